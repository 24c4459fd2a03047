"""Which kernel runs a linear on a device, with which tile: measured rows, and what the cost model
likes best.

Families of kernels compete: up to 16 tokens the narrow and wide loops are one, above there are the
loop for many tokens, the one that rebuilds the weight in registers and, on Hopper, the kinds of
prefill.py in place of that. A measured row speaks for its own family: it decides there, and the
time that it took stands for the prediction where families compete. The others are predicted, those
that were never timed at the pessimistic end of what is known.

Up to 64 tokens a token's result must not depend on how many others there are. So within a regime
(up to 16 tokens, up to 64) one family and one way of splitting K are chosen from the weight's sizes
and the device alone. Above 64 tokens the way depends on the number of tokens, too. From some number
on the weight may be rebuilt for cuBLAS, which rounds otherwise.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...errors import ArgumentError
from . import prefill
from .cost import BAND, LAUNCH_US, REDUCE_US, Plan, Rebuild, dense_microseconds, rebuild
from .gpus import Gpu
from .layout import DENSE
from .measured import MeasuredRow, PrefillRow, Row, rows_for
from .prefill import Prefill
from .tiles import (
    DECODE,
    FEW,
    LEAST_STAGES,
    MANY,
    MOST_STAGES,
    NARROW,
    NARROW_TILES,
    REBUILD,
    REBUILD_REGISTERS,
    REBUILD_SPLIT_TILES,
    REBUILD_WHOLE_TILES,
    SPLIT_TILES,
    TALL_TILES,
    WHOLE_TILES,
    WIDE,
    WIDE_TILES,
    CudaSizes,
    Tile,
    columns_bytes,
    factors_bytes,
    rings,
    stage_bytes,
    sums_bytes,
)

MOST_ROW_TILES = 65535  # CTAs along y of a grid (CUDA programming guide, compute capabilities)
SPLITS = (1, 2, 4, 8)  # CTAs that may share K, up to 64 tokens
MOST_SPLITS = 8  # any number up to it above, and where the weight is rebuilt
MOST_WAVES = 4  # of CTAs that share K above 64 tokens: it bounds the memory of their sums
REGIMES = (0, DECODE, FEW, 1 << 62)  # A regime is above one of these and up to the next.
# The token counts that a way of splitting K is weighed by, where one serves a regime.
WEIGHED = {DECODE: (1, 4, DECODE), FEW: (32, FEW)}
REGISTER_FILE = 65536  # registers of a multiprocessor
# Rebuilding is weighed at these numbers of tokens, 65 to 62036, each a tenth above the one before.
REBUILT_FROM = [round((FEW + 1) * 1.1**n) for n in range(73)]
NEVER = 1 << 62  # tokens
Split = tuple[int, int]  # K groups and CTAs that share K, or Prefill.split
DECODING = "narrow or wide"  # the family of both loops


class Weighed(NamedTuple):
    """The best plan of a family, and what a call takes with it."""

    family: str
    plan: Plan | Prefill
    microseconds: float  # measured where a row chose the plan
    adapter_us: float = 0.0  # of them: the adapter's z = x Q, which comes first


@functools.lru_cache(maxsize=16384)
def choose(sizes: CudaSizes, M: int, gpu: Gpu, by_rows: bool = True) -> Plan | Prefill | Rebuild:
    """The plan that takes the least time by measured rows and the model, within what the regime of
    M allows.

    by_rows: False leaves the choice to the model alone.

    Raises: ArgumentError if no plan fits the device's shared memory and grids, ConfigError if the
    file of measured rows is damaged.
    """
    if M > FEW and M >= _rebuilt_from(sizes, gpu, by_rows):
        return rebuild(sizes, M, gpu)
    found = next(weighed(sizes, M, gpu, by_rows), None)
    if found is None:
        raise _too_large(sizes, gpu)
    return found.plan


def weighed(sizes: CudaSizes, M: int, gpu: Gpu, by_rows: bool = True) -> Iterator[Weighed]:
    """The best plan of each family for M tokens, first the one that is chosen among them.

    Up to 64 tokens their order is the same for all M of a regime.
    """
    of = regime(M)
    rows = rows_for(sizes, gpu, *of) if by_rows else []
    if of[1] > FEW:
        each = [_best(family, sizes, M, gpu, None, rows) for family in families(sizes, gpu, of)]
        yield from sorted(filter(None, each), key=lambda found: found.microseconds)
        return
    for family, split in _ways(sizes, of, gpu, by_rows):
        if found := _best(family, sizes, M, gpu, split, rows):
            yield found


def families(sizes: CudaSizes, gpu: Gpu, of: tuple[int, int]) -> list[str]:
    """The families of kernels that a weight has in a regime on a device."""
    if of[1] == DECODE:
        return [DECODING]
    if sizes.values == DENSE:
        return [MANY]
    if gpu.capability == prefill.CAPABILITY:
        return [MANY, *(f"prefill_{kind}" for kind in prefill.kinds(sizes))]
    return [MANY, REBUILD] if sizes.rank else [MANY]


def microseconds(sizes: CudaSizes, M: int, gpu: Gpu) -> float:
    """What a call of M tokens takes with the plan that is chosen; infinity if none fits."""
    if M > FEW and M >= _rebuilt_from(sizes, gpu, True):
        return rebuild(sizes, M, gpu).microseconds
    found = next(weighed(sizes, M, gpu), None)
    return found.microseconds if found else math.inf


def takes_dense(sizes: CudaSizes, M: int, gpu: Gpu) -> bool:
    """Whether M tokens are multiplied by a 16-bit copy of the weight, if there is one.

    Never up to 16 tokens. Up to 64 there is one answer, since one family serves that regime: the
    copy does as soon as the stream would be slower than it by more than a launch somewhere. Above,
    whatever is faster by the model, in steps of a tenth. The sparse kernels of a weight without
    signs may win again where tokens are many, so there is no one limit.
    """
    if M <= DECODE:
        return False
    if M <= FEW:
        return _slower_than_dense(sizes, FEW, gpu)
    return _slower_than_dense(sizes, REBUILT_FROM[bisect.bisect(REBUILT_FROM, M) - 1], gpu)


@functools.lru_cache(maxsize=16384)
def _slower_than_dense(sizes: CudaSizes, M: int, gpu: Gpu) -> bool:
    """Whether the stream's plan is: of all M of a regime for M = FEW."""

    def gained(M: int) -> float:
        return microseconds(sizes, M, gpu) - dense_microseconds(sizes.N, sizes.K, M, gpu)

    if M == FEW:
        return max(gained(tokens) for tokens in WEIGHED[FEW]) > LAUNCH_US
    return gained(M) > 0


