"""What the Triton kernels must do, as bodies that take the device: in Triton's interpreter
(test_triton_interpreter.py) it is "cpu", on a GPU (test_triton_gpu.py) "cuda"; so the GPU's
tests work on the day there is one.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import namedtuple
from dataclasses import replace
from typing import NamedTuple

import torch
from pairwise import pairwise

from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.backends import triton as backend
from slab_kernels.backends.cuda.layout import TENSORS
from slab_kernels.backends.triton import launch, stream
from slab_kernels.backends.triton.configs import choose
from slab_kernels.backends.triton.launch import TritonState
from slab_kernels.backends.triton.rows import TileConfig
from slab_kernels.format import PackedLayout, bits
from slab_kernels.testing import (
    ADAPTER_RANKS,
    ROUNDOFF,
    SHAPES,
    TOKENS,
    VALUE_LAYOUTS,
    error_bound,
    oracle,
    random_packed,
)

BACKEND = backend.BACKEND
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RANKS = (0, 1, 2, 4, 8)
SPLITS = (1, 2, 4, 8)
# state is what the backend prepares, plain the canonical tensors for the kernels of launch.py.
Layer = namedtuple("Layer", "packed state plain x bias exact magnitude")


@functools.lru_cache(maxsize=8)
def layer(layout: PackedLayout, dtype: torch.dtype, integers: bool, device: str) -> Layer:
    """A weight, its state, activations, a bias; the exact result and its magnitude without the
    bias."""
    packed = random_packed(layout, seed=layout.out_features, integers=integers).to(device)
    generator, shape = torch.Generator().manual_seed(layout.rank), (max(TOKENS), layout.in_features)
    x = (
        torch.randint(-1, 2, shape, generator=generator)
        if integers
        else torch.randn(shape, generator=generator)
    )
    x, bias = (
        x.to(device, dtype),
        torch.randint(-9, 10, (layout.out_features,), generator=generator).float().to(device),
    )
    state = BACKEND.prepare(packed, dtype)
    plain = state if isinstance(state, TritonState) else launch.prepare((packed,), dtype)
    return Layer(packed, state, plain, x, bias, *oracle(x, packed))


def bound(magnitude, exact, dtype, K):
    """testing.error_bound, and what these kernels round besides.

    16-bit activations: W once, as a dense weight would be, and z = x Q once; to bf16 also both
    factors. fp32 on a GPU: three TF32 products lose 2^-22 a term, some of them twice; the
    interpreter multiplies in fp32.
    """
    besides = {torch.float16: 1, torch.bfloat16: 3}.get(dtype, 0) * ROUNDOFF[dtype]
    if dtype == torch.float32 and magnitude.is_cuda:
        besides = 2.0**-20
    return error_bound(magnitude, exact, dtype, K) + magnitude * besides


def stream_bound(magnitude, exact, dtype, K):
    """The same for a stream, whose kernel rounds u, v and v x besides, but not W."""
    return bound(magnitude, exact, dtype, K) + magnitude * 4 * ROUNDOFF[dtype]


def dense_of(state, dtype):
    """The whole weight by the kernel for such a state."""
    return launch.dense(state, dtype) if isinstance(state, TritonState) else stream.dense(state)


def same_bits(a, b):
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    )


# ---- the problem grid


class Case(NamedTuple):
    """One product of the grid; `tile` is the interpreter's, a GPU takes the table's."""

    dtype: torch.dtype
    values: tuple
    rank: int
    shape: tuple[int, int]
    planes: int  # without effect on rank 0
    adapter_rank: int
    M: int
    bias: torch.dtype | None
    splits: int
    z_splits: int
    tile: tuple[int, int, int]

    def __str__(self):
        return "-".join(str(part).removeprefix("torch.") for part in self)


CHOICES = {
    "planes": (1, 2, 3),
    "adapter_rank": ADAPTER_RANKS,
    "M": TOKENS,
    "bias": (None, *DTYPES),
    "splits": SPLITS,
    "z_splits": (1, 2, 4),
}
TILES = (
    (16, 16, 32),
    (16, 32, 64),
    (16, 64, 128),
    (64, 16, 64),
    (64, 64, 128),
    (128, 32, 256),
    (256, 128, 128),
)
SEED = 17  # With it any two choices meet in some case: test_triton_interpreter.py counts them.
# Products of tiles that one case of the interpreter may take, where a larger tile can keep to it.
STEPS = 16
# Of TOKENS, those below, at and beyond each tile of tokens.
LEAN_TOKENS = (0, 1, 9, 16, 17, 31, 33, 64, 65, 127, 128, 257)
DEALT_BY_COST = ("shape", "M", "splits")  # These decide which tiles are affordable.


def grid(dtypes, shapes=SHAPES, seed: int = SEED) -> list[Case]:
    """Every shape, dtype, value type and rank together; all else is dealt from shuffled decks."""
    generator, decks, cases = random.Random(seed), {name: [] for name in CHOICES}, []
    for shape, dtype, values, rank in itertools.product(shapes, dtypes, VALUE_LAYOUTS, RANKS):
        hand = {}
        for name, deck in decks.items():
            if not deck:
                deck += generator.sample(CHOICES[name], len(CHOICES[name]))
            hand[name] = deck.pop()
        shuffled = generator.sample(TILES, len(TILES))
        tile = affordable((hand["M"], *shape), hand["splits"], shuffled)[0]
        cases.append(Case(dtype, values, rank, shape, **hand, tile=tile))
    return cases


def lean_grid(dtypes) -> list[Case]:
    """Any two choices in some case; of the affordable tiles each case takes the one that meets most
    that is new to it."""
    choices = {"dtype": dtypes, "values": VALUE_LAYOUTS, "rank": RANKS, "shape": SHAPES}
    choices |= CHOICES | {"M": LEAN_TOKENS}
    cases, met = [], set()
    for chosen in pairwise(choices):
        named = dict(zip(choices, chosen, strict=True))
        others = [(name, value) for name, value in named.items() if name not in DEALT_BY_COST]
        tiles = affordable((named["M"], *named["shape"]), named["splits"], TILES)
        tile = max(tiles, key=lambda tile: sum((tile, other) not in met for other in others))
        met |= {(tile, other) for other in others}
        cases.append(Case(**named, tile=tile))
    return cases


def affordable(sizes: tuple[int, int, int], splits: int, tiles) -> list[tuple[int, int, int]]:
    """The tiles that take few steps in the interpreter; at least the one that takes fewest."""
    cost = {tile: interpreted_steps(sizes, tile) for tile in tiles}
    most = max(STEPS // splits, min(cost.values()))
    return [tile for tile, count in cost.items() if count <= most]


def interpreted_steps(sizes: tuple[int, int, int], tile: tuple[int, int, int]) -> int:
    return math.prod(-(-size // block) for size, block in zip(sizes, tile, strict=True))


def check_case(case: Case, device: str, config: TileConfig | None = None) -> None:
    """Small integers bit for bit, then random numbers each within its own bound: by the plain
    kernels, and by what the backend takes where that is another."""
    (N, K), M, dtype = case.shape, case.M, case.dtype
    planes = (
        min(case.planes, 2) if (dtype, case.rank) == (torch.bfloat16, 8) else case.planes
    )  # quarters times 504 have nine bits
    for integers in (True, False):
        it = layer(
            PackedLayout(N, K, *case.values, case.rank, case.adapter_rank, planes=planes),
            dtype,
            integers,
            device,
        )
        x, bias, exact = (
            it.x[:M],
            None if case.bias is None else it.bias.to(case.bias),
            it.exact[:M],
        )
        exact = exact if bias is None else exact + bias.double()
        chosen = config or choose(
            launch.sizes_of(it.plain), M, backend.bits_of(dtype), backend.device_of(x.device.index)
        )
        results = [(launch.linear(x, it.plain, bias, chosen, case.splits, case.z_splits), bound)]
        if it.state is not it.plain:
            results.append((BACKEND.linear(x, it.state, bias), stream_bound))
        magnitude = it.magnitude[:M] + (0 if bias is None else bias.double().abs())
        for y, most in results:
            assert (y.shape, y.dtype) == ((M, N), dtype)
            if integers:
                assert torch.equal(y, exact.to(dtype))
            else:
                off = (y.double() - exact).abs()
                assert bool((off <= most(magnitude, exact, dtype, K)).all())


# ---- bodies: each takes the device


def check_strided(device, M, K, dtype=torch.float16) -> None:
    """Columns of a wider matrix at any alignment, a transpose, batch dimensions, one row for all
    tokens."""
    it = layer(PackedLayout(33, K, "fp16", rank=1, adapter_rank=3), dtype, True, device)
    linear, want = (
        functools.partial(BACKEND.linear, state=it.state, bias=it.bias),
        (it.exact[:M] + it.bias.double()).to(dtype),
    )
    wide = torch.full((M, K + 9), float("nan"), dtype=dtype, device=device)
    for offset in (0, 1, 8):
        view = wide[:, offset : offset + K]
        view.copy_(it.x[:M])
        assert torch.equal(linear(view), want), offset
        view.fill_(float("nan"))
    assert torch.equal(linear(it.x[:M].T.contiguous().T), want)
    assert torch.equal(linear(it.x[:M].view(1, M, 1, K)), want.view(1, M, 1, 33))
    assert torch.equal(linear(it.x[0]), want[0])
    assert torch.equal(linear(it.x[:1].expand(M, K)), want[:1].expand(M, 33))
    for empty in ((0, K), (2, 0, K)):
        assert linear(it.x.new_empty(empty)).shape == (*empty[:-1], 33)


def check_error_is_that_of_a_dense_weight(device, dtype, values, layout=(48, 1024), M=9) -> None:
    """Root mean square against fp64 at most 1.5 times that of a dense product with W rounded to the
    activations' type."""
    it = layer(PackedLayout(*layout, *values, 1), dtype, False, device)
    y = BACKEND.linear(it.x[:M], it.state)
    dense = (it.x[:M].float() @ it.packed.dense().to(dtype).float().T).to(dtype)
    ours, theirs = (
        float((found.double() - it.exact[:M]).square().mean().sqrt()) for found in (y, dense)
    )
    assert ours <= 1.5 * theirs, (ours, theirs)


