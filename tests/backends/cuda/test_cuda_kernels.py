"""The CUDA kernels, executed without a GPU: the PTX that nvcc emits against the fp64 oracle
(tests/backends/cuda/emulation.py).

Small integers come out bit-exact whatever the order of summation, so any wrong lane, nibble,
sign or tail shows. What is asked of up to 16 tokens alone is in test_cuda_regimes.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from emulation import Launched, kernel_of, ptx, run
from pairwise import grid, grid_of
from ptx import PtxError

from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda import layout, plan, sizes_of, tiles, unpack
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.layout import W16
from slab_kernels.backends.cuda.tiles import (
    DECODE,
    NARROW_TILES,
    PLANES_REGISTERS,
    REBUILD_REGISTERS,
    REBUILD_WHOLE_TILES,
    REGISTERS,
    SPLIT_TILES,
    TALL,
    TALL_TILES,
    WHOLE_TILES,
    WIDE_TILES,
)
from slab_kernels.format import PackedLayout, bits
from slab_kernels.testing import ROUNDOFF, SHAPES, VALUE_LAYOUTS, oracle, random_packed

TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 257, 1000)
DTYPES = (torch.float16, torch.bfloat16)
# Rebuilding the weight for cuBLAS must not take the fused kernels' work here: a GPU whose cuBLAS is
# slow.
A100 = replace(GPUS[0], gemm_rate=1e-9)
SMALL = replace(GPUS[2], gemm_rate=1e-9)  # 99 KB of shared memory


@pytest.fixture
def forced(monkeypatch):
    """Plans by a function of the sizes instead of the cost model."""

    def force(chosen):
        monkeypatch.setattr(launching, "choose", lambda sizes, *_: chosen(sizes))
        launching.launches.cache_clear()

    yield force
    launching.launches.cache_clear()


@functools.cache
def problem(packed_layout: PackedLayout, dtype: torch.dtype, integers: bool):
    """Packed weight, its state, activations, bias, exact result and magnitude."""
    packed = random_packed(packed_layout, seed=packed_layout.out_features, integers=integers)
    generator = torch.Generator().manual_seed(packed_layout.rank)
    x = torch.randint(-2, 3, (max(TOKENS), packed_layout.in_features), generator=generator).to(
        dtype
    )  # bf16 holds z
    if not integers:
        x = torch.randn(x.shape, generator=generator).to(dtype)
    bias = torch.randint(-9, 10, (packed_layout.out_features,), generator=generator).float()
    return packed, layout.prepare((packed,), dtype), x, bias, *oracle(x, packed, bias)


def sizes(state):
    return sizes_of(state)


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(torch.int16), b.view(torch.int16))
    )


def bound(magnitude, exact, dtype, K):
    """fp32 accumulation, one rounding of the result, and the operands': v, v * x (bf16: u, fp16
    values too), P, Q, z."""
    operands = 4 * ROUNDOFF[dtype]
    return (
        magnitude * (operands + 2.0**-24 * (8 + 4 * K**0.5)) + exact.abs() * ROUNDOFF[dtype] + 1e-30
    )


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUE_LAYOUTS,
    "rank": (0, 1, 2, 4, 8),
    "N, K, adapter_rank": ((70, 260, 4), (33, 1030, 0), (16, 128, 100)),
    "M": TOKENS,
})  # fmt: skip
def test_small_integers_are_exact(dtype, values, group_size, rank, N, K, adapter_rank, M):
    _, state, x, bias, exact, _ = problem(
        PackedLayout(N, K, values, group_size, rank, adapter_rank), dtype, True
    )
    y = run(x[:M], state, bias, A100)
    assert torch.equal(y, exact[:M].to(dtype))


@grid(**{
    "dtype": DTYPES,
    "values, group_size, rank": [(*values, rank) for values in VALUE_LAYOUTS for rank in (0, 1, 2)],
    "N, K": SHAPES,
    "adapter_rank": (0, 16, 100),
    "M": (1, 9, 33, 130),
})  # fmt: skip
def test_against_fp64(dtype, values, group_size, rank, N, K, adapter_rank, M):
    rank, adapter_rank = min(rank, N, K), min(adapter_rank, N, K)
    _, state, x, bias, exact, magnitude = problem(
        PackedLayout(N, K, values, group_size, rank, adapter_rank), dtype, False
    )
    y = run(x[:M], state, bias.to(dtype), SMALL)
    assert bool(((y.double() - exact[:M]).abs() <= bound(magnitude, exact, dtype, K)[:M]).all())


def tile_name(value) -> str:
    if isinstance(value, plan.Tile):
        return f"{value.warp_rows}x{value.warp_tokens}x{value.warp_inputs}"
    return str(value)


FORCED = [
    (tile, tokens, splits) for tile in SPLIT_TILES for tokens in (32, 64) for splits in (1, 3)
]
FORCED += [(tile, tokens, 1) for tile in WHOLE_TILES for tokens in (32, 64)]


FITTING = replace(A100, shared_limit=232448)  # an H200's


def forced_tokens(tile, tokens) -> int:
    """A ragged number of tokens for a warp's tile of so many."""
    return tokens * tile.warp_tokens + 3