@functools.lru_cache(maxsize=1024)
def dense_from(sizes: CudaSizes, gpu: Gpu) -> int:
    """The fewest tokens of which `takes_dense` is true; NEVER if there are none."""
    counts = (DECODE + 1, *REBUILT_FROM)
    return next((M for M in counts if takes_dense(sizes, M, gpu)), NEVER)


def regime(M: int) -> tuple[int, int]:
    """The token counts that share M's way of splitting K: above the first, up to the second."""
    return next((above, upto) for above, upto in itertools.pairwise(REGIMES) if M <= upto)


def plans(
    sizes: CudaSizes, M: int, gpu: Gpu, warp_inputs: int, splits: int, loop: str = MANY
) -> list[Plan]:
    """Every plan for M tokens with so many K groups per CTA and so many CTAs that share K.

    loop: the one for many tokens or the one that rebuilds the weight, for more than 16. CTAs that
    share K have a K block for each of their groups at least.
    """
    if splits > 1 and sizes.k_blocks < splits * warp_inputs:
        return []
    return [
        plan
        for tile, tokens in (_rebuild_tiles(M) if loop == REBUILD else _tiles(sizes, M))
        if tile.warp_inputs == warp_inputs
        for plan in residencies(sizes, M, gpu, tile, tokens, splits)
    ]


