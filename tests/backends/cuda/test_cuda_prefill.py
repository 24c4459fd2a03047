"""The Hopper kernels for many tokens, executed without a GPU: launch.linear with forced plans on an
emulated H100, against fp64.

Small integers come out bit-exact whatever the order of summation. Memory that kernels write is
poisoned, memory beside it is not there.
"""

from __future__ import annotations

import collections
import itertools
import random
import re
from dataclasses import replace

import pytest
import torch
from emulation import Launched, run
from pairwise import grid, grid_of
from prefill_cases import (
    DEALINGS,
    DTYPES,
    FAMILIES,
    H100,
    LEAST,
    TOKENS,
    activations,
    bias_of,
    dealt,
    exact_of,
    forced,
    multiplied,
    same_bits,
    state_of,
)
from sass import counter as sass
from test_cuda_kernels import bound

from slab_kernels.backends.cuda import layout, plan, sizes_of, unpack
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.backends.cuda.prefill_launch import prefill_launch
from slab_kernels.format import PackedLayout
from slab_kernels.testing import VALUE_LAYOUTS, oracle, random_packed

# Rows: one ragged tile; two, of a pair the second ragged; three of 128, so that a pair is odd.
# Inputs: a block and a ragged second, which is no multiple of 8; the same, which is; half of one.
SHAPES = ((40, 198, 4), (150, 136, 20), (277, 64, 0))
LARGE, LARGEST = (40, 72, 20), (40, 72, 0)  # for several token tiles, a ragged block
# Every kernel deals its tiles in one of the ways.
FUSED = list(zip(FAMILIES, itertools.cycle(DEALINGS), strict=False))
# Groups of every size.
VALUES = (*VALUE_LAYOUTS, ("int8", 64))
BIASES = (None, torch.float32, torch.float16, torch.bfloat16)


def every_case() -> list[tuple]:
    """Every kernel and value type with every number of tokens and every shape that it has; the rest
    of each case is drawn."""
    draw = random.Random(0).choice
    rest = list(itertools.product(DTYPES, DEALINGS, (LEAST, (2, 5), None), BIASES, (True, False)))
    return [
        (family, *values, *shape, M, *draw(rest))
        for family, values, M in itertools.product(FAMILIES, VALUES, TOKENS)
        for shape in (SHAPES if M < 256 else (LARGE if M < 1000 else LARGEST,))
    ]


@grid_of(
    "family, values, group_size, N, K, adapter_rank, M, dtype, dealing, stages, bias_type, late",
    every_case(),
)
def test_small_integers_are_exact(
    family, values, group_size, N, K, adapter_rank, M, dtype, dealing, stages, bias_type, late
):
    """The whole of a call: what comes first for an adapter, the product, and shares of tiles added
    to it."""
    shape = PackedLayout(N, K, values, group_size, family.rank, adapter_rank, planes=family.planes)
    state, x = state_of(shape, dtype, True), activations(K, M, dtype, True)
    bias = None if bias_type is None else bias_of(N).to(bias_type)
    launched = Launched()
    with forced(family, dealing, stages):
        y = multiplied(x, state, bias, launched, late)
    exact, magnitude = exact_of(shape, M, dtype, True)
    exact = exact if bias is None else exact + bias.double()
    W = unpack.dense(state)
    if family.kind == "rebuild" and not torch.equal(W.to(dtype).float(), W):
        # The rebuilt weight is rounded, if an integer beside levels has more bits than bf16.
        assert (dtype, values) == (torch.bfloat16, "int8") and family.planes > 1
        assert bool(((y.double() - exact).abs() <= bound(magnitude, exact, dtype, K)).all())
    else:
        assert torch.equal(y, exact.to(dtype))
    assert launched.kernels[0].startswith("adapter_") == bool(adapter_rank)
    named = [name for name in launched.kernels if name.startswith(f"prefill_{family.kind}_")]
    assert len(named) == 1 and f"_t{family.tokens}" in named[0]
    assert any(name.startswith("prefill_reduce") for name in launched.kernels) == (
        dealing != "whole"
    )
    assert all(launched.dependent)


