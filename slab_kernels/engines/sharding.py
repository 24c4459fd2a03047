"""Tensor parallelism on packed tensors: which slice of each a rank keeps. Plain torch, no engine.

Column parallel layers (q, k, v; gate, up) split N, row parallel ones (o, down) split K. A slice is a
packed weight of its own: see `format.Slice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, ShapeError
from ..format import PackedLayout, PackedWeight, Slice
from ..models.packed import read_packed
from ..nn import SlabLinear


def cut(part: Slice, name: str, tensor: Tensor) -> Tensor:
    """A copy of the slice's part of the packed tensor called `name`.

    Raises: CheckpointError if the whole has another shape or dtype.
    """
    dtype, shape = part.whole.tensors()[name]
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise CheckpointError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, config.json says {dtype} {list(shape)}"
        )
    return part.narrow(name, tensor).clone()


def column_parallel(
    layouts: Sequence[PackedLayout], rows: Sequence[int], rank: int, world: int, replicas: int = 1
) -> list[Slice]:
    """The slices of one rank of a layer that splits its outputs, one for each of `rows`.

    Args:
        layouts: of each part; or one, of a weight that holds all parts below each other (Phi-3's qkv_proj).
        rows: that a rank keeps of each part.
        replicas: ranks that share one slice of every part but the first (key and value heads, where they are fewer than ranks).

    Raises: ShapeError.
    """
    _check_rank(rank, world, replicas)
    if len(layouts) not in (1, len(rows)):
        raise ShapeError(
            f"{len(layouts)} packed weights cannot make the {len(rows)} parts of one layer of the engine"
        )
    slices, first = [], 0
    for i, size in enumerate(rows):
        layout = layouts[i] if len(layouts) == len(rows) else layouts[0]
        copies = replicas if i else 1
        full = size * world // copies
        if len(layouts) == len(rows):
            first = 0
        if full + first > layout.out_features or (
            len(layouts) == len(rows) and full != layout.out_features
        ):
            raise ShapeError(
                f"the engine splits {full} outputs over {world} ranks, the packed weight has out_features={layout.out_features}"
            )
        slices.append(Slice(layout, first + rank // copies * size, size, 0, layout.in_features))
        first += full
    if len(layouts) < len(rows) and first != layouts[0].out_features:
        raise ShapeError(
            f"the engine splits {first} outputs over {world} ranks, the packed weight has out_features={layouts[0].out_features}"
        )
    return slices


def row_parallel(layout: PackedLayout, rank: int, world: int) -> Slice:
    """The slice of one rank of a layer that splits its inputs evenly. Raises: ShapeError naming the worlds that would do."""
    _check_rank(rank, world)
    K, unit = layout.in_features, layout.slice_multiple
    if world > 1 and K % (world * unit):
        fitting = ", ".join(str(n) for n in range(1, 17) if K % (n * unit) == 0 or n == 1)
        raise ShapeError(
            f"in_features={K} over {world} ranks gives no multiple of {unit} inputs a rank, which values={layout.values!r} with "
            f"group_size={layout.group_size} needs; tensor_parallel_size may be {fitting}"
        )
    return Slice(layout, 0, layout.out_features, rank * (K // world), K // world)


def _check_rank(rank: int, world: int, replicas: int = 1) -> None:
    whole = all(type(number) is int for number in (rank, world, replicas))
    if not whole or not 0 <= rank < world or replicas < 1 or world % replicas:
        what = f"rank={rank!r} of world={world!r} with replicas={replicas!r}"
        raise ShapeError(f"{what}: there is no such rank")


class Shards:
    """The packed tensors of one layer of an engine while they arrive, one by one and in any order."""

    def __init__(
        self,
        names: Sequence[str],
        slices: Sequence[Slice],
        place: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        """names: of the parts, for messages; place: where a kept slice goes."""
        self.names, self.slices, self.place = list(names), list(slices), place
        self.tensors: list[dict[str, Tensor]] = [{} for _ in slices]

    @property
    def tensor_names(self) -> list[str]:
        """Every tensor that a part of this layer has."""
        return list(dict.fromkeys(name for s in self.slices for name in s.layout.tensors()))

    def load(self, name: str, tensor: Tensor, part: int | None = None) -> None:
        """Keep this rank's slice of one part, or, with None, of all of them (a weight that holds them below each other).

        Raises: CheckpointError for a tensor that the part has not, or of another shape or dtype.
        """
        for i in range(len(self.slices)) if part is None else (part,):
            if name not in self.slices[i].whole.tensors():
                raise CheckpointError(
                    f"{self.names[i]} holds the unexpected tensor {name!r}; it does not belong to its config.json"
                )
            try:
                self.tensors[i][name] = self.place(cut(self.slices[i], name, tensor))
            except CheckpointError as error:
                raise CheckpointError(f"{self.names[i]}: {error}") from error

    def fill(self) -> None:
        """Make every part zero, for an engine that measures without a checkpoint."""
        for piece, found in zip(self.slices, self.tensors, strict=True):
            for name, tensor in SlabLinear(piece.layout).packed().tensors().items():
                found[name] = self.place(torch.ones_like(tensor) if name == "scales" else tensor)

    def packed(self) -> list[PackedWeight]:
        """Every part, checked to the last nibble. Raises: CheckpointError if a tensor did not come, FormatError if one is damaged."""

        parts = []
        for name, piece, found in zip(self.names, self.slices, self.tensors, strict=True):
            if missing := sorted(piece.layout.tensors().keys() - found.keys()):
                raise CheckpointError(
                    f"the checkpoint lacks tensor '{name}.{missing[0]}'; it does not belong to its config.json"
                )
            parts.append(
                read_packed(
                    lambda tensor, found=found: found[tensor.rpartition(".")[2]], name, piece.layout
                )
            )
        return parts
