"""The CUDA kernels for up to 16 tokens whose activations travel in the ring (wide.cuh), without a
GPU: the PTX that nvcc emits, executed, against the fp64 oracle, with forced tiles, splits and
stages.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from emulation import Launched, run
from pairwise import grid, grid_of
from test_cuda_decode import DTYPES, GPU, SHAPES, VALUES, bound, fitting, problem, same_bits

from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda import layout, plan
from slab_kernels.backends.cuda.layout import DENSE
from slab_kernels.backends.cuda.tiles import NARROW_TILES, WIDE_TILES
from slab_kernels.format import PackedLayout
from slab_kernels.testing import oracle, random_packed

# Ranks and tokens: one tile or two, of any rank one to four tiles of columns, several CTAs.
TERMS = ((0, 1), (0, 16), (1, 1), (1, 5), (1, 8), (1, 9), (1, 16))
TERMS += ((2, 8), (2, 9), (3, 3), (4, 8), (5, 6), (7, 4), (10, 3), (16, 2), (16, 5))
TILES = [(tile.warp_rows, tile.warp_inputs) for tile in WIDE_TILES]


def tile_of(tiles, warp_rows: int, warp_inputs: int):
    return next(t for t in tiles if (t.warp_rows, t.warp_inputs) == (warp_rows, warp_inputs))


@pytest.fixture
def forced(monkeypatch):
    """Plans with a tile, splits and stages instead of the chosen ones, or with four warps where
    that does not fit; an adapter has one K-split."""

    def force(warp_rows, warp_inputs, splits=1, stages=4, tiles=WIDE_TILES):
        def chosen(sizes, M, gpu):
            dense = sizes.values == DENSE
            table = WIDE_TILES if dense else tiles
            tokens = min(M, sizes.wide_tokens)
            found = (
                plan.evaluate(sizes, M, gpu, tile_of(table, *warps), tokens, 1 if dense else splits)
                for warps in ((warp_rows, warp_inputs), (2, 2))
            )
            fitting = next(filter(None, found))
            return replace(fitting, stages=min(stages, fitting.stages))

        monkeypatch.setattr(launching, "choose", chosen)
        launching.launches.cache_clear()

    yield force
    launching.launches.cache_clear()


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUES,
    "planes": (1, 2, 3),
    "rank, M": TERMS,
    "N, K": SHAPES,
    "warp_rows, warp_inputs, splits": ((1, 16, 1), (2, 4, 2), (4, 1, 3), (2, 8, 1), (1, 4, 2)),
    "stages": (2, 3, 4),
    "adapter_rank": (0, 20),
    "biased": (False, True),
})  # fmt: skip
def test_small_integers_are_exact(
    forced, dtype, values, group_size, planes, rank, M, N, K, warp_rows, warp_inputs, splits,
    stages, adapter_rank, biased,
):  # fmt: skip
    """Every kernel, at ragged edges of rows, tokens and inputs, with K groups without a K-block."""
    if K > 1000 and dtype == torch.bfloat16:
        adapter_rank = 0  # z, of so many products, is no bf16 number any more
    rank, adapter_rank = fitting(rank, N, K), fitting(adapter_rank, N, K)
    packed_layout = PackedLayout(
        N, K, values, group_size, rank, adapter_rank, planes=planes if rank else 1
    )
    _, state, x, bias, exact, _ = problem(packed_layout, dtype, True)
    splits = min(splits, state.stream.shape[1])
    forced(warp_rows, warp_inputs, splits, stages)
    launched = Launched()
    y = run(x[:M], state, bias if biased else None, GPU, launched=launched)
    want = exact[:M] if biased else exact[:M] - bias.double()
    assert torch.equal(y, want.to(dtype))
    adapter = ["adapter"] * bool(adapter_rank)
    families = [name.split("_")[0] for name in launched.kernels]
    assert families == [*adapter, "wide", *["reduce"] * (splits > 1)]


@grid_of("tile, rank, M", list(itertools.product(TILES, (1, 5), (6, 16))), str)
def test_every_tile(forced, tile, rank, M):
    """Rows past a tile, a last K-block of 12 inputs, idle K groups."""
    packed_layout = PackedLayout(149, 140, "int4", 128, rank)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    forced(*tile)
    assert torch.equal(run(x[:M], state, bias, GPU), exact[:M].half())


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUES,
    "planes": (1, 2, 3),
    "rank, M": ((0, 16), (1, 5), (1, 16), (4, 8)),
    "N, K": ((33, 260), (70, 1030)),
})  # fmt: skip
def test_against_fp64(forced, dtype, values, group_size, planes, rank, M, N, K):
    rank = fitting(rank, N, K)
    packed_layout = PackedLayout(N, K, values, group_size, rank, planes=planes if rank else 1)
    _, state, x, bias, exact, magnitude = problem(packed_layout, dtype, False)
    forced(2, 2)
    y = run(x[:M], state, bias.to(dtype), GPU)
    assert bool(((y.double() - exact[:M]).abs() <= bound(magnitude, exact, dtype, K)[:M]).all())


@grid(**{
    "dtype": DTYPES,
    "values, group_size": (("fp16", None), ("int8", 32), ("int8", 128), ("int4", 128),
                           ("int4", 64)),
    "planes": (1, 2, 3),
    "rank, M": ((0, 8), (1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (3, 2), (7, 1)),
    "warp_rows, splits": ((1, 1), (2, 2), (4, 1)),
    "adapter_rank": (0, 20),
})  # fmt: skip
def test_the_same_bits_as_narrow(
    forced, dtype, values, group_size, planes, rank, M, warp_rows, splits, adapter_rank
):
    """With the same splits and K groups, whatever the other kernel's row warps and stages."""
    packed_layout = PackedLayout(
        70, 1160, values, group_size, rank, adapter_rank, planes=planes if rank else 1
    )
    _, state, x, bias, _, _ = problem(packed_layout, dtype, False)
    forced(warp_rows, 4, splits)
    launched = Launched()
    wide = run(x, state, bias, GPU, launched=launched)
    forced(1, 4, splits, stages=2, tiles=NARROW_TILES)
    narrow = run(x[:M], state, bias, GPU, launched=launched)
    assert same_bits(wide[:M], narrow)
    families = {name.split("_")[0] for name in launched.kernels}
    assert families >= {"wide", "narrow"}


