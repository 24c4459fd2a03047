"""What a layer prepared is of the tensors that it holds now: lent, written into, traced, shared."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections import Counter

import pytest
import torch
from torch.func import functional_call

from slab_kernels import FusedSlabLinear, SlabLinear, ops
from slab_kernels.backends import dispatch
from slab_kernels.errors import ShapeError
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

LAYOUT = PackedLayout(24, 96, "int8", 32, rank=2, adapter_rank=3)
NAMES = tuple(LAYOUT.tensors())
X = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))


def other(packed, name):
    """The weight with one of its tensors upside down, and that tensor."""
    changed = packed.tensors()[name].flip(0).contiguous()
    return dataclasses.replace(packed, **{name: changed}), changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_lent_tensor_serves_its_call_and_no_other(monkeypatch, backend, name):
    monkeypatch.setenv(dispatch.ENVIRONMENT, backend)
    packed = random_packed(LAYOUT)
    weight, lent = other(packed, name)
    own, want = SlabLinear.from_packed(packed)(X), SlabLinear.from_packed(weight)(X)
    assert not torch.equal(own, want)
    fresh, warm = SlabLinear.from_packed(packed), SlabLinear.from_packed(packed)
    warm(X)
    state = warm._linears[torch.float32][0].state
    for layer in (fresh, warm):
        for _ in range(2):
            assert torch.equal(functional_call(layer, {name: lent}, X), want)
            assert torch.equal(layer(X), own)
    assert warm._linears[torch.float32][0].state is state  # a CUDA graph may hold its addresses
    for first in (True, False):
        beside = SlabLinear.from_packed(random_packed(LAYOUT, seed=5))
        fused = FusedSlabLinear([beside, SlabLinear.from_packed(packed)])
        if first:
            fused(X)
        first_part, second_part = functional_call(fused, {f"parts.1.{name}": lent}, X)
        assert torch.equal(first_part, beside(X)) and torch.equal(second_part, want)
        assert torch.equal(fused(X)[1], own)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_into_a_tensor_is_seen(name):
    packed = random_packed(LAYOUT)
    weight, changed = other(packed, name)
    mine = {name: packed.tensors()[name].clone()}
    layer = SlabLinear.from_packed(dataclasses.replace(packed, **mine))
    fused = FusedSlabLinear([layer])
    layer(X), layer(X.bfloat16()), fused(X)
    layer._buffers[name].copy_(changed)
    want = SlabLinear.from_packed(weight)
    assert torch.equal(layer(X), want(X)) and torch.equal(fused(X)[0], want(X))
    assert torch.equal(layer(X.bfloat16()), want(X.bfloat16()))


def test_another_weight_in_place_of_the_first():
    layer = SlabLinear.from_packed(random_packed(LAYOUT))
    fused = FusedSlabLinear([SlabLinear.from_packed(random_packed(LAYOUT, seed=2)), layer])
    layer(X), fused(X)
    weight = random_packed(dataclasses.replace(LAYOUT, rank=0, adapter_rank=7), seed=1)
    want = SlabLinear.from_packed(weight)(X)
    assert torch.equal(layer.hold(weight)(X), want) and torch.equal(fused(X)[1], want)
    assert layer.layout == weight.layout and "signs" not in layer.state_dict()
    with pytest.raises(ShapeError, match="this layer is 24x96 .* weight 24x64"):
        layer.hold(random_packed(dataclasses.replace(LAYOUT, in_features=64)))
    assert torch.equal(layer(X), want)


def test_loading_into_tensors_that_count_no_writing():
    """Inference tensors: neither the layer nor a fused layer around it could see the copy."""
    first, second = random_packed(LAYOUT, seed=1), random_packed(LAYOUT, seed=2)
    want = SlabLinear.from_packed(second)(X)
    with torch.inference_mode():
        tensors = {name: tensor.clone() for name, tensor in first.tensors().items()}
        layer = SlabLinear.from_packed(dataclasses.replace(first, **tensors))
        fused = FusedSlabLinear([layer])
        layer(X), fused(X)
        layer.load_state_dict(second.tensors())
        assert torch.equal(layer(X), want) and torch.equal(fused(X)[0], want)


@pytest.mark.parametrize("prepared", [True, False])
def test_compiled_calls(prepared):
    """Prepared while it is traced; a lent tensor is used, inside the trace and around it."""
    packed = random_packed(LAYOUT)
    weight, lent = other(packed, "scales")
    want = SlabLinear.from_packed(weight)(X)
    layer = SlabLinear.from_packed(packed)
    fused = FusedSlabLinear([SlabLinear.from_packed(packed)])
    if prepared:
        layer(X), fused(X)
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close = lambda a, b: torch.allclose(a, b, atol=1e-4)  # noqa: E731
    assert close(compiled(X), SlabLinear.from_packed(packed)(X)) and layer.backend == "cpu"
    assert close(functional_call(compiled, {"_orig_mod.scales": lent}, X), want)
    assert close(compiled(X), layer(X))
    lend = lambda t: functional_call(layer, {"scales": t}, X)  # noqa: E731
    inside = torch.compile(lend, fullgraph=True, backend="aot_eager")
    assert close(inside(lent), want) and close(inside(layer.scales), layer(X))
    both = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert close(both(X)[0], layer(X)) and fused._linears[torch.float32]
    assert close(functional_call(both, {"_orig_mod.parts.0.scales": lent}, X)[0], want)


def test_biases_of_fused_parts_are_read_in_every_call():
    layouts = [dataclasses.replace(LAYOUT, out_features=n) for n in (24, 8)]
    parts = [SlabLinear.from_packed(random_packed(i), torch.zeros(i.out_features)) for i in layouts]
    parts[1].bias = None
    fused = FusedSlabLinear(parts)
    before = fused(X)[0]
    parts[0].bias.data.fill_(2.0)
    assert torch.allclose(fused(X)[0], before + 2)
    lent = {"parts.0.bias": torch.full((24,), 3.0)}
    assert torch.allclose(functional_call(fused, lent, X)[0], before + 3)
    parts[0].bias = torch.nn.Parameter(torch.full((24,), 4.0))
    first, second = fused(X)
    assert torch.allclose(first, before + 4) and torch.equal(second, parts[1](X))
    (first.sum() + second.sum()).backward()
    assert torch.equal(parts[0].bias.grad, torch.full((24,), 2.0))


def test_dtypes_prepared_by_several_threads_at_once():
    layer = SlabLinear.from_packed(random_packed(PackedLayout(256, 512, "int4", 32, 1)))
    state, errors, end = layer.state_dict(), Counter(), time.monotonic() + 1.0

    def again(action):
        while time.monotonic() < end:
            try:
                action()
            except Exception as error:
                errors[repr(error)] += 1

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    actions = [functools.partial(layer, torch.randn(2, 512).to(dtype)) for dtype in dtypes]
    actions += [lambda: layer.prepare(torch.bfloat16), lambda: layer.backend]
    actions += [lambda: layer.load_state_dict(state)]
    threads = [threading.Thread(target=again, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_gives_the_type_that_a_dense_layer_gives(dtype, target, enabled):
    packed, bias = random_packed(LAYOUT), torch.randn(24)
    close = lambda a, b: torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.1)  # noqa: E731
    layer = SlabLinear.from_packed(packed, bias)
    dense, fused = layer.to_linear(dtype), FusedSlabLinear([layer, layer])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(X.to(dtype))
    x = X.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", target, enabled=enabled):
        want = dense(x)
        for y in (layer(x), fused(x)[1], compiled(x)):
            assert y.dtype == want.dtype and close(y, want)
            (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
            (dense_grad,) = torch.autograd.grad(want.sum(), x, retain_graph=True)
            assert grad.dtype == dtype and close(grad, dense_grad)
        with torch.inference_mode():
            assert layer(x).dtype == want.dtype
    assert layer(x).dtype == compiled(x).dtype == dtype


def test_autocast_leaves_the_op_and_what_is_no_float_alone():
    layer = SlabLinear.from_packed(random_packed(LAYOUT))
    tensors = [layer._buffers[name] for name in ops.TENSOR_ARGUMENTS]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.slab_kernels.linear(X, *tensors, None, 96).dtype == torch.float32
        with pytest.raises(RuntimeError, match="floating point"):
            layer(torch.ones(2, 96, dtype=torch.long))


@pytest.mark.parametrize("autocast", [True, False])
def test_inference_mode_first_and_training_after_it_and_back(autocast):
    make = lambda: SlabLinear.from_packed(random_packed(LAYOUT))  # noqa: E731
    for layer in (make(), FusedSlabLinear([make()])):
        run = lambda x, layer=layer: y[0] if isinstance(y := layer(x), tuple) else y  # noqa: E731
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = run(X)
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run(x).float().sum().backward()
            assert torch.equal(run(X), first)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(run(X), first)
        W = random_packed(LAYOUT).dense()
        assert torch.allclose(x.grad, W.sum(0).expand(2, -1), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_layer_made_under_inference_mode_has_gradients(monkeypatch, backend):
    monkeypatch.setenv(dispatch.ENVIRONMENT, backend)
    packed, x = random_packed(LAYOUT), X.clone().requires_grad_()
    with torch.inference_mode():
        copied = {name: t.clone() for name, t in packed.tensors().items()}
        layer = SlabLinear.from_packed(dataclasses.replace(packed, **copied))
        fused = FusedSlabLinear([layer])
    for y in (layer(x), fused(x)[0]):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, packed.dense().sum(0).expand_as(x))


def test_share_memory_shares_packed_tensors_too():
    layer = SlabLinear.from_packed(random_packed(LAYOUT), torch.ones(24))
    part = SlabLinear.from_packed(random_packed(LAYOUT))
    net = torch.nn.Sequential(layer, FusedSlabLinear([part]))
    want = layer(X)
    net.share_memory()
    assert all(t.is_shared() for t in net.state_dict().values())
    assert torch.equal(layer(X), want)
