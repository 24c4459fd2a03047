"""`SlabLinear` and `FusedSlabLinear`, drop-in replacements of `nn.Linear`, and `replace_linear`."""

from .linear import FusedSlabLinear, SlabLinear
from .replacement import replace_linear

__all__ = ["FusedSlabLinear", "SlabLinear", "replace_linear"]
