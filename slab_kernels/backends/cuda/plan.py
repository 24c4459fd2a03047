"""Which kernel runs a linear on a device, with which tiles: table rows with reasons, chosen by a small cost model.

Everything here is arithmetic on sizes; nothing asks a device. The model knows bytes, tensor and issue rates; its figures
are predictions, good for ranking tiles, not measurements.

A token's result must not depend on how many others there are, so within a regime (up to 16 tokens, up to 64) one way of
splitting K is chosen from the weight's sizes alone. Above 64 K is never split; but from some number of tokens on the
weight may be rebuilt for cuBLAS, which rounds otherwise.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import ArgumentError
from .layout import (
    BLOCK_INPUTS,
    BLOCK_ROWS,
    DENSE,
    INT4,
    INT8,
    METADATA_BYTES,
    SIGN_BYTES,
    VALUE_BYTES,
    W16,
)

MOST_STAGES = 4
REBUILT_ROWS = 8192  # of a weight at a time, so that memory is bounded; 4096 cost an H100 up to 10 % more, all at once 1 to 4 % less
REGISTERS = {
    8: 128,
    16: 128,
    32: 192,
    64: 255,
}  # most a thread has, by tokens of a warp: one family of kernels each
TALL_REGISTERS = {8: 160, 16: 208, 32: 208, 64: 255}  # of those with 64 rows a warp
PLANES_REGISTERS = {
    8: 128,
    32: 248,
}  # of those with several sign planes, whose sums are apart: 64 tokens do not fit
TOKEN_ROW_BYTES = 2 * BLOCK_INPUTS
MOST_RANK = 16  # rows of V beside the activations in every stage
SHARED_PORT = 128  # bytes a clock of one multiprocessor's shared memory
# Fitted by benchmarks/fit_plans.py to 1477 launches timed on an H100 (benchmarks/results/plans-h100.csv), in the device's own clocks;
# other GPUs are taken to behave alike.
BANDWIDTH_REACHED = 0.86  # of the datasheet's memory bandwidth
RATE_REACHED = 0.85  # of the tensor and shared-memory rates
ISSUE_CYCLES = 1.38  # of a scheduler for an instruction, when it has warps to choose from
WAIT_CYCLES = 2.13  # more until a warp may issue its next one: what several warps overlap
OVERLAP = 6  # the p-norm that joins the times below: nearly their maximum
LAUNCH_US = 1.09  # of a kernel in a graph
FILL_US = 1.73  # a wave of CTAs, from first byte to first product, and its reduction and store
REDUCE_US = 1.55  # the kernel that adds K-splits
LATENCY_US = 0.8  # of memory under load: bytes in flight = bandwidth x latency

# SASS instructions a warp issues for 32 rows x 128 inputs (4096 weights): (fixed, per token tile of 8). Fitted to the main
# loops of the sm_90a cubin by `python tests/sass/counter.py`; tests/sass/test_sass.py holds them within 10 %.
ISSUE = {W16: (223, 56), INT8: (275, 78), INT4: (279, 78), DENSE: (165, 133)}
PLANES_ISSUE = {  # by sign planes, of rank one
    2: {W16: (247, 53), INT8: (327, 61), INT4: (330, 61)},
    3: {W16: (303, 54), INT8: (377, 61), INT4: (379, 62)},
}
TALL_ISSUE = {
    W16: (345, 71),
    INT8: (512, 71),
    INT4: (522, 71),
}  # of a tall warp: 64 rows x 128 inputs


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a device. Rates are the datasheet's; mma_rate is that of `mma.sync`, not of `wgmma`."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    bandwidth: float  # GB/s
    clock: float  # GHz, boost
    mma_rate: int  # dense fp16 multiply-adds a clock of one multiprocessor, fp32 accumulation
    gemm_rate: (
        int  # of them, what cuBLAS reaches on large matrices (by wgmma where the device has it)
    )
    l2_port: int = 64  # bytes a clock from L2 into one multiprocessor
    shared_limit: int = 101376  # bytes a CTA may have

    @property
    def shared_total(self) -> int:
        return self.shared_limit + 1024  # one KB a CTA is the driver's


GPUS = (
    Gpu("A100", (8, 0), 108, 1555, 1.41, 1024, 900, shared_limit=166912),
    Gpu("RTX 3090", (8, 6), 82, 936, 1.70, 256, 235),
    Gpu("RTX 4090", (8, 9), 128, 1008, 2.52, 256, 235),
    # mma.sp reached 550 in our loops, by two warps a scheduler; mma.sync of dense operands is said to reach 1330, wgmma 2048
    Gpu("H100", (9, 0), 132, 3350, 1.76, 650, 1650, shared_limit=232448),
    Gpu("H200", (9, 0), 132, 4800, 1.76, 650, 1650, shared_limit=232448),
    Gpu("RTX 5090", (12, 0), 170, 1792, 2.41, 256, 235),
)


def gpu_named(name: str) -> Gpu:
    """The table's row of that name, in any case. Raises: ValueError with the known names."""
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ArgumentError(
        f"no figures for the GPU {name!r}; known: {', '.join(gpu.name for gpu in GPUS)}"
    )


