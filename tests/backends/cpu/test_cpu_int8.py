"""int8 activations on a CPU: every instruction set against an emulation in integers and against
fp64 with the stated bound; NaN and infinity, shared x, words and their messages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from int8_emulation import few, many, weight_of, wide

from slab_kernels import FusedSlabLinear, SlabLinear, native, reference
from slab_kernels.backends import activations as accuracy
from slab_kernels.backends import cpu, dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.errors import ArgumentError
from slab_kernels.format import PackedLayout, PackedWeight
from slab_kernels.testing import ROUNDOFF, oracle, random_packed

if native.missing_library():
    pytest.skip(f"no native library: {native.missing_library()}", allow_module_level=True)

cpu.load_library()
OPS = torch.ops.slab_kernels
ISAS = native.runnable()
VALUES = (
    ("int8", 128), ("int8", 64), ("int8", None), ("int4", 32), ("int4", 64), ("int4", 128),
    ("int4", None), ("int3", 32), ("int3", 128),
)  # fmt: skip
TERMS = ((0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (3, 3), (18, 1))  # rank, planes
SHAPES = ((1, 3), (17, 172), (40, 516), (70, 260))
MOST_RANK = 16  # of the product for many tokens
TOKENS = (1, 2, 3, 4, 5, 7, 12, 13, 16, 17, 31, 40, 70)
ROUNDED = 2.0**-20  # fp32 sums of blocks, of the terms' magnitudes


@pytest.fixture(params=ISAS)
def isa(request):
    before = OPS.cpu_isa()
    yield OPS.cpu_use_isa(request.param)
    OPS.cpu_use_isa(before)


def int8(packed: PackedWeight):
    state = cpu.BACKEND.prepare(packed)
    return cpu.BACKEND.with_activations(state, (packed,), "int8")


def linear(x, packed, bias=None):
    return cpu.BACKEND.linear(x, int8(packed), bias)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@contextlib.contextmanager
def product(way: str):
    """`few` or `many` for whatever number of tokens."""
    OPS.cpu_use_few({"few": 1 << 30, "many": 0}[way])
    yield
    OPS.cpu_use_few(-1)


@pytest.fixture(params=["few", "many"])
def way(request):
    with product(request.param):
        yield request.param


def integers(way: str) -> str:
    """`wide` where the instruction set has 13 bits for many tokens, else `way`."""
    return "wide" if way == "many" and OPS.cpu_int8(1, 1 << 20)[2] == 13 else way


def emulated(way, x, packed):
    w, values = weight_of(packed), packed.layout.values
    if way == "few":
        return few(x, w)
    if integers(way) == "wide":
        return wide(x, w, values, packed.layout.group_size or 128)
    return many(x, w, values)


@functools.cache
def problem(layout: PackedLayout) -> tuple[PackedWeight, torch.Tensor]:
    packed = random_packed(layout, seed=layout.out_features + layout.rank)
    generator = torch.Generator().manual_seed(layout.in_features)
    return packed, torch.randn(max(TOKENS), layout.in_features, generator=generator)


@functools.cache
def of_integers(layout: PackedLayout, way: str):
    """A product of all tokens, and the exact one; `way` as `integers` has it."""
    packed, x = problem(layout)
    return emulated("few" if way == "few" else "many", x, packed), oracle(x, packed)[0]


def expected(layout: PackedLayout, way: str):
    return of_integers(layout, integers(way))


def check(y, found, exact, dtype=torch.float32):
    """y against the emulation, and within the stated bound of the exact product."""
    rounding = ROUNDED * found.size + found.y.abs() * ROUNDOFF[dtype] + 1e-30
    assert bool(((y.double() - found.y).abs() <= rounding).all())
    assert bool(((y.double() - exact).abs() <= found.bound + rounding).all())


@pytest.mark.parametrize("rank, planes", TERMS)
@pytest.mark.parametrize("values, group_size", VALUES)
def test_against_integers_and_fp64(isa, values, group_size, rank, planes, poisoned):
    for (N, K), way in itertools.product(SHAPES, ("few", "many")):
        if rank > min(N, K) or (rank > MOST_RANK and way == "many"):
            continue
        layout = PackedLayout(N, K, values, group_size, rank, planes=planes)
        packed, x = problem(layout)
        found, exact = expected(layout, way)
        state = int8(packed)
        with product(way):
            for M in TOKENS:
                y = cpu.BACKEND.linear(x[:M], state)
                check(y, type(found)(*(t[:M] for t in found)), exact[:M])


@pytest.mark.parametrize("M", range(1, 71))
def test_every_number_of_tokens(isa, way, M):
    layout = PackedLayout(70, 260, "int4", 128, rank=1)
    packed, x = problem(layout)
    found, exact = expected(layout, way)
    check(linear(x[:M], packed), type(found)(*(t[:M] for t in found)), exact[:M])


@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter, stored", [(5, None), (40, "int8")])
def test_types_adapters_and_bias(isa, way, M, dtype, adapter, stored):
    layout = PackedLayout(50, 300, "int4", 64, 1, adapter, planes=2, adapter_values=stored)
    packed, bias = random_packed(layout), torch.randn(50)
    x = torch.randn(M, 300).to(dtype)
    found = emulated(way, x, packed)
    found = found._replace(y=found.y + bias.double(), size=found.size + bias.double().abs())
    y = linear(x, packed, bias)
    assert y.dtype == dtype
    check(y, found, oracle(x, packed, bias)[0], dtype)


@pytest.mark.parametrize("values", ["int4", "int8"])
@pytest.mark.parametrize("rank, planes", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("M", [2, 40])
def test_a_sign_term_beyond_the_panel(isa, way, values, rank, planes, M):
    """Some rows have a sign term far larger than any kept value, some scales are 0 or tiny."""
    packed = random_packed(PackedLayout(70, 300, values, 32, rank, planes=planes), seed=5)
    U, V, scales = packed.U.clone(), packed.V.clone(), packed.scales.clone()
    U[3] *= 300
    V[140] *= 200  # one block of all rows
    scales[7], scales[11, 2], scales[12], scales[13] = 0, 0, 1e-38, -scales[13]
    U[9], scales[9] = 0, 0
    packed = dataclasses.replace(packed, U=U, V=V, scales=scales)
    x = torch.randn(M, 300)
    check(linear(x, packed), emulated(way, x, packed), oracle(x, packed)[0])


@pytest.mark.parametrize("inputs", [128, 260])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e33, 1e36])
@pytest.mark.parametrize("M", [1, 40])
def test_small_and_large_numbers(isa, way, size, inputs, M):
    """From 2^108 on a sum of integers times a step could overflow where y is finite."""
    packed = random_packed(PackedLayout(20, 260, "int4", 128, rank=1))
    x = torch.randn(M, 260)
    x[:, :inputs] *= size
    y, exact = linear(x, packed).double(), oracle(x, packed)[0]
    magnitude = oracle(x, packed)[1]
    assert bool(((y - exact).abs() <= 0.02 * magnitude).all())


@pytest.mark.parametrize("values", ["int4", "int8"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("M", [1, 40])
def test_a_scale_times_x_beyond_fp32(isa, way, values, planes, M):
    """Finite where the exact product is: no kept value of the row meets the largest inputs."""
    packed = random_packed(PackedLayout(40, 260, values, 32, rank=1, planes=planes))
    scales, kept = packed.scales.clone(), packed.values.clone()
    scales[3], kept[3] = 2.0**60, 0
    second = kept.shape[1] * 128 // (32 * scales.shape[1])  # where those of the second block begin
    scales[5], kept[5, second:] = -(2.0**60), 0
    packed = dataclasses.replace(packed, scales=scales, values=kept)
    x = torch.randn(M, 260, generator=torch.Generator().manual_seed(M))
    x[:, 128:256] *= 2.0**75
    y, exact = linear(x, packed), oracle(x, packed)[0]
    assert bool(exact.abs().amax() < 2.0**127) and bool(y.isfinite().all())
    check(y, emulated(way, x, packed), exact)


def test_zeros_are_zero(isa, way):
    packed = random_packed(PackedLayout(20, 260, "int8", None, rank=2))
    for M in (1, 40):
        assert not bool(linear(torch.zeros(M, 260), packed).any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("M", [1, 3, 20, 40])
@pytest.mark.parametrize("rank", [1, 3])
def test_nan_and_infinity_reach_y_as_in_the_exact_product(isa, way, M, bad, rank):
    packed = random_packed(PackedLayout(40, 260, "int4", 32, rank, adapter_rank=3))
    x, bias = torch.randn(M, 260), torch.randn(40)
    clean = linear(x, packed, bias)
    x[M // 2, 77] = bad
    y, row = linear(x, packed, bias), slice(M // 2, M // 2 + 1)
    exact = cpu.BACKEND.linear(x[row], cpu.BACKEND.prepare(packed), bias)
    assert not bool(y[row].isfinite().any())
    assert same_bits(y[row].nan_to_num(7, 8, 9), exact.nan_to_num(7, 8, 9))
    others = [i for i in range(M) if i != M // 2]
    assert same_bits(y[others], clean[others])


def test_products_with_v_that_overflow_are_computed_exactly(isa):
    OPS.cpu_use_few(4)
    packed = random_packed(PackedLayout(20, 260, "int4", 32, rank=1))
    packed = dataclasses.replace(packed, V=packed.V * 1e4)
    x = torch.full((2, 260), 1e37)
    x[1] = 1.0
    y = linear(x, packed)
    OPS.cpu_use_few(-1)
    exact = cpu.BACKEND.linear(x[:1], cpu.BACKEND.prepare(packed))
    assert same_bits(y[:1].nan_to_num(), exact.nan_to_num()) and bool(y[1].isfinite().all())


def test_same_bits_for_any_thread_count_and_batch(isa, way):
    packed = random_packed(PackedLayout(1000, 512, "int8", 64, rank=1, adapter_rank=40))
    state = int8(packed)
    x, threads = torch.randn(280, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, all_of = cpu.BACKEND.linear(x[:1], state), cpu.BACKEND.linear(x, state)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(cpu.BACKEND.linear(x, state), all_of)
            assert same_bits(cpu.BACKEND.linear(x[:1], state), one)
        assert same_bits(one, all_of[:1])
        for M in (2, 3, 5, 13, 70, 193, 257):
            assert same_bits(cpu.BACKEND.linear(x[:M], state), all_of[:M])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("values", ["int4", "int8"])
def test_the_highest_rank_of_many_tokens(isa, values, planes):
    packed = random_packed(PackedLayout(40, 260, values, 64, MOST_RANK, planes=planes), seed=3)
    x = torch.randn(13, 260)
    with product("many"):
        check(linear(x, packed), emulated("many", x, packed), oracle(x, packed)[0])


def test_a_call_of_more_tokens_than_are_run_at_once(isa, way):
    """They are cut after each 512; a token has the result that it has alone, NaN stays in its."""
    packed, x = random_packed(PackedLayout(17, 132, "int4", 32, rank=1)), torch.randn(1030, 132)
    x[700, 5] = float("nan")
    state = int8(packed)
    y = cpu.BACKEND.linear(x, state)
    assert bool(y[700].isnan().any()) and bool(y[:700].isfinite().all() & y[701:].isfinite().all())
    for token in (0, 511, 512, 699, 700, 701, 1023, 1024, 1029):
        alone = cpu.BACKEND.linear(x[token : token + 1], state)
        assert same_bits(y[token : token + 1].nan_to_num(7), alone.nan_to_num(7))


def test_instruction_sets_have_the_same_integers(way):
    """Those that have as many bits."""
    packed, x = random_packed(PackedLayout(64, 512, "int4", 64, rank=2)), torch.randn(40, 512)
    before, results = OPS.cpu_isa(), {}
    for name in ISAS:
        OPS.cpu_use_isa(name)
        results.setdefault(integers(way), []).append(linear(x, packed))
    OPS.cpu_use_isa(before)
    for same in results.values():
        assert all(torch.allclose(y, same[0], rtol=1e-5, atol=1e-6) for y in same)


# Name of the kernels -> the most tokens of `few` by rank, and what runs above.
FEW = {
    "avx512_vnni": ({0: 8, 1: 8, 4: 8, MOST_RANK: 8}, "many"),
    "avx2": ({0: 16, 1: 8, 2: 5, 3: 4, 4: 3, MOST_RANK: 1}, "many"),
    "scalar": ({0: 0, 1: 0, 4: 0}, "exact"),
}


def test_up_to_how_many_tokens_each_product_runs(isa):
    name = OPS.cpu_int8(1, 1)[1]
    few, above = FEW[name]
    for rank, most in few.items():
        if most:
            assert OPS.cpu_int8(rank, 1)[0] == OPS.cpu_int8(rank, most)[0] == "few"
        assert OPS.cpu_int8(rank, most + 1)[0] == OPS.cpu_int8(rank, 1000)[0] == above
    assert {OPS.cpu_int8(MOST_RANK + 1, M)[0] for M in (1, 8, 9, 100)} == {"exact"}


@pytest.mark.parametrize("M", [1, 2, 3, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("rank", [1, 2, MOST_RANK + 2])
def test_which_product_runs(isa, M, rank):
    packed, x = random_packed(PackedLayout(40, 260, "int4", 32, rank)), torch.randn(M, 260)
    y, (chosen, name, _) = linear(x, packed), OPS.cpu_int8(rank, M)
    family = isa.removesuffix("_bf16")
    assert name.startswith(family) or (family, name) == ("avx512", "scalar")
    if chosen == "exact":
        assert same_bits(y, cpu.BACKEND.linear(x, cpu.BACKEND.prepare(packed)))
    else:
        with product(chosen):
            assert same_bits(y, linear(x, packed))
    said = cpu.BACKEND.describe(LinearProblem(M, 40, 260, "int4", 32, rank, activations="int8"))
    assert ("exact runs" in said) == (chosen == "exact")
    assert rank <= MOST_RANK or chosen == "exact", "higher ranks are exact"


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (0, 2, 1)])
def test_fused_parts_are_what_they_are_alone(isa, way, M, ranks):
    kept = [
        random_packed(PackedLayout(n, 260, "int4", 64, rank), seed=n)
        for n, rank in zip((48, 17, 33), ranks, strict=True)
    ]
    layers = [SlabLinear.from_packed(p, torch.randn(p.out_features)) for p in kept]
    x = torch.randn(M, 260)
    x[0, 3] = float("nan") if M == 5 else 1.0
    alone = [layer.prepare(activations="int8")(x) for layer in layers]
    fused = FusedSlabLinear(layers).prepare(activations="int8")
    assert "activations=int8" in repr(fused)
    for mine, theirs in zip(fused(x), alone, strict=True):
        assert torch.equal(mine.nan_to_num(5), theirs.nan_to_num(5))
    x = x.nan_to_num(1).requires_grad_()
    (grad,) = torch.autograd.grad(sum(y.sum() for y in fused(x)), x)
    dense = torch.cat([p.dense() for p in kept]).sum(0)
    assert torch.allclose(grad[0], dense, rtol=1e-3, atol=1e-3)


def test_opcheck_and_vmap(way):
    packed = random_packed(PackedLayout(40, 200, "int8", 128, 2, 5))
    prepared, N, K = int8(packed)
    x, bias = torch.randn(3, 200), torch.randn(40)
    for sample in (x[None].bfloat16(), x.clone().requires_grad_()):
        torch.library.opcheck(OPS.linear_cpu_int8.default, (sample, prepared, bias, N, K))
    torch.library.opcheck(OPS.linear_cpu_int8_frozen.default, (x, prepared, None, N, K))
    parts = ([prepared, prepared], torch.cat([bias, bias]), [N, N], K)
    torch.library.opcheck(OPS.linear_cpu_int8_parts.default, (x, *parts))
    y = torch.vmap(lambda row: OPS.linear_cpu_int8_parts(row, *parts))(x)
    assert torch.equal(y, OPS.linear_cpu_int8_parts(x, *parts))


def test_gradients_are_those_of_the_exact_product():
    packed = random_packed(PackedLayout(40, 200, "int4", 32, 2, 5))
    x, bias = torch.randn(3, 2, 200, requires_grad=True), torch.randn(40, requires_grad=True)
    grad = torch.randn(3, 2, 40)
    ours = torch.autograd.grad(linear(x, packed, bias), (x, bias), grad)
    theirs = torch.autograd.grad(reference.linear(x, packed, bias), (x, bias), grad)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True)
    )


def test_compile(way):
    layer = SlabLinear.from_packed(random_packed(PackedLayout(40, 200, "int4", 32, rank=1)))
    layer.prepare(activations="int8")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (1, 5, 40):
        x = torch.randn(M, 200)
        assert torch.equal(compiled(x), layer(x))


# The word, and what a layer does with it.


def test_the_word_of_a_layer(monkeypatch, way):
    layer = SlabLinear.from_packed(random_packed(PackedLayout(40, 200, "int4", 32, rank=1)))
    x = torch.randn(3, 200)
    exact = layer(x)
    assert "activations" not in repr(layer)
    stream = layer._linears[torch.float32][-1].state.prepared
    rounded = layer.prepare(activations="int8")(x)
    assert "activations=int8" in repr(layer) and not torch.equal(rounded, exact)
    assert layer._linears[torch.float32][-1].state.prepared is stream, "both modes read one stream"
    assert torch.equal(layer.prepare(torch.float32)(x), rounded), "it keeps to its word"
    assert torch.equal(layer.prepare(activations="exact")(x), exact)
    assert "activations" not in repr(layer)
    monkeypatch.setenv(accuracy.ENVIRONMENT, "int8")
    assert torch.equal(layer.prepare()(x), exact), "what a layer was told stands above"
    fresh = SlabLinear.from_packed(layer.packed())
    assert torch.equal(fresh(x), rounded)


def test_the_default_is_int8(monkeypatch, way):
    monkeypatch.delenv(accuracy.ENVIRONMENT, raising=False)
    packed, x = random_packed(PackedLayout(40, 200, "int4", 32, rank=1)), torch.randn(3, 200)
    layer = SlabLinear.from_packed(packed)
    assert torch.equal(layer(x), linear(x, packed)) and "activations=int8" in repr(layer)
    assert accuracy.named(None) == "int8" and "activations=int8" in cpu.BACKEND.describe(
        LinearProblem(1, 64, 256, values="int4", group_size=32)
    )
    assert not torch.equal(layer.prepare(activations="exact")(x), linear(x, packed))


@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_16_bit_values_stay_exact(values):
    packed = random_packed(PackedLayout(40, 200, values, rank=1))
    layer, x = SlabLinear.from_packed(packed), torch.randn(3, 200)
    exact = layer(x)
    assert torch.equal(layer.prepare(activations="int8")(x), exact)
    assert "activations" not in repr(layer)
    with pytest.raises(RuntimeError, match="int8 activations need int8 or int4 values"):
        OPS.linear_cpu_int8_frozen(x, *cpu.BACKEND.prepare(packed)[:1], None, 40, 200)
    problem = LinearProblem.of(packed.layout, 1, torch.float32, "cpu")
    said = cpu.BACKEND.describe(dataclasses.replace(problem, activations="int8"))
    assert f"exact runs instead, since {values} values" in said


def test_what_explain_says(monkeypatch):
    problem = LinearProblem(1, 64, 256, values="int4", group_size=32)
    monkeypatch.setenv(accuracy.ENVIRONMENT, "exact")
    assert "activations=exact" in cpu.BACKEND.describe(problem)
    monkeypatch.setenv(accuracy.ENVIRONMENT, "int8")
    for name in ("few", "many"):
        with product(name):
            assert f"the product for {name} tokens" in cpu.BACKEND.describe(problem)


@pytest.mark.parametrize("word", ["int4", "", 8])
def test_an_unknown_word_is_refused(monkeypatch, word):
    layer = SlabLinear.from_packed(random_packed(PackedLayout(40, 200, "int4", 32, rank=1)))
    with pytest.raises(ArgumentError, match=r"activations=.* is unknown; use one of exact, int8"):
        layer.prepare(activations=word)
    assert layer._activations is None and layer.backend is None
    monkeypatch.setenv(accuracy.ENVIRONMENT, "fast")
    sentence = r"activations='fast' \(SLAB_KERNELS_CPU_ACTIVATIONS names it\) is unknown"
    with pytest.raises(ArgumentError, match=sentence):
        layer(torch.ones(1, 200))
    with pytest.raises(ArgumentError, match=sentence):
        dispatch.prepare_fused((layer.packed(),), torch.float32)


HOSTILE = {
    "no parts": ([], [], "prepared has 0 weights, out_features 0 sizes"),
    "another number": (1, [40, 40], "prepared has 1 weights, out_features 2 sizes"),
    "other rows": (1, [41], "a weight of 40x200, not 41x200"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_parts_are_refused(case):
    count, sizes, message = HOSTILE[case]
    prepared = cpu.BACKEND.prepare(random_packed(PackedLayout(40, 200, "int4", 32, 1))).prepared
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_cpu_int8_parts(
            torch.ones(1, 200), [prepared] * count if count else [], None, sizes, 200
        )
