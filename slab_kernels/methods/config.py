"""The settings that every method has, each with its rule."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import MethodError, ShapeError, ValueTypeError
from ..format import AUTO, INTEGER_RANGES, VALUE_TYPES
from ..settings import enforce, setting
from .solvers.masks import Pattern, parse_pattern
from .solvers.quantize import Grid


@dataclass(frozen=True)
class CommonSettings:
    """What is kept of a weight, and how its parts are stored.

    group_size: "auto" stands for the size that fits the weight's inputs.
    adapter_rank: None stands for the method's own rank, which depends on the weight's shape.
    """

    pattern: str = setting(
        "2:4", "'n:m' keeps n of every m inputs, 'p%' removes p percent of every row", kind=str
    )
    rank: int = setting(1, "rank of U V^T in the sign term", 0, error=ShapeError)
    values: str = setting(
        "fp16", "type of the kept values", choices=tuple(VALUE_TYPES), error=ValueTypeError
    )
    group_size: int | str | None = setting(
        AUTO,
        "inputs that share a scale",
        1,
        kind=int,
        words=(AUTO,),
        optional=True,
        error=ShapeError,
    )
    planes: int = setting(1, "signs of a pruned entry", 1, error=ShapeError)
    adapter_rank: int | None = setting(
        None, "rank of the adapter P Q^T", 0, kind=int, optional=True, error=ShapeError
    )
    adapter_values: str = setting(
        "int8",
        "how P and Q are stored: int8 has one exponent per row",
        choices=("int8", "fp16"),
        error=ValueTypeError,
    )

    @property
    def parsed(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def stored_adapter(self) -> str | None:
        """`adapter_values` in the form that `format.round_adapter` takes: None for fp16."""
        return None if self.adapter_values == "fp16" else self.adapter_values


@dataclass(frozen=True)
class Config(CommonSettings):
    """What a method is called with; methods with options of their own extend it.

    Raises on construction: MethodError, or a FormatError for the settings that all methods share.
    """

    group_size: int | None = setting(
        128, "inputs that share a scale", 1, kind=int, optional=True, error=ShapeError
    )
    adapter_rank: int = setting(0, "rank of the adapter P Q^T", 0, error=ShapeError)

    def __post_init__(self):
        parse_pattern(self.pattern)
        enforce(self, MethodError)

    @property
    def grid(self) -> Grid | None:
        return Grid(self.values, self.group_size) if self.values in INTEGER_RANGES else None


COMMON = tuple(field.name for field in fields(CommonSettings))
