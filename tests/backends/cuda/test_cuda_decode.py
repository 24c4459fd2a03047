"""The CUDA kernels for up to 16 tokens, executed without a GPU: the PTX that nvcc emits against the
fp64 oracle (tests/backends/cuda/emulation.py), with forced tiles, splits and stages.

Small integers come out bit-exact whatever the order of summation, so any wrong lane, nibble, sign,
column or tail shows.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from emulation import Launched, run
from pairwise import grid, grid_of

from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda import layout, plan, prefetch
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.layout import DENSE
from slab_kernels.backends.cuda.tiles import NARROW_TILES
from slab_kernels.format import PackedLayout, PackedWeight, bits
from slab_kernels.testing import ROUNDOFF, oracle, random_packed

DTYPES = (torch.float16, torch.bfloat16)
GPU = replace(GPUS[0], shared_limit=232448)  # with an H200's shared memory all tiles fit
VALUES = (
    ("fp16", None),
    ("bf16", None),
    ("int8", None),
    ("int8", 32),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
    ("int3", 64),
)
# Ranks and tokens of narrow kernels: at most eight columns.
COLUMNS = ((0, 1), (0, 5), (0, 8), (1, 1), (1, 3), (1, 4), (2, 2), (3, 2), (4, 1), (7, 1))
SHAPES = ((1, 3), (33, 260), (70, 1030), (149, 140), (64, 2304))


@pytest.fixture
def forced(monkeypatch):
    """Plans with a tile, splits and stages instead of the chosen ones; an adapter's kernel is
    chosen."""

    def force(tile, splits=1, stages=None):
        def chosen(sizes, M, gpu):
            if sizes.values == DENSE:
                return plan.choose(sizes, M, gpu)
            found = plan.evaluate(sizes, M, gpu, tile, M, splits)
            return replace(found, stages=min(stages or 4, found.stages))

        monkeypatch.setattr(launching, "choose", chosen)
        launching.launches.cache_clear()

    yield force
    launching.launches.cache_clear()


@functools.cache
def problem(packed_layout: PackedLayout, dtype: torch.dtype, integers: bool):
    """Packed weight, its state, 16 tokens, bias, exact result and magnitude."""
    packed = random_packed(packed_layout, seed=packed_layout.out_features, integers=integers)
    generator = torch.Generator().manual_seed(packed_layout.rank)
    x = torch.randint(-2, 3, (16, packed_layout.in_features), generator=generator).to(dtype)
    if not integers:
        x = torch.randn(x.shape, generator=generator).to(dtype)
    bias = torch.randint(-9, 10, (packed_layout.out_features,), generator=generator).float()
    return packed, layout.prepare((packed,), dtype), x, bias, *oracle(x, packed, bias)


def tile_of(warp_rows: int, warp_inputs: int):
    return next(
        tile
        for tile in NARROW_TILES
        if (tile.warp_rows, tile.warp_inputs) == (warp_rows, warp_inputs)
    )


def tile_name(value) -> str:
    if isinstance(value, plan.Tile):
        return f"{value.warp_rows}x{value.warp_inputs}"
    return str(value)


def same_bits(a, b) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def bound(magnitude, exact, dtype, K):
    """fp32 accumulation, one rounding of the result, and the operands': v, v * x, u, fp16 values
    for bf16 activations, P, Q, z."""
    operands = 4 * ROUNDOFF[dtype]
    return (
        magnitude * (operands + 2.0**-24 * (8 + 4 * K**0.5)) + exact.abs() * ROUNDOFF[dtype] + 1e-30
    )


def fitting(rank: int, N: int, K: int) -> int:
    return min(rank, N, K)


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUES,
    "planes": (1, 2, 3),
    "rank, M": COLUMNS,
    "N, K": SHAPES,
    "warp_rows, warp_inputs, splits": ((1, 16, 1), (2, 4, 2), (4, 1, 3), (2, 8, 1)),
    "stages": (2, 3, 4),
    "adapter_rank": (0, 20),
    "biased": (False, True),
})  # fmt: skip
def test_small_integers_are_exact(
    forced, dtype, values, group_size, planes, rank, M, N, K, warp_rows, warp_inputs, splits,
    stages, adapter_rank, biased,
):  # fmt: skip
    """Every kernel, at ragged edges of rows and inputs, with K groups that have no K-block."""
    if K > 500 and dtype == torch.bfloat16:
        adapter_rank = 0  # z, of so many products, is no bf16 number any more
    rank, adapter_rank = fitting(rank, N, K), fitting(adapter_rank, N, K)
    packed_layout = PackedLayout(
        N, K, values, group_size, rank, adapter_rank, planes=planes if rank else 1
    )
    _, state, x, bias, exact, _ = problem(packed_layout, dtype, True)
    if splits > state.stream.shape[1]:
        splits = 1
    forced(tile_of(warp_rows, warp_inputs), splits, stages)
    launched = Launched()
    y = run(x[:M], state, bias if biased else None, GPU, launched=launched)
    want = exact[:M] if biased else exact[:M] - bias.double()
    assert torch.equal(y, want.to(dtype))
    assert launched.kernels[-1 - (splits > 1)].startswith("narrow_")


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUES,
    "planes": (1, 2, 3),
    "rank, M": COLUMNS,
    "N, K": SHAPES,
    "adapter_rank": (0, 20),
})  # fmt: skip
def test_against_fp64(dtype, values, group_size, planes, rank, M, N, K, adapter_rank):
    """By the plan that is chosen."""
    rank, adapter_rank = fitting(rank, N, K), fitting(adapter_rank, N, K)
    packed_layout = PackedLayout(
        N, K, values, group_size, rank, adapter_rank, planes=planes if rank else 1
    )
    _, state, x, bias, exact, magnitude = problem(packed_layout, dtype, False)
    y = run(x[:M], state, bias.to(dtype), GPU)
    assert bool(((y.double() - exact[:M]).abs() <= bound(magnitude, exact, dtype, K)[:M]).all())


@grid_of("tile, rank, values", itertools.product(NARROW_TILES, (1, 2), ("fp16", "int4")), tile_name)
def test_every_tile(forced, tile, rank, values):
    """Rows past a tile, a last K-block of 12 inputs, idle K groups."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(149, 140, values, group_size, rank)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    forced(tile)
    launched = Launched()
    assert torch.equal(run(x[:2], state, bias, GPU, launched=launched), exact[:2].half())
    assert launched.kernels == [f"narrow_fp16_{'w16' if values == 'fp16' else values}_one"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["fp16", "int8", "int4"])
