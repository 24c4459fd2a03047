"""What to do with every linear: the method and its settings, for all layers or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import FormatError
from ..format import (
    INTEGER_RANGES,
    Decomposition,
    PackedLayout,
    PackedWeight,
    cast,
    pack,
    unpack,
)
from ..methods import COMMON, METHODS, check_settings, check_shape, decompose
from ..methods.inputs import InputStats
from ..methods.solvers.masks import parse_pattern
from .matching import Matching

PACKABLE = ("2:4",)


@dataclass(frozen=True)
class Plan:
    """Settings of `methods.decompose`, and what follows it. Raises on construction: ValueError or a FormatError.

    matching: transformer matching after the method, in any form that `Matching.of` takes.
    layers: module name -> settings that differ for that layer.
    """

    method: str = "slab"
    pattern: str = "2:4"
    rank: int = 1
    values: str = "fp16"
    group_size: int | None = 128
    planes: int = 1
    adapter_rank: int | None = None
    adapter_values: str = "int8"
    options: dict = field(default_factory=dict)
    matching: Matching | None = None
    layers: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        config = check_settings(
            self.method, self.pattern, self.rank, self.values, self.group_size, self.planes, self.adapter_rank, self.adapter_values,
            self.options,
        )  # fmt: skip
        plain = {name: getattr(config, name) for name in COMMON if getattr(self, name) is not None}
        plain["options"] = {name: getattr(config, name) for name in self.options}
        plain["matching"] = Matching.of(self.matching)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        for name in self.layers:
            self.layer(name)

    def layer(self, name: str) -> Plan:
        """The plan of one layer."""
        own = self.layers.get(name)
        return replace(self, layers={}, **own) if own else self

    @property
    def stored_group_size(self) -> int | None:
        return self.group_size if self.values in INTEGER_RANGES else None

    @property
    def stored_adapter(self) -> str | None:
        return None if self.adapter_values == "fp16" else self.adapter_values

    @property
    def packed(self) -> bool:
        return self.pattern in PACKABLE

    @property
    def needs_gram(self) -> bool:
        return METHODS[self.method].statistics == "gram"

    @property
    def drift(self) -> bool:
        """Whether the method takes the drift from the dense model into account (its setting `drift` is not 0)."""
        return bool(self.options.get("drift", getattr(METHODS[self.method].config, "drift", 0)))

    @property
    def dense_stream(self) -> bool:
        """Whether the dense model's hidden states are wanted beside those of the compressed prefix."""
        return self.drift or (self.matching is not None and self.matching.target == "dense")

    @property
    def group(self) -> int:
        """Inputs that belong together: the m of n:m."""
        return parse_pattern(self.pattern).group or 1

    def check_shapes(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Refuse a plan that some layer cannot have.

        shapes: module name -> (N, K). Raises: a FormatError that names the layer.
        """
        for name, shape in shapes.items():
            own = self.layer(name)
            method, given = METHODS[own.method], own.adapter_rank
            config = check_settings(
                own.method,
                own.pattern,
                own.rank,
                own.values,
                own.group_size,
                own.planes,
                given,
                own.adapter_values,
                own.options,
            )
            try:
                check_shape(config, method, shape, given)
                if own.packed:
                    own.layout(shape)
            except FormatError as error:
                raise type(error)(f"{name}: {error}") from error

    def decompose(self, weight: Tensor, stats: InputStats) -> Decomposition:
        """weight [N,K] fp32 -> the numbers that will be stored."""
        return self.as_stored(
            decompose(
                weight, stats, method=self.method, pattern=self.pattern, rank=self.rank, values=self.values,
                group_size=self.stored_group_size, planes=self.planes, adapter_rank=self.adapter_rank, adapter_values=self.adapter_values,
                **self.options,
            )
        )  # fmt: skip

    def pack(self, decomposition: Decomposition) -> PackedWeight:
        return pack(
            decomposition, self.values, self.stored_group_size, adapter_values=self.stored_adapter
        )

    def as_stored(self, decomposition: Decomposition) -> Decomposition:
        """What packing leaves of a decomposition; patterns that are not packed are stored as dense weights."""
        return unpack(self.pack(decomposition)) if self.packed else decomposition

    def store(
        self, name: str, decomposition: Decomposition, dtype: torch.dtype
    ) -> PackedWeight | Tensor:
        """Packed, or dense in `dtype`.

        Raises: RangeError naming the module if a number does not fit.
        """
        if not self.packed:
            return cast(decomposition.dense(), dtype, f"{name}.weight")
        return self.pack(decomposition)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        """Of a packed weight of `shape` (N, K) made by this plan."""
        method = METHODS[self.method]
        rank = self.rank if method.signs else 0
        adapter = method.adapter_rank(shape, self.adapter_rank)
        return PackedLayout(
            *shape,
            self.values,
            self.stored_group_size,
            rank,
            adapter,
            planes=self.planes,
            adapter_values=self.stored_adapter,
        )
