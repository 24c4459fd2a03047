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
from .routing import Feeding, in_waves


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


def moments(passes: Passes, groups: list[Group]) -> list[InputStats]:
    """Statistics of the inputs of each group in one text."""
    found = [InputStats(passes.linears[group.names[0]].in_features) for group in groups]
    for batch in passes.batches:
        for stats, x in zip(found, passes.inputs(groups, batch), strict=True):
            stats.update(x)
    return found


def _moments_and_shift(
    passes: Passes, dense: DensePasses, groups: list[Group]
) -> list[tuple[InputStats, Tensor | None]]:
    """`GroupInputs.stats` and `.moved` of the text whose way through the dense block is `dense`."""
    widths = [passes.linears[group.names[0]].in_features for group in groups]
    found = [InputStats(K) for K in widths]
    moved: list[Tensor | None] = [torch.zeros(K, K, device=passes.stream.device) for K in widths]
    for batch in passes.batches:
        read = zip(passes.inputs(groups, batch), dense.inputs(groups, batch), strict=True)
        for number, (x, other) in enumerate(read):
            found[number].update(x)
            if (before := moved[number]) is not None:
                # In a list of experts, one may get other tokens in the dense model; the two cannot
                # be compared then.
                same = other.shape == x.shape
                cross = _cross(other, x, passes.stream.products) if same else None
                moved[number] = None if cross is None else before + cross
    return [
        (stats, None if shift is None or not bool(shift.any()) else shift / stats.tokens)
        for stats, shift in zip(found, moved, strict=True)
    ]


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
    text through the dense twin. feeding: who of the block's experts sees all tokens.
    """

    calibration: Passes
    held_back: Passes | None
    heldout: Passes | None
    dense: DensePasses | None
    feeding: Feeding

    def inputs(self, groups: list[Group]) -> list[GroupInputs]:
        """Run the texts up to the last of these groups, and gather what methods and records need.

        An expert that turns out to have got fewer tokens than its method needs is fed all of them:
        the router sees what the compressed layers before it make of the text.
        """
        found = self._gather(groups)
        for number, group in enumerate(groups):
            needed = self.feeding.needed(group.names)
            if found[number].stats.tokens < needed and self.feeding.feed(group.names):
                (found[number],) = self._gather([group])
        return found

    def _gather(self, groups: list[Group]) -> list[GroupInputs]:
        began = time.perf_counter()
        found = self._fitted(groups)
        if self.held_back is not None:
            judging = moments(self.held_back, groups)
            found = [
                (replace(stats, held_back=judge.gram), moved)
                for (stats, moved), judge in zip(found, judging, strict=True)
            ]
        heldout: list[InputStats | None] = [None] * len(groups)
        if self.heldout is not None:
            heldout = [*moments(self.heldout, groups)]
        seconds = (time.perf_counter() - began) / sum(len(group.names) for group in groups)
        return [
            GroupInputs(stats, text, moved, seconds)
            for (stats, moved), text in zip(found, heldout, strict=True)
        ]

    def _fitted(self, groups: list[Group]) -> list[tuple[InputStats, Tensor | None]]:
        """`GroupInputs.stats` and `.moved`; the latter where the dense text can be compared."""
        compared = [] if self.dense is None else [g for g in groups if self._is_compared(g)]
        others = [group for group in groups if group not in compared]
        found: dict[Group, tuple[InputStats, Tensor | None]] = {}
        if compared and self.dense is not None:
            both = _moments_and_shift(self.calibration, self.dense, compared)
            found |= zip(compared, both, strict=True)
        if others:
            alone = moments(self.calibration, others)
            found |= {group: (stats, None) for group, stats in zip(others, alone, strict=True)}
        return [found[group] for group in groups]

    def _is_compared(self, group: Group) -> bool:
        """Whether its linears read the same tokens in the dense model.

        The router of the dense model sends an expert others.
        """
        return not self.feeding.routed.issuperset(group.names)

    def each(self, act: Callable[[Passes], None]) -> None:
        """Do something to every text's passes through the compressed block."""
        for passes in (self.calibration, self.held_back, self.heldout):
            if passes is not None:
                act(passes)

    def end_feeding(self) -> None:
        """From now on every expert sees the tokens that its router sends it, and no others."""
        called = self.feeding.end()
        self.each(lambda passes: passes.forget_modules(called))

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
        feeding: Feeding,
    ) -> tuple[list[list[Group]], BlockPasses]:
        """The groups of a block's linears, in lists that one pass serves, and passes up to them.

        linears: full name -> linear, of those that are compressed. prefix: of their names. feeding:
        of the block's experts.

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
            compared = [g for g in groups if not feeding.routed.issuperset(g.names)]
            dense = DensePasses(self.dense, index, dense_block, twins, compared, Room.on(device))
        self._inside = BlockPasses(
            passes(self.calibration),
            None if self.held_back is None else passes(self.held_back),
            None if self.heldout is None else passes(self.heldout),
            dense,
            feeding,
        )
        tokens = max(hidden.shape[:-1].numel() for hidden in self.calibration.hidden)
        texts = 1 + sum(
            text is not None for text in (self.held_back, self.heldout, self._inside.dense)
        )
        space = Room.on(device).bytes // texts
        waves = in_waves(groups, linears, feeding.stages, tokens, space)
        return waves, self._inside

    def forget(self) -> None:
        """Keep no outputs of the block's modules, as its weights will change after all."""
        if self._inside is not None:
            self._inside.end_feeding()
            self._inside.each(Passes.forget)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, dense_block: nn.Module | None) -> None:
        """Lead every text through block `index`, the dense ones through its dense twin."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.end_feeding()
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
