"""Up to 16 tokens, without a GPU: a token's result is the same to the bit whichever kernel, tile
and company it meets, and nothing that does not belong to it reaches it.

The PTX that nvcc emits is executed (emulation.py), under plans that are forced.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from cycled import INPUTS, ROWS, cycled
from emulation import Launched, run
from pairwise import grid, grid_of

from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda import layout, plan, prefetch
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.tiles import (
    DECODE,
    MANY,
    NARROW,
    NARROW_TILES,
    WIDE,
    WIDE_TILES,
    CudaSizes,
    sizes_of,
)
from slab_kernels.format import PackedLayout
from slab_kernels.testing import oracle, random_packed

# Large enough for every plan, and its cuBLAS too slow to be taken.
GPU = replace(GPUS[0], gemm_rate=1e-9, shared_limit=232448)
DTYPES = (torch.float16, torch.bfloat16)
VALUES = (("fp16", None), ("int8", 128), ("int8", 64), ("int4", 128), ("int4", 32), ("int3", 64))
# Sign planes and rank; none at all, one with a rank for every narrow tile and above, several.
TERMS = ((1, 0), (1, 1), (1, 2), (1, 3), (1, 7), (1, 8), (2, 1), (3, 1), (2, 3), (3, 2))
TILES = {NARROW: NARROW_TILES, WIDE: WIDE_TILES}
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def forced(monkeypatch):
    """Every linear takes a certain loop of up to 16 tokens with so many tokens, row warps, K groups
    and splits a CTA, or its weight is rebuilt ("dense"); its adapter takes the wide loop with its
    own number of splits."""

    def force(loop, tokens, warp_rows, warp_inputs, splits=1, stages=4, z_splits=1):
        def chosen(sizes: CudaSizes, M: int, gpu):
            if loop == "dense":
                return plan.rebuild(sizes, M, gpu)
            if sizes.values == layout.DENSE:
                return planned(sizes, M, WIDE, DECODE, 1, 4, z_splits, 2)
            return planned(sizes, M, loop, tokens, warp_rows, warp_inputs, splits, stages)

        monkeypatch.setattr(launching, "choose", chosen)
        launching.launches.cache_clear()

    yield force
    launching.launches.cache_clear()


def planned(sizes, M, loop, tokens, warp_rows, warp_inputs, splits, stages) -> plan.Plan:
    tile = next(
        tile
        for tile in TILES[loop]
        if (tile.warp_rows, tile.warp_inputs) == (warp_rows, warp_inputs)
    )
    found = plan.evaluate(sizes, M, GPU, tile, tokens, splits)
    assert found is not None, (sizes, loop, tokens, tile)
    return replace(found, stages=min(stages, found.stages))


def most_tokens(loop: str, rank: int) -> int:
    """The tokens of a CTA at most."""
    sizes = CudaSizes(128, (32,), layout.W16, 4, rank, 0)
    return sizes.most_narrow_tokens if loop == NARROW else sizes.wide_tokens


@functools.cache
def problem(packed_layout: PackedLayout, dtype: torch.dtype, integers: bool = True):
    """A prepared weight, 16 tokens of activations, bias, and the exact result in fp64."""
    packed = random_packed(packed_layout, seed=packed_layout.rank, integers=integers)
    generator = torch.Generator().manual_seed(packed_layout.out_features)
    shape = DECODE, packed_layout.in_features
    if integers:
        x = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    else:
        x = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randint(-9, 10, (packed_layout.out_features,), generator=generator).float()
    return layout.prepare((packed,), dtype), x, bias, oracle(x, packed, bias)[0]


def bits_of(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int16)


# ---- the same bits ------------------------------------------------------------------------------

# Tokens of a CTA, tokens at once.
NARROW_TOKENS = ((1, 1), (1, 3), (2, 2), (2, 7), (3, 3), (4, 4), (4, 6), (8, 5), (8, 8))
WIDE_TOKENS = ((16, 1), (16, 2), (16, 8), (16, 9), (16, 15), (16, 16))
WIDE_TOKENS += ((8, 1), (8, 7), (8, 8), (8, 9), (8, 16), (4, 1), (4, 4), (4, 5), (4, 16))
COMPANIES = [(NARROW, *tokens, rows) for tokens in NARROW_TOKENS for rows in (1, 2, 4)]
COMPANIES += [(WIDE, *tokens, rows) for tokens in WIDE_TOKENS for rows in (1, 2, 4)]
WAYS = (
    (torch.float16, 0, 1),
    (torch.bfloat16, 20, 1),
    (torch.float16, 20, 3),
    (torch.bfloat16, 0, 2),
)


def suits(loop: str, tokens: int, rank: int) -> bool:
    """Whether a CTA of this loop may have so many tokens of a weight of this rank."""
    most = most_tokens(loop, rank)
    return tokens <= most if loop == NARROW else tokens == most


# Few weights for many companies, so that what is compared with is made once.
SAME_BITS = [
    (*company, *term, *VALUES[(number + turn) % 6], *WAYS[(number + turn // 2) % 4])
    for number, term in enumerate(TERMS)
    for turn, company in enumerate(company for company in COMPANIES if suits(*company[:2], term[1]))
    for turn in (turn % 3,)
]


@functools.cache
def made_before(packed_layout: PackedLayout, dtype: torch.dtype, splits: int) -> dict:
    """Results by number of token, filled in by the test."""
    return {}


@grid_of(
    "loop, tokens, M, warp_rows, planes, rank, values, group_size, dtype, adapter_rank, splits",
    SAME_BITS,
)
def test_a_token_has_the_same_bits_in_any_company(
    forced, loop, tokens, M, warp_rows, planes, rank, values, group_size, dtype, adapter_rank,
    splits,
):  # fmt: skip
    """Three tokens, somewhere among tokens of NaN and infinity: against what the wide loop with one
    row warp makes of them, each at its own place. K groups and splits are the same."""
    packed_layout = PackedLayout(70, 1300, values, group_size, rank, adapter_rank, planes=planes)
    state, x, bias, _ = problem(packed_layout, dtype, integers=False)
    known = made_before(packed_layout, dtype, splits)
    mine = (3, 8, 14)
    if not known:
        forced(WIDE, most_tokens(WIDE, rank), 1, 4, splits)
        y = run(x, state, bias, GPU)
        assert bool(y.isfinite().all())
        known |= {token: bits_of(y[token]) for token in mine}
    forced(loop, tokens, warp_rows, 4, splits, stages=3)
    places = {token: (M // 2 + at * max(1, M // 3)) % M for at, token in enumerate(mine[:M])}
    rows = torch.full((M, packed_layout.in_features), NAN, dtype=dtype)
    rows[1::3] = INFINITY
    for token, place in places.items():
        rows[place] = x[token]
    launched = Launched()
    y = run(rows, state, bias, GPU, launched=launched)
    assert launched.kernels[bool(adapter_rank)].startswith(loop)
    for token, place in places.items():
        assert torch.equal(bits_of(y[place]), known[token]), (token, place)
    others = [place for place in range(M) if place not in places.values()]
    assert not bool(y[others].isfinite().any())


@pytest.mark.parametrize("values, group_size", [("fp16", None), ("int8", 32), ("int4", 128)])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_kernels_of_any_rank_have_the_bits_of_those_of_rank_one(
    forced, monkeypatch, planes, values, group_size
):
    packed_layout = PackedLayout(70, 700, values, group_size, 1, planes=planes)
    state, x, bias, _ = problem(packed_layout, torch.float16, integers=False)
    forced(WIDE, 16, 1, 4)
    usual = run(x, state, bias, GPU)
    number = {1: "one", 2: "two", 3: "three"}[planes]
    name = f"wide_fp16_{'w16' if values == 'fp16' else values}_{number}_any_t8"
    monkeypatch.setattr(launching, "_name", lambda *_: name)
    forced(WIDE, 8, 2, 4)
    assert torch.equal(bits_of(run(x, state, bias, GPU)), bits_of(usual))


# ---- the right numbers --------------------------------------------------------------------------

SIZES = ((33, 130), (70, 260), (16, 128), (100, 1300), (1, 3), (300, 388), (257, 1030))
ADAPTERS = (0, 4, 64, 100)
TILES_IN_TURN = [
    (loop, tile.warp_rows, tile.warp_inputs, *term)
    for loop in (NARROW, WIDE)
    for term in TERMS
    if most_tokens(loop, term[1])
    for tile in TILES[loop]
]
EXACT = [
    (*case, *SIZES[turn % 7], *VALUES[turn // 2 % 6], ADAPTERS[turn % 4], turn % 5 % 3 + 2,
     (1, 1, 2, 4)[turn // 3 % 4], DTYPES[turn // 5 % 2], turn % 3 - 1)
    for turn, case in enumerate(TILES_IN_TURN)
]  # fmt: skip


@grid_of(
    "loop, warp_rows, warp_inputs, planes, rank, N, K, values, group_size, adapter_rank, stages, "
    "splits, dtype, more",
    EXACT,
)
def test_small_integers_are_exact_in_every_tile(
    forced, loop, warp_rows, warp_inputs, planes, rank, N, K, values, group_size, adapter_rank,
    stages, splits, dtype, more,
):  # fmt: skip
    """Ragged everywhere: rows past a tile, tokens past a tile, K blocks of few inputs, K groups and
    splits without a K block."""
    rank, adapter_rank = min(rank, N, K), min(adapter_rank, N, K)
    planes = planes if rank else 1
    packed_layout = PackedLayout(N, K, values, group_size, rank, adapter_rank, planes=planes)
    state, x, bias, exact = problem(packed_layout, dtype)
    tokens = most_tokens(loop, rank)
    M = min(max(tokens + more, 1), DECODE)
    splits = min(splits, sizes_of(state).k_blocks)
    forced(loop, tokens, warp_rows, warp_inputs, splits, stages, z_splits=splits)
    launched = Launched()
    y = run(x[:M], state, bias, GPU, launched=launched)
    assert torch.equal(y, exact[:M].to(dtype))
    families = [name.split("_")[0] for name in launched.kernels]
    assert families == ["adapter"] * bool(adapter_rank) + [loop] + ["reduce"] * (splits > 1)


@grid(**{
    "dtype": DTYPES,
    "values, group_size": (("fp16", None), ("int8", 32), ("int8", 128), ("int4", 64),
                           ("int4", 128), ("int3", 32)),
    "planes, rank": ((1, 0), (1, 1), (1, 3), (2, 1), (3, 1), (2, 3), (3, 2)),
    "loop, M": ((NARROW, 1), (NARROW, 2), (WIDE, 5), (WIDE, 16), (MANY, 20), (MANY, 40)),
})  # fmt: skip
def test_every_pattern_sign_and_code_at_every_place(
    forced, dtype, values, group_size, planes, rank, loop, M
):
    packed = cycled(PackedLayout(ROWS, INPUTS, values, group_size, rank, planes=planes))
    state = layout.prepare((packed,), dtype)
    x = torch.randint(-3, 4, (M, INPUTS), generator=torch.Generator().manual_seed(M)).to(dtype)
    if loop != MANY:
        forced(
            loop,
            min(M, most_tokens(loop, rank)) if loop == NARROW else most_tokens(loop, rank),
            2,
            4,
        )
    launched = Launched()
    y = run(x, state, None, GPU, launched=launched)
    assert torch.equal(y, oracle(x, packed)[0].to(dtype))
    assert launched.kernels[0].startswith({MANY: ("linear", "tall", "planes")}.get(loop, loop))


@grid(**{
    "loop": (NARROW, WIDE),
    "M": (1, 2, 4, 9, 16),
    "values, group_size, planes, rank": (
        ("fp16", None, 1, 1), ("int8", 128, 1, 0), ("int4", 32, 1, 3), ("int4", 128, 2, 1),
        ("int8", 64, 3, 2),
    ),
    "adapter_rank": (0, 20),
    "rows": ((100, 24, 37), (32, 64), (5, 40, 3, 33)),
    "splits": (1, 2),
})  # fmt: skip
def test_fused_projections(
    forced, loop, M, values, group_size, planes, rank, adapter_rank, rows, splits
):
    """Parts with rows of their own, which are no multiples of 32, each with its own V and Q."""
    K = 648
    layouts = [
        PackedLayout(n, K, values, group_size, min(rank, n), min(adapter_rank, min(rows)),
                     planes=planes)
        for n in rows
    ]  # fmt: skip
    parts = [random_packed(each, seed=each.out_features, integers=True) for each in layouts]
    state = layout.prepare(parts, torch.float16)
    generator = torch.Generator().manual_seed(M)
    x = torch.randint(-3, 4, (M, K), generator=generator).half()
    bias = torch.randint(-5, 6, (sum(rows),), generator=generator).half()
    tokens = most_tokens(loop, rank)
    forced(loop, min(M, tokens) if loop == NARROW else tokens, 2, 2, splits)
    exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
    assert torch.equal(run(x, state, bias, GPU), exact.half())


# ---- nothing else gets in -----------------------------------------------------------------------


@grid(**{
    "loop, M": ((NARROW, 1), (NARROW, 3), (WIDE, 1), (WIDE, 9), (WIDE, 16)),
    "K": (3, 100, 130, 389, 1288),
    "values, group_size, rank": (
        ("fp16", None, 0), ("fp16", None, 1), ("int8", 128, 1), ("int4", 32, 3), ("int4", 128, 0),
    ),
    "bad": (NAN, INFINITY),
    "dtype": DTYPES,
})  # fmt: skip
def test_what_stands_beside_x_reaches_no_result(
    forced, loop, M, K, values, group_size, rank, bad, dtype
):
    """Rows of x are aligned parts of wider rows, so they are not copied; between them stand NaN or
    infinity, which the last K block's padding must not pick up."""
    packed_layout = PackedLayout(35, K, values, group_size, min(rank, K), 4 if K > 4 else 0)
    state, x, bias, exact = problem(packed_layout, dtype)
    wide = torch.full((M + 1, 8 * (K // 8 + 5)), bad, dtype=dtype)
    view = wide[1:, 16 : 16 + K]
    assert view.data_ptr() % 16 == 0
    view.copy_(x[:M])
    tokens = most_tokens(loop, state.V.shape[1] if state.V is not None else 0)
    forced(loop, min(M, tokens) if loop == NARROW else tokens, 1, 8)
    assert torch.equal(run(view, state, bias, GPU), exact[:M].to(dtype))


@pytest.mark.parametrize("M", [1, 3, 5, 16])
@pytest.mark.parametrize("K", [40, 129, 388])
def test_strided_and_misaligned_activations(M, K):
    """The library copies them first."""
    state, x, bias, exact = problem(PackedLayout(33, K, "int4", 32, 1, 4), torch.float16)
    want = exact[:M].half()
    wide = torch.full((M, K + 9), NAN, dtype=torch.float16)
    for offset in (0, 1, 8):
        view = wide[:, offset : offset + K]
        view.copy_(x[:M])
        assert torch.equal(run(view, state, bias, GPU), want), offset
        view.fill_(NAN)
    turned = x[:M].T.contiguous().T
    assert torch.equal(run(turned, state, bias, GPU), want)
    assert torch.equal(run(x[:M, None], state, bias, GPU), want[:, None])


# ---- beside other kernels -----------------------------------------------------------------------

HOPPER = [
    ("int4", 128, 1, 1, 0, NARROW, 1, 1), ("fp16", None, 1, 3, 0, NARROW, 2, 2),
    ("int8", 32, 1, 0, 20, WIDE, 16, 1), ("int4", 128, 1, 1, 20, WIDE, 9, 2),
    ("fp16", None, 1, 2, 0, WIDE, 3, 1), ("int8", 128, 1, 1, 20, MANY, 20, 1),
    ("fp16", None, 1, 1, 0, MANY, 40, 2), ("int4", 128, 2, 1, 0, MANY, 20, 1),
    ("int8", 128, 1, 1, 0, "dense", 80, 1), ("int4", 64, 3, 2, 0, "dense", 80, 1),
]  # fmt: skip


@pytest.mark.parametrize("values, group_size, planes, rank, adapter_rank, loop, M, splits", HOPPER)
def test_on_hopper_every_kernel_waits_for_the_one_ahead(
    forced, values, group_size, planes, rank, adapter_rank, loop, M, splits
):
    """compute_90 text, launched as dependent kernels: the interpreter refuses whatever is read or
    written too early."""
    packed_layout = PackedLayout(64, 648, values, group_size, rank, adapter_rank, planes=planes)
    packed = random_packed(packed_layout, integers=True)
    state = layout.prepare((packed,), torch.float16)
    x = torch.randint(-2, 3, (M, 648), generator=torch.Generator().manual_seed(M)).half()
    bias = torch.arange(64).half()
    if loop != MANY:
        tokens = most_tokens(loop, rank)
        forced(loop, min(M, tokens) if loop == NARROW else tokens, 1, 4, splits, z_splits=splits)
    launched = Launched()
    y = run(x, state, bias, GPU, "compute_90", launched)
    assert torch.equal(y, oracle(x, packed, bias)[0].half())
    assert launched.dependent == [True] * len(launched.kernels)
    for name, stats in zip(launched.kernels, launched.stats, strict=True):
        assert stats["griddepcontrol.wait"], name
        assert stats["griddepcontrol.launch_dependents"] or name.startswith("reduce"), name


@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
@pytest.mark.parametrize("loop, M", [(NARROW, 1), (WIDE, 9)])
def test_the_next_weight_is_prefetched_line_by_line(forced, loop, M, architecture):
    """Each line of 128 bytes once, whatever the CTAs; and the result is the same."""
    state, x, bias, exact = problem(PackedLayout(70, 648, "int4", 128, 1), torch.float16)
    following = problem(PackedLayout(300, 388, "int8", 128, 1), torch.float16)[0]
    forced(loop, min(M, most_tokens(loop, 1)) if loop == NARROW else 16, 1, 4)
    for most in (1 << 20, 5000):
        prefetch.link(state, following, most)
        launched = Launched()
        y = run(x[:M], state, bias, GPU, architecture, launched)
        assert torch.equal(y, exact[:M].half())
        lines = -(-min(following.stream.nbytes, most // 16 * 16) // 128)
        assert launched.stats[0]["prefetches"] == lines
    prefetch.link(state, following, 0)
    run(x[:M], state, bias, GPU, architecture, launched)
    assert launched.stats[1]["prefetches"] == 0
