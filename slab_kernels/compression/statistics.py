"""The texts of a run on their way through the blocks, and statistics of what linears read there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..methods.inputs import InputStats
from ..models.groups import Group, find_groups
from ..models.passes import DensePasses, Passes, Room, may_replay
from ..models.streams import Stream, kind_of


class GroupInputs(NamedTuple):
    """What is known of the input x of a group of linears.

    stats: on the windows that layers are fitted to, with the Gram matrix of those held back.
    heldout: on the held-out text; None without one.
    moved: the mean over tokens of (x_dense - x) x^T, [K,K] fp32; None where the two are equal or
        not known. A layer W puts out W x_dense in the dense model, so the mean of its drift
        (y_dense - W x) x^T is W @ moved.
    seconds: the time that the statistics took, per linear of the group.
    """

    stats: InputStats
    heldout: InputStats | None
    moved: Tensor | None
    seconds: float

    @property
    def judging(self) -> Tensor | None:
        """The Gram matrix [K,K] by which layers are judged; None where no text is left for it."""
        return self.stats.held_back if self.heldout is None else self.heldout.gram


def moments(passes: Passes, group: Group) -> InputStats:
    """Statistics of the inputs of one text."""
    stats = InputStats(passes.linears[group.names[0]].in_features)
    for batch in passes.batches:
        stats.update(passes.inputs(group, batch))
    return stats


def _moments_and_shift(
    passes: Passes, dense: DensePasses, group: Group
) -> tuple[InputStats, Tensor | None]:
    """`GroupInputs.stats` and `.moved` of the text whose way through the dense block is `dense`."""
    K = passes.linears[group.names[0]].in_features
    stats = InputStats(K)
    moved: Tensor | None = torch.zeros(K, K, device=passes.stream.device)
    for batch in passes.batches:
        x = passes.inputs(group, batch)
        stats.update(x)
        other = dense.inputs(group, batch)
        if moved is not None:
            # An expert may get other tokens in the dense model; the two cannot be compared then.
            same = other.shape == x.shape
            moved = moved + _cross(other, x, passes.stream.products) if same else None
    if moved is None or not bool(moved.any()):
        return stats, None
    return stats, moved / stats.tokens


def _cross(other: Tensor, x: Tensor, products: torch.dtype | None) -> Tensor:
    """(other - x)^T x of one batch [tokens, K], fp32 [K,K].

    products: the type in which it is multiplied. Rounding adds less to it than its being a sample:
    it is a mean of numbers of either sign, which the tokens at hand hit less exactly than bf16.
    """
    difference, x = other.float() - x.float(), x.float()
    if products is not None:
        difference, x = difference.to(products), x.to(products)
    return (difference.T @ x).float()


@dataclass
class BlockPasses:
    """The texts of a run inside one block.

    calibration, held_back, heldout: through the block that is compressed. dense: the calibration
    text through the dense twin.
    """

    calibration: Passes
    held_back: Passes | None
    heldout: Passes | None
    dense: DensePasses | None

    def inputs(self, group: Group) -> GroupInputs:
        """Run the texts up to a group of linears, and gather what methods and records need."""
        began = time.perf_counter()
        if self.dense is None:
            stats, moved = moments(self.calibration, group), None
        else:
            stats, moved = _moments_and_shift(self.calibration, self.dense, group)
        if self.held_back is not None:
            stats = replace(stats, held_back=moments(self.held_back, group).gram)
        heldout = None if self.heldout is None else moments(self.heldout, group)
        seconds = (time.perf_counter() - began) / len(group.names)
        return GroupInputs(stats, heldout, moved, seconds)

    def each(self, act: Callable[[Passes], None]) -> None:
        """Do something to every text's passes through the compressed block."""
        for passes in (self.calibration, self.held_back, self.heldout):
            if passes is not None:
                act(passes)

    def finish(self, names: tuple[str, ...]) -> None:
        """These linears have their final weights from now on."""
        self.each(lambda passes: passes.finish(names))


@dataclass
class Streams:
    """The texts of a run on their way through the blocks.

    calibration: hidden states of the compressed prefix, of the windows that layers are fitted to.
    held_back, heldout: of the calibration windows that judge, and of the held-out text; None where
        there are none.
    dense, dense_held_back: calibration and held_back in the dense model; None where nobody asks.
    """

    calibration: Stream
    held_back: Stream | None
    heldout: Stream | None
    dense: Stream | None
    dense_held_back: Stream | None
    _inside: BlockPasses | None = None  # of the block at whose input the streams are
    # kind of block and its linears -> `may_replay`
    _replay: dict[tuple, bool] = field(default_factory=dict)

    @torch.no_grad()
    def enter(
        self,
        index: int,
        block: nn.Module,
        dense_block: nn.Module | None,
        linears: dict[str, nn.Linear],
        prefix: str,
    ) -> tuple[list[Group], BlockPasses]:
        """The groups of a block's linears, and passes up to each of them.

        linears: full name -> linear, of those that are compressed. prefix: of their names.

        Raises: CalibrationError.
        """
        device = self.calibration.device
        groups = find_groups(self.calibration, index, block, linears)
        # Which modules take part in replay depends on the linears, of which some may be skipped.
        kind = kind_of(block), tuple(name.removeprefix(prefix) for name in linears)
        if kind not in self._replay:
            self._replay[kind] = may_replay(self.calibration, index, block, linears)
        room = Room.on(device) if self._replay[kind] else Room(0)

        def passes(stream: Stream) -> Passes:
            return Passes(stream, index, block, linears, room)

        dense = None
        if self.dense is not None and dense_block is not None:
            twins: dict[str, nn.Linear] = {}
            for name in linears:
                twin = dense_block.get_submodule(name.removeprefix(prefix))
                assert isinstance(twin, nn.Linear)
                twins[name] = twin
            dense = DensePasses(self.dense, index, dense_block, twins, groups, Room.on(device))
        self._inside = BlockPasses(
            passes(self.calibration),
            None if self.held_back is None else passes(self.held_back),
            None if self.heldout is None else passes(self.heldout),
            dense,
        )
        return groups, self._inside

    def forget(self) -> None:
        """Keep no outputs of the block's modules, as its weights have changed after all."""
        if self._inside is not None:
            self._inside.each(Passes.forget)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, dense_block: nn.Module | None) -> None:
        """Lead every text through block `index`, the dense ones through its dense twin."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.each(Passes.advance)
        else:
            for stream in (self.calibration, self.held_back, self.heldout):
                if stream is not None:
                    stream.advance(index, block)
        if dense_block is None:
            return
        if inside is not None and inside.dense is not None:
            inside.dense.advance()
        elif self.dense is not None:
            self.dense.advance(index, dense_block)
        if self.dense_held_back is not None:
            self.dense_held_back.advance(index, dense_block)
