"""The CUDA kernels that rebuild W in registers (rebuild.cuh), without a GPU: the PTX that nvcc
emits, executed, against the fp64 oracle, with forced tiles, splits and stages.

Small integers come out bit-exact whatever the order of summation, so any wrong lane, selector,
sign, scale or tail shows. The interpreter looks for races and illegal accesses all the while.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from emulation import Launched, run
from pairwise import grid, grid_of
from test_cuda_decode import GPU, VALUES, fitting
from test_cuda_kernels import DTYPES, bound, problem, same_bits

from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda import layout, plan
from slab_kernels.backends.cuda.cost import Plan
from slab_kernels.backends.cuda.layout import DENSE
from slab_kernels.backends.cuda.tiles import REBUILD, Tile, factors_bytes, stage_bytes, sums_bytes
from slab_kernels.format import PackedLayout, PackedWeight, bits
from slab_kernels.testing import oracle, random_packed

# Warps of a CTA along rows, tokens and K, and tokens of a warp: as far as an H200's shared memory
# holds two stages.
TILES = (
    ((4, 1, 1), 128), ((4, 1, 1), 64), ((2, 1, 2), 64), ((1, 1, 4), 64), ((1, 2, 2), 64),
    ((2, 2, 1), 128), ((8, 1, 1), 64), ((1, 1, 2), 128), ((1, 1, 1), 128),
)  # fmt: skip
TOKENS = (17, 33, 64, 65, 127, 128, 129)


def planned(sizes, M, warps, tokens, splits=1, stages=2) -> Plan:
    """A plan with at most so many stages."""
    tile = Tile(*warps, "", loop=REBUILD)
    tables = factors_bytes(sizes, tile)
    assert tables + sums_bytes(sizes, tile, tokens) <= GPU.shared_limit
    fitting = (GPU.shared_limit - tables) // (warps[2] * stage_bytes(sizes, tile, tokens))
    assert fitting >= 2
    return Plan(sizes, M, GPU, tile, tokens, splits, min(stages, fitting), 1)


@pytest.fixture
def forced(monkeypatch):
    """Such plans instead of the chosen ones; an adapter's kernel is chosen."""

    def force(*how):
        def chosen(sizes, M, gpu):
            return plan.choose(sizes, M, gpu) if sizes.values == DENSE else planned(sizes, M, *how)

        monkeypatch.setattr(launching, "choose", chosen)
        launching.launches.cache_clear()

    yield force
    launching.launches.cache_clear()


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUES,
    "rank, planes": ((1, 1), (1, 2), (1, 3), (2, 1), (5, 2), (5, 3), (16, 1), (16, 3)),
    "M": TOKENS,
    "N, K": ((1, 3), (33, 260), (70, 132), (149, 140)),
    "tile, tokens": TILES,
    "splits": (1, 2, 3),
    "stages": (2, 3, 4),
    "adapter_rank": (0, 20),
    "biased": (False, True),
})  # fmt: skip
def test_small_integers_are_exact(
    forced, dtype, values, group_size, rank, planes, M, N, K, tile, tokens, splits, stages,
    adapter_rank, biased,
):  # fmt: skip
    """Ragged in every direction, with K groups that have no K-block."""
    if rank > 5 and dtype == torch.bfloat16:
        planes = 1  # The levels' quarters of so large a sum are no bf16 numbers.
    rank, adapter_rank = fitting(rank, N, K), fitting(adapter_rank, N, K)
    packed_layout = PackedLayout(N, K, values, group_size, rank, adapter_rank, planes=planes)
    _, state, x, bias, exact, _ = problem(packed_layout, dtype, True)
    splits = min(splits, state.stream.shape[1])
    splits = splits if M <= tile[1] * tokens * 8 else 1
    forced(tile, tokens, splits, stages)
    launched = Launched()
    y = run(x[:M], state, bias if biased else None, GPU, launched=launched)
    want = exact[:M] if biased else exact[:M] - bias.double()
    assert torch.equal(y, want.to(dtype))
    kind = f"{launching.DTYPE_NAMES[dtype]}_{launching.VALUE_NAMES[state.values]}"
    which = "one" if rank == planes == 1 else "any"
    name = f"rebuild_{kind}_{which}_t{tokens}"
    reduced = [f"reduce_{launching.DTYPE_NAMES[dtype]}"] * (splits > 1)
    assert launched.kernels[bool(adapter_rank) :] == [name, *reduced]


