"""The waist of the library: methods end in a `Decomposition`, kernels start from a `PackedWeight`.

`layout` has sizes and types, `bits` the bytes, `weight` the two records, `packing` the way from one
to the other, `slicing` parts of a weight, `check` what is read from outside.
"""

from ..errors import (
    DtypeError,
    FormatError,
    MetadataError,
    MissingTensorError,
    PaddingError,
    PatternError,
    RangeError,
    ShapeError,
    UnknownTensorError,
    ValueTypeError,
    VersionError,
)
from .check import check_tensors
from .layout import (
    FACTOR_TYPES,
    FORMAT_VERSION,
    GROUP_SIZES,
    INTEGER_RANGES,
    MAX_FEATURES,
    MAX_PLANES,
    TENSOR_NAMES,
    VALUE_BYTES,
    VALUE_TYPES,
    PackedLayout,
    ceil_div,
    plane_unit,
)
from .packing import pack, pack_adapter
from .rounding import (
    MOST_LOST,
    WEIGHT_DTYPES,
    cast,
    round_adapter,
    round_factors,
    rounding_error,
    weight_dtype,
)
from .slicing import Slice
from .weight import Decomposition, PackedWeight, read_factors, unpack

__all__ = [
    "FACTOR_TYPES",
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "INTEGER_RANGES",
    "MAX_FEATURES",
    "MAX_PLANES",
    "MOST_LOST",
    "TENSOR_NAMES",
    "VALUE_BYTES",
    "VALUE_TYPES",
    "WEIGHT_DTYPES",
    "Decomposition",
    "DtypeError",
    "FormatError",
    "MetadataError",
    "MissingTensorError",
    "PackedLayout",
    "PackedWeight",
    "PaddingError",
    "PatternError",
    "RangeError",
    "ShapeError",
    "Slice",
    "UnknownTensorError",
    "ValueTypeError",
    "VersionError",
    "cast",
    "ceil_div",
    "check_tensors",
    "pack",
    "pack_adapter",
    "plane_unit",
    "read_factors",
    "round_adapter",
    "round_factors",
    "rounding_error",
    "unpack",
    "weight_dtype",
]
