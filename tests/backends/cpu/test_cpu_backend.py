"""The native CPU backend against the fp64 oracle: every instruction set that runs here, every
layout, ragged shapes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from instruction_sets import ALL, PAIRS

from slab_kernels import SlabLinear, native, reference
from slab_kernels.backends import cpu, dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.bench import machine
from slab_kernels.errors import BackendError
from slab_kernels.format import PackedLayout, PackedWeight, bits
from slab_kernels.testing import (
    ADAPTER_RANKS,
    RANKS,
    ROUNDOFF,
    SHAPES,
    VALUE_LAYOUTS,
    error_bound,
    oracle,
    random_packed,
)

if not native.LIBRARY.exists():
    pytest.skip(f"no native library: {native.missing_library()}", allow_module_level=True)

OPS = torch.ops.slab_kernels
ISAS = native.runnable()
TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 65)
TERMS = [(rank, 1) for rank in (*RANKS, 3)] + [(1, 2), (1, 3), (2, 2), (3, 3)]  # rank, planes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUT = PackedLayout(40, 200, "fp16", rank=2, adapter_rank=5)
HUGE_PAGE = 1 << 21


@pytest.fixture(params=ALL)
def isa(request):
    before = OPS.cpu_isa()
    yield OPS.cpu_use_isa(request.param)
    OPS.cpu_use_isa(before)


def linear(x, packed, bias=None):
    return cpu.BACKEND.linear(x, cpu.BACKEND.prepare(packed), bias)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


@functools.cache
def problem(layout):
    """Packed weight, activations that every dtype holds exactly, bias, exact result and
    magnitude."""
    generator = torch.Generator().manual_seed(layout.rank)
    packed = random_packed(layout, seed=layout.out_features)
    x = torch.randint(-127, 128, (max(TOKENS), layout.in_features), generator=generator) / 64
    bias = (
        torch.randn(layout.out_features, generator=generator) if layout.out_features % 2 else None
    )
    return packed, x, bias, *oracle(x, packed, bias)


@pytest.mark.parametrize("rank, planes", TERMS)
@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_against_fp64(isa, values, group_size, rank, planes, poisoned):
    for (N, K), adapter_rank in itertools.product(SHAPES, ADAPTER_RANKS if planes == 1 else (0,)):
        if max(rank, adapter_rank) > min(N, K):
            continue
        stored = "int8" if adapter_rank == 16 else None
        layout = PackedLayout(
            N, K, values, group_size, rank, adapter_rank, planes=planes, adapter_values=stored
        )
        packed, x, bias, exact, magnitude = problem(layout)
        state = cpu.BACKEND.prepare(packed)
        for dtype in DTYPES:
            tokens = TOKENS if dtype == torch.float32 else TOKENS[1:6]
            results = [cpu.BACKEND.linear(x[:M].to(dtype), state, bias) for M in tokens]
            assert [y.shape for y in results] == [(M, N) for M in tokens]
            assert {y.dtype for y in results} == {dtype}
            rows = torch.cat([torch.arange(M) for M in tokens])
            error = (torch.cat(results).double() - exact[rows]).abs()
            allowed = error_bound(magnitude, exact, dtype, K)
            if isa in PAIRS and dtype == torch.bfloat16:  # test_cpu_bf16.py is tighter
                allowed = allowed + magnitude * ROUNDOFF[dtype]
            assert bool((error <= allowed[rows]).all()), (
                N,
                K,
                adapter_rank,
                dtype,
            )


@pytest.mark.parametrize("M", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("rank, planes", [(0, 1), (1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_small_integers_are_exact(isa, values, group_size, rank, planes, M):
    layout = PackedLayout(70, 260, values, group_size, rank, adapter_rank=4, planes=planes)
    packed = random_packed(layout, seed=3, integers=True)
    x = torch.randint(-4, 5, (M, layout.in_features)).float()
    bias = torch.randint(-4, 5, (70,)).float()
    assert torch.equal(linear(x, packed, bias).double(), oracle(x, packed, bias)[0])


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("M", [1, 6])
def test_every_pattern_and_level_at_every_lane(isa, M, planes):
    """Row n, group g: pattern (n + g) mod 6 and all pairs of levels in turn: each at each lane and
    place of a word."""
    N, K, levels = 33, 4 * 6 * 4**planes, 2**planes
    row, group = torch.arange(N)[:, None], torch.arange(K // 4)[None, :]
    nibbles = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8)[(row + group) % 6]
    pair = (row + group) // 6 % levels**2
    level = 2 * torch.stack([pair % levels, pair // levels], -1).flatten(1) + 1 - levels
    parts = random_packed(
        PackedLayout(N, K, "fp16", rank=1, planes=planes), integers=True
    ).tensors()
    parts["metadata"] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    parts["signs"] = bits.pack_planes(level, planes)
    packed = PackedWeight.from_tensors(parts, N, K)
    state = cpu.BACKEND.prepare(packed)
    assert torch.equal(OPS.dequantize_cpu(*state), packed.dense())
    x = torch.randint(-4, 5, (M, K)).float()
    assert torch.equal(linear(x, packed).double(), oracle(x, packed)[0])


@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_dequantize(isa, values, group_size, poisoned):
    for (N, K), planes in itertools.product(SHAPES, (1, 2, 3)):
        packed = random_packed(PackedLayout(N, K, values, group_size, rank=1, planes=planes))
        state = cpu.BACKEND.prepare(packed)
        dense = OPS.dequantize_cpu(*state)
        assert torch.allclose(dense, packed.dense(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("adapter_rank", [5, 16, 40])
def test_dequantize_adds_the_adapter(isa, adapter_rank, poisoned):
    packed = random_packed(PackedLayout(50, 200, "int4", 32, 1, adapter_rank))
    exact, magnitude = oracle(torch.eye(200), packed)
    error = (OPS.dequantize_cpu(*cpu.BACKEND.prepare(packed)).double().T - exact).abs()
    assert bool((error <= error_bound(magnitude, exact, torch.float32, adapter_rank)).all())


def test_kept_is_what_the_mask_says(isa):
    """Stored zeros and minus zeros are kept entries, not pruned ones, whatever U V^T holds
    there."""
    packed = random_packed(PackedLayout(16, 64, "fp16", rank=1))
    packed.values.zero_()
    packed.values[:, ::2] = -0.0
    x = torch.eye(64)
    kept = bits.unpack_mask(packed.metadata)
    for M in (1, 64):
        y = torch.cat([linear(x[i : i + M], packed) for i in range(0, 64, M)]).T
        assert bool((y[kept] == 0).all()) and bool((y[~kept] != 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("M", [1, 8])
def test_nan_and_infinity_propagate(isa, M, bad):
    packed = random_packed(PackedLayout(20, 132, "int4", 32, rank=1))
    x = torch.randn(M, 132)
    x[0, 77] = bad
    y = linear(x, packed)
    assert not bool(y[0].isfinite().any())
    assert bool(y[1:].isfinite().all())


def first_two(a, b):
    """One output of four inputs: a x[0] + b x[1]."""
    packed = random_packed(PackedLayout(1, 4, "fp16"))
    packed.metadata.fill_(0x44)
    packed.values.zero_()
    packed.values[0, :2] = torch.tensor([a, b])
    return packed


def test_fp16_values_convert_exactly(isa):
    """Every finite fp16 number, subnormals included, as weight and as activation."""
    numbers = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()][:63488]
    N, K = 16, 7936
    packed = random_packed(PackedLayout(N, K, "fp16"))
    packed.values.copy_(numbers.view(N, K // 2))
    state = cpu.BACKEND.prepare(packed)
    assert torch.equal(OPS.dequantize_cpu(*state), packed.dense())
    one = first_two(1.0, 0.0)
    x = torch.zeros(len(numbers), 4, dtype=torch.float16)
    x[:, 0] = numbers
    assert torch.equal(linear(x, one)[:, 0].float(), numbers.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_rounds_to_nearest_even(isa, dtype):
    one = first_two(1.0, 1.0)
    pattern = (
        torch.randint(-(1 << 31), 1 << 31, (20000, 1), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    x = torch.zeros(20000, 4, dtype=dtype)
    x[:, 0], x[:, 1] = pattern[:, 0].to(dtype), pattern.roll(1, 0)[:, 0].to(dtype)
    x = torch.where(x.isfinite(), x, 0)
    if isa in PAIRS and dtype == torch.bfloat16:  # which take subnormal numbers as zero
        x = torch.where(x.abs() < 2.0**-126, 0, x)
    exact = (x[:, 0].float() + x[:, 1].float()).to(dtype)
    y = linear(x, one)[:, 0]
    if isa in PAIRS and dtype == torch.bfloat16:
        exact = torch.where(exact.abs() < 2.0**-126, 0, exact)
    assert torch.equal(y, exact)


def test_strided_and_batched_activations(isa):
    packed = random_packed(LAYOUT)
    state = cpu.BACKEND.prepare(packed)
    x = torch.randn(200, 12).T.unflatten(0, (3, 4))
    assert not x.is_contiguous()
    y = cpu.BACKEND.linear(x, state)
    assert y.shape == (3, 4, 40)
    assert torch.equal(y, cpu.BACKEND.linear(x.contiguous(), state))
    assert cpu.BACKEND.linear(x[0, 0], state).shape == (40,)
    assert cpu.BACKEND.linear(x[:0], state).shape == (0, 4, 40)


def test_same_bits_for_any_thread_count_and_batch(isa):
    packed = random_packed(PackedLayout(1000, 512, "int8", 64, rank=1, adapter_rank=40))
    state = cpu.BACKEND.prepare(packed)
    x, threads = torch.randn(250, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        few, many = cpu.BACKEND.linear(x[:1], state), cpu.BACKEND.linear(x, state)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(cpu.BACKEND.linear(x, state), many)
            assert same_bits(cpu.BACKEND.linear(x[:1], state), few)
        # A row depends on its own token only, within the few-token and the many-token regime.
        most = 2 if isa == "avx2" else 3  # tokens that are few; see the next test
        for M in (most + 1, 6, 13, 100, 193):
            assert same_bits(cpu.BACKEND.linear(x[:M], state), many[:M])
        for M in range(2, most + 1):
            assert same_bits(cpu.BACKEND.linear(x[:M], state)[:1], few)
    finally:
        torch.set_num_threads(threads)


def test_how_many_tokens_are_few(isa):
    """Three tokens are few, and with AVX2 two where there are signs.

    Signs are summed in another order than with many tokens; without signs a NaN does not reach the
    rows that prune its input.
    """
    for rank, most in ((0, 3), (1, 2 if isa == "avx2" else 3)):
        state = cpu.BACKEND.prepare(random_packed(PackedLayout(96, 512, "fp16", rank=rank)))
        x = torch.randn(9, 512)
        if not rank:
            x[:, 7] = torch.nan
        few, many = cpu.BACKEND.linear(x[:1], state), cpu.BACKEND.linear(x, state)[:1]
        assert not same_bits(few, many), "the two would not be told apart"
        assert same_bits(cpu.BACKEND.linear(x[:most], state)[:1], few)
        assert same_bits(cpu.BACKEND.linear(x[: most + 1], state)[:1], many)


def test_instruction_sets_agree():
    packed, x = random_packed(PackedLayout(64, 512, "fp16", rank=1)), torch.randn(9, 512)
    before, results = OPS.cpu_isa(), []
    for name in ISAS:
        OPS.cpu_use_isa(name)
        results.append(linear(x, packed))
    OPS.cpu_use_isa(before)
    assert all(torch.allclose(y, results[0], rtol=1e-4, atol=1e-4) for y in results)


@pytest.mark.parametrize("rank, adapter_rank", [(0, 0), (2, 5)])
def test_opcheck(rank, adapter_rank):
    packed = random_packed(PackedLayout(40, 200, "int8", 128, rank, adapter_rank))
    prepared, *sizes = cpu.BACKEND.prepare(packed)
    x, bias = torch.randn(3, 200), torch.randn(40)
    for sample in (x[None].bfloat16(), x.clone().requires_grad_()):
        torch.library.opcheck(OPS.linear_cpu.default, (sample, prepared, bias, *sizes))
    torch.library.opcheck(OPS.linear_cpu_frozen.default, (x, prepared, None, *sizes))
    torch.library.opcheck(OPS.dequantize_cpu.default, (prepared, *sizes))


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_a_large_stream_has_memory_of_its_own_which_is_given_back():
    """What malloc hands out may lie in small pages that were touched before."""
    packed = random_packed(PackedLayout(1024, 4096, "int8", 128, rank=1))
    size = cpu.BACKEND.prepare(packed).prepared.numel()
    assert size > HUGE_PAGE

    def resident():
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    for _ in range(20):
        assert cpu.BACKEND.prepare(packed).prepared.data_ptr() % HUGE_PAGE == 0
    assert resident() < before + 4 * size


def test_the_output_is_new_memory_and_the_inputs_stay_as_they_are():
    packed, x, bias = random_packed(LAYOUT), torch.randn(3, 200), torch.randn(40)
    state = cpu.BACKEND.prepare(packed)
    before = [t.clone() for t in (x, bias, state.prepared)]
    y = cpu.BACKEND.linear(x, state, bias)
    again = cpu.BACKEND.linear(x, state, bias)
    storages = {t.untyped_storage().data_ptr() for t in (x, bias, state.prepared, y, again)}
    assert len(storages) == 5 and y.is_contiguous() and torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, state.prepared), strict=True))


def test_gradients():
    packed = random_packed(LAYOUT)
    x, bias = torch.randn(3, 2, 200, requires_grad=True), torch.randn(40, requires_grad=True)
    grad = torch.randn(3, 2, 40)
    gradients = torch.autograd.grad(linear(x, packed, bias), (x, bias), grad)
    expected = torch.autograd.grad(reference.linear(x, packed, bias), (x, bias), grad)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.state = cpu.BACKEND.prepare(random_packed(LAYOUT))

    def forward(self, x):
        return cpu.BACKEND.linear(x * 2, self.state) + 1


def test_compile_and_export():
    layer = Layer()
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (1, 5, 9):
        x = torch.randn(M, 200)
        assert torch.equal(compiled(x), layer(x))
    x = torch.randn(3, 200, requires_grad=True)
    assert torch.allclose(
        torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0]
    )
    exported = torch.export.export(
        layer, (torch.randn(4, 200),), dynamic_shapes=({0: torch.export.Dim("M", min=2)},)
    )
    assert torch.equal(exported.module()(x.detach()), layer(x.detach()))


def test_reasons():
    assert (
        cpu.BACKEND.not_supported_reasons(LinearProblem.of(LAYOUT, 1, torch.bfloat16, "cpu")) == []
    )
    against = cpu.BACKEND.not_supported_reasons(LinearProblem.of(LAYOUT, 1, torch.float64, "cuda"))
    assert len(against) == 2 and "float64" in against[1] and "cuda" in against[0]


def test_missing_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_C.so")
    reasons = cpu.BACKEND.not_supported_reasons(LinearProblem.of(LAYOUT, 1, torch.float32, "cpu"))
    assert len(reasons) == 1 and "was not built" in reasons[0] and "compiler" in reasons[0]


@pytest.mark.parametrize("up", [-37, -30, 0, 30, 37])
@pytest.mark.parametrize("rank, planes", [term for term in TERMS if term[0]])
def test_factors_far_apart_stay_finite(isa, rank, planes, up):
    """U of 1e-30 beside V of 1e30 is a weight like any other; so are P and Q, and the gradient."""
    packed = random_packed(PackedLayout(40, 200, "bf16", None, rank, 5, planes=planes))
    factors = {"U": packed.U.double() * 10.0**up, "V": packed.V.double() / 10.0**up}
    factors |= {"P": packed.P.double() / 10.0**up, "Q": packed.Q.double() * 10.0**up}
    layout = dataclasses.replace(packed.layout, factors="fp32")
    factors = {name: t.float() for name, t in factors.items()}
    packed = dataclasses.replace(packed, layout=layout, **factors)
    for M, size in itertools.product((1, 2, 5), (1e-6, 1.0, 1e9)):
        x = (torch.randn(M, 200) * size).requires_grad_()
        want = reference.linear(x.detach().double(), packed)
        y = linear(x, packed)
        assert torch.allclose(y.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(grad[0], packed.dense().sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("exponents", [(-120, 113), (110, -120), (-126, 118)])
def test_exponents_of_an_int8_adapter_far_apart_stay_finite(isa, exponents):
    packed = random_packed(PackedLayout(40, 200, "bf16", None, 1, 5, adapter_values="int8"))
    P, Q = packed.P.clone(), packed.Q.clone()
    P[:, -1], Q[:200, -1] = exponents[0], exponents[1]
    P[::3, -1] = -126  # rows of one matrix far apart as well
    packed = dataclasses.replace(packed, P=P, Q=Q)
    for M in (1, 5):
        x = torch.randn(M, 200)
        want = reference.linear(x.double(), packed)
        small = 1e-5 * float(want.abs().max())
        assert torch.allclose(linear(x, packed).double(), want, rtol=1e-4, atol=small)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_moving_powers_of_two_rounds_nothing(isa, monkeypatch, rank):
    packed, x = random_packed(PackedLayout(40, 200, "int4", 32, rank, 5)), torch.randn(5, 200)
    moved = [linear(x[:m], packed) for m in (1, 2, 5)]
    as_they_are = lambda left, right: (left.float(), right.float())  # noqa: E731
    monkeypatch.setattr(cpu.factors, "beside_results", as_they_are)
    assert all(same_bits(y, linear(x[:m], packed)) for y, m in zip(moved, (1, 2, 5), strict=True))


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "scalar "])
def test_a_misspelt_instruction_set_is_an_error_and_no_reason(monkeypatch, name):
    monkeypatch.setenv(native.ENVIRONMENT, name)
    sentence = f"SLAB_KERNELS_CPU_ISA={name} is not an instruction set.*one of {', '.join(ISAS)}"
    with pytest.raises(BackendError, match=sentence):
        dispatch.select(LinearProblem.of(LAYOUT, 1, torch.float32, "cpu"))
    with pytest.raises(BackendError, match=sentence):
        SlabLinear.from_packed(random_packed(LAYOUT))(torch.ones(1, 200))
    assert re.match(sentence, machine.cpu_kernels())
    assert all(re.match(sentence, reasons["cpu"][0]) for reasons in machine.backends().values())


def test_info_shows_a_misspelt_backend(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "gpu")
    assert "'gpu' is unknown (SLAB_KERNELS_BACKEND names it)" in machine.backends()["cpu"]["cpu"][0]


def run_with_isa(name):
    code = (
        "from slab_kernels import native;"
        "print(native.runnable(), native.torch.ops.slab_kernels.cpu_isa())"
    )
    environment = {**os.environ, "SLAB_KERNELS_CPU_ISA": name}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_forced_instruction_set():
    assert run_with_isa("scalar").stdout.split()[-1] == "scalar"
    refused = run_with_isa("avx1024")
    assert (
        refused.returncode
        and "SLAB_KERNELS_CPU_ISA=avx1024" in refused.stderr
        and ISAS[0] in refused.stderr
    )
    with pytest.raises(RuntimeError, match="choose one of"):
        OPS.cpu_use_isa("neon")


X, STATE = torch.randn(2, 200), cpu.BACKEND.prepare(random_packed(LAYOUT))


def header(word: int, content: int) -> torch.Tensor:
    """The prepared tensor with another 64-bit word in its header: 1 out_features, 3 rank, 4 adapter
    rank, 5 values | group size, 6 planes | half."""
    changed = STATE.prepared.clone()
    changed.view(torch.int64)[word] = content
    return changed


HOSTILE = {
    "another width": ({"x": torch.randn(2, 201)}, "x has 201 features, the weight 200"),
    "claimed width": (
        {"in_features": 400, "x": torch.randn(2, 400)},
        "a weight of 40x200, not 40x400",
    ),
    "far wider": ({"x": torch.randn(2, 400)}, "x has 400 features"),
    "fp64": ({"x": X.double()}, "x must be float32, float16 or bfloat16"),
    "scalar x": ({"x": torch.tensor(1.0)}, "at least one dimension"),
    "bias": ({"bias": torch.randn(39)}, "bias has shape"),
    "bias type": ({"bias": torch.ones(40, dtype=torch.int64)}, "bias must be float32"),
    "more rows": ({"out_features": 400}, "a weight of 40x200, not 400x200"),
    "cut short": ({"prepared": STATE.prepared[:-64]}, r"prepared has \d+ bytes, its header says"),
    "too long": (
        {"prepared": torch.cat([STATE.prepared, STATE.prepared])},
        r"prepared has \d+ bytes, its header says",
    ),
    "strided": ({"prepared": STATE.prepared[::2]}, "contiguous uint8"),
    "type": ({"prepared": STATE.prepared.to(torch.int8)}, "contiguous uint8"),
    "empty": ({"prepared": STATE.prepared[:0]}, "does not begin with the header"),
    "no header": ({"prepared": torch.zeros_like(STATE.prepared)}, "does not begin with the header"),
    "no rows": ({"prepared": header(1, 0), "out_features": 0}, "out_features=0"),
    "huge": ({"prepared": header(1, 1 << 60), "out_features": 1 << 60}, "must be between"),
    "rank": ({"prepared": header(3, 1 << 40)}, "ranks 1099511627776 and 5"),
    "another rank": ({"prepared": header(3, 3)}, "its header says"),
    "negative adapter rank": ({"prepared": header(4, -1)}, "ranks 2 and -1"),
    "value type": ({"prepared": header(5, 7)}, "values=7"),
    "int8 read of fp16": ({"prepared": header(5, 2)}, "its header says"),
    "group size": ({"prepared": header(5, 48 << 32)}, "group_size=48"),
    "planes": ({"prepared": header(6, 7)}, "planes=7"),
    "a sign term without rank": ({"prepared": header(3, 0)}, "ranks 0 and 5 and 1 sign planes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arguments_are_refused(case):
    change, message = HOSTILE[case]
    arguments = {"x": X, **STATE._asdict(), "bias": None, **change}
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_cpu_frozen(**arguments)


def test_hostile_packed_tensors_are_refused():
    packed = random_packed(PackedLayout(8, 64, "int8", 32, rank=1))
    U, V = torch.zeros(1, 1, 16), torch.zeros(1, 128)
    good = [
        packed.values,
        packed.metadata,
        packed.signs,
        packed.scales,
        U,
        V,
        None,
        None,
        8,
        64,
        2,
        32,
        1,
    ]
    OPS.prepare_cpu(*good)
    for place, bad, message in (
        (0, packed.values[:, :-1].contiguous(), "values has shape"),
        (0, packed.values.float(), "values has another dtype"),
        (1, torch.zeros_like(packed.metadata), "256 nibbles|nibbles that are not"),
        (1, packed.metadata[:4], "metadata has shape"),
        (2, packed.signs[:, 1:], "signs has shape"),
        (3, None, "scales belong to"),
        (3, packed.scales.float(), "scales has another dtype"),
        (4, None, "signs, U and V belong together"),
        (4, torch.zeros(3, 2), "U has shape"),
        (4, torch.zeros(1, 0, 16), "U has shape"),
        (4, torch.zeros(2, 1, 16), "U has shape"),
        (5, V.half(), "V has another dtype"),
        (5, torch.zeros(2, 128), "V has shape"),
        (6, torch.zeros(1, 3, 16), "P and Q belong together"),
        (9, 1 << 40, "in_features="),
        (10, -1, "values=-1"),
        (11, 16, "group_size=16"),
        (12, 2, "signs has shape"),
        (12, 4, "planes=4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.prepare_cpu(*good[:place], bad, *good[place + 1 :])
    P, Q = torch.zeros(1, 3, 16), torch.zeros(2, 128, 16)
    for factors, message in (
        ((P[:, :0], Q), "P has shape"),
        ((P, Q[:1]), "Q has shape"),
        ((P.half(), Q), "Q has another dtype"),
        ((P.double(), Q), "P has another"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.prepare_cpu(*good[:6], *factors, *good[8:])