def check_shares_of_K(device, layout, dtype, config: TileConfig, M=5) -> None:
    """The same numbers up to rounding for any number of programs, the same bits for the same
    number."""
    it = layer(layout, dtype, False, device)
    exact, K = it.exact[:M] + it.bias.double(), layout.in_features
    most = bound(it.magnitude[:M] + it.bias.double().abs(), exact, dtype, K)
    for splits in SPLITS:
        y, again = (
            launch.linear(it.x[:M], it.plain, it.bias, config, splits, z) for z in (splits, splits)
        )
        assert bool(((y.double() - exact).abs() <= most).all()), splits
        assert same_bits(y, again), splits


def check_a_token_alone(device, layout, dtype) -> None:
    """Up to 16 tokens a token's result depends on no other token, nor on its place."""
    it = layer(layout, dtype, False, device)
    largest = BACKEND.linear(it.x[:16], it.state, it.bias)
    for M in (1, 2, 5, 8, 9, 15):
        assert same_bits(BACKEND.linear(it.x[:M], it.state, it.bias), largest[:M]), M
    assert same_bits(BACKEND.linear(it.x[:16].roll(3, 0), it.state, it.bias), largest.roll(3, 0))


def check_fused(
    device,
    dtype,
    values,
    rank,
    adapter_rank,
    tokens,
    rows=(1, 17, 40),
    K=172,
    config=None,
    planes=1,
) -> None:
    """Parts keep their own factors: magnitudes of V and Q differ between them by powers of two."""
    parts, bias = [], torch.randint(-5, 6, (sum(rows),), device=device).float()
    for i, n in enumerate(rows):
        part = random_packed(
            PackedLayout(n, K, *values, rank, adapter_rank, planes=planes), seed=n, integers=True
        )
        parts.append(
            replace(
                part,
                V=None if part.V is None else part.V * 2**i,
                Q=None if part.Q is None else part.Q * 2**i,
            ).to(device)
        )
    state = launch.prepare(parts, dtype) if config else BACKEND.prepare_fused(parts, dtype)
    assert list(state.rows) == list(rows)
    for M in tokens:
        x = torch.randint(-1, 2, (M, K), generator=torch.Generator().manual_seed(M)).to(
            device, dtype
        )
        exact = torch.cat([oracle(x, part)[0] for part in parts], -1) + bias.double()
        y = (
            launch.linear(x, state, bias, config, 2, 2)
            if config
            else BACKEND.linear_fused(x, state, bias)
        )
        assert torch.equal(y, exact.to(dtype)), M
    W = torch.cat([part.dense() for part in parts])
    assert adapter_rank or torch.equal(dense_of(state, dtype), W.to(dtype))


