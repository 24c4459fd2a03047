"""`SlabLinear` and `FusedSlabLinear`, drop-in replacements of `nn.Linear`, `replace_linear`, and
`prefetch_in_order`."""

from .fused import FusedSlabLinear
from .linear import SlabLinear
from .prefetch import prefetch_in_order
from .replacement import replace_linear

__all__ = ["FusedSlabLinear", "SlabLinear", "prefetch_in_order", "replace_linear"]
