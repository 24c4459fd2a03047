"""FusedSlabLinear: several projections of one x, on every backend that runs here and on the
emulated CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch

from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.errors import ShapeError
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

ROWS, K = (40, 8, 17), 96


def parts(biases=(True, False, True)):
    packed = [random_packed(PackedLayout(n, K, "int8", 32, 1, 4), seed=n) for n in ROWS]
    return [
        SlabLinear.from_packed(p, torch.randn(n) if b else None)
        for p, n, b in zip(packed, ROWS, biases, strict=True)
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("biases", [(True, False, True), (False,) * 3])
def test_the_parts_side_by_side(monkeypatch, backend, biases):
    monkeypatch.setenv("SLAB_KERNELS_BACKEND", backend)
    single = parts(biases)
    fused, x = FusedSlabLinear(single), torch.randn(2, 3, K)
    outputs = fused(x)
    assert [y.shape for y in outputs] == [(2, 3, n) for n in ROWS]
    for y, part in zip(outputs, single, strict=True):
        assert torch.allclose(y, part(x), atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bias_is_added_before_rounding(monkeypatch, backend, dtype):
    """As in each part alone: products of 1e5 are infinite in fp16, and what a bias leaves of them
    is not."""
    monkeypatch.setenv("SLAB_KERNELS_BACKEND", backend)
    packed = [random_packed(PackedLayout(n, K, rank=1), seed=n, integers=True) for n in ROWS]
    x = torch.full((2, K), 2048.0)
    single = [SlabLinear.from_packed(p, 5 - x[0] @ p.dense().T) for p in packed]
    outputs = FusedSlabLinear(single)(x.to(dtype))
    assert max(float((x @ p.dense().T).abs().max()) for p in packed) > 65504
    assert all(torch.equal(y, torch.full_like(y, 5)) for y in outputs)


def test_a_state_dict_round_trip_and_a_copy_prepare_anew():
    fused, other, x = FusedSlabLinear(parts()), FusedSlabLinear(parts()), torch.randn(2, K)
    before = other(x)
    other.load_state_dict(fused.state_dict())
    for y, old, want in zip(other(x), before, fused(x), strict=True):
        assert torch.equal(y, want)
        assert (
            not torch.equal(y, old) or y.shape[1] == ROWS[1]
        )  # the middle part has the same weight and no bias
    assert copy.deepcopy(fused)._linears == {}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_prepared_is_kept_while_the_weights_stay(monkeypatch, backend):
    monkeypatch.setenv("SLAB_KERNELS_BACKEND", backend)
    fused = FusedSlabLinear(parts()).prepare()
    (first,) = fused._linears[torch.float32]
    (second,) = fused.prepare()._linears[torch.float32]
    assert second.state is first.state
    fused.parts[1].values.zero_()
    (third,) = fused.prepare()._linears[torch.float32]
    assert third.state is not first.state


@pytest.mark.slow
def test_compile_before_and_after_the_first_call():
    x = torch.ones(2, K)
    for warm in (False, True):
        fused = FusedSlabLinear(parts())
        want = [part(x) for part in fused.parts]
        if warm:
            fused(x)
        torch._dynamo.reset()  # Other tests of this process compile the same code.
        for y, w in zip(torch.compile(fused, fullgraph=True)(x), want, strict=True):
            assert torch.allclose(y, w, atol=1e-5)


def test_parts_that_do_not_fit_together():
    with pytest.raises(
        ShapeError, match=r"must read the same x, but these take in_features=\[48, 96\]"
    ):
        FusedSlabLinear([parts()[0], SlabLinear.from_packed(random_packed(PackedLayout(8, 48)))])
    with pytest.raises(ShapeError, match="not an empty list"):
        FusedSlabLinear([])
    with pytest.raises(TypeError, match="takes SlabLinear modules, not Linear"):
        FusedSlabLinear([parts()[0], torch.nn.Linear(96, 8)])
    with pytest.raises(
        ShapeError, match=r"x has shape \[2, 95\], but these layers take in_features=96 last"
    ):
        FusedSlabLinear(parts())(torch.ones(2, 95))