@grid(**{
    "dtype": DTYPES,
    "values, group_size": VALUES,
    "rank, planes": ((1, 1), (1, 2), (2, 1), (5, 3), (16, 2)),
    "M": (17, 65, 129),
    "tile, tokens": TILES[:3],
    "adapter_rank": (0, 20),
})  # fmt: skip
def test_against_fp64(
    forced, dtype, values, group_size, rank, planes, M, tile, tokens, adapter_rank
):
    N, K = 70, 262
    packed_layout = PackedLayout(N, K, values, group_size, rank, adapter_rank, planes=planes)
    _, state, x, bias, exact, magnitude = problem(packed_layout, dtype, False)
    forced(tile, tokens)
    y = run(x[:M], state, bias.to(dtype), GPU)
    assert bool(((y.double() - exact[:M]).abs() <= bound(magnitude, exact, dtype, K)[:M]).all())


@grid_of("tile, tokens, rank", [(*how, rank) for how, rank in itertools.product(TILES, (1, 3))])
def test_every_tile(forced, tile, tokens, rank):
    """Rows and tokens past a tile, a last K-block of 12 inputs."""
    packed_layout = PackedLayout(149, 140, "int4", 128, rank, 4)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    M = tile[1] * tokens + 3
    forced(tile, tokens)
    assert torch.equal(run(x[:M], state, bias, GPU), exact[:M].half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("rank", [1, 2])
def test_every_pattern_and_sign_at_every_lane(forced, dtype, values, rank):
    """Row n, group g: pattern (n + g) mod 6 and all four sign pairs; 48 rows and 144 groups meet
    each at each place."""
    N, K = 48, 4 * 144
    row, group = torch.arange(N)[:, None], torch.arange(K // 4)[None, :]
    nibbles = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8)[(row + group) % 6]
    pair = (row + group) // 6 % 4
    group_size = None if values == "fp16" else 64
    parts = random_packed(PackedLayout(N, K, values, group_size, rank), integers=True).tensors()
    parts["metadata"] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    parts["signs"] = bits.pack_signs(torch.stack([pair % 2 == 1, pair // 2 == 1], -1).flatten(1))
    packed = PackedWeight.from_tensors(parts, N, K, values, group_size)
    state, x = layout.prepare((packed,), dtype), torch.randint(-2, 3, (20, K)).to(dtype)
    forced((2, 1, 1), 64)
    assert torch.equal(run(x, state, None, GPU), oracle(x, packed)[0].to(dtype))


@pytest.mark.parametrize("values, group_size", [("int8", 32), ("int8", None), ("int4", 64)])
@pytest.mark.parametrize("rank, planes", [(1, 1), (3, 2)])
@pytest.mark.parametrize("exponent", [-16, -1, 7])
def test_scales_that_are_no_fp16_numbers_keep_their_precision(
    forced, values, group_size, rank, planes, exponent
):
    """Scales that fp16 would lose bits of or hold as zero: a power of two of each row brings them
    to where fp16 is precise, and u, the adapter's product excepted, with them."""
    N, K, M = 40, 260, 19
    packed_layout = PackedLayout(N, K, values, group_size, rank, 4, planes=planes)
    parts = random_packed(packed_layout, seed=planes).tensors()
    row = 2.0 ** (exponent - torch.arange(N) % 3)[:, None]
    parts["scales"] = (parts["scales"] * row).to(torch.bfloat16)
    for name in "UP":  # They are fp16 numbers themselves, and far larger than the smallest scales.
        parts[name] = (parts[name] * (row if exponent > -9 else 0)).to(parts[name].dtype)
    packed = PackedWeight(packed_layout, **parts)
    state = layout.prepare((packed,), torch.float16)
    assert len(state.powers.unique()) > 2
    x = torch.randn(M, K) * 2.0 ** min(13, -exponent)
    x = x.clamp(-6e4, 6e4).half()
    exact, magnitude = oracle(x, packed)
    forced((2, 1, 1), 64)
    y = run(x, state, None, GPU)
    limit = bound(magnitude, exact, torch.float16, K) + 2.0**-25
    assert bool(((y.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("rank, planes", [(1, 1), (3, 3)])
def test_fused_projections_are_one_launch(forced, rank, planes):
    """q, k and v of unequal sizes, each with its own V, none a multiple of 32 rows."""
    rows, K, M = (100, 24, 37), 272, 35
    parts = [
        random_packed(
            PackedLayout(n, K, "int8", 128, rank, 4, planes=planes), seed=n, integers=True
        )
        for n in rows
    ]
    state, x = layout.prepare(parts, torch.float16), torch.randint(-3, 4, (M, K)).half()
    bias, launched = torch.randint(-5, 6, (sum(rows),)).half(), Launched()
    forced((2, 1, 2), 64)
    y = run(x, state, bias, GPU, launched=launched)
    exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
    assert torch.equal(y, exact.half())
    assert [name.split("_")[0] for name in launched.kernels] == ["adapter", "rebuild"]


@pytest.mark.parametrize("values, rank", [("fp16", 1), ("int4", 3)])
def test_a_token_does_not_depend_on_the_others(forced, values, rank):
    """Bit for bit, whatever its row and its CTA, with 64 or 128 tokens a warp."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(70, 262, values, group_size, rank)
    _, state, x, bias, _, _ = problem(packed_layout, torch.bfloat16, False)
    forced((2, 1, 1), 64)
    largest = run(x[:130], state, bias, GPU)
    assert same_bits(run(x[:33], state, bias, GPU), largest[:33])
    assert same_bits(run(x[:130].roll(3, 0), state, bias, GPU), largest.roll(3, 0))
    forced((4, 1, 1), 128)
    assert same_bits(run(x[:130], state, bias, GPU), largest)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [1, 3])
def test_nan_and_infinity_reach_their_token_alone(forced, rank, bad):
    packed = random_packed(PackedLayout(20, 132, "int4", 32, rank))
    state, x = layout.prepare((packed,), torch.float16), torch.randn(18, 132).half()
    x[1, 77] = bad
    forced((1, 1, 2), 64)
    y = run(x, state, None, GPU)
    assert not bool(y[1].isfinite().any())
    assert bool(y[torch.arange(18) != 1].isfinite().all())


@pytest.mark.parametrize("K", [40, 129, 388])
@pytest.mark.parametrize("tile", [(1, 1, 2), (8, 1, 1)])
def test_strided_activations(forced, K, tile):
    """Rows that lie apart, their padding NaN; K within a 16-byte piece."""
    packed_layout = PackedLayout(33, K, "fp16", None, 1)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    wide = torch.full((37, 8 * (K // 8) + 24), float("nan"), dtype=torch.float16)
    wide[:, :K] = x[:37]
    forced(tile, 64)
    assert torch.equal(run(wide[:, :K], state, bias, GPU), exact[:37].half())


@pytest.mark.parametrize("values, rank", [("fp16", 1), ("int4", 3)])
def test_a_dependent_launch_reads_weights_alone_before_its_predecessor_ends(forced, values, rank):
    """compute_90 text: the harness refuses any other access before griddepcontrol.wait."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(70, 518, values, group_size, rank)
    _, state, x, bias, exact, _ = problem(packed_layout, torch.float16, True)
    forced((2, 1, 2), 64, 2)
    launched = Launched()
    y = run(x[:40], state, bias, GPU, "compute_90", launched)
    assert torch.equal(y, exact[:40].half())
    stats = launched.stats[0]
    assert launched.dependent[0] and stats["griddepcontrol.wait"]
    assert stats["griddepcontrol.launch_dependents"] == stats["griddepcontrol.wait"]


@pytest.mark.parametrize("values, rank, planes", [("fp16", 1, 1), ("int8", 1, 1), ("int4", 3, 3)])
@pytest.mark.parametrize("tile, tokens", TILES[:3])
def test_shared_memory_banks(forced, values, rank, planes, tile, tokens):
    """Exact counts from the real addresses: no access meets a bank twice but some of the end."""
    group_size = None if values == "fp16" else 128
    packed_layout = PackedLayout(128, 512, values, group_size, rank, planes=planes)
    _, state, x, bias, _, _ = problem(packed_layout, torch.float16, False)
    forced(tile, tokens)
    launched = Launched()
    run(x[:tokens], state, bias, GPU, launched=launched)
    assert launched.stats[0]["shared_wavefronts"] <= 1.1 * launched.stats[0]["shared_ideal"]
