"""The cost model of the CUDA kernels: how long a launch takes.

It knows bytes, tensor rates and issue rates. Its figures are predictions, good for ranking plans
against one another; they are no measurements. All arithmetic here is on sizes, and nothing asks a
device.

The model is a roofline with more than two roofs: a launch takes about the largest of six bounds,
joined by a p-norm, and some fixed costs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ...format import ceil_div
from .gpus import Gpu
from .layout import BLOCK_INPUTS, DENSE, INT4, INT8, W16
from .measured import MeasuredRow
from .tiles import (
    COLUMNS,
    FEW,
    MANY,
    NARROW,
    REBUILD,
    TOKEN_ROW_BYTES,
    WIDE,
    CudaSizes,
    Tile,
    columns_bytes,
    factors_bytes,
    rings,
    stage_bytes,
    sums_bytes,
)
from .unknowns import BEST, Unknowns, assumed, joined

BAND = 8  # token tiles side by side in a grid; kBand of csrc/cuda/params.h
SHARED_PORT = 128  # bytes per clock of one multiprocessor's shared memory
SCHEDULERS = 4  # of a multiprocessor
V_FRAGMENT_BYTES, STEPS = 512, 4  # A warp reads one fragment of V for each step of 32 inputs.
# These constants were fitted by benchmarks/fit_plans.py to 1477 launches timed on an H100
# (benchmarks/results/plans-h100.csv), in the device's own clocks. The model takes other GPUs to
# behave alike.
BANDWIDTH_REACHED = 0.86  # of the datasheet's memory bandwidth
RATE_REACHED = 0.85  # of the tensor and shared-memory rates
ISSUE_CYCLES = 1.38  # that a scheduler takes per instruction, when it has warps to choose from
WAIT_CYCLES = 2.13  # more until the same warp may issue again; several warps overlap them
OVERLAP = 6  # the p of the p-norm that joins the bounds: nearly their maximum
LAUNCH_US = 1.09  # of a kernel in a graph
FILL_US = 1.73  # per wave of CTAs: from first byte to first product, its reduction and store
REDUCE_US = 1.55  # of the kernel that adds K-splits
SUMS_IN_L2 = 32 << 20  # bytes of partial sums that are taken to be still there when they are added
LATENCY_US = 0.8  # of memory under load: bytes in flight = bandwidth x latency
# The loops for up to 16 tokens are newer than those measurements, and nothing is known of them but
# their machine code. FILL_US was fitted to kernels with 368 instructions before their first copy,
# five divisions among them, where now are at most 85 and no division, and that divided again at
# their end. It is an assumption that this saves so much of every launch.
DECODE_SAVES_US = 0.7
# The fit counted instructions that did not run: of 357 in the loop for eight tokens 320 with one
# token. The newer loops run all that is counted, so each is taken to last so much longer.
DECODE_ISSUE = 1.12

# SASS instructions that a warp issues for 32 rows x 128 inputs (4096 weights). They are counted in
# the main loops of the sm_90a cubin by `python tests/sass/counter.py`; tests/sass/test_sass.py
# holds them within 10 %.
NARROW_ISSUE = {  # by sign planes, 0 for a rank of 0; as many for every number of tokens and ranks
    0: {W16: 48, INT8: 119, INT4: 122},
    1: {W16: 145, INT8: 211, INT4: 215},
    2: {W16: 158, INT8: 239, INT4: 243},
    3: {W16: 212, INT8: 289, INT4: 293},
}
WIDE_ISSUE = {  # 16 tokens, at most one rank
    0: {W16: 77, INT8: 154, INT4: 158, DENSE: 107},
    1: {W16: 220, INT8: 296, INT4: 300},
    2: {W16: 233, INT8: 325, INT4: 329},
    3: {W16: 285, INT8: 375, INT4: 379},
}
ANY_ISSUE = {  # 8 tokens of any rank: (fixed, for each product of 8 sign columns), by sign planes
    1: {W16: (132, 50), INT8: (215, 50), INT4: (225, 50)},
    2: {W16: (145, 50), INT8: (237, 50), INT4: (238, 50)},
    3: {W16: (197, 50), INT8: (294, 50), INT4: (288, 50)},
}
# More where a scale covers 32 or 64 inputs, for each 8 columns of kept values.
GROUPS_ISSUE = 60
# The loop for many tokens: (fixed, per 8 tokens).
ISSUE = {W16: (193, 60), INT8: (270, 68), INT4: (243, 76), DENSE: (103, 96)}
PLANES_ISSUE = {  # by sign planes, of rank 1
    2: {W16: (239, 53), INT8: (323, 61), INT4: (326, 61)},
    3: {W16: (286, 54), INT8: (370, 61), INT4: (370, 62)},
}
TALL_ISSUE = {W16: (330, 71)}  # for 64 rows x 128 inputs
# The loop that rebuilds the weight, counted for sm_80: (fixed, per 8 tokens). Those of any rank and
# number of planes with the first rank, and with all that planes of one number or another need.
REBUILD_ISSUE = {W16: (427, 28.9), INT8: (552, 28.5), INT4: (555, 28.6)}
REBUILD_ANY_ISSUE = {W16: (793, 30.1), INT8: (926, 29.8), INT4: (920, 30.5)}
REBUILD_RANK_ISSUE = 80  # more for each rank above the first
LOOK_UPS = 32  # of a warp in the table of selectors, for each K block
ROW_OF_V_BYTES = STEPS * 2 * SHARED_PORT  # that such a warp reads of shared memory: two wavefronts


def bytes_per_us(gpu: Gpu) -> float:
    """The memory bandwidth that kernels reach."""
    return gpu.bandwidth * 1e3 * BANDWIDTH_REACHED


def clocks_per_us(gpu: Gpu) -> float:
    return gpu.clock * 1e3


@dataclass(frozen=True)
class Plan:
    """One launch of a linear's kernel: its sizes, its GPU, the choices, and their predicted time.

    measured: the row of measured.json by which it was chosen, None where the cost model chose.

    Every `*_us` is a bound: what the launch would take if nothing else held it up. The work is
    that of the multiprocessor with the most CTAs.
    """

    sizes: CudaSizes
    M: int  # tokens
    gpu: Gpu
    tile: Tile
    tokens: int  # of a warp
    splits: int  # CTAs that share K
    stages: int  # K blocks in a ring
    resident: int  # CTAs that a multiprocessor holds at once
    measured: MeasuredRow | None = None

    @property
    def split(self) -> tuple[int, int]:
        """The K groups of a CTA and the CTAs that share K."""
        return self.tile.warp_inputs, self.splits

    @property
    def cta_tokens(self) -> int:
        return self.tokens * self.tile.warp_tokens

    @functools.cached_property
    def row_tiles(self) -> int:
        return sum(self.sizes.row_tiles(self.tile.rows))

    @property
    def token_tiles(self) -> int:
        return ceil_div(self.M, self.cta_tokens)

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """CTAs along x: the token tiles of a band, which share a weight tile while it is in L2;
        y: row tiles; z: the splits of K or, where K is not split, the bands."""
        bands = ceil_div(self.token_tiles, BAND)
        assert bands == 1 or self.splits == 1
        return min(BAND, self.token_tiles), self.row_tiles, self.splits * bands

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads: lanes, warps of a K group, K groups."""
        return 32, self.tile.warp_rows * self.tile.warp_tokens, self.tile.warp_inputs

    @functools.cached_property
    def stage_bytes(self) -> int:
        return stage_bytes(self.sizes, self.tile, self.tokens)

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA: u; rings and columns of x, and later the groups' sums in their
        place."""
        held = columns_bytes(self.sizes, self.tile, self.tokens, self.splits)
        held += rings(self.tile) * self.stages * self.stage_bytes
        sums = sums_bytes(self.sizes, self.tile, self.tokens)
        return factors_bytes(self.sizes, self.tile) + max(sums, held)

    @functools.cached_property
    def ctas(self) -> int:
        return self.row_tiles * self.token_tiles * self.splits

    @functools.cached_property
    def ctas_per_multiprocessor(self) -> int:
        return ceil_div(self.ctas, self.gpu.multiprocessors)

    @property
    def at_once(self) -> int:
        """CTAs that a multiprocessor works on at the same time."""
        return min(self.resident, self.ctas_per_multiprocessor)

    @property
    def waves(self) -> int:
        return ceil_div(self.ctas_per_multiprocessor, self.resident)

    @property
    def cta_k_blocks(self) -> float:
        return self.sizes.k_blocks / self.splits

    @property
    def warp_k_blocks(self) -> float:
        """K blocks of the warp that has most."""
        if self.tile.loop in (MANY, REBUILD):
            return self.cta_k_blocks / self.tile.warp_inputs
        return ceil_div(ceil_div(self.sizes.k_blocks, self.splits), self.tile.warp_inputs)

    @property
    def column_tiles(self) -> tuple[int, int]:
        """How many products of 8 columns a warp makes of the kept values, and of the signs."""
        rank, tokens = self.sizes.rank, self.tokens
        if self.tile.loop == REBUILD:
            return tokens // COLUMNS, 0
        if self.tile.loop == NARROW:
            return 1, min(1, rank)
        if self.tile.loop == WIDE and rank <= 1:
            tokens = self.sizes.wide_tokens  # Those that do not exist are multiplied, too.
        elif self.tile.loop == WIDE:
            return 1, ceil_div(tokens * rank, COLUMNS)
        return tokens // COLUMNS, tokens * rank // COLUMNS

    @property
    def cta_weight_bytes(self) -> int:
        """Bytes of the stream that a CTA reads per K block."""
        return self.tile.row_pairs * self.sizes.block_bytes

    def memory_us(self) -> float:
        activations = 2 * self.M * (self.sizes.K + self.sizes.N)
        return (self.sizes.stream_bytes + activations) / bytes_per_us(self.gpu)

    def bytes_in_flight_us(self) -> float:
        """Memory answers after LATENCY_US, and only so many bytes are asked for meanwhile."""
        busy = min(self.ctas, self.gpu.multiprocessors)
        ahead = self.tile.warp_inputs * (self.stages - 1)  # K blocks of a CTA
        flying = busy * self.at_once * ahead * self.cta_weight_bytes
        return self.sizes.stream_bytes * LATENCY_US / flying

    def l2_us(self) -> float:
        activations = (min(self.M, self.cta_tokens) + self.sizes.rank) * TOKEN_ROW_BYTES
        cta_bytes = self.cta_k_blocks * (self.cta_weight_bytes + activations)
        port = self.gpu.l2_rate if self.tile.loop == REBUILD else self.gpu.l2_port
        return self.ctas_per_multiprocessor * cta_bytes / (port * clocks_per_us(self.gpu))

    def shared_memory_us(self, unknowns: Unknowns) -> float:
        """Every stage is written once, and read by each warp that needs it."""
        weight = self.tile.row_tiles * self.sizes.block_bytes // 2
        if self.tile.loop == NARROW:
            read = COLUMNS * TOKEN_ROW_BYTES + weight
        else:
            V = self.sizes.rank * STEPS * V_FRAGMENT_BYTES
            if self.tile.loop == REBUILD:
                table = LOOK_UPS * unknowns.table_wavefronts * SHARED_PORT
                V = self.sizes.rank * ROW_OF_V_BYTES + round(table)
            read = self.tokens * TOKEN_ROW_BYTES + weight + V
        warps = self.tile.warp_rows * self.tile.warp_tokens
        written = rings(self.tile) // self.tile.warp_inputs * self.stage_bytes
        cta_bytes = self.cta_k_blocks * (warps * read + written)
        rate = SHARED_PORT * clocks_per_us(self.gpu) * RATE_REACHED
        return self.ctas_per_multiprocessor * cta_bytes / rate

    def tensor_cores_us(self) -> float:
        """A 2:4 product takes half of a dense one, and so does one of signs."""
        kept, signs = self.column_tiles
        dense = self.sizes.values == DENSE or self.tile.loop == REBUILD
        halves = COLUMNS * ((2 if dense else 1) * kept + signs)
        rows = self.tile.rows * self.tile.warp_tokens * self.cta_k_blocks * BLOCK_INPUTS
        rate = self.gpu.mma_rate * clocks_per_us(self.gpu) * RATE_REACHED
        return self.ctas_per_multiprocessor * (rows * halves / 2) / rate

    def issue_us(self) -> float:
        """The instructions that the warps of a scheduler issue, and what a lone warp waits."""
        warps = max(1.0, self.at_once * self.tile.warps / SCHEDULERS)
        rounds = self.ctas_per_multiprocessor / self.at_once
        cycles = self._warp_instructions() * (ISSUE_CYCLES * warps + WAIT_CYCLES)
        return rounds * self.warp_k_blocks * cycles / clocks_per_us(self.gpu)

    def _warp_instructions(self) -> float:
        """SASS instructions that a warp issues per K block."""
        values, rank = self.sizes.values, self.sizes.rank
        planes = self.sizes.planes if rank else 0
        if self.tile.loop == REBUILD:
            any_rank = rank > 1 or planes > 1
            fixed, per_token_tile = (REBUILD_ANY_ISSUE if any_rank else REBUILD_ISSUE)[values]
            fixed += REBUILD_RANK_ISSUE * (rank - 1)
            return fixed + per_token_tile * (self.tokens // COLUMNS)
        if self.tile.loop != MANY:
            return DECODE_ISSUE * self._decode_instructions(planes)
        if self.tile.tall:
            table = TALL_ISSUE
        else:
            table = PLANES_ISSUE[planes] if planes > 1 else ISSUE
        fixed, per_token_tile = table[values]
        return fixed + per_token_tile * (self.tokens // COLUMNS) * (1 + rank) / 2

    def _decode_instructions(self, planes: int) -> float:
        kept, signs = self.column_tiles
        values, grouped = self.sizes.values, self.sizes.group_steps < STEPS
        more = GROUPS_ISSUE * kept if grouped and values in (INT8, INT4) else 0
        if self.tile.loop == WIDE and self.sizes.rank > 1:
            fixed, per_tile = ANY_ISSUE[planes][values]
            return fixed + per_tile * signs + more
        table = NARROW_ISSUE if self.tile.loop == NARROW else WIDE_ISSUE
        return table[planes][values] + more

    @functools.cached_property
    def bounds(self) -> dict[str, float]:
        """Every bound by its name, in microseconds."""
        return self._bounds(assumed(OVERLAP))

    def _bounds(self, unknowns: Unknowns) -> dict[str, float]:
        return {
            "memory": self.memory_us(),
            "bytes in flight": self.bytes_in_flight_us(),
            "L2": self.l2_us(),
            "shared memory": self.shared_memory_us(unknowns),
            "tensor cores": self.tensor_cores_us(),
            "issue": self.issue_us(),
        }

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        return max(self.bounds, key=self.bounds.__getitem__)

    def columns_us(self) -> float:
        """What the narrow loop's x and V take a CTA longer to fetch than its first weights."""
        if self.tile.loop != NARROW:
            return 0.0
        fetched = self.cta_k_blocks * (self.tokens + self.sizes.rank) * TOKEN_ROW_BYTES
        rate = self.gpu.l2_port * clocks_per_us(self.gpu)
        return max(0.0, self.at_once * fetched / rate - LATENCY_US)

    def fixed_us(self) -> float:
        """The launch, the waves' starts and ends, and the kernel that adds K-splits."""
        started = LAUNCH_US + (FILL_US + self.columns_us()) * self.waves
        if self.tile.loop not in (MANY, REBUILD):
            started -= DECODE_SAVES_US
        if self.splits == 1:
            return started
        partial_sums = 2 * self.splits * self.M * self.sizes.N * 4  # bytes written and read, fp32
        rate = bytes_per_us(self.gpu)
        newer = self.M > FEW or self.tile.loop == REBUILD  # than the fit to an H100
        if newer and partial_sums <= 2 * SUMS_IN_L2:
            rate = self.gpu.multiprocessors * self.gpu.l2_rate * clocks_per_us(self.gpu)
        return started + REDUCE_US + partial_sums / rate

    @functools.cached_property
    def microseconds(self) -> float:
        """The predicted time of the launch: the p-norm of the bounds, and the fixed costs."""
        return joined(self.bounds, OVERLAP) + self.fixed_us()

    @property
    def range_us(self) -> tuple[float, float]:
        """The predicted time at both ends: of the loop that rebuilds the weight, which nobody has
        timed, with all that is not known for the best and for the worst; otherwise twice the
        same."""
        if self.tile.loop != REBUILD:
            return self.microseconds, self.microseconds
        best = joined(self._bounds(BEST), BEST.overlap) + self.fixed_us()
        return min(best, self.microseconds), self.microseconds

    def describe(self) -> str:
        """The choices, their reason, the prediction and who chose, in words."""
        tile, split, by = self.tile, "", "chosen by the cost model"
        if self.splits > 1:
            split = f", K split over {self.splits} CTAs"
        if self.measured is not None:
            by = self.measured.describe()
        return (
            f"{tile.loop} loop, {tile.rows} rows x {self.cta_tokens} tokens a CTA, "
            f"{tile.warp_inputs} K groups, {tile.threads} threads, {self.stages} stages, "
            f"{self.shared_bytes} bytes shared, {self.resident} CTAs a multiprocessor{split} "
            f"({tile.reason}); predicted {in_words(self.range_us)}, bound by {self.bound}; {by}"
        )


