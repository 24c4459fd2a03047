"""`SlabLinear` and `FusedSlabLinear`, drop-in replacements of `nn.Linear`; `Int8Embedding` and
`Int8Head`, which share one table; `replace_linear`, `prepare` and `prefetch_in_order` of whole
models."""

from .embedding import Int8Embedding, Int8Head
from .fused import FusedSlabLinear
from .linear import SlabLinear
from .prefetch import prefetch_in_order
from .preparation import prepare
from .replacement import replace_linear

__all__ = [
    "FusedSlabLinear",
    "Int8Embedding",
    "Int8Head",
    "SlabLinear",
    "prefetch_in_order",
    "prepare",
    "replace_linear",
]
