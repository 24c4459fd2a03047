"""bf16 activations on a CPU that multiplies bf16: many tokens meet the weight rounded to bf16."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from instruction_sets import PAIRS

from slab_kernels import native
from slab_kernels.backends import cpu
from slab_kernels.format import PackedLayout, PackedWeight, bits
from slab_kernels.testing import SHAPES, VALUE_LAYOUTS, error_bound, oracle, random_packed

if native.missing_library():
    pytest.skip(f"no native library: {native.missing_library()}", allow_module_level=True)
if not PAIRS:
    pytest.skip("this CPU does not multiply bf16", allow_module_level=True)

OPS = torch.ops.slab_kernels
TERMS = [(rank, 1) for rank in (0, 1, 2, 3, 4)] + [(1, 2), (1, 3), (2, 2), (3, 3)]  # rank, planes
TOKENS = (3, 4, 7, 12, 13, 25, 65)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True, params=PAIRS)
def isa(request):
    before = OPS.cpu_isa()
    yield OPS.cpu_use_isa(request.param)
    OPS.cpu_use_isa(before)


def rounded_oracle(x, packed):
    """The exact result in fp64 of the weight without adapter as it is after rounding to bf16, and
    the magnitude of its terms."""
    bare = cpu.BACKEND.prepare(packed)
    W = OPS.dequantize_cpu(*bare).to(BF16).double()
    return x.double() @ W.T, x.double().abs() @ W.abs().T


@pytest.mark.parametrize("rank, planes", TERMS)
@pytest.mark.parametrize("values, group_size", VALUE_LAYOUTS)
def test_only_the_weight_is_rounded(values, group_size, rank, planes, poisoned):
    """Against the rounded weight in fp64, the error is that of fp32 sums and of rounding y."""
    for N, K in (*SHAPES, (40, 1024)):
        if rank > min(N, K):
            continue
        packed = random_packed(PackedLayout(N, K, values, group_size, rank, planes=planes), seed=N)
        x = torch.randn(max(TOKENS), K).to(BF16)
        exact, magnitude = rounded_oracle(x, packed)
        allowed = error_bound(magnitude, exact, BF16, K)
        state = cpu.BACKEND.prepare(packed)
        for M in TOKENS:
            error = (cpu.BACKEND.linear(x[:M], state).double() - exact[:M]).abs()
            assert bool((error <= allowed[:M]).all()), (N, K, M)


@pytest.mark.parametrize("adapter_rank", [5, 40, 150])
def test_adapters_and_bias_are_not_rounded(adapter_rank, poisoned):
    """With small integers in the weight, which bf16 holds, only y is rounded."""
    N, K = 170, 260
    packed = random_packed(PackedLayout(N, K, "int8", 64, 1, adapter_rank), integers=True)
    packed = dataclasses.replace(packed, P=(packed.P.float() * 0.37).to(packed.P.dtype))
    bias = torch.randn(N)
    x = torch.randint(-4, 5, (30, K)).to(BF16)
    exact, magnitude = oracle(x, packed, bias)
    y = cpu.BACKEND.linear(x, cpu.BACKEND.prepare(packed), bias)
    assert bool(((y.double() - exact).abs() <= error_bound(magnitude, exact, BF16, K)).all())


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_every_pattern_and_level_at_every_lane(planes):
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
    state = cpu.BACKEND.prepare(PackedWeight.from_tensors(parts, N, K))
    W = OPS.dequantize_cpu(*state)
    columns = torch.eye(K).to(BF16)
    y = torch.cat([cpu.BACKEND.linear(some, state) for some in columns.split(64)])
    assert torch.equal(y.T, W.to(BF16))


def test_rows_depend_on_their_own_token_only():
    packed = random_packed(PackedLayout(1000, 640, "int8", 64, rank=1, adapter_rank=40))
    state, x = cpu.BACKEND.prepare(packed), torch.randn(1100, 640).to(BF16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        many = cpu.BACKEND.linear(x, state)
        for count, M in itertools.product((1, 2, 3), (3, 13, 512, 513, 1100)):
            torch.set_num_threads(count)
            assert torch.equal(cpu.BACKEND.linear(x[:M], state), many[:M])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_activations_are_computed_as_without_it(dtype):
    packed = random_packed(PackedLayout(100, 388, "int4", 32, rank=2, adapter_rank=5))
    state, x = cpu.BACKEND.prepare(packed), torch.randn(20, 388).to(dtype)
    y = cpu.BACKEND.linear(x, state)
    OPS.cpu_use_isa("avx512")
    assert torch.equal(y, cpu.BACKEND.linear(x, state))


@pytest.mark.parametrize("K", [131, 132, 255])  # odd ones end in the middle of a pair
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(K, bad):
    state = cpu.BACKEND.prepare(random_packed(PackedLayout(20, K, "int4", 32, rank=1)))
    for k in (0, 77, K - 1):
        x = torch.randn(8, K).to(BF16)
        x[0, k] = bad
        y = cpu.BACKEND.linear(x, state)
        assert not bool(y[0].isfinite().any())
        assert bool(y[1:].isfinite().all())


def test_what_is_behind_the_inputs_is_not_read():
    """x ends within a larger tensor of NaN, after an odd number of inputs."""
    state = cpu.BACKEND.prepare(random_packed(PackedLayout(20, 131, "fp16", rank=1)))
    storage = torch.full((10 * 131,), float("nan"), dtype=BF16)
    storage[: 8 * 131] = torch.randn(8 * 131).to(BF16)
    assert bool(cpu.BACKEND.linear(storage[: 8 * 131].view(8, 131), state).isfinite().all())