def in_words(range_us: tuple[float, float]) -> str:
    """Both ends of a prediction, or the one that there is."""
    low, high = (f"{us:.1f}" for us in range_us)
    return f"{high} us" if low == high else f"{low} to {high} us"


# At so many tokens cuBLAS on a rebuilt weight is faster. The rows at a time bound the memory that
# takes: 4096 cost an H100 up to 10 % more time, all at once 1 to 4 % less.
REBUILT_ROWS = 8192


@dataclass(frozen=True)
class Rebuild:
    """The weight rebuilt dense, REBUILT_ROWS rows at a time, and multiplied by cuBLAS."""

    max_ctas: int  # of a launch that rebuilds rows
    microseconds: float  # predicted

    @property
    def range_us(self) -> tuple[float, float]:
        """Both ends of the prediction, which are the same."""
        return self.microseconds, self.microseconds

    def describe(self) -> str:
        """The way and the prediction in words."""
        return (
            f"the weight rebuilt dense, {REBUILT_ROWS} rows at a time, then cuBLAS; "
            f"predicted {self.microseconds:.1f} us, bound by tensor cores"
        )


def rebuild(sizes: CudaSizes, M: int, gpu: Gpu) -> Rebuild:
    """What rebuilding takes for M tokens."""
    pieces = sum(sizes.row_tiles(REBUILT_ROWS))
    rebuilding = (sizes.stream_bytes + 2 * sizes.N * sizes.K) / bytes_per_us(gpu)
    adapter = _rebuilt_adapter_us(sizes, M, gpu, pieces) if sizes.adapter_steps else 0.0
    started = (LAUNCH_US + FILL_US) * pieces
    product = dense_microseconds(sizes.N, sizes.K, M, gpu)
    return Rebuild(4 * gpu.multiprocessors, rebuilding + started + adapter + product)


def _rebuilt_adapter_us(sizes: CudaSizes, M: int, gpu: Gpu, pieces: int) -> float:
    """What the adapter of a rebuilt weight takes: z = x Q and z P^T, to which each piece's product
    is added, or from K tokens on P Q added to each piece."""
    if M >= sizes.K:
        return 2 * LAUNCH_US * pieces + 4 * sizes.N * sizes.K / bytes_per_us(gpu)
    z = 2 * (M + sizes.adapter().N) * sizes.K / bytes_per_us(gpu)
    return z + FILL_US + LAUNCH_US * (1 + len(sizes.rows)) + 4 * M * sizes.N / bytes_per_us(gpu)


def dense_microseconds(N: int, K: int, M: int, gpu: Gpu) -> float:
    """The predicted time of cuBLAS for a dense fp16 linear: fixed costs, and bytes or products."""
    memory = 2 * (N * K + M * (N + K)) / bytes_per_us(gpu)
    product = M * N * K / (gpu.multiprocessors * gpu.gemm_rate * clocks_per_us(gpu))
    return max(memory, product) + LAUNCH_US + FILL_US
