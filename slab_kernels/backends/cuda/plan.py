"""Which kernel runs a linear on a device, with which tile: a measured row, or what the cost model
likes best.

A token's result must not depend on how many others there are. So within a regime (up to 16 tokens,
up to 64) one way of splitting K is chosen from the weight's sizes alone, and above 64 tokens K is
never split. From some number of tokens on the weight may be rebuilt for cuBLAS, which rounds
otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from ...errors import ArgumentError
from .cost import Plan, Rebuild, dense_microseconds, rebuild
from .gpus import Gpu
from .layout import DENSE
from .measured import MeasuredRow, rows_for
from .tiles import (
    DECODE,
    DECODE_REGISTERS,
    FEW,
    LEAST_STAGES,
    MANY,
    MOST_STAGES,
    NARROW_TILES,
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
SPLITS = (1, 2, 4, 8)  # CTAs that may share K
REGIMES = (0, DECODE, FEW, 1 << 62)  # A regime is above one of these and up to the next.
NEVER = 1 << 62  # more tokens than there can be
REGISTER_FILE = 65536  # registers of a multiprocessor
# Rebuilding is weighed at these numbers of tokens, 65 to 62036, each a tenth above the one before.
REBUILT_FROM = [round((FEW + 1) * 1.1**n) for n in range(73)]


@functools.lru_cache(maxsize=4096)
def choose(sizes: CudaSizes, M: int, gpu: Gpu, by_rows: bool = True) -> Plan | Rebuild:
    """The measured plan if there is one, else the fastest by the model, within what the regime of
    M allows.

    by_rows: False leaves the choice to the model alone.

    Raises: ArgumentError if no plan fits the device's shared memory and grids, ConfigError if the
    file of measured rows is damaged.
    """
    if M > FEW and M >= _rebuilt_from(sizes, gpu):
        return rebuild(sizes, M, gpu)
    rows = rows_for(sizes, gpu, *regime(M)) if by_rows else []
    found = plans(sizes, M, gpu, *_split(sizes, regime(M), gpu, by_rows))
    if not found:
        raise _too_large(sizes, gpu)
    for row in rows:
        if row.above < M <= row.tokens and (plan := named(row, found)):
            return plan
    return min(found, key=lambda plan: plan.microseconds)


@functools.lru_cache(maxsize=1024)
def dense_from(sizes: CudaSizes, gpu: Gpu) -> int:
    """The tokens from which on a 16-bit copy of the weight is faster with cuBLAS than its stream,
    by the model; NEVER if there are none."""
    threshold = NEVER
    for M in reversed(REBUILT_FROM):
        if choose(sizes, M, gpu).microseconds <= dense_microseconds(sizes.N, sizes.K, M, gpu):
            break
        threshold = M
    return threshold


def regime(M: int) -> tuple[int, int]:
    """The token counts that share M's way of splitting K: above the first, up to the second."""
    return next((above, upto) for above, upto in itertools.pairwise(REGIMES) if M <= upto)


def plans(sizes: CudaSizes, M: int, gpu: Gpu, warp_inputs: int, splits: int) -> list[Plan]:
    """Every plan for M tokens with so many K groups per CTA and so many CTAs that share K.

    CTAs that share K have a K block for each of their groups at least.
    """
    if splits > 1 and sizes.k_blocks < splits * warp_inputs:
        return []
    return [
        plan
        for tile, tokens in _tiles(sizes, M)
        if tile.warp_inputs == warp_inputs
        for plan in residencies(sizes, M, gpu, tile, tokens, splits)
    ]


def _tiles(sizes: CudaSizes, M: int) -> Iterator[tuple[Tile, int]]:
    """Tiles and tokens of a warp that suit M tokens.

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
    if tile.loop == MANY:
        registers = sizes.registers(tile.tall)[tokens] * tile.threads
    else:
        registers = DECODE_REGISTERS * tile.threads
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


def named(row: MeasuredRow, found: list[Plan]) -> Plan | None:
    """The plan that a row names, with no more stages than fit, or None if it is not among these."""
    for plan in found:
        tile = plan.tile
        same = (
            row.loop == tile.loop
            and (row.warp_rows, row.warp_tokens) == (tile.warp_rows, tile.warp_tokens)
            and (row.split, row.row_tiles) == ((tile.warp_inputs, plan.splits), tile.row_tiles)
            and (row.warp_width == plan.tokens or tile.loop != MANY)
            and row.resident == plan.resident
        )
        if same:
            return replace(plan, stages=min(row.stages, plan.stages), measured=row)
    return None


def _too_large(sizes: CudaSizes, gpu: Gpu) -> ArgumentError:
    return ArgumentError(
        f"no tile of {sizes} fits {gpu.shared_limit} bytes of shared memory and a grid of "
        f"{MOST_ROW_TILES} row tiles; use the triton backend"
    )


@functools.lru_cache(maxsize=1024)
def _rebuilt_from(sizes: CudaSizes, gpu: Gpu) -> float:
    """The tokens from which on rebuilding is faster, to a tenth: one threshold per weight."""
    threshold = float("inf")
    if sizes.values == DENSE:
        return threshold
    for M in reversed(REBUILT_FROM):
        fused = [plan.microseconds for plan in plans(sizes, M, gpu, 1, 1)]
        if fused and rebuild(sizes, M, gpu).microseconds >= min(fused):
            break
        threshold = M
    return threshold


@functools.lru_cache(maxsize=1024)
def _split(sizes: CudaSizes, of: tuple[int, int], gpu: Gpu, by_rows: bool) -> tuple[int, int]:
    """The K groups of a CTA and the CTAs that share K, for all token counts of a regime.

    Measured rows of the regime have one way. Without them it is the one with the least time by the
    model, summed over some token counts.

    Raises: ArgumentError if no plan fits the device's shared memory and grids.
    """
    if of[0] >= FEW:
        return 1, 1
    weighed = (1, 4, DECODE) if of[1] == DECODE else (32, FEW)
    for row in rows_for(sizes, gpu, *of) if by_rows else []:
        fit = all(plans(sizes, M, gpu, *row.split) for M in weighed)
        if fit and named(row, plans(sizes, row.tokens, gpu, *row.split)):
            return row.split
    tiles = WIDE_TILES if of[1] == DECODE else SPLIT_TILES
    totals: list[tuple[float, int, int]] = []
    for warp_inputs in sorted({tile.warp_inputs for tile in tiles}, reverse=True):
        for splits in SPLITS:
            found = [plans(sizes, M, gpu, warp_inputs, splits) for M in weighed]
            if all(found):
                total = sum(min(plan.microseconds for plan in some) for some in found)
                totals.append((total, warp_inputs, splits))
    if not totals:
        raise _too_large(sizes, gpu)
    _, warp_inputs, splits = min(totals)
    return warp_inputs, splits