def kernel_of(family, dtype, values, group_size) -> str:
    shape = PackedLayout(16, 64, values, group_size, family.rank, planes=family.planes)
    sizes = sizes_of(state_of(shape, dtype, True))
    return prefill_launch(dealt(sizes, 17, family, "whole", None), dtype).name


def by_kernel(cases: list[tuple]) -> list[tuple]:
    """One of these cases for each kernel, those of the least used tokens and dealing."""
    found: dict[str, tuple] = {}
    used: collections.Counter[tuple] = collections.Counter()
    for *weight, M, dealing in cases:
        name = kernel_of(*weight)
        if name not in found and used[M, dealing] == min(used[how] for how in HOW):
            found[name] = (*weight, M, dealing)
            used[M, dealing] += 1
    return list(found.values())


HOW = ((33, "whole"), (60, "tail"))
REAL = [
    (family, dtype, *values, *how)
    for family, dtype, values, how in itertools.product(FAMILIES, DTYPES, VALUES, HOW)
]


@grid_of("family, dtype, values, group_size, M, dealing", REAL, few=by_kernel(REAL))
def test_against_fp64(family, dtype, values, group_size, M, dealing):
    """Real numbers, of every size of scale that a row's power of two has to bear."""
    shape = PackedLayout(40, 140, values, group_size, family.rank, 5, planes=family.planes)
    state, x = state_of(shape, dtype, False), activations(140, M, dtype, False)
    exact, magnitude = exact_of(shape, M, dtype, False)
    with forced(family, dealing):
        y = multiplied(x, state)
    assert bool(((y.double() - exact).abs() <= bound(magnitude, exact, dtype, 140)).all())


@pytest.mark.parametrize("family, dealing", FUSED, ids=str)
def test_fused_projections_are_one_launch(family, dealing):
    """q, k and v of unequal sizes, each with its own V and Q, none a multiple of a tile; all rows
    together are one of 8. Shares are a whole tile, or end one tile and begin another."""
    rows, K, M = (150, 26, 40), 262, family.tokens // 2 + 5
    parts = [
        random_packed(
            PackedLayout(n, K, "int4", 32, family.rank, 20, planes=family.planes), n, integers=True
        )
        for n in rows
    ]
    state, x = layout.prepare(parts, torch.float16), activations(K, M, torch.float16, True)
    bias, launched = bias_of(sum(rows)).half(), Launched()
    with forced(family, dealing):
        y = multiplied(x, state, bias, launched)
    exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
    assert torch.equal(y, exact.half())
    products = [name for name in launched.kernels if name.startswith(f"prefill_{family.kind}")]
    assert len(products) == 1


def test_bands_of_token_tiles():
    """Ten token tiles: the last two are a band of their own."""
    family, shape, M = FAMILIES[0], PackedLayout(150, 64, "fp16"), 9 * 64 + 1
    state, x = state_of(shape, torch.float16, True), activations(64, M, torch.float16, True)
    with forced(family, "whole"):
        y = multiplied(x, state)
    assert torch.equal(y, exact_of(shape, M, torch.float16, True)[0].half())


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.tokens == 64], ids=str)
def test_up_to_64_tokens_a_result_depends_on_no_other_token(family):
    """Nor do results of more tokens change what others have beside them."""
    shape = PackedLayout(40, 262, "int4", 64, family.rank, 4, planes=family.planes)
    state = state_of(shape, torch.float16, False)
    x = activations(262, 64, torch.float16, False).clone()
    with forced(family, "tail"):
        y = multiplied(x, state)
        assert same_bits(multiplied(x[:17], state), y[:17])
        x[1, 77], x[40, 3] = float("nan"), float("-inf")
        spoilt = multiplied(x, state)
    others = (torch.arange(64) != 1) & (torch.arange(64) != 40)
    assert same_bits(spoilt[others], y[others])
    assert not bool(spoilt[~others].isfinite().any())


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_same_bytes_twice(family):
    """Products at once and products when they are waited for, least and most stages; a token of
    NaN changes no other."""
    shape = PackedLayout(40, 262, "int8", 128, family.rank, planes=family.planes)
    state = state_of(shape, torch.bfloat16, False)
    x, results = activations(262, 70, torch.bfloat16, False).clone(), []
    x[1, 77] = float("nan")
    for stages, late in ((LEAST, True), (None, False)):
        with forced(family, "both", stages):
            results.append(multiplied(x, state, late=late))
    assert same_bits(*results)
    assert torch.equal(results[0].isfinite().all(1), torch.arange(70) != 1)


