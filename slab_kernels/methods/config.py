"""What every method's settings have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ..format import INTEGER_RANGES
from .masks import Pattern, parse_pattern
from .sweep import Grid


@dataclass(frozen=True)
class Config:
    """pattern: "n:m" or "p%".  rank, planes: of the sign term (U V^T) * B.  adapter_rank: of P Q^T, adapter_values: how it is stored, "int8" (an exponent a row) or "fp16".
    values, group_size: type of the kept values, inputs a scale.
    """

    pattern: str = "2:4"
    rank: int = 1
    values: str = "fp16"
    group_size: int | None = 128
    planes: int = 1
    adapter_rank: int = 0
    adapter_values: str = "int8"

    @property
    def parsed(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def stored_adapter(self) -> str | None:
        """As `format.round_adapter` takes it."""
        return None if self.adapter_values == "fp16" else self.adapter_values

    @property
    def grid(self) -> Grid | None:
        return Grid(self.values, self.group_size) if self.values in INTEGER_RANGES else None
