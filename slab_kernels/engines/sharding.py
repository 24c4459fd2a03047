"""Tensor parallelism on packed tensors: which slice of each a rank keeps. Plain torch, no engine.

Column parallel layers (q, k, v; gate, up) split N, row parallel ones (o, down) split K. A slice is
a packed weight of its own, see `format.Slice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ShapeError
from ..format import PackedLayout, PackedWeight, Slice
from ..models.packed import read_packed
from ..nn import SlabLinear


def column_parallel(
    layouts: Sequence[PackedLayout], rows: Sequence[int], rank: int, world: int, replicas: int = 1
) -> list[Slice]:
    """The slices of one rank of a layer that splits its outputs, one for each of `rows`.

    Args:
        layouts: of each part; or one, of a weight that holds all parts below each other (Phi-3's
            qkv_proj).
        rows: that a rank keeps of each part.
        rank, world: number of this rank, and of all.
        replicas: ranks that share one slice of every part but the first (key and value heads, where
            they are fewer than ranks).

    Raises: ShapeError.
    """
    _check_rank(rank, world, replicas)
    if len(layouts) not in (1, len(rows)):
        raise ShapeError(
            f"{len(layouts)} packed weights cannot make the {len(rows)} parts of one layer of the "
            "engine"
        )
    copies = [1 if i == 0 else replicas for i in range(len(rows))]
    full = [size * world // copy for size, copy in zip(rows, copies, strict=True)]
    if len(layouts) == len(rows):
        first_rows, wholes, needed = [0] * len(rows), list(layouts), full
    else:
        first_rows = [sum(full[:i]) for i in range(len(rows))]
        wholes, needed = [layouts[0]] * len(rows), [sum(full)] * len(rows)
    for whole, outputs in zip(wholes, needed, strict=True):
        if outputs != whole.out_features:
            raise ShapeError(
                f"the engine splits {outputs} outputs over {world} ranks, the packed weight has "
                f"out_features={whole.out_features}"
            )
    return [
        Slice(whole, first + rank // copy * size, size, 0, whole.in_features)
        for whole, first, copy, size in zip(wholes, first_rows, copies, rows, strict=True)
    ]


def row_parallel(layout: PackedLayout, rank: int, world: int) -> Slice:
    """The slice of one rank of a layer that splits its inputs evenly.

    Raises: ShapeError naming the numbers of ranks that would do.
    """
    _check_rank(rank, world)
    K, unit = layout.in_features, layout.slice_multiple
    if world > 1 and K % (world * unit):
        fitting = ", ".join(str(n) for n in range(1, 17) if K % (n * unit) == 0 or n == 1)
        raise ShapeError(
            f"in_features={K} over {world} ranks gives no multiple of {unit} inputs a rank, which "
            f"values={layout.values!r} with group_size={layout.group_size} needs; "
            f"tensor_parallel_size may be {fitting}"
        )
    return Slice(layout, 0, layout.out_features, rank * (K // world), K // world)


def vocabulary_rows(shard: Any) -> tuple[int, int]:
    """The first row of a rank's range of the vocabulary and how many there are, without padding.

    shard: vLLM's `shard_indices`. Raises: ShapeError for rows that were added behind the model's.
    """
    if shard.added_vocab_end_index > shard.added_vocab_start_index:
        raise ShapeError(
            f"{shard.added_vocab_end_index - shard.added_vocab_start_index} rows were added to the "
            "vocabulary (LoRA), which packed heads and int8 embeddings have not"
        )
    first = shard.org_vocab_start_index
    return first, shard.org_vocab_end_index - first


def vocabulary_parallel(layout: PackedLayout, shard: Any) -> Slice:
    """The slice of one rank of an output head, whose rows are split by the vocabulary.

    Raises: ShapeError, also for a rank that has no row.
    """
    first, count = vocabulary_rows(shard)
    if not 0 <= first < first + count <= layout.out_features:
        raise ShapeError(
            f"a rank takes rows {first} to {first + count} of a head with out_features="
            f"{layout.out_features}; use fewer ranks"
        )
    return Slice(layout, first, count, 0, layout.in_features)


def _check_rank(rank: int, world: int, replicas: int = 1) -> None:
    whole = all(type(number) is int for number in (rank, world, replicas))
    if not whole or not 0 <= rank < world or replicas < 1 or world % replicas:
        what = f"rank={rank!r} of world={world!r} with replicas={replicas!r}"
        raise ShapeError(f"{what}: there is no such rank")


class LayerParts:
    """One rank's packed tensors of one layer while they arrive, one by one and in any order.

    names: of the parts, for messages. slices: what this rank keeps of each. place: puts a kept
    slice where it belongs.
    """

    def __init__(
        self,
        names: Sequence[str],
        slices: Sequence[Slice],
        place: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        self.names, self.slices, self.place = list(names), list(slices), place
        self.tensors: list[dict[str, Tensor]] = [{} for _ in slices]

    @property
    def tensor_names(self) -> list[str]:
        """Every tensor that a part of this layer has."""
        return list(dict.fromkeys(name for s in self.slices for name in s.layout.tensors()))

    def load(self, name: str, tensor: Tensor, part: int | None = None) -> None:
        """Keep this rank's slice of the tensor `name`.

        part: the one that it belongs to; None: a weight that holds all parts below each other.

        Raises: CheckpointError for a tensor that the part has not, or of another shape or dtype.
        """
        for i in range(len(self.slices)) if part is None else (part,):
            table = self.slices[i].whole.tensors()
            if name not in table:
                raise CheckpointError(
                    f"{self.names[i]} holds the unexpected tensor {name!r}; it does not belong to "
                    "its config.json"
                )
            dtype, shape = table[name]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise CheckpointError(
                    f"{self.names[i]}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"config.json says {dtype} {list(shape)}"
                )
            self.tensors[i][name] = self.place(self.slices[i].narrow(name, tensor).clone())

    def fill(self) -> None:
        """Make every part zero, for an engine that measures without a checkpoint."""
        for piece, found in zip(self.slices, self.tensors, strict=True):
            for name, tensor in SlabLinear(piece.layout).packed().tensors().items():
                found[name] = self.place(torch.ones_like(tensor) if name == "scales" else tensor)

    def packed(self) -> list[PackedWeight]:
        """Every part, checked to the last nibble.

        Raises: CheckpointError if a tensor did not come, FormatError if one is damaged.
        """
        parts = []
        for name, piece, found in zip(self.names, self.slices, self.tensors, strict=True):
            if missing := sorted(piece.layout.tensors().keys() - found.keys()):
                raise CheckpointError(
                    f"the checkpoint lacks tensor '{name}.{missing[0]}'; it does not belong to its "
                    "config.json"
                )
            full_names = {f"{name}.{tensor}": t for tensor, t in found.items()}
            parts.append(read_packed(full_names.__getitem__, name, piece.layout))
        return parts