@pytest.mark.parametrize("family", FAMILIES[::5], ids=str)
def test_strided_and_unaligned_activations(family):
    K, M = 132, 70
    shape = PackedLayout(40, K, "fp16", None, family.rank, 4, planes=family.planes)
    state = state_of(shape, torch.float16, True)
    x, want = activations(K, M, torch.float16, True), exact_of(shape, M, torch.float16, True)[0]
    wide = torch.full((M, K + 12), float("nan"), dtype=torch.float16)
    with forced(family, "tail"):
        for offset in (0, 1, 8):
            view = wide[:, offset : offset + K]
            view.copy_(x)
            assert torch.equal(multiplied(view, state), want.half()), offset
            view.fill_(float("nan"))
        assert torch.equal(multiplied(x.T.contiguous().T, state), want.half())
        assert multiplied(x.view(7, 10, K), state).shape == (7, 10, 40)


@grid(family=FAMILIES, values=("int8", "int4"))
def test_scales_outside_of_fp16(family, values):
    """Rows of very large and very small scales, and of none at all, beside one another."""
    packed = random_packed(
        PackedLayout(40, 140, values, 64, family.rank, planes=family.planes), seed=5
    )
    assert packed.scales is not None
    sizes = torch.tensor([1.0, 1e-38, 0.0, 1e38, 1e-7, 1e7, 3.0, 1e4, 1e-4, 0.3])
    packed.scales.copy_(packed.scales.float() * sizes.repeat(4)[:, None])
    state, x = layout.prepare((packed,), torch.float16), activations(140, 20, torch.float16, False)
    exact, magnitude = oracle(x, packed)
    with forced(family, "whole"):
        y = multiplied(x, state)
    wrong = (y.double() - exact).abs() > bound(magnitude, exact, torch.float16, 140) + 2.0**-25
    fits = exact.abs() < 65000
    assert bool(fits.any()) and not bool((wrong & fits).any())
    assert not bool(y[~fits].isnan().any())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("M", [20, 50])
def test_plans_as_they_are_chosen(rank, M):
    """Nothing is forced: the plan for an H100 with few multiprocessors, which chooses a kernel for
    many tokens, and its own dealing and stages."""
    gpu = replace(H100, multiprocessors=3)
    shape = PackedLayout(277, 520, "int4", 128, rank, 4)
    state, x = state_of(shape, torch.float16, True), activations(520, M, torch.float16, True)
    chosen = plan.choose(sizes_of(state), M, gpu)
    assert isinstance(chosen, Prefill), chosen.describe()
    y = run(x, state, bias_of(277), gpu, "compute_90")
    assert torch.equal(y, (exact_of(shape, M, torch.float16, True)[0] + bias_of(277)).half())


def test_every_kernel_of_the_unit_is_executed():
    """By name: nothing ships that these tests cannot reach."""
    text = (sass.ROOT / "csrc/cuda/prefill.cu").read_text(encoding="utf-8")
    rows = re.findall(r"KERNEL\((\w+), *(\w+),", text)
    shipped = {f"prefill_{kind}_fp16_{name}" for kind, name in rows}
    shipped |= {name.replace("_fp16_", "_bf16_") for name in shipped}
    tested = {kernel_of(*weight) for *weight, _, _ in by_kernel(REAL)}
    assert tested == shipped
