"""int8 activations where parts of a weight are unlike: a sign term far smaller than the step of the
kept values, and fused parts whose ranks have other products."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slab_kernels import FusedSlabLinear, SlabLinear, native
from slab_kernels.backends import cpu
from slab_kernels.format import PackedLayout
from slab_kernels.testing import oracle, random_packed

if native.missing_library():
    pytest.skip(f"no native library: {native.missing_library()}", allow_module_level=True)

cpu.load_library()
OPS = torch.ops.slab_kernels
MOST_RANK = 16  # of the product for many tokens


@pytest.fixture(params=native.runnable())
def isa(request):
    before = OPS.cpu_isa()
    yield OPS.cpu_use_isa(request.param)
    OPS.cpu_use_isa(before)


@pytest.fixture(params=["few", "many", "its own"])
def few_tokens(request):
    """Up to how many tokens `few` is forced; -1: no product is."""
    yield OPS.cpu_use_few({"few": 1 << 30, "many": 0, "its own": -1}[request.param])
    OPS.cpu_use_few(-1)


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", [32, 128])
def test_a_small_sign_term_beside_int8_values(isa, few_tokens, size, planes, group_size):
    """All that a row has is its sign term, of less than 8 steps of its int8 values."""
    packed = random_packed(PackedLayout(40, 260, "int8", group_size, rank=1, planes=planes))
    U, V = torch.full_like(packed.U, size), torch.rand_like(packed.V) * 0.5 + 0.5
    values, scales = torch.zeros_like(packed.values), torch.ones_like(packed.scales)
    packed = dataclasses.replace(packed, U=U, V=V, values=values, scales=scales)
    x = torch.randn(40, 260)
    exact, magnitude = oracle(x, packed)[:2]
    state = cpu.BACKEND.with_activations(cpu.BACKEND.prepare(packed), (packed,), "int8")
    y = cpu.BACKEND.linear(x, state).double()
    assert bool(((y - exact).abs() <= 0.01 * magnitude).all())


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("ranks", [(1, MOST_RANK + 2), (MOST_RANK + 2, 0, 2)])
def test_fused_parts_with_ranks_that_have_other_products(isa, few_tokens, M, ranks):
    kept = [
        random_packed(PackedLayout(n, 260, "int4", 64, rank, adapter_rank=3), seed=n)
        for n, rank in zip((48, 17, 33), ranks, strict=False)
    ]
    layers = [SlabLinear.from_packed(p, torch.randn(p.out_features)) for p in kept]
    x = torch.randn(M, 260)
    x[0, 3] = float("nan") if M == 5 else 1.0
    alone = [layer.prepare(activations="int8")(x) for layer in layers]
    fused = FusedSlabLinear(layers).prepare(activations="int8")
    for mine, theirs in zip(fused(x), alone, strict=True):
        assert torch.equal(mine.nan_to_num(5), theirs.nan_to_num(5))
