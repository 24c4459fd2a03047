"""What to do with every linear: its settings, for all layers or layer by layer, and matching."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, MethodError
from ..format import Decomposition, PackedWeight, cast, pack, unpack
from ..methods import LayerSettings, decompose_layer
from ..methods.inputs import InputStats
from .by_pattern import ByPattern
from .matching import Matching


@dataclass(frozen=True)
class Plan:
    """Settings of every layer, and what follows the method.

    usual: the settings of a layer that has none of its own.
    matching: transformer matching after the method.
    layers: module name -> the settings in which that layer differs from `usual`.
    by_pattern: the same by patterns of module names.

    Raises on construction: MethodError or a FormatError, for settings of a single layer.
    """

    usual: LayerSettings = field(default_factory=LayerSettings)
    matching: Matching | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_pattern: ByPattern = field(default_factory=ByPattern)

    def __post_init__(self) -> None:
        for name in self.layers:
            self.layer(name)

    def layer(self, name: str) -> LayerSettings:
        """The settings of one layer."""
        own = self.own(name)
        return replace(self.usual, **own) if own else self.usual

    def own(self, name: str) -> dict[str, Any]:
        """The settings in which one layer differs from `usual`."""
        return self.by_pattern.own(name) | self.layers.get(name, {})

    @property
    def dense_stream(self) -> bool:
        """Whether the dense model's hidden states are wanted beside the compressed prefix's."""
        return self.usual.drift or self.dense_target

    @property
    def dense_target(self) -> bool:
        """Whether matching learns what the dense model puts out."""
        return self.matching is not None and self.matching.target == "dense"

    def check_shapes(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Refuse a plan that some layer cannot have.

        shapes: module name -> (N, K). Raises: a FormatError or MethodError that names the layer.
        """
        for name, shape in shapes.items():
            try:
                settings = self.layer(name)
                settings.config(shape)
                if settings.packed:
                    settings.layout(shape)
            except (FormatError, MethodError) as error:
                raise type(error)(f"{name}: {error}") from error


def decompose_as_stored(
    weight: Tensor, stats: InputStats, settings: LayerSettings
) -> Decomposition:
    """weight [N,K] fp32 -> the numbers that will be stored. Raises: as `methods.decompose`."""
    return as_stored(decompose_layer(weight, stats, settings), settings)


def as_stored(decomposition: Decomposition, settings: LayerSettings) -> Decomposition:
    """What packing leaves of a decomposition; one that is stored as a dense weight stays."""
    return unpack(_packed(decomposition, settings)) if settings.packed else decomposition


def store(
    name: str, decomposition: Decomposition, settings: LayerSettings, dtype: torch.dtype
) -> PackedWeight | Tensor:
    """What is written of a layer: a packed weight, or a dense one [N,K] in `dtype`.

    Raises: RangeError naming the module if a number does not fit.
    """
    if not settings.packed:
        return cast(decomposition.dense(), dtype, f"{name}.weight")
    return _packed(decomposition, settings)


def _packed(decomposition: Decomposition, settings: LayerSettings) -> PackedWeight:
    shape = (decomposition.out_features, decomposition.in_features)
    return pack(
        decomposition,
        settings.values,
        settings.for_shape(shape).stored_group_size,
        adapter_values=settings.stored_adapter,
    )
