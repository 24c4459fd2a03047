"""`SlabLinear` and `FusedSlabLinear`, drop-in replacements of `nn.Linear`; `replace_linear`,
`prepare` and `prefetch_in_order` of whole models."""

from .fused import FusedSlabLinear
from .linear import SlabLinear
from .prefetch import prefetch_in_order
from .preparation import prepare
from .replacement import replace_linear

__all__ = ["FusedSlabLinear", "SlabLinear", "prefetch_in_order", "prepare", "replace_linear"]