def gpu_like(
    name: str, capability: tuple[int, int], multiprocessors: int, shared_limit: int
) -> Gpu:
    """The table's row for a device, with the device's own sizes; for an unknown name the row nearest in capability."""
    words = set(re.findall(r"[a-z]*\d+\w*", name.lower()))
    named = [gpu for gpu in GPUS if words & set(re.findall(r"[a-z]*\d+\w*", gpu.name.lower()))]
    near = max(
        (gpu for gpu in GPUS if gpu.capability <= capability),
        key=lambda gpu: gpu.capability,
        default=GPUS[0],
    )
    row = named[0] if named else near
    return Gpu(name, capability, multiprocessors, row.bandwidth, row.clock, row.mma_rate, row.gemm_rate,
               row.l2_port, shared_limit)  # fmt: skip


class Sizes(NamedTuple):
    """A linear as its kernels see it."""

    K: int
    rows: tuple[int, ...]  # out_features of each fused part
    values: int  # W16, INT8, INT4, or DENSE for the adapter's Q
    group_steps: int
    rank: int
    adapter_steps: int  # rank of the adapter / 16, rounded up
    planes: int = 1  # of signs

    @property
    def k_blocks(self) -> int:
        return -(-self.K // BLOCK_INPUTS)

    @property
    def block_bytes(self) -> int:
        scales = 4 // self.group_steps * 2 * BLOCK_ROWS if self.values in (INT8, INT4) else 0
        metadata = 0 if self.values == DENSE else METADATA_BYTES
        return (
            VALUE_BYTES[self.values]
            + metadata
            + (self.planes * SIGN_BYTES if self.rank else 0)
            + scales
        )

    def row_tiles(self, rows: int) -> list[int]:
        return [-(-part // rows) for part in self.rows]

    def warp_tokens(self, tall: bool = False) -> tuple[int, ...]:
        """Tokens of a warp in the kernels that are compiled for it; tall: 64 rows a warp."""
        if self.planes > 1:
            return () if tall else tuple(PLANES_REGISTERS)
        return TALL.get((self.values, self.rank), ()) if tall else tuple(REGISTERS)

    def adapter(self) -> Sizes:
        """The linear z = x Q that comes first."""
        return Sizes(self.K, (16 * self.adapter_steps * len(self.rows),), DENSE, 4, 0, 0)


@dataclass(frozen=True)
class Tile:
    """At most eight warps as rows x tokens x K groups; a warp is 32 (or 64) rows x 8, 16, 32 or 64 tokens."""

    warp_rows: int
    warp_tokens: int
    warp_inputs: int
    reason: str
    blocks: int = 2  # of 16 rows, that a warp holds

    @property
    def rows(self) -> int:
        return BLOCK_ROWS * self.blocks * self.warp_rows

    @property
    def threads(self) -> int:
        return 32 * self.warp_rows * self.warp_tokens * self.warp_inputs


SPLIT_TILES = (  # up to 64 tokens
    Tile(1, 1, 8, "32 rows: most CTAs, so that few output features still fill the device"),
    Tile(2, 1, 4, "64 rows: activations are read half as often"),
    Tile(
        4,
        1,
        2,
        "128 rows: activations are read a quarter as often, for many output features and tokens",
    ),
    Tile(1, 1, 4, "32 rows, four warps: fits 99 KB of shared memory, or two CTAs a multiprocessor"),
    Tile(2, 1, 2, "64 rows, four warps: the same with half the activation reads"),
    Tile(4, 1, 1, "128 rows, four warps: many tokens in 99 KB of shared memory"),
    Tile(1, 2, 4, "32 rows x 2 t tokens: more warps for many tokens"),
    Tile(2, 2, 2, "64 rows x 2 t tokens, more warps for many tokens"),
    Tile(2, 1, 1, "64 rows, two warps: the least shared memory"),
)
WHOLE_TILES = (  # above 64 tokens; t tokens a warp, 32 or 64
    Tile(4, 2, 1, "128 rows x 2 t tokens: most products per byte of shared memory"),
    Tile(8, 1, 1, "256 rows x t tokens: half the activations in shared memory, where it is small"),
    Tile(2, 4, 1, "64 rows x 4 t tokens: for few output features"),
    Tile(4, 1, 1, "128 rows x t tokens, four warps: two CTAs a multiprocessor"),
    Tile(2, 2, 1, "64 rows x 2 t tokens, four warps: more CTAs for few output features"),
    Tile(2, 1, 1, "64 rows x t tokens, two warps: most CTAs"),
)
TALL_TILES = (  # 64 rows a warp: half the reads of activations
    Tile(1, 1, 8, "64 rows, one tall warp each K group", 4),
    Tile(1, 1, 4, "64 rows, four tall warps: two CTAs a multiprocessor", 4),
    Tile(2, 1, 4, "128 rows: activations are staged half as often", 4),
    Tile(2, 1, 2, "128 rows, four tall warps", 4),
    Tile(1, 2, 4, "64 rows x 2 t tokens", 4),
    Tile(1, 2, 2, "64 rows x 2 t tokens, four tall warps", 4),
    Tile(2, 2, 2, "128 rows x 2 t tokens", 4),
    Tile(2, 2, 1, "128 rows x 2 t tokens, four tall warps", 4),
    Tile(4, 2, 1, "256 rows x 2 t tokens: for many output features", 4),
    Tile(4, 1, 1, "256 rows x t tokens: where shared memory is small", 4),
)
TALL = {
    (INT8, 1): (8, 16),
    (INT4, 1): (8, 16),
    (W16, 1): (32,),
    (W16, 0): (64,),
}  # values, rank: tokens of the kernels
SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """One launch, decided."""

    tokens: int  # of a warp
    tile: Tile
    stages: int
    splits: int
    row_tiles: int
    token_tiles: int
    shared_bytes: int
    stage_bytes: int
    resident: int  # CTAs a multiprocessor holds
    microseconds: float  # predicted, launch included
    bound: str  # what the prediction is bound by

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.row_tiles * self.token_tiles, self.splits, 1

    @property
    def block(self) -> tuple[int, int, int]:
        return self.tile.threads, 1, 1

    def describe(self) -> str:
        t = self.tile
        split = f", K split over {self.splits} CTAs" if self.splits > 1 else ""
        return (
            f"{t.rows} rows x {self.tokens * t.warp_tokens} tokens a CTA, {t.warp_inputs} K groups, "
            f"{t.threads} threads, {self.stages} stages, {self.shared_bytes} bytes shared, {self.resident} CTAs a multiprocessor{split} "
            f"({t.reason}); predicted {self.microseconds:.1f} us, bound by {self.bound}"
        )


def stage_bytes(sizes: Sizes, tile: Tile, tokens: int, M: int) -> int:
    """Of one K-block in shared memory, as `plan_stage` in csrc/cuda/plan.cuh lays it out."""
    staged = tile.warp_tokens * tokens
    rows = (staged if tokens >= 32 else min(staged, M)) + sizes.rank
    return (
        -(-(rows * TOKEN_ROW_BYTES + tile.warp_rows * tile.blocks * sizes.block_bytes) // 256) * 256
    )


def evaluate(sizes: Sizes, M: int, gpu: Gpu, tile: Tile, tokens: int, splits: int) -> Plan | None:
    """The fastest of `residencies`; None if there is none."""
    return min(
        residencies(sizes, M, gpu, tile, tokens, splits),
        key=lambda plan: plan.microseconds,
        default=None,
    )


def residencies(sizes: Sizes, M: int, gpu: Gpu, tile: Tile, tokens: int, splits: int) -> list[Plan]:
    """The plans for one, two and four CTAs a multiprocessor, as far as they fit, each with as many stages as it has room for."""
    tall, several = tile.blocks == 4, sizes.planes > 1
    registers = (TALL_REGISTERS if tall else PLANES_REGISTERS if several else REGISTERS)[tokens]
    group, found = tile.warp_inputs * stage_bytes(sizes, tile, tokens, M), []
    for resident in (1, 2, 4):
        limit = min(gpu.shared_limit, gpu.shared_total // resident - 1024)
        stages = min(MOST_STAGES, limit // group)
        fits = registers * tile.threads * resident <= 65536 and sums_bytes(tile, tokens) <= limit
        if fits and stages >= (3 if resident > 1 else 2):
            found.append(predict(sizes, M, gpu, tile, tokens, splits, stages, resident))
    return found


def sums_bytes(tile: Tile, tokens: int) -> int:
    """What a CTA's groups add at the end, in the memory of the stages."""
    return tile.warp_inputs * tokens * tile.warp_tokens * (tile.rows + 4) * 4


def predict(
    sizes: Sizes, M: int, gpu: Gpu, tile: Tile, tokens: int, splits: int, stages: int, resident: int
) -> Plan:
    """The plan with these choices and its predicted time."""
    stage = stage_bytes(sizes, tile, tokens, M)
    rows, wide = tile.rows, tokens * tile.warp_tokens
    row_tiles, token_tiles = sum(sizes.row_tiles(rows)), -(-M // wide)
    tall, several = tile.blocks == 4, sizes.planes > 1
    ctas = row_tiles * token_tiles * splits
    per_sm = -(-ctas // gpu.multiprocessors)
    at_once = min(resident, per_sm)
    k_blocks = sizes.k_blocks / splits
    weight_blocks = sum(-(-part // BLOCK_ROWS) for part in sizes.rows)
    weights = weight_blocks * sizes.k_blocks * sizes.block_bytes
    activations = 2 * M * (sizes.K + sum(sizes.rows))
    cta_bytes = k_blocks * (
        tile.warp_rows * tile.blocks * sizes.block_bytes
        + (min(M, wide) + sizes.rank) * TOKEN_ROW_BYTES
    )
    fixed, per_tile = (TALL_ISSUE if tall else PLANES_ISSUE[sizes.planes] if several else ISSUE)[
        sizes.values
    ]
    products = (
        2 if sizes.values == DENSE else 1
    ) + sizes.rank  # in units of half the dense product
    cta_mma = rows * wide * k_blocks * BLOCK_INPUTS * products / 2
    issue_warp = fixed + per_tile * (tokens // 8) * (1 + sizes.rank) / 2
    warp_reads = (
        tokens * TOKEN_ROW_BYTES + tile.blocks * sizes.block_bytes + sizes.rank * 4 * 512
    )  # v: a fragment of 512 bytes a step
    cta_shared = k_blocks * (tile.warp_rows * tile.warp_tokens * warp_reads + stage)
    busy = min(ctas, gpu.multiprocessors)
    scheduled = max(
        1.0, at_once * tile.threads / 128
    )  # warps of a scheduler, of which a multiprocessor has four
    flying = (
        busy
        * at_once
        * tile.warp_inputs
        * (stages - 1)
        * tile.warp_rows
        * tile.blocks
        * sizes.block_bytes
    )
    clock = gpu.clock * 1e3  # per microsecond
    bandwidth = gpu.bandwidth * 1e3 * BANDWIDTH_REACHED
    times = {
        "memory": (weights + activations) / bandwidth,
        "bytes in flight": weights * LATENCY_US / flying,
        "L2": per_sm * cta_bytes / (gpu.l2_port * clock),
        "shared memory": per_sm * cta_shared / (SHARED_PORT * clock * RATE_REACHED),
        "tensor cores": per_sm * cta_mma / (gpu.mma_rate * clock * RATE_REACHED),
        "issue": per_sm
        / at_once
        * k_blocks
        / tile.warp_inputs
        * issue_warp
        * (ISSUE_CYCLES * scheduled + WAIT_CYCLES)
        / clock,
    }
    extra = 0.0 if splits == 1 else REDUCE_US + 2 * splits * M * sum(sizes.rows) * 4 / bandwidth
    total = (
        sum(t**OVERLAP for t in times.values()) ** (1 / OVERLAP)
        + LAUNCH_US
        + FILL_US * -(-per_sm // resident)
        + extra
    )
    shared, bound = (
        max(sums_bytes(tile, tokens), stages * tile.warp_inputs * stage),
        max(times, key=times.__getitem__),
    )
    return Plan(
        tokens, tile, stages, splits, row_tiles, token_tiles, shared, stage, resident, total, bound
    )


@dataclass(frozen=True)
class Rebuild:
    """The weight rebuilt as a dense matrix, REBUILT_ROWS rows at a time, then cuBLAS: for so many tokens that it is faster."""

    ctas: int  # at most, of a launch
    microseconds: float  # predicted

    def describe(self) -> str:
        return f"the weight rebuilt dense, {REBUILT_ROWS} rows at a time, then cuBLAS; predicted {self.microseconds:.1f} us, bound by tensor cores"


def rebuild(sizes: Sizes, M: int, gpu: Gpu) -> Rebuild:
    blocks = sum(sizes.row_tiles(BLOCK_ROWS)) * sizes.k_blocks
    weights = sum(sizes.rows) * sizes.K
    dense = (blocks * sizes.block_bytes + 2 * weights) / (gpu.bandwidth * 1e3 * BANDWIDTH_REACHED)
    pieces = sum(sizes.row_tiles(REBUILT_ROWS))
    adapter = 2 * LAUNCH_US * pieces if sizes.adapter_steps else 0.0
    total = (
        dense
        + (LAUNCH_US + FILL_US) * pieces
        + adapter
        + dense_microseconds(sum(sizes.rows), sizes.K, M, gpu)
    )
    return Rebuild(4 * gpu.multiprocessors, total)


def dense_microseconds(N: int, K: int, M: int, gpu: Gpu) -> float:
    """What the model gives cuBLAS for a dense fp16 linear: the same fixed costs, its bytes or its products."""
    memory = 2 * (N * K + M * (N + K)) / (gpu.bandwidth * 1e3 * BANDWIDTH_REACHED)
    product = M * N * K / (gpu.multiprocessors * gpu.gemm_rate * gpu.clock * 1e3)
    return max(memory, product) + LAUNCH_US + FILL_US


@functools.lru_cache(maxsize=4096)
def choose(sizes: Sizes, M: int, gpu: Gpu) -> Plan | Rebuild:
    """The fastest plan by the model, within what the regime of M allows.

    Raises: ValueError if none fits into the device's shared memory.
    """
    if M > 64:
        return (
            rebuild(sizes, M, gpu)
            if M >= _rebuilt_from(sizes, gpu)
            else _fastest(plans(sizes, M, gpu, 1, 1), sizes, gpu)
        )
    return _fastest(plans(sizes, M, gpu, *_split(sizes, M <= 16, gpu)), sizes, gpu)


@functools.lru_cache(maxsize=1024)
def _rebuilt_from(sizes: Sizes, gpu: Gpu) -> int:
    """The tokens from which on rebuilding is the faster way: one threshold a weight, to a tenth."""
    threshold = 1 << 62
    for M in (round(65 * 1.1**n) for n in range(72, -1, -1)):  # 62036 down to 65
        fused = min(
            (plan.microseconds for plan in plans(sizes, M, gpu, 1, 1)), default=float("inf")
        )
        if sizes.values == DENSE or rebuild(sizes, M, gpu).microseconds >= fused:
            break
        threshold = M
    return threshold


def plans(sizes: Sizes, M: int, gpu: Gpu, warp_inputs: int, splits: int) -> list[Plan]:
    """Every plan for M that splits K this way."""
    widths = sizes.warp_tokens()
    tiles = [
        (tile, tokens) for tile in (SPLIT_TILES if M <= 64 else WHOLE_TILES) for tokens in widths
    ]
    tiles += [(tile, tokens) for tile in TALL_TILES for tokens in sizes.warp_tokens(tall=True)]
    # Few tokens: the smallest tile that takes all, or, with several planes, two tiles of 32. Many: warps of 32 or 64 tokens.
    smallest = min(tokens for tokens in widths if tokens >= min(M, max(widths)))
    found = []
    for tile, tokens in tiles:
        fits = tokens * tile.warp_tokens == smallest if M <= 64 else tokens >= 32
        if (
            tile.warp_inputs == warp_inputs
            and fits
            and (plan := evaluate(sizes, M, gpu, tile, tokens, splits))
        ):
            found.append(plan)
    return found


def _fastest(found: list[Plan], sizes: Sizes, gpu: Gpu) -> Plan:
    if not found:
        raise ArgumentError(f"no tile of {sizes} fits {gpu.shared_limit} bytes of shared memory")
    return min(found, key=lambda plan: plan.microseconds)


@functools.lru_cache(maxsize=1024)
def _split(sizes: Sizes, decode: bool, gpu: Gpu) -> tuple[int, int]:
    """The K groups of a CTA and the CTAs that share K, for all token counts of a regime: the fastest over its ends."""
    best: tuple[float, int, int] | None = None
    for warp_inputs in sorted({tile.warp_inputs for tile in SPLIT_TILES}, reverse=True):
        for splits in SPLITS:
            if splits > 1 and sizes.k_blocks < splits * warp_inputs:
                continue
            ends = [
                plans(sizes, M, gpu, warp_inputs, splits)
                for M in ((1, 8, 16) if decode else (32, 64))
            ]
            if all(ends):
                total = sum(min(plan.microseconds for plan in end) for end in ends)
                best = min(best or (total, warp_inputs, splits), (total, warp_inputs, splits))
    if best is None:
        raise ArgumentError(f"no tile of {sizes} fits {gpu.shared_limit} bytes of shared memory")
    return best[1:]
