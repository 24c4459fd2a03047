"""What it costs that the inputs of some weights are padded, and how people are told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .layout import PackedLayout


@dataclass(frozen=True)
class Padding:
    """The weights of a model that are padded alike.

    layers: how many. in_features, padded_in_features: K and Kp. group_size: as of their layout.
    bits_per_weight: what padding adds, over these weights.
    """

    layers: int
    in_features: int
    padded_in_features: int
    group_size: int | None
    bits_per_weight: float

    def __str__(self) -> str:
        groups = f" for groups of {self.group_size}" if self.group_size else ""
        return (
            f"{self.layers} {'layer' if self.layers == 1 else 'layers'} with K={self.in_features} "
            f"to {self.padded_in_features}{groups}, {self.bits_per_weight:.3f} bits per weight"
        )


def paddings(layouts: Iterable[PackedLayout]) -> list[Padding]:
    """One Padding for each K and group size that is padded, the smallest K first."""
    alike: dict[tuple[int, int, int | None], list[PackedLayout]] = {}
    for layout in layouts:
        if layout.padded_in_features > layout.in_features:
            key = (layout.in_features, layout.padded_in_features, layout.group_size)
            alike.setdefault(key, []).append(layout)
    found = []
    for (K, Kp, size), group in sorted(alike.items(), key=lambda item: item[0][:2]):
        weights = [layout.out_features * K for layout in group]
        bits = math.fsum(
            layout.padding_bits_per_weight() * count
            for layout, count in zip(group, weights, strict=True)
        )
        found.append(Padding(len(group), K, Kp, size, bits / sum(weights)))
    return found