def split_plans(sizes: CudaSizes, M: int, gpu: Gpu, loop: str) -> Iterator[Plan]:
    """Every plan for M tokens, M above 64, with one K group per CTA: K whole, or shared by CTAs
    where tiles are few.

    An adapter's z is shared until half of the multiprocessors have a CTA and no further, since all
    CTAs of the linear read each part of it; but where prefill.py's kernels follow, which want its
    parts added first.
    """
    read_often = sizes.values == DENSE and gpu.capability != prefill.CAPABILITY
    most = gpu.multiprocessors // 2 if read_often else MOST_WAVES * gpu.multiprocessors
    for plan in plans(sizes, M, gpu, 1, 1, loop):
        yield plan
        if plan.token_tiles <= BAND:
            for splits in range(2, min(MOST_SPLITS, sizes.k_blocks, most // plan.ctas) + 1):
                yield replace(plan, splits=splits)


def _rebuild_tiles(M: int) -> Iterator[tuple[Tile, int]]:
    """Tiles and tokens of a warp of the loop that rebuilds the weight: up to 64 tokens those of
    64."""
    if M <= FEW:
        yield from ((tile, FEW) for tile in REBUILD_SPLIT_TILES)
    else:
        yield from itertools.product(REBUILD_WHOLE_TILES, REBUILD_REGISTERS)


def _tiles(sizes: CudaSizes, M: int) -> Iterator[tuple[Tile, int]]:
    """Tiles and tokens of a warp that suit M tokens, without the loop that rebuilds the weight.

    In the loop for many, up to 64 tokens take the smallest tile that holds them all; with several
    sign planes, which have no tile of 64, two tiles of 32. More take warps of 32 or 64.
    """
    if M <= DECODE:
        if M <= sizes.most_narrow_tokens:
            yield from ((tile, M) for tile in NARROW_TILES)
        yield from ((tile, sizes.wide_tokens) for tile in WIDE_TILES)
        return
    widths = sizes.warp_tokens()
    smallest = min(tokens for tokens in widths if tokens >= min(M, max(widths)))
    flat = SPLIT_TILES if M <= FEW else WHOLE_TILES
    pairs = [(tile, tokens) for tile in flat for tokens in widths]
    pairs += [(tile, tokens) for tile in TALL_TILES for tokens in sizes.warp_tokens(tall=True)]
    for tile, tokens in pairs:
        if tokens * tile.warp_tokens == smallest if M <= FEW else tokens >= 32:
            yield tile, tokens


def evaluate(
    sizes: CudaSizes, M: int, gpu: Gpu, tile: Tile, tokens: int, splits: int
) -> Plan | None:
    """The fastest plan with this tile; None if it does not fit the device."""
    found = residencies(sizes, M, gpu, tile, tokens, splits)
    return min(found, key=lambda plan: plan.microseconds, default=None)


def residencies(
    sizes: CudaSizes, M: int, gpu: Gpu, tile: Tile, tokens: int, splits: int
) -> list[Plan]:
    """The plans with this tile for one, two and four CTAs per multiprocessor, as far as they fit.

    There is none if the row tiles are too many for a grid. Each plan has as many stages as there is
    room for. One CTA alone needs two, several need three. A CTA of the wide loop makes room for no
    more tokens than there are.
    """
    if sum(sizes.row_tiles(tile.rows)) > MOST_ROW_TILES:
        return []
    tokens = min(tokens, M) if tile.loop == WIDE else tokens
    registers = sizes.registers(tile, tokens) * tile.threads
    factors, held = factors_bytes(sizes, tile), columns_bytes(sizes, tile, tokens, splits)
    stage = rings(tile) * stage_bytes(sizes, tile, tokens)
    found = []
    for resident in (1, 2, 4):
        shared = min(gpu.shared_limit, gpu.shared_total // resident - 1024) - factors
        stages = min(MOST_STAGES, (shared - held) // stage)
        fits = registers * resident <= REGISTER_FILE and sums_bytes(sizes, tile, tokens) <= shared
        if fits and stages >= (LEAST_STAGES if resident == 1 else 3):
            found.append(Plan(sizes, M, gpu, tile, tokens, splits, stages, resident))
    return found


def named(row: Row, found: Sequence[Plan | Prefill]) -> Plan | Prefill | None:
    """The plan that a row names, with no more stages than fit, or None if it is not among these."""
    for plan in found:
        if isinstance(plan, Prefill):
            if (row.loop, row.split) == (plan.loop, plan.split):
                assert isinstance(row, PrefillRow)
                return replace(plan, measured=row)
        elif isinstance(row, MeasuredRow) and _is_named(row, plan):
            return replace(plan, stages=min(row.stages, plan.stages), measured=row)
    return None


def _is_named(row: MeasuredRow, plan: Plan) -> bool:
    tile = plan.tile
    return (
        row.loop == tile.loop
        and (row.warp_rows, row.warp_tokens) == (tile.warp_rows, tile.warp_tokens)
        and (row.split, row.row_tiles) == ((tile.warp_inputs, plan.splits), tile.row_tiles)
        and (row.warp_width == plan.tokens or tile.loop in (NARROW, WIDE))
        and row.resident == plan.resident
    )


def own(family: str, sizes: CudaSizes, M: int, gpu: Gpu) -> Plan | Prefill | None:
    """The plan of a family that the model alone likes best; None if there is none."""
    of = regime(M)
    split = _split(family, sizes, of, gpu, False) if of[1] <= FEW else None
    if of[1] <= FEW and split is None:
        return None
    found = _best(family, sizes, M, gpu, split, [])
    return found and found.plan


def _too_large(sizes: CudaSizes, gpu: Gpu) -> ArgumentError:
    return ArgumentError(
        f"no tile of {sizes} fits {gpu.shared_limit} bytes of shared memory and a grid of "
        f"{MOST_ROW_TILES} row tiles; use the triton backend"
    )


@functools.lru_cache(maxsize=1024)
def _rebuilt_from(sizes: CudaSizes, gpu: Gpu, by_rows: bool) -> float:
    """The tokens from which on rebuilding is faster, to a tenth: one threshold per weight."""
    threshold = float("inf")
    if sizes.values == DENSE:
        return threshold
    for M in reversed(REBUILT_FROM):
        fused = next(weighed(sizes, M, gpu, by_rows), None)
        if fused and rebuild(sizes, M, gpu).microseconds >= fused.microseconds:
            break
        threshold = M
    return threshold


def plans_of(
    family: str, sizes: CudaSizes, M: int, gpu: Gpu, split: Split | None
) -> list[Plan] | list[Prefill]:
    """The plans of a family with a way of splitting K; None: all ways, for more than 64 tokens."""
    if not family.startswith("prefill"):
        loop = MANY if family == DECODING else family
        if split is None:
            return list(split_plans(sizes, M, gpu, loop))
        return plans(sizes, M, gpu, *split, loop)
    return [
        plan
        for plan in prefill.plans(sizes, M, gpu)
        if plan.loop == family and split in (None, plan.split)
    ]


def family_of(row: Row) -> str:
    """The family of kernels that a row speaks for."""
    return DECODING if row.loop in (NARROW, WIDE) else row.loop


def _best(
    family: str, sizes: CudaSizes, M: int, gpu: Gpu, split: Split | None, rows: list[Row]
) -> Weighed | None:
    """The plan of a family that a row names, else the fastest by the model; None if there is none.

    A row was timed with its greatest number of tokens. For fewer its time shrinks as the model's.
    """
    found = plans_of(family, sizes, M, gpu, split)
    if not found:
        return None
    first = _adapter_us(family, sizes.adapter(), M, gpu) if sizes.adapter_steps else 0.0
    for row in rows:
        covers = family_of(row) == family and row.above < M <= row.tokens
        if covers and (plan := named(row, found)):
            timed = named(row, plans_of(family, sizes, row.tokens, gpu, split)) or plan
            took = row.measured_us * (plan.microseconds / timed.microseconds)
            return Weighed(family, plan, took + first, first)
    fastest = _fastest(found)
    return Weighed(family, fastest, fastest.microseconds + first, first)


def _fastest(found: Sequence[Plan | Prefill]) -> Plan | Prefill:
    return min(found, key=lambda plan: plan.microseconds)


@functools.lru_cache(maxsize=16384)
def _adapter_us(family: str, adapter: CudaSizes, M: int, gpu: Gpu) -> float:
    """What z = x Q takes, which comes first where there is an adapter.

    Where K is split for it, the linear adds z's parts itself; the kernels of prefill.py want them
    added before.
    """
    plan = choose(adapter, M, gpu)
    assert isinstance(plan, Plan)
    added = plan.splits > 1 and not family.startswith("prefill")
    return plan.microseconds - (REDUCE_US if added else 0.0)


@functools.lru_cache(maxsize=1024)
def _ways(
    sizes: CudaSizes, of: tuple[int, int], gpu: Gpu, by_rows: bool
) -> list[tuple[str, Split]]:
    """The families of a regime up to 64 tokens, each with the way of splitting K that serves all of
    its token counts; first the one whose times have the least sum."""
    rows = rows_for(sizes, gpu, *of) if by_rows else []
    totals = []
    for family in families(sizes, gpu, of):
        if split := _split(family, sizes, of, gpu, by_rows):
            each = [_best(family, sizes, M, gpu, split, rows) for M in WEIGHED[of[1]]]
            totals.append((sum(found.microseconds for found in each if found), family, split))
    return [(family, split) for _, family, split in sorted(totals)]


@functools.lru_cache(maxsize=1024)
def _split(
    family: str, sizes: CudaSizes, of: tuple[int, int], gpu: Gpu, by_rows: bool
) -> Split | None:
    """A family's way of splitting K for all token counts of a regime; None if nothing fits.

    Measured rows of the regime have one way. Without them it is the one with the least time by the
    model, summed over some token counts.
    """
    counts = WEIGHED[of[1]]
    for row in rows_for(sizes, gpu, *of) if by_rows else []:
        if family_of(row) != family:
            continue
        fit = all(plans_of(family, sizes, M, gpu, row.split) for M in counts)
        if fit and named(row, plans_of(family, sizes, row.tokens, gpu, row.split)):
            return row.split
    totals: list[tuple[float, Split]] = []
    for split in _splits(family, sizes, of, gpu):
        found = [plans_of(family, sizes, M, gpu, split) for M in counts]
        if all(found):
            total = sum(_fastest(some).microseconds for some in found)
            totals.append((total, split))
    return min(totals)[1] if totals else None


def _splits(family: str, sizes: CudaSizes, of: tuple[int, int], gpu: Gpu) -> list[Split]:
    """The ways of splitting K that a family has in a regime up to 64 tokens."""
    if family.startswith("prefill"):
        found = prefill.plans(sizes, of[1], gpu)
        return [plan.split for plan in found if plan.loop == family]
    tiles = {DECODING: WIDE_TILES, MANY: SPLIT_TILES, REBUILD: REBUILD_SPLIT_TILES}[family]
    groups = sorted({tile.warp_inputs for tile in tiles}, reverse=True)
    splits = range(1, MOST_SPLITS + 1) if family == REBUILD else SPLITS
    return list(itertools.product(groups, splits))