def check_dense(device, dtype, values, rank, adapter_rank, N, K, planes=1) -> None:
    """The whole weight: to the bit where it takes one rounding, else within as many as it takes."""
    for integers in (True, False):
        it = layer(
            PackedLayout(N, K, *values, rank, adapter_rank, planes=planes), dtype, integers, device
        )
        W, want = launch.dense(it.plain, dtype), it.packed.dense()
        if not adapter_rank and (integers or rank == 0 or (rank == 1 and dtype == torch.float32)):
            assert torch.equal(W, want.to(dtype))
        else:
            size, want = oracle(torch.eye(K, device=device), it.packed)[1].T, want.double()
            most = (
                bound(size, want, dtype, max(rank, adapter_rank)) + 2.0**-23
            )  # subnormal fp16 numbers: two halves of 2^-24
            assert bool(((W.double() - want).abs() <= most).all())


def check_kept_is_what_the_mask_says(device, dtype) -> None:
    """Stored zeros and minus zeros are kept entries with their sign, whatever U V^T holds there; u
    = 0 gives zeros elsewhere."""
    packed = random_packed(PackedLayout(16, 64, "fp16", rank=1))
    packed.values.zero_()
    packed.values[:, ::2] = -0.0
    packed.U[packed.U == 0] = 1
    packed.V[packed.V == 0] = 1
    packed.U[3] = 0
    packed = packed.to(device)
    kept = bits.unpack_mask(packed.metadata)
    state, x = BACKEND.prepare(packed, dtype), torch.eye(64, dtype=dtype, device=device)
    W, y = dense_of(state, dtype), BACKEND.linear(x, state).T
    for found in (W, y):
        assert bool((found[kept] == 0).all()) and bool((found[~kept].view(16, -1)[3] == 0).all())
        assert bool((found[~kept].view(16, -1)[torch.arange(16) != 3] != 0).all())
    negative = torch.signbit(W)[kept].view(16, -1)
    assert bool(negative[:, ::2].all()) and not bool(negative[:, 1::2].any())
    packed.U.zero_()
    assert not bool(dense_of(BACKEND.prepare(packed, dtype), dtype).any())