@pytest.mark.parametrize("values, rank", [("fp16", 1), ("int4", 3)])
def test_a_token_does_not_depend_on_the_others(forced, values, rank):
    """Bit for bit, whatever its row and its CTA."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(70, 1160, values, group_size, rank)
    _, state, x, bias, _, _ = problem(packed_layout, torch.bfloat16, False)
    forced(2, 4)
    largest = run(x, state, bias, GPU)
    for M in (1, 7, 8, 9):
        assert same_bits(run(x[:M], state, bias, GPU), largest[:M]), M
    assert same_bits(run(x.roll(3, 0), state, bias, GPU), largest.roll(3, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank, M", [(0, 9), (1, 16), (3, 8), (16, 2)])
def test_nan_and_infinity_reach_their_token_alone(forced, rank, M, bad):
    packed = random_packed(PackedLayout(20, 132, "int4", 32, rank))
    state, x = layout.prepare((packed,), torch.float16), torch.randn(M, 132).half()
    x[1, 77] = bad
    forced(1, 4)
    y = run(x, state, None, GPU)
    assert not bool(y[1].isfinite().any())
    assert bool(y[torch.arange(M) != 1].isfinite().all())


@pytest.mark.parametrize("rank, M, planes", [(0, 11, 1), (1, 16, 1), (3, 10, 3)])
def test_fused_projections_are_one_launch(forced, rank, M, planes):
    """q, k and v of unequal sizes, each with its own V, none a multiple of 32 rows."""
    rows, K = (100, 24, 37), 272
    parts = [
        random_packed(
            PackedLayout(n, K, "int8", 128, rank, 4, planes=planes), seed=n, integers=True
        )
        for n in rows
    ]
    state, x = layout.prepare(parts, torch.float16), torch.randint(-3, 4, (M, K)).half()
    bias, launched = torch.randint(-5, 6, (sum(rows),)).half(), Launched()
    forced(2, 4)
    y = run(x, state, bias, GPU, launched=launched)
    exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
    assert torch.equal(y, exact.half())
    assert [name.split("_")[0] for name in launched.kernels] == ["adapter", "wide"]


@pytest.mark.parametrize("K", [40, 129, 388])
@pytest.mark.parametrize("rank", [1, 4])
def test_strided_activations(forced, K, rank):
    """Rows that lie apart, their padding NaN; K within a 16-byte piece."""
    packed_layout = PackedLayout(33, K, "fp16", None, rank)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    wide = torch.full((11, 8 * (K // 8) + 24), float("nan"), dtype=torch.float16)
    wide[:, :K] = x[:11]
    forced(2, 2)
    assert torch.equal(run(wide[:, :K], state, bias, GPU), exact[:11].half())


@pytest.mark.parametrize("values, rank", [("fp16", 1), ("int8", 0), ("int4", 3)])
def test_a_dependent_launch_reads_weights_alone_before_its_predecessor_ends(forced, values, rank):
    """compute_90 text: the harness refuses any other access before griddepcontrol.wait."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(70, 1030, values, group_size, rank)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    forced(2, 8, 2)
    launched = Launched()
    y = run(x[:8], state, bias, GPU, "compute_90", launched)
    assert torch.equal(y, exact[:8].half())
    stats = launched.stats[0]
    assert launched.dependent[0] and stats["griddepcontrol.wait"]
    assert stats["griddepcontrol.launch_dependents"] == stats["griddepcontrol.wait"]


@pytest.mark.parametrize("values, rank, M", [("fp16", 1, 16), ("int8", 1, 16), ("int4", 4, 8)])
@pytest.mark.parametrize("warp_rows, warp_inputs", [(1, 8), (4, 2)])
def test_shared_memory_banks(forced, values, rank, M, warp_rows, warp_inputs):
    """Exact counts from the real addresses: a tenth above none is left for the end."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(128, 4096, values, group_size, rank)
    _, state, x, bias, _, _ = problem(packed_layout, torch.float16, False)
    forced(warp_rows, warp_inputs)
    launched = Launched()
    run(x[:M], state, bias, GPU, launched=launched)
    assert launched.stats[0]["shared_wavefronts"] <= 1.1 * launched.stats[0]["shared_ideal"]