def fits(tile, tokens, splits, values, group_size) -> bool:
    """Whether choose() could ever take this tile."""
    kind = {"fp16": W16, "int8": layout.INT8, "int4": layout.INT4}[values]
    some = tiles.CudaSizes(140, (149,), kind, (group_size or 128) // 32, 1, 2)
    M = forced_tokens(tile, tokens)
    return plan.evaluate(some, M, FITTING, tile, tokens, splits) is not None


FORCED_VALUES = [
    (*case, *values)
    for case in FORCED
    for values in (("fp16", None), ("int8", 64), ("int4", 128))
    if fits(*case, *values)
]


@grid_of("tile, tokens, splits, values, group_size", FORCED_VALUES, tile_name)
def test_every_tile_of_the_tables(forced, tile, tokens, splits, values, group_size):
    """Ragged in every direction: rows past a tile, tokens past a tile, a last K-block of 12 inputs,
    idle K groups."""
    _, state, x, bias, exact, _ = problem(
        PackedLayout(149, 140, values, group_size, 1, 20), torch.float16, True
    )
    M = forced_tokens(tile, tokens)
    forced(
        lambda s: plan.evaluate(s, M, FITTING, tile if s.rank else SPLIT_TILES[-1], tokens, splits)
    )
    launched = Launched()
    y = run(x[:M], state, bias, FITTING, launched=launched)
    assert torch.equal(y, exact[:M].half())
    name = f"linear_fp16_{'w16' if values == 'fp16' else values}_one_t{tokens}"
    assert launched.kernels == [f"adapter_fp16_t{tokens}", name, *["reduce_fp16"] * (splits > 1)]


TALL_CASES = [(values, rank, tokens) for (values, rank), tiles in TALL.items() for tokens in tiles]


@pytest.mark.parametrize("tile", TALL_TILES, ids=tile_name)
@pytest.mark.parametrize("values, rank, tokens", TALL_CASES)
def test_tall_tiles(forced, values, rank, tokens, tile):
    """64 rows a warp."""
    name = {W16: "fp16", layout.INT8: "int8", layout.INT4: "int4"}[values]
    group_size = None if values == W16 else 64
    _, state, x, bias, exact, _ = problem(
        PackedLayout(277, 140, name, group_size, rank, 4), torch.float16, True
    )
    M = forced_tokens(tile, tokens)
    if plan.evaluate(sizes(state), M, FITTING, tile, tokens, 1) is None:
        pytest.skip("this tile never fits: choose() never takes it")
    forced(
        lambda s: plan.evaluate(
            s, M, FITTING, SPLIT_TILES[-1] if s.values == layout.DENSE else tile, tokens, 1
        )
    )
    launched = Launched()
    assert torch.equal(run(x[:M], state, bias, FITTING, launched=launched), exact[:M].half())
    kind = "w16" if values == W16 else name
    assert launched.kernels[1] == f"tall_fp16_{kind}_{'one' if rank else 'none'}_t{tokens}"


def chosen(tile, tokens, M):
    """A plan of its own for everything that M tokens of a weight need. tokens: of a warp."""

    def plan_of(sizes):
        if sizes.values == layout.DENSE:
            inner = (WIDE_TILES[-1], DECODE) if M <= DECODE else (SPLIT_TILES[-1], tokens)
            return plan.evaluate(sizes, M, A100, *inner, 1)
        return plan.evaluate(sizes, M, A100, tile, tokens, 1)

    return plan_of


@pytest.mark.slow
def test_every_kernel_of_the_library_is_executed(forced):
    """By name: nothing ships that these tests cannot reach."""
    seen = Launched()

    def exact_with(how, M, dtype, values, planes=1, rank=1, adapter_rank=0, group_size=32, K=140):
        group_size = None if values == "fp16" else group_size
        packed_layout = PackedLayout(40, K, values, group_size, rank, adapter_rank, planes=planes)
        _, state, x, bias, exact, _ = problem(packed_layout, dtype, True)
        forced(how)
        assert torch.equal(run(x[:M], state, bias, A100, launched=seen), exact[:M].to(dtype))

    names = {W16: "fp16", layout.INT8: "int8", layout.INT4: "int4"}
    for dtype, values in itertools.product(DTYPES, names.values()):
        for planes, rank in ((1, 0), (1, 1), (2, 1), (3, 1)):
            for group_size in (32, 128):
                how = dtype, values, planes, rank, 0, group_size
                exact_with(chosen(NARROW_TILES[-1], 2, 2), 2, *how)
                exact_with(chosen(WIDE_TILES[-1], DECODE, 9), 9, *how)
        for planes in (1, 2, 3):
            exact_with(chosen(WIDE_TILES[-1], 8, 9), 9, dtype, values, planes, 2)
        for rank, tokens in itertools.product((1, 2), REGISTERS):
            exact_with(chosen(SPLIT_TILES[-1], tokens, tokens), tokens, dtype, values, 1, rank, 3)
        for (planes, rank), tokens in itertools.product(((2, 1), (3, 1), (3, 2)), PLANES_REGISTERS):
            how = dtype, values, planes, rank
            exact_with(chosen(SPLIT_TILES[-1], tokens, tokens), tokens, *how)
        for planes, rank in ((1, 1), (2, 2)):
            exact_with(lambda s: plan.rebuild(s, 80, A100), 80, dtype, values, planes, rank)
            for tokens in REBUILD_REGISTERS:
                how = dtype, values, planes, rank
                exact_with(chosen(REBUILD_WHOLE_TILES[-1], tokens, 20), 20, *how)
    for dtype, (values, rank, tokens) in itertools.product(DTYPES, TALL_CASES):
        how = dtype, names[values], 1, rank
        exact_with(chosen(TALL_TILES[-1], tokens, tokens), tokens, *how)
    for dtype in DTYPES:
        exact_with(chosen(WIDE_TILES[-1], DECODE, 16), 16, dtype, "fp16", adapter_rank=3)
        exact_with(
            lambda s: plan.evaluate(s, 1, A100, NARROW_TILES[-1], 1, 4), 1, dtype, "fp16", K=520
        )
    assert set(seen.kernels) == set(ptx().names)


@grid(**{
    "planes": (2, 3),
    "dtype": DTYPES,
    "values, group_size": (("fp16", None), ("int8", 128), ("int4", 32), ("int3", 64)),
    "rank": (1, 2, 3),
    "N, K, adapter_rank, adapter_values": (
        (34, 260, 4, None), (33, 140, 0, None), (17, 197, 20, "int8"),
    ),
    "M": (1, 9, 40, 66),
})  # fmt: skip
def test_several_planes(
    planes, dtype, values, group_size, rank, N, K, adapter_rank, adapter_values, M
):
    """Small integers are exact: of one token, of more up to 16, in two tiles of 32 tokens up to 64,
    in warps of them above. Then real numbers against fp64."""
    packed_layout = PackedLayout(
        N, K, values, group_size, rank, adapter_rank, planes=planes, adapter_values=adapter_values
    )
    _, state, x, bias, exact, _ = problem(packed_layout, dtype, True)
    launched = Launched()
    y = run(x[:M], state, bias, A100, launched=launched)
    assert torch.equal(y, exact[:M].to(dtype))
    number, kind = {2: "two", 3: "three"}[planes], launching.VALUE_NAMES[state.values]
    kind = f"{launching.DTYPE_NAMES[dtype]}_{kind}"
    names = {
        1: f"narrow_{kind}_{number}",
        9: f"wide_{kind}_{number}_{'t16' if rank == 1 else 'any_t8'}",
    }
    several = f"planes_{kind}_{number if rank == 1 else 'any'}_t32"
    assert names.get(M, several) in launched.kernels
    _, state, x, bias, exact, magnitude = problem(packed_layout, dtype, False)
    y = run(x[:M], state, bias.to(dtype), SMALL)
    assert bool(((y.double() - exact[:M]).abs() <= bound(magnitude, exact, dtype, K)[:M]).all())


@pytest.mark.parametrize("tile", [*SPLIT_TILES, *WHOLE_TILES], ids=tile_name)
def test_every_tile_of_the_tables_with_planes(forced, tile):
    whole = tile in WHOLE_TILES
    for turn, (values, tokens) in enumerate(
        itertools.product((("fp16", None), ("int4", 128)), (32,) if whole else (32, 32))
    ):
        rank, splits = (
            (1, 1 if whole or turn == 0 else 2) if turn < 2 else (2, 1 if whole or turn == 2 else 2)
        )
        packed_layout = PackedLayout(149, 140, *values, rank, 20, planes=3 if rank == 1 else 2)
        _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
        M = tokens * tile.warp_tokens + 3 if whole else tokens - 3
        if plan.evaluate(sizes(state), M, FITTING, tile, tokens, splits) is None:
            continue  # this tile never fits: choose() never takes it
        forced(
            lambda s, how=(tile, tokens, splits), M=M: (
                plan.evaluate(s, M, FITTING, *how) if s.rank else plan.choose(s, M, FITTING)
            )
        )
        launched = Launched()
        assert torch.equal(run(x[:M], state, bias, FITTING, launched=launched), exact[:M].half()), (
            values,
            tokens,
        )
        assert launched.kernels[-1 if splits == 1 else -2].startswith("planes_fp16")


@pytest.mark.parametrize(
    "values, group_size", [("fp16", None), ("int8", None), ("int4", 32), ("int3", 128)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rebuilt_weight_with_planes(forced, dtype, values, group_size):
    """By `dense_*_any`: one rounding on every entry. And what gradients take, `unpack.dense`, is
    the same weight."""
    forced(lambda s: plan.rebuild(s, 65, A100))
    for (N, K), planes, rank in itertools.product(((5, 7), (33, 172)), (2, 3), (1, 3)):
        packed = random_packed(
            PackedLayout(N, K, values, group_size, rank, planes=planes), seed=N, integers=True
        )
        state, launched = layout.prepare((packed,), dtype), Launched()
        y = run(
            torch.eye(K, dtype=dtype).repeat(-(-65 // K), 1),
            state,
            None,
            A100,
            launched=launched,
        )
        assert launched.kernels == [
            f"dense_{launching.DTYPE_NAMES[dtype]}_{launching.VALUE_NAMES[state.values]}_any"
        ]
        assert torch.equal(y[:K].T, packed.dense().to(dtype)), (N, K, planes, rank)
        plain = unpack.dense(state)
        assert torch.equal(plain.to(dtype), packed.dense().to(dtype)), (N, K, planes, rank)


@pytest.mark.parametrize("planes, rank, adapter_values", [(2, 1, None), (3, 2, "int8")])
def test_fused_projections_with_planes(planes, rank, adapter_values):
    rows, K = (100, 24, 37), 272
    layouts = [
        PackedLayout(n, K, "int3", 32, rank, 20, planes=planes, adapter_values=adapter_values)
        for n in rows
    ]
    parts = [random_packed(each, seed=each.out_features, integers=True) for each in layouts]
    state = layout.prepare(parts, torch.float16)
    for M in (1, 40, 66):
        x, launched = (
            torch.randint(-2, 3, (M, K), generator=torch.Generator().manual_seed(M)).half(),
            Launched(),
        )
        y = run(x, state, None, A100, launched=launched)
        assert torch.equal(y, torch.cat([oracle(x, part)[0] for part in parts], -1).half()), M
        assert sum(name.startswith(("narrow", "planes")) for name in launched.kernels) == 1


@pytest.mark.parametrize("dtype, rank", [(torch.float16, 1), (torch.bfloat16, 2)])
def test_a_token_does_not_depend_on_the_others_with_planes(dtype, rank):
    """Up to 64 also where two tiles of 32 tokens follow one."""
    _, state, x, bias, _, _ = problem(
        PackedLayout(40, 520, "int4", 128, rank, 20, planes=2), dtype, False
    )
    for regime in ((1, 8, 9, 16), (17, 32, 33, 64), (65, 130)):
        largest = run(x[: max(regime)], state, bias, A100)
        for M in regime[:-1]:
            assert same_bits(run(x[:M], state, bias, A100), largest[:M]), M
        assert same_bits(run(x[: max(regime)].roll(3, 0), state, bias, A100), largest.roll(3, 0))


def test_kept_is_what_the_mask_says():
    """Stored zeros and minus zeros are kept entries, not pruned ones, whatever U V^T holds
    there."""
    packed = random_packed(PackedLayout(16, 64, "fp16", rank=1))
    packed.values.zero_()
    packed.values[:, ::2] = -0.0
    state, kept = layout.prepare((packed,), torch.float16), bits.unpack_mask(packed.metadata)
    for M in (8, 64):
        y = torch.cat([run(x, state, None, A100) for x in torch.eye(64).half().split(M)]).T
        assert bool((y[kept] == 0).all()) and bool((y[~kept] != 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("M", [2, 20, 70])
def test_nan_and_infinity_reach_their_token_alone(M, bad):
    packed = random_packed(PackedLayout(20, 132, "int4", 32, rank=1, adapter_rank=2))
    state, x = layout.prepare((packed,), torch.float16), torch.randn(M, 132).half()
    x[1, 77] = bad
    y = run(x, state, None, A100)
    assert not bool(y[1].isfinite().any())
    assert bool(y[torch.arange(M) != 1].isfinite().all())


@pytest.mark.parametrize("values, group_size, adapter_rank", [("fp16", None, 0), ("int4", 128, 20)])
def test_a_token_does_not_depend_on_the_others(values, group_size, adapter_rank):
    """Bit for bit within a regime; above 64 tokens whatever the tiles."""
    layout_ = PackedLayout(100, 1160, values, group_size, 1, adapter_rank)
    _, state, x, bias, _, _ = problem(layout_, torch.bfloat16, False)
    for regime in ((1, 2, 5, 8, 9, 16), (17, 32, 40, 64), (65, 129, 300)):
        largest = run(x[: max(regime)], state, bias, A100)
        for M in regime:
            assert same_bits(run(x[:M], state, bias, A100), largest[:M]), M
        moved = x[: max(regime)].roll(3, 0)
        assert same_bits(run(moved, state, bias, A100), largest.roll(3, 0))


@pytest.mark.parametrize("rank, adapter_rank", [(0, 0), (1, 0), (2, 20), (0, 16)])
@pytest.mark.parametrize("M", [1, 12, 40, 200])
def test_fused_projections_are_one_launch(M, rank, adapter_rank):
    """q, k and v of unequal sizes, each with its own V and Q, one of them no multiple of 16."""
    rows, K = (100, 24, 37), 272
    parts = [
        random_packed(PackedLayout(n, K, "int8", 128, rank, adapter_rank), seed=n, integers=True)
        for n in rows
    ]
    state, x = layout.prepare(parts, torch.float16), torch.randint(-3, 4, (M, K)).half()
    bias, launched = torch.randint(-5, 6, (sum(rows),)).half(), Launched()
    y = run(x, state, bias, A100, launched=launched)
    exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
    assert torch.equal(y, exact.half())
    loops = ("narrow", "wide", "linear")
    assert sum(name.startswith(loops) for name in launched.kernels) == 1


@pytest.mark.parametrize("M", [30, 90])
@pytest.mark.parametrize("K", [40, 129, 388])
def test_strided_and_unaligned_activations(M, K):
    _, state, x, bias, exact, _ = problem(PackedLayout(33, K, "fp16", rank=1), torch.float16, True)
    want = exact[:M].half()
    wide = torch.full((M, K + 9), float("nan"), dtype=torch.float16)
    for offset in (0, 1, 8):
        view = wide[:, offset : offset + K]
        view.copy_(x[:M])
        assert torch.equal(run(view, state, bias, A100), want), offset
        view.fill_(float("nan"))
    turned = x[:M].T.contiguous().T
    assert not turned.is_contiguous() and torch.equal(run(turned, state, bias, A100), want)
    assert torch.equal(
        run(x[:M].unflatten(0, (M // 3, 3)), state, bias, A100),
        want.unflatten(0, (M // 3, 3)),
    )


@pytest.mark.parametrize("bias_type", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("M", [2, 70])
def test_bias(M, bias_type):
    _, state, x, bias, exact, _ = problem(
        PackedLayout(50, 300, "fp16", rank=1), torch.bfloat16, True
    )
    given = None if bias_type is None else bias.to(bias_type)
    want = exact[:M] - (bias.double() if bias_type is None else 0)
    assert torch.equal(run(x[:M], state, given, A100), want.bfloat16())


@pytest.mark.parametrize("M", [1, 40, 100])
@pytest.mark.parametrize(
    "values, adapter_rank, outlier, size",
    [
        ("fp16", 0, 1, 1.0),
        ("int8", 0, 1, 1.0),
        ("int4", 0, 1, 1.0),
        ("int4", 16, 1, 1.0),
        ("fp16", 16, 1, 1.0),
        ("fp16", 0, 50, 1e-3),
        ("fp16", 0, 1, 1e-3),
        ("int4", 0, 50, 1e-2),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_a_dense_gemm_of_the_same_weight(
    dtype, values, adapter_rank, outlier, size, M
):
    """Root mean square, against fp64, of ours and of x W^T with W rounded to the activations' type:
    at most 1.5 times.

    Also where one input has a large v (its x is small, as where a method has made v large) and
    all activations are small.
    """
    group_size = None if values == "fp16" else 128
    packed = random_packed(PackedLayout(128, 1024, values, group_size, 1, adapter_rank), seed=5)
    x = torch.randn(M, 1024, generator=torch.Generator().manual_seed(1)) * size
    packed.V[3] *= outlier
    x[:, 3] /= outlier
    x = x.to(dtype)
    state, exact = layout.prepare((packed,), dtype), oracle(x, packed)[0]
    plain = PackedLayout(128, 1024, values, group_size, 1)
    dense = x.double() @ replace(packed, layout=plain, P=None, Q=None).dense().to(dtype).double().T
    if adapter_rank:  # as it runs unfused: z in the activations' type
        P, Q = packed.P.to(dtype).double(), packed.Q[:1024].to(dtype).double()
        dense = dense + (x.double() @ Q).to(dtype).double() @ P.T
    dense, ours = dense.to(dtype), run(x, state, None, A100)
    error = [float((y.double() - exact).square().mean().sqrt()) for y in (ours, dense)]
    assert error[0] <= 1.5 * error[1]


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rebuilt_weight(forced, dtype, values, group_size):
    """One rounding to the activations' type, on every entry."""
    for (N, K), rank in itertools.product(SHAPES, (0, 1, 3)):
        if rank > min(N, K):
            continue
        packed = random_packed(PackedLayout(N, K, values, group_size, rank), seed=N, integers=True)
        state = layout.prepare((packed,), dtype)
        launched = Launched()
        forced(lambda s: plan.rebuild(s, 65, A100))
        y = run(
            torch.eye(K, dtype=dtype).repeat(-(-65 // K), 1),
            state,
            None,
            A100,
            launched=launched,
        )
        assert launched.kernels[0].startswith("dense") and torch.equal(
            y[:K].T, packed.dense().to(dtype)
        )


@grid(**{
    "dtype": DTYPES,
    "values, group_size": (("fp16", None), ("int8", 64), ("int4", 32)),
    "rank, planes": ((0, 1), (1, 1), (3, 1), (1, 2)),
    "rows": ((70,), (33, 22, 48), (20, 40)),
    "K": (136, 260),
    "adapter_rank": (4, 20),
    "M": (66, 135, 136, 300),
    "biased": (True, False),
    "integers": (True, False),
})  # fmt: skip
def test_the_rebuilt_weight_with_an_adapter(
    forced,
    monkeypatch,
    dtype,
    values,
    group_size,
    rank,
    planes,
    rows,
    K,
    adapter_rank,
    M,
    biased,
    integers,
):
    """Below K tokens the result begins as z P^T, with z by the adapter's kernel; from K on the
    weight takes P Q, and there is no z. A part may need several calls of the kernel that rebuilds.
    """
    monkeypatch.setattr(launching, "REBUILT_ROWS", 32)
    parts = [
        random_packed(
            PackedLayout(n, K, values, group_size, rank, adapter_rank, planes=planes),
            seed=n,
            integers=integers,
        )
        for n in rows
    ]
    state, launched = layout.prepare(parts, dtype), Launched()
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(sum(rows), generator=generator).to(dtype) if biased else None
    if integers:  # so small that fp16 holds z, z P^T and their sum with the bias
        x = torch.randint(-1, 2, (M, K), generator=generator).to(dtype) * (torch.arange(K) % 8 == 3)
        bias = bias.round() if biased else None
    forced(lambda s: (plan.rebuild if s.values != layout.DENSE else plan.choose)(s, M, A100))
    y = run(x, state, bias, A100, launched=launched)
    names = [name.split("_")[0] for name in launched.kernels]
    assert names == ["adapter"] * (M < K) + ["dense"] * sum(-(-n // 32) for n in rows)
    done = 0
    for packed, n in zip(parts, rows, strict=True):
        own = y[:, done : done + n]
        exact, magnitude = oracle(x, packed, None if bias is None else bias[done : done + n])
        if integers and dtype == torch.float16:
            assert torch.equal(own, exact.to(dtype))
        allowed = bound(magnitude, exact, dtype, K)
        assert bool(((own.double() - exact).abs() <= allowed).all())
        done += n


def test_the_parameters_are_those_of_the_kernels():
    sizes_in_ptx = {
        kernel_of(name).parameter_bytes
        for name in ("narrow_fp16_w16_one", "reduce_bf16", "dense_fp16_int4")
    }
    assert sizes_in_ptx == {ctypes.sizeof(launching.LinearParams)}


@pytest.mark.parametrize(
    "name, tiles, M",
    [
        ("narrow_fp16_w16_one", NARROW_TILES, 4),
        ("narrow_fp16_int4_one", NARROW_TILES, 1),
        ("wide_fp16_int8_one_t16", WIDE_TILES, 16),
        ("linear_fp16_int4_one_t64", SPLIT_TILES, 64),
    ],
    ids=tile_name,
)
def test_shared_memory_banks(forced, name, tiles, M):
    """Exact counts from the real addresses: the main loop's loads meet no bank twice; a tenth is
    left for the epilogue."""
    values = {"w16": "fp16", "int8": "int8", "int4": "int4"}[name.split("_")[2]]
    group_size = None if values == "fp16" else 128
    _, state, x, bias, _, _ = problem(
        PackedLayout(256, 2048, values, group_size, 1), torch.float16, False
    )
    launched = Launched()
    forced(lambda s: next(filter(None, (plan.evaluate(s, M, A100, tile, M, 1) for tile in tiles))))
    run(x[:M], state, bias, A100, launched=launched)
    assert launched.kernels[0] == name
    assert launched.stats[0]["shared_wavefronts"] <= 1.1 * launched.stats[0]["shared_ideal"]


def test_a_damaged_stream_is_found():
    """The harness can fail: a short stream is out of bounds, an illegal nibble is refused, a lost
    sign is a wrong number."""
    _, state, x, bias, exact, _ = problem(
        PackedLayout(33, 260, "fp16", rank=1), torch.float16, True
    )
    with pytest.raises(PtxError):
        short = state._replace(stream=state.stream.flatten()[:-16].clone())
        run(x[:2], short, bias, A100)
    broken = state.stream.clone()
    broken[0, 0, 4096] = 0
    with pytest.raises(PtxError):
        run(x[:2], state._replace(stream=broken), bias, A100)
    flipped = state.stream.clone()
    flipped[0, 0, 4608:] ^= 0x80
    assert not torch.equal(run(x[:2], state._replace(stream=flipped), bias, A100), exact[:2].half())