def check_nan_and_infinity_propagate(device, dtype, bad, M) -> None:
    it = layer(PackedLayout(20, 132, "int4", 32, 1, 3), dtype, False, device)
    x = it.x[:M].clone()
    x[M // 2, 77] = bad
    y = BACKEND.linear(x, it.state, it.bias)
    other = torch.arange(M, device=device) != M // 2
    assert not bool(y[M // 2].isfinite().any()) and bool(y[other].isfinite().all())


def check_gradients(device, dtype) -> None:
    """Of x and bias, each wanted or not, any leading dimensions, two fused parts: those of the
    dense weight."""
    parts = [
        random_packed(PackedLayout(n, 140, "int8", 128, 2, 4), seed=n).to(device) for n in (37, 16)
    ]
    state, W = (
        BACKEND.prepare_fused(parts, dtype),
        torch.cat([part.dense() for part in parts]).to(dtype).float(),
    )
    for shape, wanted in itertools.product(
        ((140,), (5, 140), (2, 3, 140)), ((True, True), (True, False), (False, True))
    ):
        x, bias = (
            torch.randn(shape).to(device, dtype).requires_grad_(wanted[0]),
            torch.randn(53, device=device).requires_grad_(wanted[1]),
        )
        grad = torch.randn(*shape[:-1], 53).to(device, dtype)
        y = BACKEND.linear(x, state, bias)
        y.backward(grad)
        want = grad.float() @ W, grad.float().reshape(-1, 53).sum(0)
        for leaf, expected in zip((x, bias), want, strict=True):
            assert (leaf.grad is None) is not leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(
                    leaf.grad.float(),
                    expected,
                    rtol=4 * ROUNDOFF[dtype] + 1e-5,
                    atol=8 * ROUNDOFF[dtype] + 1e-5,
                )


def check_opcheck(device, M, dtype=torch.float16) -> None:
    it = layer(PackedLayout(40, 140, "int8", 128, 2, 4), dtype, False, device)
    ops, check, x = torch.ops.slab_kernels, torch.library.opcheck, it.x[:M]
    rest = (*it.plain[:8], it.bias.to(dtype), *it.plain[8:])
    check(ops.linear_triton_frozen.default, (x, *rest))
    check(ops.linear_triton.default, (x.clone().requires_grad_(), *rest))
    check(ops.dense_triton.default, (*it.plain, dtype))
    if it.state is not it.plain:
        rest = (*it.state[:TENSORS], it.bias.to(dtype), *it.state[TENSORS:])
        check(ops.linear_triton_stream_frozen.default, (x, *rest))
        check(ops.linear_triton_stream.default, (x.clone().requires_grad_(), *rest))
        check(ops.dense_triton_stream.default, tuple(it.state))


def check_compile(device, compiler: str, tokens=(1, 3, 17)) -> None:
    """One graph for every number of tokens, forward and backward, without a break."""
    torch._dynamo.reset()
    it = layer(PackedLayout(40, 140, "fp16", None, 1, 4), torch.float16, False, device)
    module = SlabLinear.from_packed(it.packed, it.bias.half()).prepare(torch.float16)
    assert module.backend == "triton"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
    for M in tokens:
        with torch.no_grad():
            assert same_bits(compiled(it.x[:M]), module(it.x[:M])), M
        x, again = (it.x[:M].clone().requires_grad_() for _ in range(2))
        compiled(x).float().sum().backward()
        module(again).float().sum().backward()
        torch.testing.assert_close(
            x.grad, again.grad, rtol=2e-3, atol=1e-3
        )  # the compiler may contract a * b + c


def check_modules(device) -> None:
    """SlabLinear and FusedSlabLinear, end to end: types, a joined bias, parts that cannot share a
    launch, gradients."""
    layouts = [PackedLayout(n, 140, "fp16", None, 1, 4) for n in (40, 8, 17)]
    mixed = [*layouts[:2], PackedLayout(17, 140, "int4", 32, 1, 4)]
    for chosen, is_one in ((layouts, True), (mixed, False)):
        packed = [
            random_packed(it, seed=it.out_features, integers=True).to(device) for it in chosen
        ]
        bias = [torch.randint(-4, 5, (it.out_features,), device=device).float() for it in chosen]
        parts = [
            SlabLinear.from_packed(p, None if i == 1 else b)
            for i, (p, b) in enumerate(zip(packed, bias, strict=True))
        ]
        fused = FusedSlabLinear(parts)
        for dtype in (torch.float16, torch.float32):
            x = torch.randint(-2, 3, (2, 3, 140), device=device).to(dtype)
            for i, (y, part) in enumerate(zip(fused(x), parts, strict=True)):
                want = (
                    oracle(x.view(6, 140), packed[i], None if i == 1 else bias[i])[0]
                    .to(dtype)
                    .view(2, 3, -1)
                )
                assert (
                    torch.equal(y, want) and torch.equal(part(x), want) and part.backend == "triton"
                )
            served_by, state, _ = fused._linears[dtype][0]
            assert served_by.name == "triton" and isinstance(state, BACKEND.state_types) is is_one
    parts[0].bias.requires_grad_()
    x = torch.ones(3, 140, dtype=torch.float16, device=device, requires_grad=True)
    parts[0](x).float().sum().backward()
    assert torch.equal(x.grad, packed[0].dense().sum(0).half().expand(3, -1))
    assert torch.equal(parts[0].bias.grad, torch.full_like(parts[0].bias, 3))
