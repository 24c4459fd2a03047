"""backends/cuda/plan.py: whatever the layer, the device and the number of tokens, the plan fits,
covers and keeps its promises.

Arithmetic alone. The sizes of shared memory are derived here once more from the text of
csrc/cuda.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairwise import grid
from prefill_checks import check_prefill

from slab_kernels.backends.base import LinearProblem
from slab_kernels.backends.cuda import BACKEND, cost, gpus, plan
from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda.cost import Plan, Rebuild
from slab_kernels.backends.cuda.gpus import GPUS, gpu_named
from slab_kernels.backends.cuda.launch import kernel_names, launches
from slab_kernels.backends.cuda.layout import DENSE, INT4, INT8, W16
from slab_kernels.backends.cuda.plan import choose
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.backends.cuda.tiles import (
    DECODE_REGISTERS,
    MANY,
    NARROW,
    NARROW_TILES,
    PLANES_REGISTERS,
    REBUILD,
    REBUILD_REGISTERS,
    REBUILD_SPLIT_TILES,
    REBUILD_WHOLE_TILES,
    REGISTERS,
    SPLIT_TILES,
    TALL,
    TALL_REGISTERS,
    TALL_TILES,
    WHOLE_TILES,
    WIDE,
    WIDE_TILES,
    CudaSizes,
)
from slab_kernels.bench.layer_shapes import MODELS, layers

CUDA = Path(__file__).resolve().parents[3] / "csrc/cuda"
SHAPES = sorted({shape for name in MODELS for shape in layers(name)})
# The shapes that the design is measured by: Llama-2-7B, Llama-3-8B, 70B.
DESIGN = sorted(
    {shape for name in ("llama-2-7b", "llama-3-8b", "llama-3-70b") for shape in layers(name)}
)
VALUES = ((W16, 4), (INT8, 4), (INT4, 1))  # and steps of 32 inputs that a scale covers
RANKS = (0, 1, 2, 16)
SIGNS = ((0, 1), (1, 1), (2, 1), (16, 1), (1, 2), (1, 3), (2, 3), (16, 2))  # ranks and sign planes
TOKENS = (1, 4, 5, 8, 9, 16, 17, 33, 64, 65, 1000, 4096)  # both sides of every tile and regime
GPU_NAMES = [gpu.name for gpu in GPUS]
A100, H200 = GPUS[0], GPUS[4]


def regime(M: int) -> int:
    return 0 if M <= 16 else 1 if M <= 64 else 2


def split(chosen: Plan | Prefill | Rebuild, M: int) -> tuple | None:
    """What decides in which order the products of a token's result are added, up to 64 tokens."""
    if M > 64 or isinstance(chosen, Rebuild):
        return None
    loop = "decode" if M <= 16 else chosen.loop if isinstance(chosen, Prefill) else chosen.tile.loop
    return loop, *chosen.split


# ---- every plan


