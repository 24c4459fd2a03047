"""Which kernel runs a linear on a device, with which tile: the plan that the cost model likes best.

A token's result must not depend on how many others there are. So within a regime (up to 16 tokens,
up to 64) one way of splitting K is chosen from the weight's sizes alone, and above 64 tokens K is
never split. From some number of tokens on the weight may be rebuilt for cuBLAS, which rounds
otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ...errors import ArgumentError
from .cost import Plan, Rebuild, rebuild
from .gpus import Gpu
from .layout import DENSE
from .tiles import (
    MOST_STAGES,
    SPLIT_TILES,
    TALL_TILES,
    WHOLE_TILES,
    CudaSizes,
    Tile,
    stage_bytes,
    sums_bytes,
)

DECODE, FEW = 16, 64  # tokens up to which each regime reaches
SPLITS = (1, 2, 4, 8)  # CTAs that may share K
REGISTER_FILE = 65536  # registers of a multiprocessor
# Rebuilding is weighed at these numbers of tokens, 65 to 62036, each a tenth above the one before.
REBUILT_FROM = [round((FEW + 1) * 1.1**n) for n in range(73)]


@functools.lru_cache(maxsize=4096)
def choose(sizes: CudaSizes, M: int, gpu: Gpu) -> Plan | Rebuild:
    """The fastest plan by the model, within what the regime of M allows.

    Raises: ArgumentError if no plan fits into the device's shared memory.
    """
    if M > FEW:
        if M >= _rebuilt_from(sizes, gpu):
            return rebuild(sizes, M, gpu)
        return _fastest(plans(sizes, M, gpu, 1, 1), sizes, gpu)
    warp_inputs, splits = _split(sizes, M <= DECODE, gpu)
    return _fastest(plans(sizes, M, gpu, warp_inputs, splits), sizes, gpu)


def plans(sizes: CudaSizes, M: int, gpu: Gpu, warp_inputs: int, splits: int) -> list[Plan]:
    """Every plan for M tokens with so many K groups per CTA and so many CTAs that share K."""
    found = (
        evaluate(sizes, M, gpu, tile, tokens, splits)
        for tile, tokens in _tiles(sizes, M)
        if tile.warp_inputs == warp_inputs
    )
    return [plan for plan in found if plan is not None]


def _tiles(sizes: CudaSizes, M: int) -> Iterator[tuple[Tile, int]]:
    """Tiles and tokens of a warp that suit M tokens.

    Few tokens take the smallest tile that holds them all; with several sign planes, which have no
    tile of 64, two tiles of 32. Many tokens take warps of 32 or 64.
    """
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

    Each has as many stages as there is room for. One CTA alone needs two, several need three.
    """
    registers = sizes.registers(tile.tall)[tokens] * tile.threads
    group_bytes = tile.warp_inputs * stage_bytes(sizes, tile, tokens, M)
    found = []
    for resident in (1, 2, 4):
        shared = min(gpu.shared_limit, gpu.shared_total // resident - 1024)
        stages = min(MOST_STAGES, shared // group_bytes)
        fits = registers * resident <= REGISTER_FILE and sums_bytes(tile, tokens) <= shared
        if fits and stages >= (2 if resident == 1 else 3):
            found.append(Plan(sizes, M, gpu, tile, tokens, splits, stages, resident))
    return found


def _fastest(found: list[Plan], sizes: CudaSizes, gpu: Gpu) -> Plan:
    if not found:
        raise _too_large(sizes, gpu)
    return min(found, key=lambda plan: plan.microseconds)


def _too_large(sizes: CudaSizes, gpu: Gpu) -> ArgumentError:
    return ArgumentError(f"no tile of {sizes} fits {gpu.shared_limit} bytes of shared memory")


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
def _split(sizes: CudaSizes, decode: bool, gpu: Gpu) -> tuple[int, int]:
    """The K groups of a CTA and the CTAs that share K, for all token counts of a regime.

    They are those with the least time summed over some token counts of the regime.

    Raises: ArgumentError if no plan fits into the device's shared memory.
    """
    groups = sorted({tile.warp_inputs for tile in SPLIT_TILES}, reverse=True)
    weighed = (1, 8, DECODE) if decode else (32, FEW)
    totals: list[tuple[float, int, int]] = []
    for warp_inputs in groups:
        for splits in SPLITS:
            if splits > 1 and sizes.k_blocks < splits * warp_inputs:
                continue
            found = [plans(sizes, M, gpu, warp_inputs, splits) for M in weighed]
            if all(found):
                total = sum(min(plan.microseconds for plan in some) for some in found)
                totals.append((total, warp_inputs, splits))
    if not totals:
        raise _too_large(sizes, gpu)
    _, warp_inputs, splits = min(totals)
    return warp_inputs, splits