def test_every_pattern_and_sign_at_every_lane(dtype, values):
    """Row n, group g: pattern (n + g) mod 6 and all four sign pairs; 48 rows and 144 groups meet
    each at each place."""
    N, K = 48, 4 * 144
    row, group = torch.arange(N)[:, None], torch.arange(K // 4)[None, :]
    nibbles = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8)[(row + group) % 6]
    pair = (row + group) // 6 % 4
    group_size = None if values == "fp16" else 64
    parts = random_packed(PackedLayout(N, K, values, group_size, rank=1), integers=True).tensors()
    parts["metadata"] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    parts["signs"] = bits.pack_signs(torch.stack([pair % 2 == 1, pair // 2 == 1], -1).flatten(1))
    packed = PackedWeight.from_tensors(parts, N, K, values, group_size)
    state, x = layout.prepare((packed,), dtype), torch.randint(-3, 4, (2, K)).to(dtype)
    assert torch.equal(run(x, state, None, GPU), oracle(x, packed)[0].to(dtype))


@pytest.mark.parametrize("rank, M, planes", [(0, 4, 1), (1, 3, 1), (3, 2, 3), (6, 1, 2)])
def test_fused_projections_are_one_launch(forced, rank, M, planes):
    """q, k and v of unequal sizes, each with its own V, none a multiple of 32 rows."""
    rows, K = (100, 24, 37), 272
    parts = [
        random_packed(PackedLayout(n, K, "int8", 128, rank, planes=planes), seed=n, integers=True)
        for n in rows
    ]
    forced(tile_of(2, 4))
    state, x = layout.prepare(parts, torch.float16), torch.randint(-3, 4, (M, K)).half()
    bias, launched = torch.randint(-5, 6, (sum(rows),)).half(), Launched()
    y = run(x, state, bias, GPU, launched=launched)
    exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
    assert torch.equal(y, exact.half())
    assert [name.split("_")[0] for name in launched.kernels] == ["narrow"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank, M", [(0, 8), (1, 4), (3, 2)])
def test_nan_and_infinity_reach_their_token_alone(rank, M, bad):
    packed = random_packed(PackedLayout(20, 132, "int4", 32, rank))
    state, x = layout.prepare((packed,), torch.float16), torch.randn(M, 132).half()
    x[1, 77] = bad
    y = run(x, state, None, GPU)
    assert not bool(y[1].isfinite().any())
    assert bool(y[torch.arange(M) != 1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile, splits", [(tile_of(1, 8), 1), (tile_of(2, 4), 2)], ids=tile_name)
def test_a_token_does_not_depend_on_the_others(forced, dtype, tile, splits):
    """Bit for bit, whatever columns it has."""
    packed_layout = PackedLayout(70, 1160, "int4", 128, 1)
    _, state, x, bias, _, _ = problem(packed_layout, dtype, False)
    forced(tile, splits)
    largest = run(x[:4], state, bias, GPU)
    for M in (1, 2, 3):
        assert same_bits(run(x[:M], state, bias, GPU), largest[:M]), M
    assert same_bits(run(x[:4].roll(3, 0), state, bias, GPU), largest.roll(3, 0))


@pytest.mark.parametrize("K", [40, 129, 388])
def test_strided_activations(K):
    """Rows that lie apart, their padding NaN; K within a 16-byte piece."""
    packed_layout = PackedLayout(33, K, "fp16", None, 1)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    wide = torch.full((3, 8 * (K // 8) + 24), float("nan"), dtype=torch.float16)
    wide[:, :K] = x[:3]
    assert torch.equal(run(wide[:, :K], state, bias, GPU), exact[:3].half())


@pytest.mark.parametrize("values, rank", [("fp16", 1), ("int8", 0), ("int4", 3)])
def test_a_dependent_launch_reads_weights_alone_before_its_predecessor_ends(forced, values, rank):
    """compute_90 text: the harness refuses any other access before griddepcontrol.wait."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(70, 1030, values, group_size, rank)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    forced(tile_of(2, 8), 2)
    launched = Launched()
    y = run(x[:2], state, bias, GPU, "compute_90", launched)
    assert torch.equal(y, exact[:2].half())
    stats = launched.stats[0]
    assert launched.dependent[0] and stats["griddepcontrol.wait"]
    assert stats["griddepcontrol.launch_dependents"] == stats["griddepcontrol.wait"]


def test_each_line_of_the_next_weight_is_prefetched_once(forced):
    _, state, x, bias, exact, _ = problem(
        PackedLayout(149, 140, "int4", 128, 1), torch.float16, True
    )
    following = problem(PackedLayout(70, 1030, "fp16", None, 1), torch.float16, True)[1]
    forced(tile_of(1, 4))
    launched = Launched()
    prefetch.link(state, following, 1 << 20)
    try:
        y = run(x[:1], state, bias, GPU, launched=launched)
    finally:
        prefetch.link(state, following, 0)
    assert torch.equal(y, exact[:1].half())
    lines = following.stream.nbytes // 128
    assert launched.stats[0]["prefetch"] == -(-lines // 32)  # full warps but the last


def test_u_of_many_ranks_arrives_with_warps_that_have_no_k_block(forced):
    """u is copied by two warps here, of which only the first waits for copies in its loop."""
    _, state, x, bias, exact, _ = problem(
        PackedLayout(40, 100, "int8", 128, 7), torch.float16, True
    )
    forced(tile_of(1, 16))
    assert torch.equal(run(x[:1], state, bias, GPU), exact[:1].half())
