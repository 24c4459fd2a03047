"""The cost model of the Hopper kernels for many tokens: what a plan of prefill.py takes.

No such kernel has been timed yet. What each resource has to do is counted: the work of the
multiprocessor with the most K blocks. The rest is what unknowns.py names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...format import ceil_div
from . import cost
from .layout import BLOCK_INPUTS, INT4, INT8, W16
from .tiles import TOKEN_ROW_BYTES
from .unknowns import Unknowns, joined

if TYPE_CHECKING:
    from .prefill import Prefill

PORT_REACHED = 0.95  # of the shared-memory port
END_INSTRUCTIONS = 40  # that a consumer warp issues to store 16 tokens of a tile

# What a consumer warp does for 16 rows x 128 inputs: SASS instructions, those of them that the ALU
# executes, and wavefronts of shared memory with one for each look-up. The first two are those of
# the sm_90a machine code, within the 10 % that tests/sass/test_sass_prefill.py allows.
ONE_WARP = {W16: (94, 34, 18), INT8: (147, 54, 12), INT4: (150, 58, 8)}
BOTH_WARP = {W16: (168, 67, 20), INT8: (219, 85, 14), INT4: (222, 89, 10)}
REBUILD_WARP = {W16: (344, 183, 93), INT8: (396, 202, 89), INT4: (399, 206, 85)}
# Of any rank and planes, with one turn of each loop over ranks. Ways that exclude each other are
# both counted, one plane's and several planes', so this is at most what is issued.
ANY_WARP = {W16: (766, 339, 109), INT8: (890, 366, 105), INT4: (892, 369, 101)}
WARP = {"one": ONE_WARP, "both": BOTH_WARP, "rebuild": REBUILD_WARP}
RANK_WARP = (40, 16, 8)  # more for each rank above the first
GROUPS_WARP = 28  # more instructions where a scale covers 32 or 64 inputs
STEPS = 4  # of 32 inputs in a K block
LOOK_UPS = 16  # in the selector table, where the weight is rebuilt
K16 = 8  # dense products of 16 inputs in a K block


def warp_work(plan: Prefill, unknowns: Unknowns) -> tuple[float, float, float]:
    """Of a consumer warp and a K block: instructions, those of the ALU, wavefronts."""
    sizes = plan.sizes
    table = ANY_WARP if plan.any_rank else WARP[plan.kind]
    instructions, alu, wavefronts = (float(n) for n in table[sizes.values])
    if sizes.values in (INT8, INT4) and sizes.group_steps < STEPS:
        instructions += GROUPS_WARP
    if plan.kind == "rebuild":
        wavefronts += LOOK_UPS * (unknowns.table_wavefronts - 1)
        instructions += (sizes.rank - 1) * RANK_WARP[0]
        alu += (sizes.rank - 1) * RANK_WARP[1]
        wavefronts += (sizes.rank - 1) * RANK_WARP[2]
    return instructions, alu, wavefronts


def clocks(plan: Prefill, unknowns: Unknowns) -> dict[str, float]:
    """The clocks of the busiest multiprocessor by what it would be busy with all the time."""
    at_once, groups, tokens = plan.at_once, plan.groups, plan.tokens
    k_blocks, ends = plan.most_k_blocks, tile_ends(plan)
    adapter = ends * plan.sizes.adapter_steps / K16  # K blocks of dense products
    instructions, alu, wavefronts = warp_work(plan, unknowns)
    # A product reads 32 bytes of each token: of 16 inputs a dense one, of 32 a sparse one, whose
    # half of the inputs takes as long.
    operand = groups * 2 * tokens
    of_x = TOKEN_ROW_BYTES * tokens / cost.SHARED_PORT  # to write a K block of it
    loads = 2 * operand + 2 * of_x if plan.kind == "both" else operand  # v * x: read and written
    weights = plan.weight_stage_bytes
    written = unknowns.copy_writes * (of_x + weights / cost.SHARED_PORT)
    port = k_blocks * (loads + written + 4 * groups * wavefronts)
    port += adapter * (operand + unknowns.copy_writes * of_x)
    products = k_blocks * (0.5 if plan.kind == "one" else 1.0) + adapter
    fetched = min(plan.M, tokens) * TOKEN_ROW_BYTES / plan.pair
    from_l2 = k_blocks * (weights + fetched) + adapter * fetched
    return {
        "L2": at_once * from_l2 / plan.gpu.l2_rate,
        "shared memory": at_once * port / PORT_REACHED,
        "tensor cores": at_once * products * plan.rows * tokens * BLOCK_INPUTS / plan.gpu.gemm_rate,
        "issue": k_blocks * instructions * _issue_clocks(plan, unknowns),
        "ALU": at_once * k_blocks * groups * 2 * alu,  # 16 lanes a scheduler
    }


def bounds(plan: Prefill, unknowns: Unknowns) -> dict[str, float]:
    """Every bound by its name, in microseconds."""
    sizes, gpu = plan.sizes, plan.gpu
    moved = sizes.stream_bytes + 2 * plan.M * (sizes.K + sizes.N)
    ctas = min(plan.clusters * plan.pair, gpu.multiprocessors * plan.at_once)
    flying = ctas * (plan.weight_stages - 1) * plan.weight_stage_bytes
    of_clocks = {name: n / cost.clocks_per_us(gpu) for name, n in clocks(plan, unknowns).items()}
    return {
        "memory": moved / cost.bytes_per_us(gpu),
        "bytes in flight": sizes.stream_bytes * cost.LATENCY_US / flying,
        **of_clocks,
    }


def tile_ends(plan: Prefill) -> int:
    """The ends of tiles that a CTA stores at most, parts of tiles too."""
    whole = ceil_div(plan.whole_tiles, plan.clusters)
    if not plan.tail_tiles:
        return whole
    return whole + (1 if plan.evenly_cut else 2)


def fixed_us(plan: Prefill, unknowns: Unknowns) -> float:
    """The launch, the start, the ends of tiles but one, and the adding of parts of tiles."""
    gpu = plan.gpu
    end = END_INSTRUCTIONS * plan.tokens / 16 * _issue_clocks(plan, unknowns)
    ends = (tile_ends(plan) - 1) * end / cost.clocks_per_us(gpu)
    return cost.LAUNCH_US + cost.FILL_US + ends + reduce_us(plan)


def reduce_us(plan: Prefill) -> float:
    """The kernel that adds parts of tiles, and its slots written and read, which stay in L2."""
    if not plan.tail_tiles:
        return 0.0
    parts = plan.clusters + (0 if plan.evenly_cut else plan.tail_tiles - 1)  # at most
    bytes_ = 2 * parts * plan.pair * plan.rows * plan.tokens * 4
    gpu = plan.gpu
    rate = gpu.multiprocessors * gpu.l2_rate * cost.clocks_per_us(gpu)
    return cost.REDUCE_US + bytes_ / rate


def microseconds(plan: Prefill, unknowns: Unknowns) -> float:
    """The predicted time: the p-norm of the bounds, and the fixed costs."""
    return joined(bounds(plan, unknowns), unknowns.overlap) + fixed_us(plan, unknowns)


def _issue_clocks(plan: Prefill, unknowns: Unknowns) -> float:
    """In which every warp of a scheduler issues one instruction."""
    return cost.ISSUE_CYCLES * plan.at_once * plan.groups + unknowns.consumer_wait
