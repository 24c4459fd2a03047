"""The Hopper kernels for many tokens (csrc/cuda/prefill.cu) as plans: their tiles, their rings, and
how tiles and K blocks are dealt to persistent CTAs.

There are three kinds:

one      no sign term: kept pairs by sparse `wgmma`
both     one plane of signs of rank 1: those by a second sparse `wgmma` against v * x
rebuild  any sign term: the weight is rebuilt in registers for dense `wgmma`

A cluster (one CTA, or a pair along rows that shares x) takes tiles whole, one after another. The
tiles that are left, fewer than clusters, may be dealt by their K blocks: each cluster takes an even
share, of at most two tiles. Whatever is no whole tile goes to a slot of `partial`, and the
reducing kernel adds the slots in the order of K. There are no flags and no atomics, and who takes
what is arithmetic on sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ...format import ceil_div
from . import prefill_cost
from .cost import OVERLAP, in_words
from .gpus import Gpu
from .layout import BLOCK_ROWS, DENSE
from .measured import PrefillRow
from .tiles import FEW, CudaSizes
from .unknowns import BEST, assumed

CAPABILITY = (9, 0)  # exactly: wgmma is of no other
ONE, BOTH, REBUILD = KINDS = ("one", "both", "rebuild")
BAND = 8  # token tiles side by side; kBand of csrc/cuda/params.h
LEAST_STAGES, MOST_STAGES = 2, 8  # of each ring
STAGE_INPUTS = 64  # of a stage of x: the 128 bytes of its swizzle
ALIGNMENT = 1024  # of the swizzled stages; the base is rounded up to it at run time
FIXED_BYTES = 512  # the selector table and the barriers
STAGING_BYTES = 768  # of a consumer warp: 16 tokens, 16 rows and 16 bytes against bank conflicts
# Fewer K blocks do not pay for filling the rings and for another slot.
LEAST_SHARE = 4


class Frame(NamedTuple):
    """What a kernel fixes at compile time."""

    groups: int  # consumer warpgroups, of 64 rows each
    resident: int  # CTAs of a multiprocessor
    pair: int  # CTAs of a cluster
    reason: str


_FEW = Frame(2, 2, 1, "two CTAs a multiprocessor, one loads while the other multiplies")
_MANY = Frame(2, 1, 1, "half the weight reads")
_PAIR = Frame(2, 1, 2, "two CTAs share each read of x")
# By kind, whether the rank or the planes are more than one, and the tokens of a CTA.
FRAMES = {
    (ONE, False, 64): _FEW,
    (ONE, False, 128): _MANY,
    (ONE, False, 256): _PAIR,
    (BOTH, False, 64): _FEW,
    (REBUILD, False, 64): _FEW,
    (REBUILD, False, 128): Frame(4, 1, 1, "256 rows: half the reads of x, four warps a scheduler"),
    (REBUILD, False, 256): _PAIR,
    (REBUILD, True, 64): _FEW,
    (REBUILD, True, 128): _MANY,
}


def is_any_rank(sizes: CudaSizes, kind: str) -> bool:
    """Whether the kernel is the one for every rank and number of planes."""
    return kind == REBUILD and (sizes.rank > 1 or sizes.planes > 1)


def kinds(sizes: CudaSizes) -> tuple[str, ...]:
    """The kinds of kernels that a weight may use."""
    if sizes.values == DENSE:
        return ()
    if sizes.rank == 0:
        return (ONE,)
    return (REBUILD,) if is_any_rank(sizes, REBUILD) else (BOTH, REBUILD)


def frames(sizes: CudaSizes) -> list[tuple[str, int]]:
    """The kinds that a weight may use, each with the tokens of a CTA."""
    return [
        (kind, tokens)
        for kind, any_rank, tokens in FRAMES
        if kind in kinds(sizes) and any_rank == is_any_rank(sizes, kind)
    ]


class Dealing(NamedTuple):
    """How many clusters there are, and the tiles that they take whole; the others' K blocks are
    dealt evenly."""

    clusters: int
    whole_tiles: int


def dealings(tiles: int, k_blocks: int, most: int) -> list[Dealing]:
    """The ways worth weighing of dealing tiles of so many K blocks to `most` clusters at most.

    All tiles whole; the tiles of the last, incomplete round by K blocks; and where there is no
    other round, two clusters and more for each tile: more of them multiply faster, and leave more
    sums to add.
    """
    found = [Dealing(min(tiles, most), tiles)]
    whole = tiles // most * most
    left = tiles - whole
    clusters = most if whole else min(most, left * k_blocks // LEAST_SHARE)
    if left and clusters > left and left * k_blocks >= LEAST_SHARE * clusters:
        found.append(Dealing(clusters, whole))
    if left and not whole:
        found += [
            Dealing(left * each, 0)
            for each in range(2, min(most // left, k_blocks // LEAST_SHARE) + 1)
            if left * each != clusters and (k_blocks % each == 0 or each & (each - 1) == 0)
        ]
    return found


@dataclass(frozen=True)
class Prefill:
    """One launch of a Hopper kernel for many tokens: its sizes, its GPU, the choices, and their
    predicted time.

    measured: the row of measured.json by which it was chosen, None where the cost model chose.

    What a call needs of it is computed once.
    """

    sizes: CudaSizes
    M: int  # tokens
    gpu: Gpu
    kind: str  # of KINDS
    tokens: int  # of a CTA
    groups: int  # consumer warpgroups
    pair: int  # CTAs of a cluster
    resident: int  # CTAs that a multiprocessor holds at once
    clusters: int
    whole_tiles: int
    weight_stages: int  # K blocks
    token_stages: int  # half K blocks
    measured: PrefillRow | None = None

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return 64 * self.groups

    @property
    def loop(self) -> str:
        """The family of kernels, as measured rows name it."""
        return f"prefill_{self.kind}"

    @property
    def share(self) -> int:
        """How many clusters share a tile: 1 where all are whole, 0 where they differ because the
        tiles of the last round are dealt to all clusters."""
        if not self.tail_tiles:
            return 1
        each, more = divmod(self.clusters, self.tail_tiles)
        return 0 if self.whole_tiles or more else each

    @property
    def split(self) -> tuple[int, int]:
        """What decides in which order a token's products are added, but for the sizes."""
        return self.tokens, self.share

    @property
    def any_rank(self) -> bool:
        """Whether the kernel is the one for every rank and number of planes."""
        return is_any_rank(self.sizes, self.kind)

    @functools.cached_property
    def row_tiles(self) -> int:
        """CTAs' row tiles of all parts."""
        return sum(self.sizes.row_tiles(self.rows))

    @property
    def token_tiles(self) -> int:
        return ceil_div(self.M, self.tokens)

    @property
    def tiles(self) -> int:
        """Tiles of a cluster: token tiles times pairs of row tiles, or row tiles."""
        return ceil_div(self.row_tiles, self.pair) * self.token_tiles

    @functools.cached_property
    def tail_tiles(self) -> int:
        """Tiles that are dealt by K blocks."""
        return self.tiles - self.whole_tiles

    @property
    def tail_share(self) -> int:
        """K blocks that every cluster takes of the tail."""
        return self.tail_tiles * self.sizes.k_blocks // self.clusters

    @property
    def tail_more(self) -> int:
        """Clusters that take one K block more."""
        return self.tail_tiles * self.sizes.k_blocks % self.clusters

    @property
    def evenly_cut(self) -> bool:
        """Whether every tile of the tail is cut into equal shares, so that none lies in two."""
        each, more = divmod(self.clusters, max(1, self.tail_tiles))
        return more == 0 and self.sizes.k_blocks % each == 0

    @property
    def most_k_blocks(self) -> int:
        """K blocks of the cluster that has most."""
        whole = ceil_div(self.whole_tiles, self.clusters) * self.sizes.k_blocks
        return whole + self.tail_share + (self.tail_more > 0)

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        return self.clusters * self.pair, 1, 1

    @functools.cached_property
    def block(self) -> tuple[int, int, int]:
        """Threads: the consumers' warpgroups, and the producer's behind them."""
        return 128 * (self.groups + 1), 1, 1

    @property
    def at_once(self) -> int:
        """CTAs that a multiprocessor works on at the same time."""
        return min(self.resident, ceil_div(self.clusters * self.pair, self.gpu.multiprocessors))

    @property
    def weight_stage_bytes(self) -> int:
        """Bytes of a K block in the ring of weights."""
        return weight_stage_bytes(self.sizes, self.rows)

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        rings = self.token_stages * token_stage_bytes(self.kind, self.tokens)
        rings += self.weight_stages * self.weight_stage_bytes
        return head_bytes(self.groups) + rings

    @functools.cached_property
    def partial_floats(self) -> int:
        """fp32 numbers of the slots for sums of parts of tiles: two a cluster, if any."""
        slots = 2 * self.clusters * self.pair if self.tail_tiles else 0
        return slots * self.tokens * self.rows

    @functools.cached_property
    def bounds(self) -> dict[str, float]:
        """Every bound by its name, in microseconds, at the pessimistic end."""
        return prefill_cost.bounds(self, assumed(OVERLAP))

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @functools.cached_property
    def microseconds(self) -> float:
        """The predicted time of the launch and of the one that adds parts: the pessimistic end of
        `range_us`, by which plans are chosen."""
        return prefill_cost.microseconds(self, assumed(OVERLAP))

    @functools.cached_property
    def range_us(self) -> tuple[float, float]:
        """The predicted time at both ends: all that is not known for the best, and for the
        worst."""
        best = prefill_cost.microseconds(self, BEST)
        return min(best, self.microseconds), self.microseconds

    def describe(self) -> str:
        """The choices, their reason, the prediction and who chose, in words."""
        by, pair = "chosen by the cost model", ""
        if self.measured is not None:
            by = self.measured.describe()
        if self.pair == 2:
            pair = " in pairs that share x"
        reason = FRAMES[self.kind, self.any_rank, self.tokens].reason
        return (
            f"prefill kernel for sm_90a, {_WORDS[self.kind]}, {self.rows} rows x {self.tokens} "
            f"tokens a CTA{pair}, {self.groups} consumer warpgroups, {self.weight_stages} weight "
            f"and {self.token_stages} token stages, {self.shared_bytes} bytes shared, "
            f"{self.resident} CTAs a multiprocessor, {self._dealt()} ({reason}); predicted "
            f"{in_words(self.range_us)}, bound by {self.bound}; {by}"
        )

    def _dealt(self) -> str:
        clusters = f"{self.clusters} {'CTAs' if self.pair == 1 else 'pairs'}"
        tiles = f"{self.whole_tiles} tiles whole" if self.whole_tiles else ""
        if self.tail_tiles:
            dealt = f"the K blocks of {self.tail_tiles} tiles evenly"
            tiles = f"{tiles} and {dealt}" if tiles else dealt
        return f"{clusters} take {tiles}"


