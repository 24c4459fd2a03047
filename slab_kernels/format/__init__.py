"""The waist of the library: methods end in a `Decomposition`, kernels start from a `PackedWeight`.

`layout` has sizes and types, `bits` the bytes, `weight` the two records, `packing` the way from one
to the other, `rounding` what stored types lose, `padding` what padded inputs cost, `slicing` parts
of a weight, `check` the test of what is read from outside, `table` an embedding as int8 rows.
"""

from .layout import (
    AUTO,
    FORMAT_VERSION,
    GROUP_SIZES,
    INTEGER_RANGES,
    MAX_PLANES,
    TENSOR_NAMES,
    VALUE_ENTRIES,
    VALUE_TYPES,
    PackedLayout,
    ceil_div,
    fitting_group_size,
    plane_unit,
)
from .packing import pack, pack_adapter, with_adapter
from .padding import Padding, paddings
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
from .table import TABLE_NAMES, Int8Table, check_table, int8_table, table_tensors
from .weight import Decomposition, PackedWeight, read_factors, unpack

__all__ = [
    "AUTO",
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "INTEGER_RANGES",
    "MAX_PLANES",
    "MOST_LOST",
    "TABLE_NAMES",
    "TENSOR_NAMES",
    "VALUE_ENTRIES",
    "VALUE_TYPES",
    "WEIGHT_DTYPES",
    "Decomposition",
    "Int8Table",
    "PackedLayout",
    "PackedWeight",
    "Padding",
    "Slice",
    "cast",
    "ceil_div",
    "check_table",
    "fitting_group_size",
    "int8_table",
    "pack",
    "pack_adapter",
    "paddings",
    "plane_unit",
    "read_factors",
    "round_adapter",
    "round_factors",
    "rounding_error",
    "table_tensors",
    "unpack",
    "weight_dtype",
    "with_adapter",
]