def constants() -> dict[str, int]:
    """Numbers of params.h that decide sizes, read from its text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(CUDA.iterdir()))
    found = {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", text)}
    values = re.search(
        r"values == kW16 \? (\d+) : values == kI8 \? (\d+) : values == kI4 \? (\d+) : (\d+);", text
    )
    metadata = re.search(
        r"stream_metadata_bytes\(int values\) { return values == kDense \? 0 : (\d+); }", text
    )
    # What the test below spells out in Python, as it stands in the sources; whoever edits it looks
    # here too.
    flat = re.sub(r"\s+", "", text)
    for formula in FORMULAS:
        assert formula.replace(" ", "") in flat, f"csrc/cuda no longer says {formula!r}"
    return (
        found | {f"bytes{i}": int(values[i + 1]) for i in range(4)} | {"metadata": int(metadata[1])}
    )


FORMULAS = (
    # narrow.cuh, narrow_columns.cuh, wide_stage.cuh, decode_end.cuh
    "constexpr int kColumnRow = kTokenRow + 16;",
    "return tile_tokens * (1 + rank) * kColumnRow;",
    "kLeast = 8 * kTokenRow * Traits::kTokenTiles;",
    "weights_at = v_at + (Traits::kSigns ? params.rank * kTokenRow : 0);",
    "bytes = max(kLeast, (weights_at + params.warp_rows * block_bytes + 127) & ~127u);",
    "return params.warp_rows * kBlockRows + 4;",
    "group_floats = params.tile_tokens * (1 + params.rank) * pitch;",
    # the loop for many tokens
    "kTokenRow = 2 * kBlockInputs",
    "v_rows_at = staged * kTokenRow",
    "weights_at = layout.v_rows_at + rank * kTokenRow",
    "stage_bytes = (layout.weights_at + weight_bytes + 255) / 256 * 256",
    "begin = shared + table_bytes + role.group * params.stages * ring.stage_bytes",
    "pitch = rows + 4",
    "(role.group * all_tokens + role.token_warp * Traits::kWarpTokens) * pitch +",
    "split * params.k_share + min(split, params.k_more)",
    # the one that rebuilds the weight
    "constexpr int kPairWords = 4 * kBlockRows;",
    "return kSelectorBytes + params.warp_rows * (1 + params.rank) * kPairWords;",
)


def test_the_kernels_have_the_tiles_that_plans_count_on():
    """Row pairs, tokens and planes of each row of the table in linear.cu, against its name."""
    rows = re.findall(
        r"KERNEL\((\w+), +(\w+), +k\w+, +k\w+, +(\w+), +(\d), (\d)\)",
        (CUDA / "linear.cu").read_text(encoding="utf-8"),
    )
    assert len(rows) == 12 + 2 + 2 + 9
    planes_of = {"two": "2", "three": "3", "any": "kPlanesAny"}
    for family, name, planes, row_pairs, token_tiles in rows:
        *which, tokens = name.split("_")
        assert int(tokens.removeprefix("t")) == 8 * int(token_tiles), name
        assert int(row_pairs) == (2 if family == "tall" else 1), name  # row_tiles / 2 of a Tile
        assert planes == (planes_of[which[-1]] if family == "planes" else "1"), name


@functools.cache
def shared_bytes_of(
    sizes: CudaSizes, tokens: int, tile: plan.Tile, stages: int, splits: int
) -> tuple[int, int]:
    """Of a stage, and all that a CTA touches."""
    c = _constants()
    integers = sizes.values in (INT8, INT4)
    block = c["kBlockTiles"] * c[f"bytes{sizes.values}"]
    block += 0 if sizes.values == DENSE else c["metadata"]
    block += sizes.planes * c["kSignBytes"] if sizes.rank else 0
    block += c["kSteps"] // sizes.group_steps * c["kScaleBytes"] if integers else 0
    rows, pitch = tile.row_tiles * 16 * tile.warp_rows, tile.row_tiles * 16 * tile.warp_rows + 4
    staged = tile.warp_tokens * tokens
    if tile.loop == NARROW:  # narrow.cuh: u, rings of warps and columns; in their place the sums
        warps, columns = tile.warp_rows * tile.warp_inputs, tokens * (1 + sizes.rank)
        most_k_blocks = -(-sizes.k_blocks // splits)
        held = warps * stages * block + most_k_blocks * columns * (2 * c["kBlockInputs"] + 16)
        sums = tile.warp_inputs * columns * pitch * 4
        return block, 4 * rows * sizes.rank + max(held, sums)
    stage = (staged + sizes.rank) * 2 * c["kBlockInputs"] + rows // 32 * block
    unit = 128 if tile.loop == WIDE else 256
    stage = (stage + unit - 1) // unit * unit
    if tile.loop == WIDE:  # wide_stage.cuh: tokens that do not exist are read, too
        stage = max(stage, (16 if sizes.rank <= 1 else 8) * 2 * c["kBlockInputs"])
    ring, sums = tile.warp_inputs * stages * stage, tile.warp_inputs * staged * pitch * 4
    if tile.loop == WIDE:
        return stage, 4 * rows * sizes.rank + max(ring, sums * (1 + sizes.rank))
    tables = c["kSelectorBytes"] + 4 * rows * (1 + sizes.rank) if tile.loop == REBUILD else 0
    return stage, tables + max(ring, sums)


_constants = functools.cache(constants)


def check(chosen: Plan | Prefill | Rebuild, sizes: CudaSizes, M: int, gpu: plan.Gpu) -> None:
    if isinstance(chosen, Prefill):
        check_prefill(chosen, sizes, M, gpu)
        return
    where = (sizes, M, gpu.name, chosen)
    if isinstance(chosen, Rebuild):
        assert M > 64 and sizes.values != DENSE and chosen.max_ctas == 4 * gpu.multiprocessors, (
            where
        )
        return
    tile = chosen.tile
    threads = 32 * tile.warp_rows * tile.warp_tokens * tile.warp_inputs
    assert chosen.block == (32, tile.warp_rows * tile.warp_tokens, tile.warp_inputs), where
    assert 2 <= chosen.stages <= 4 and chosen.resident >= 1, where
    assert chosen.shared_bytes <= gpu.shared_limit, where
    assert (chosen.shared_bytes + 1024) * chosen.resident <= gpu.shared_total, where
    assert (chosen.stage_bytes, chosen.shared_bytes) == shared_bytes_of(
        sizes, chosen.tokens, tile, chosen.stages, chosen.splits
    ), where
    if M <= 16:
        check_decoding(chosen, where)
        assert threads <= 512 and DECODE_REGISTERS * threads * chosen.resident <= 65536, where
    else:
        check_many(chosen, where)
        family = PLANES_REGISTERS if sizes.planes > 1 else REGISTERS
        registers = (TALL_REGISTERS if tile.tall else family).get(chosen.tokens)
        registers = REBUILD_REGISTERS[chosen.tokens] if tile.loop == REBUILD else registers
        assert threads <= 256 and registers * threads * chosen.resident <= 65536, where
    # tiles cover rows and tokens and none is empty
    rows, wide = 16 * tile.row_tiles * tile.warp_rows, chosen.tokens * tile.warp_tokens
    assert chosen.row_tiles == sum(-(-part // rows) for part in sizes.rows), where
    assert chosen.token_tiles * wide >= M > (chosen.token_tiles - 1) * wide, where
    x, y, z = chosen.grid
    bands = z if chosen.splits == 1 else 1
    assert x <= 8 and x * bands >= chosen.token_tiles > x * (bands - 1), where
    assert y == chosen.row_tiles and (bands == z or z == chosen.splits), where
    # the shares of K, as LinearParams has them: none is empty, the first have one K block more
    assert min(sizes.k_blocks // chosen.splits, 1 if chosen.splits > 1 else 99) <= sizes.k_blocks
    assert chosen.splits == 1 or sizes.k_blocks // chosen.splits >= tile.warp_inputs, where
    fixed = cost.LAUNCH_US + cost.FILL_US - (cost.DECODE_SAVES_US if M <= 16 else 0)
    assert fixed < chosen.microseconds < 1e6, where


def check_decoding(chosen: Plan, where: tuple) -> None:
    """The narrow loop where its columns fit one product, else the wide one; never a tile of more
    tokens than its kernels hold."""
    sizes, tile, M = chosen.sizes, chosen.tile, chosen.M
    assert (tile.row_tiles, tile.warp_tokens) == (2, 1) and tile.loop != MANY, where
    if tile.loop == NARROW:
        assert chosen.tokens == M and M * (1 + sizes.rank) <= 8 and sizes.values != DENSE, where
    elif sizes.rank <= 1:
        assert chosen.tokens == M, where
    else:
        assert chosen.tokens == min(M, 8, 32 // sizes.rank), where
        assert chosen.token_tiles <= 8, where  # one band, so that K may be split


def check_many(chosen: Plan, where: tuple) -> None:
    sizes, tile, M = chosen.sizes, chosen.tile, chosen.M
    assert M <= 64 or tile.warp_inputs == 1, where
    if M > 64 and chosen.splits > 1:  # in one band, and the memory of their sums is bounded
        waves = 0.5 if sizes.values == DENSE and chosen.gpu.capability != (9, 0) else 4
        assert chosen.token_tiles <= 8 and chosen.ctas <= waves * chosen.gpu.multiprocessors, where
    if tile.loop == REBUILD:
        assert sizes.rank and chosen.gpu.capability != (9, 0) and tile.row_tiles == 2, where
        assert chosen.tokens in ((64,) if M <= 64 else (64, 128)), where
        assert M > 64 or chosen.token_tiles == 1, where
        return
    assert tile.loop == MANY, where
    # one tile takes all tokens up to 64; with several planes, whose warps hold no 64, two of 32
    assert M > 64 or chosen.token_tiles == (2 if sizes.planes > 1 and M > 32 else 1), where
    # 64 rows a warp: not every kernel is compiled for them
    assert tile.row_tiles == 2 or (
        tile.row_tiles == 4 and chosen.tokens in TALL[sizes.values, sizes.rank]
    ), where
    assert sizes.planes == 1 or tile.row_tiles == 2, where


@grid(**{
    "name": GPU_NAMES,
    "N, K": SHAPES,
    "rank, planes": SIGNS,
    "values, group_steps": VALUES,
})  # fmt: skip
def test_every_layer_of_the_known_models(name, N, K, rank, planes, values, group_steps):
    """Fits, covers, and within a regime splits K in one way: a token's result depends on no
    other token."""
    gpu, sizes = gpu_named(name), CudaSizes(K, (N,), values, group_steps, rank, 0, planes)
    ways = [set(), set(), set()]
    for M in TOKENS:
        chosen = choose(sizes, M, gpu)
        check(chosen, sizes, M, gpu)
        ways[regime(M)].add(split(chosen, M))
    assert max(map(len, ways)) <= 1, (sizes, name, ways)


@pytest.mark.parametrize("gpu", GPUS, ids=GPU_NAMES)
def test_every_adapter(gpu):
    """z = x Q, a dense weight of few rows that comes first: rank 64, alone and for three fused
    parts; rank 1 rounds up to 16."""
    for K, parts, steps in itertools.product(sorted({K for _, K in SHAPES}), (1, 3), (1, 4)):
        sizes = CudaSizes(K, (4096,) * parts, INT4, 4, 1, steps).adapter()
        assert sizes == CudaSizes(K, (16 * steps * parts,), DENSE, 4, 0, 0)
        ways = [set(), set(), set()]
        for M in TOKENS:
            chosen = choose(sizes, M, gpu)
            check(chosen, sizes, M, gpu)
            ways[regime(M)].add(split(chosen, M))
        assert [len(way) for way in ways] == [1, 1, 1], (sizes, gpu.name, ways)


@pytest.mark.parametrize(
    "name, most", [("A100", 0.5), ("RTX 4090", 0.5), ("H100", plan.MOST_WAVES)]
)
def test_an_adapter_of_few_tiles_shares_its_inputs(name, most):
    """Above 64 tokens, too, or a few CTAs would read all of x. Where each part is read by every CTA
    of the linear there are no more than half as many as multiprocessors."""
    gpu = gpu_named(name)
    for K, steps, M in itertools.product((4096, 14336), (1, 4), (65, 128, 256, 1024, 4096)):
        chosen = choose(CudaSizes(K, (4096,), INT4, 4, 1, steps).adapter(), M, gpu)
        assert chosen.splits == 1 or chosen.ctas <= most * gpu.multiprocessors
        assert M > 256 or chosen.splits > 4, (K, steps, M)


@grid(**{
    "name": GPU_NAMES,
    "rows": ((1,), (33,), (100, 24, 37), (1 << 20,), (5, 4096, 5, 7)),
    "K": (1, 128, 129, 1160),
    "values, rank, planes": (
        (W16, 1, 1), (INT4, 0, 1), (INT8, 16, 1), (INT4, 1, 3), (W16, 16, 2),
    ),
})  # fmt: skip
def test_sizes_that_no_model_has(name, rows, K, values, rank, planes):
    """One input, one row, K of one block, parts that are no multiple of anything, far more rows
    than a tile, every M up to 17 and some more."""
    gpu, sizes = gpu_named(name), CudaSizes(K, rows, values, 2, rank, 2, planes)
    ways = [set(), set(), set()]
    for M in (*range(1, 18), *range(20, 65, 11), 64, 65, 4095):
        check(chosen := choose(sizes, M, gpu), sizes, M, gpu)
        ways[regime(M)].add(split(chosen, M))
    assert max(map(len, ways)) <= 1, (sizes, ways)


@pytest.mark.parametrize("gpu", (A100, H200), ids=("A100", "H200"))
@pytest.mark.parametrize("rank, planes", [(0, 1), (1, 1), (16, 2)])
def test_row_tiles_stay_within_a_grid(gpu, rank, planes):
    """A grid has at most 65535 CTAs along y: so many rows take tiles of more rows."""
    for rows, (values, steps), M in itertools.product(
        ((32 * 65535 + 1,), (3 << 20, 1 << 21), (128 * 65535,)), VALUES, (1, 4, 16, 33)
    ):
        sizes = CudaSizes(128, rows, values, steps, rank, 0, planes)
        check(chosen := choose(sizes, M, gpu), sizes, M, gpu)
        assert chosen.grid[1] <= 65535, (sizes, M, gpu.name)
    with pytest.raises(ValueError, match="and a grid of 65535 row tiles; use the triton backend"):
        choose(CudaSizes(128, (1 << 24,), INT4, 4, 1, 0), 1, gpu)


def test_the_tables_hold_what_the_kernels_can():
    """Powers of two (the kernels shift and mask by them), eight or sixteen warps; tall warps where
    linear.cu has their kernels."""
    few = (*SPLIT_TILES, *WHOLE_TILES, *TALL_TILES, *REBUILD_SPLIT_TILES, *REBUILD_WHOLE_TILES)
    for tile in (*few, *NARROW_TILES, *WIDE_TILES):
        numbers = (tile.warp_rows, tile.warp_tokens, tile.warp_inputs)
        assert all(n & (n - 1) == 0 for n in numbers) and tile.reason
        assert tile.threads <= (256 if tile in few else 512)
    text = (CUDA / "linear.cu").read_text()
    tall = re.findall(r"KERNEL\(tall, +(\w+)_(none|one)_t(\d+),", text)
    ranks = {"none": 0, "one": 1}
    values = {name: code for code, name in launching.VALUE_NAMES.items()}
    compiled = sorted((values[name], ranks[rank], int(tokens)) for name, rank, tokens in tall)
    assert compiled == sorted((*key, tokens) for key, many in TALL.items() for tokens in many)


def test_every_tile_for_few_tokens_is_of_use():
    """Each is chosen for some weight, with 227 KB of shared memory or with 99."""
    unseen = {*NARROW_TILES, *WIDE_TILES}
    for gpu, (N, K) in itertools.product(
        (GPUS[3], GPUS[2], A100), (*DESIGN, (64, 512), (256, 4096))
    ):
        for (values, group_steps), (rank, planes) in itertools.product(VALUES, SIGNS[1::3]):
            sizes = CudaSizes(K, (N,), values, group_steps, rank, 0, planes)
            unseen -= {choose(sizes, M, gpu).tile for M in (1, 16)}
        if not unseen:
            break
    assert unseen == set()


@pytest.mark.parametrize("gpu", [A100, GPUS[2], H200], ids=lambda gpu: gpu.name)
def test_a_weight_too_wide_for_the_narrow_loop_takes_the_wide_one(gpu):
    """Columns of x take 272 bytes a K block each: K = 28672 is too much for 99 KB, and for any
    device with four tokens."""
    for K in (4096, 28672, 1 << 17):
        sizes = CudaSizes(K, (8192,), W16, 4, 1, 0)
        loops = []
        for M in range(1, 17):
            check(chosen := choose(sizes, M, gpu), sizes, M, gpu)
            loops.append(chosen.tile.loop)
            columns = -(-sizes.k_blocks // chosen.splits) * 2 * M * 272
            assert chosen.tile.loop == WIDE or columns < gpu.shared_limit
        assert loops == sorted(loops), "narrow first"
        assert set(loops[4:]) == {WIDE}
        if K == 4096:
            assert loops[:2] == [NARROW, NARROW]
        if K == 1 << 17:
            assert set(loops) == {WIDE}


def test_few_ctas_get_sixteen_warps():
    """128 row tiles of 32 rows on 132 multiprocessors: four warps a scheduler instead of two."""
    sizes = CudaSizes(4096, (4096,), INT4, 4, 1, 0)
    for M in (1, 4, 16):
        chosen = choose(sizes, M, GPUS[3])
        assert (chosen.ctas, chosen.tile.threads) == (128, 512)


# ---- the predicted time


@grid(**{
    "name": GPU_NAMES,
    "N, K": DESIGN[::3],
    "values, group_steps": VALUES,
    "rank": (0, 1, 2),
})  # fmt: skip
def test_more_tokens_never_cost_less_within_a_regime(name, N, K, values, group_steps, rank):
    """But for a twentieth: two CTAs a multiprocessor are taken where they fit, and one with more
    stages may do better. Above 64 tokens for two fifths: there is one threshold from which on
    the weight is rebuilt, and before it whole waves of CTAs."""
    gpu, sizes = gpu_named(name), CudaSizes(K, (N,), values, group_steps, rank, 0)
    for tokens in (range(1, 17), range(17, 65), (*range(65, 600, 13), 1024, 2048, 4096)):
        times = [choose(sizes, M, gpu, by_rows=False).microseconds for M in tokens]
        allowed = 0.95 if tokens[-1] <= 64 else 0.6
        assert all(b >= allowed * a for a, b in itertools.pairwise(times)), (sizes, times)


@pytest.mark.parametrize("gpu", GPUS, ids=GPU_NAMES)
def test_decoding_is_predicted_to_beat_dense_weights(gpu):
    """On the design's shapes. Of the bandwidth cuBLAS is granted what it was measured to reach, no
    more than ours. Of rank 2, for as many tokens as one CTA takes."""
    for (N, K), (values, group_steps), rank in itertools.product(DESIGN, VALUES, (0, 1, 2)):
        sizes = CudaSizes(K, (N,), values, group_steps, rank, 0)
        for M in (1, 2, 4, 8, 16)[: 4 if rank > 1 else 5]:
            assert choose(sizes, M, gpu).microseconds < cost.dense_microseconds(N, K, M, gpu), (
                sizes,
                M,
            )


def test_rebuilding_pays_only_for_very_many_tokens():
    sizes = CudaSizes(4096, (11008,), W16, 4, 1, 0)
    kinds = [type(choose(sizes, M, H200)) for M in (1, 64, 65, 256, 4096, 1 << 16)]
    assert kinds[:3] == [Plan, Prefill, Prefill] and kinds[-1] is Rebuild
    for gpu in (H200, A100):
        slow = replace(gpu, gemm_rate=1e-9)
        assert not isinstance(choose(sizes, 1 << 16, slow), Rebuild), "no fast cuBLAS"


# ---- devices


@pytest.mark.parametrize(
    ("name", "capability", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100"),
        ("NVIDIA A100 80GB PCIe", (8, 0), "A100"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "RTX 5090"),
        # none of the table's: the newest row that is not newer than the device
        ("NVIDIA A10", (8, 6), "RTX 3090"),
        ("NVIDIA A800-SXM4-80GB", (8, 0), "A100"),
        ("Orin", (8, 7), "RTX 3090"),
        ("NVIDIA L40S", (8, 9), "RTX 4090"),
        ("NVIDIA H20", (9, 0), "H100"),
        ("NVIDIA B200", (10, 0), "H100"),
        ("NVIDIA GB10", (12, 1), "RTX 5090"),
        ("", (13, 0), "RTX 5090"),
        (
            "Tesla T4",
            (7, 5),
            "A100",
        ),  # older than all; no kernel runs there, a plan can still be asked for
    ],
)
def test_gpu_like(name, capability, row):
    """Figures of the row, sizes of the device."""
    (known,) = [gpu for gpu in GPUS if gpu.name == row]
    found = gpus.gpu_like(name, capability, 77, 99_000)
    assert found == replace(
        known, name=name, capability=capability, multiprocessors=77, shared_limit=99_000
    )


def test_a_plan_follows_the_sizes_of_the_device():
    """A part of a GPU (MIG) and one with less shared memory than its row get plans of their own."""
    sizes = CudaSizes(4096, (4096,), INT8, 4, 1, 0)
    slice_ = gpus.gpu_like("NVIDIA A100-SXM4-80GB MIG 1g.10gb", (8, 0), 14, 101376)
    for M in TOKENS:
        check(choose(sizes, M, slice_), sizes, M, slice_)


# ---- words and errors


def test_describe():
    text = choose(CudaSizes(4096, (4096,), W16, 4, 1, 0), 1, A100).describe()
    number = r"\d+"
    assert re.fullmatch(
        rf"narrow loop, {number} rows x 1 tokens a CTA, {number} K groups, {number} threads, "
        rf"[234] stages, {number} bytes shared, "
        rf"[124] CTAs a multiprocessor(, K split over {number} CTAs)? \(.+\); predicted "
        rf"{number}\.\d us, bound by [a-zL2 ]+; chosen by the cost model",
        text,
    ), text
    split = plan.evaluate(CudaSizes(8192, (64,), W16, 4, 1, 0), 1, A100, NARROW_TILES[0], 1, 4)
    assert ", K split over 4 CTAs (32 rows, sixteen" in split.describe()
    fast = replace(A100, gemm_rate=1 << 30, bandwidth=1 << 30, mma_rate=1)
    rebuilt = choose(CudaSizes(4096, (4096,), W16, 4, 1, 0), 100, fast).describe()
    assert re.fullmatch(
        r"the weight rebuilt dense, 8192 rows at a time, then cuBLAS; predicted \d+\.\d us, bound "
        r"by tensor cores",
        rebuilt,
    )

    problem = LinearProblem(1, 4096, 4096, "int4", 128, dtype=torch.float16, device="cuda")
    asked = BACKEND.describe(problem, "a100")  # a GPU that need not be here
    assert re.fullmatch(
        r"A100: narrow loop, \d+ rows x .* us, bound by [a-z ]+; chosen by the cost model; "
        r"a dense fp16 linear by the same model: \d+\.\d us",
        asked,
    )
    with pytest.raises(ValueError, match="no figures for the GPU 'Voodoo2'; known: A100, RTX 3090"):
        BACKEND.describe(problem, "Voodoo2")
    with pytest.raises(ValueError, match="no figures for the GPU ''"):
        BACKEND.describe(problem, "")


def test_sizes_that_fit_nowhere_are_refused():
    tiny = replace(A100, shared_limit=16384)
    for M in (1, 16, 17, 64):
        with pytest.raises(
            ValueError,
            match=r"no tile of CudaSizes\(K=4096, .*\) fits 16384 bytes of shared memory",
        ):
            choose(CudaSizes(4096, (64,), W16, 4, 16, 0), M, tiny)
    assert isinstance(choose(CudaSizes(4096, (64,), W16, 4, 16, 0), 65, tiny), Rebuild), (
        "rebuilding needs none"
    )
    with pytest.raises(ValueError, match="fits 16384 bytes of shared memory"):
        choose(CudaSizes(4096, (64,), DENSE, 4, 0, 0), 65, tiny)


# ---- names


@pytest.mark.parametrize("gpu", [A100, GPUS[2], H200], ids=lambda gpu: gpu.name)
def test_every_kernel_that_may_be_launched_is_named_ahead(gpu, request):
    """`prepare` loads them, so that the first call may be captured into a graph."""
    named = set()
    # Every number that decodes, both sides of each tile above, and several of rebuilt weights.
    counts = (*range(1, 18), 32, 33, 64, 65, 96, 97, 128, 129, *range(130, 4097, 397), 1 << 20)
    if request.config.getoption("full"):
        counts = (*range(1, 130), *range(130, 4097, 97), 1 << 20)
    for (values, group_steps), (rank, planes), steps in itertools.product(VALUES, SIGNS, (0, 4)):
        sizes, dtype = (
            CudaSizes(512, (72,), values, group_steps, rank, steps, planes),
            (torch.float16, torch.bfloat16)[rank % 2],
        )
        ahead = kernel_names(sizes, dtype, gpu)
        assert len(set(ahead)) == len(ahead)
        named |= set(ahead)
        for M in counts:
            first, second = launches(sizes, M, dtype, gpu)
            assert second.name in ahead and (first is None or first.name in ahead), (sizes, M)
            in_weight = isinstance(second.plan, Rebuild) and M >= sizes.K
            assert (first is None) == (steps == 0 or in_weight)
    assert {f"reduce_{act}" for act in ("fp16", "bf16")} <= named


NAMES = [
    ((W16, 4, 0, 1), 8, "narrow_fp16_w16_none"),
    ((W16, 4, 1, 1), 4, "narrow_fp16_w16_one"),
    ((W16, 4, 1, 1), 5, "wide_fp16_w16_one_t16"),
    ((W16, 4, 0, 1), 9, "wide_fp16_w16_none_t16"),
    ((INT4, 4, 1, 1), 1, "narrow_fp16_int4_one"),
    ((INT4, 2, 1, 1), 1, "narrow_fp16_int4_one_groups"),
    ((INT8, 1, 0, 1), 16, "wide_fp16_int8_none_t16_groups"),
    ((INT8, 1, 7, 1), 1, "narrow_fp16_int8_one_groups"),
    ((INT8, 1, 7, 1), 2, "wide_fp16_int8_one_any_t8"),
    ((INT4, 1, 1, 3), 4, "narrow_fp16_int4_three"),
    ((INT4, 4, 1, 2), 16, "wide_fp16_int4_two_t16"),
    ((INT4, 1, 16, 3), 1, "wide_fp16_int4_three_any_t8"),
    ((INT4, 1, 1, 1), 17, "linear_fp16_int4_one_t32"),
    ((INT4, 1, 2, 3), 64, "planes_fp16_int4_any_t32"),
]


@pytest.mark.parametrize("sizes, M, name", NAMES, ids=lambda case: str(case).replace(" ", ""))
def test_names(sizes, M, name):
    values, group_steps, rank, planes = sizes
    sizes = CudaSizes(1024, (640,), values, group_steps, rank, 1, planes)
    first, second = launches(sizes, M, torch.float16, A100)
    assert second.name == name
    assert re.fullmatch("adapter_fp16_t16" if M <= 16 else "adapter_fp16_t(32|64)", first.name)


def test_the_template_says_what_the_plan_says():
    """Parts of unequal rows: first tile, block and feature of each, in `LinearParams`."""
    sizes = CudaSizes(1000, (100, 24, 37), INT8, 2, 2, 1, 3)
    first, second = launches(sizes, 12, torch.float16, A100)
    p = launching.LinearParams.from_buffer_copy(second.template)
    tile = second.plan.tile
    rows = 16 * tile.row_tiles * tile.warp_rows
    assert (p.tokens, p.in_features, p.out_features, p.num_k_blocks) == (12, 1000, 161, 8)
    assert (p.rank, p.planes, p.group_steps, p.adapter_steps, p.parts, p.z_splits) == (
        2,
        3,
        2,
        1,
        3,
        first.plan.splits,
    )
    assert (p.warp_rows, p.warp_tokens, p.warp_inputs) == (
        tile.warp_rows,
        tile.warp_tokens,
        tile.warp_inputs,
    )
    splits = second.plan.splits
    assert (p.stages, p.splits, p.tile_tokens) == (second.plan.stages, splits, 8)  # of 12 tokens
    assert (p.k_share, p.k_more) == (8 // splits, 8 % splits)
    assert list(p.part_row) == [0, 100, 124, 161, 161] and list(p.part_pair) == [0, 4, 5, 7, 7]
    assert (p.next, p.next_bytes) == (0, 0)
    ends = list(itertools.accumulate(-(-part // rows) for part in sizes.rows))
    assert (
        list(p.part_tile) == [0, *ends, ends[-1]]
        and p.row_tiles == ends[-1]
        and p.token_tiles == second.plan.token_tiles
    )
    q = launching.LinearParams.from_buffer_copy(first.template)
    assert (q.out_features, q.parts, q.rank, q.adapter_steps, q.tokens) == (48, 1, 0, 0, 12)