_WORDS = {
    ONE: "kept pairs by sparse wgmma",
    BOTH: "kept pairs and signs by sparse wgmma",
    REBUILD: "the weight rebuilt in registers for wgmma",
}


def head_bytes(groups: int) -> int:
    """What rounding the base up may take, the table, the barriers and the consumers' staging."""
    head = FIXED_BYTES + STAGING_BYTES * 4 * groups
    return ALIGNMENT + ceil_div(head, ALIGNMENT) * ALIGNMENT


def token_stage_bytes(kind: str, tokens: int) -> int:
    """Bytes of a stage of x; `both` keeps v * x beside it."""
    return tokens * 2 * STAGE_INPUTS * (2 if kind == BOTH else 1)


def weight_stage_bytes(sizes: CudaSizes, rows: int) -> int:
    """Bytes of a K block of a CTA's rows and of its rows of V."""
    return ceil_div(rows // BLOCK_ROWS * sizes.block_bytes + 256 * sizes.rank, 128) * 128


def stages(room: int, weight_bytes: int, token_bytes: int) -> tuple[int, int] | None:
    """The stages of the rings of weights and of x that fill so many bytes; None if not even two of
    each fit.

    Both rings reach equally far ahead in K, as far as they can, and what is left goes to weights:
    they come from memory, while x mostly comes from L2.
    """
    found = []
    for weights in range(LEAST_STAGES, MOST_STAGES + 1):
        tokens = min(MOST_STAGES, (room - weights * weight_bytes) // token_bytes)
        if tokens >= LEAST_STAGES:
            found.append((min(2 * weights, tokens), weights, tokens))
    return max(found)[1:] if found else None


def plans(sizes: CudaSizes, M: int, gpu: Gpu) -> list[Prefill]:
    """Every plan for M tokens, M above 16; none where the kernels do not run.

    Up to 64 tokens a CTA has 64. More may have 64 or more, but not twice as many as there are.
    """
    if gpu.capability != CAPABILITY:
        return []
    return [
        plan
        for kind, tokens in frames(sizes)
        if tokens <= FEW or tokens < 2 * M
        for plan in dealt(sizes, M, gpu, kind, tokens)
    ]


def dealt(sizes: CudaSizes, M: int, gpu: Gpu, kind: str, tokens: int) -> Iterator[Prefill]:
    """The plans of one kernel, one for each way of dealing its tiles; none if it does not fit."""
    frame = FRAMES[kind, is_any_rank(sizes, kind), tokens]
    rows = 64 * frame.groups
    room = min(gpu.shared_limit, gpu.shared_total // frame.resident - 1024)
    weight_bytes = weight_stage_bytes(sizes, rows)
    fitting = stages(room - head_bytes(frame.groups), weight_bytes, token_stage_bytes(kind, tokens))
    most = gpu.multiprocessors * frame.resident // frame.pair
    if fitting is None or not most:
        return
    tiles = ceil_div(sum(sizes.row_tiles(rows)), frame.pair) * ceil_div(M, tokens)
    for clusters, whole_tiles in dealings(tiles, sizes.k_blocks, most):
        yield Prefill(
            sizes,
            M,
            gpu,
            kind,
            tokens,
            frame.groups,
            frame.pair,
            frame.resident,
            clusters,
            whole_tiles,
            *fitting,
        )
