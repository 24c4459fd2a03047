"""What torch.compile and torch.export make of layers that nobody has prepared, and what is said."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call

from slab_kernels import FusedSlabLinear, SlabLinear, reference
from slab_kernels.format import PackedLayout
from slab_kernels.nn import call
from slab_kernels.testing import random_packed

LAYOUT = PackedLayout(24, 48, "int8", rank=1)
X = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))


def layer_of(seed=0):
    return SlabLinear.from_packed(random_packed(LAYOUT, seed=seed))


def fused_of():
    return FusedSlabLinear([layer_of(1), layer_of(2)])


@pytest.fixture
def said(monkeypatch):
    """The warnings of a process that has not warned yet, and how often the reference ran."""
    calls, real = [], reference.linear
    monkeypatch.setattr(reference, "linear", lambda *given: calls.append(given) or real(*given))
    monkeypatch.setattr(call, "_SAID", set())
    torch._dynamo.reset()  # Other tests of this process compile the same code.
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield lambda: ([str(w.message) for w in found if "a packed layer" in str(w.message)], calls)


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("make", [layer_of, fused_of])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
def test_compiling_prepares(said, make, dynamic, mode):
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with mode():
        for m in (3, 1, 5):
            compiled(torch.ones(m, 48))
    assert said() == ([], []) and layer._linears[torch.float32]


def test_a_layer_that_is_cast_moved_or_loaded_after_compiling(said):
    layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(X)
    layer.bfloat16()
    assert compiled(X.bfloat16()).dtype == torch.bfloat16
    layer.load_state_dict(layer_of(5).state_dict())
    close = torch.testing.assert_close
    close(compiled(X), layer_of(5)(X))
    layer._apply(lambda t: t.to("meta"))
    assert layer._linears == {} and compiled(X.to("meta")).is_meta
    assert said() == ([], [])


@pytest.mark.parametrize("make", [layer_of, fused_of])
def test_exporting_before_preparing_says_once_what_it_costs(said, make):
    for _ in range(2):
        program = torch.export.export(make(), (X,), strict=False)
    found, calls = said()
    assert found == [call.EXPORTED] and not calls
    torch.testing.assert_close(first(program.module()(X)), first(make()(X)))
    assert calls


@pytest.mark.parametrize("make", [layer_of, fused_of])
@pytest.mark.parametrize("strict", [True, False])
def test_exporting_says_nothing_where_the_layer_is_prepared(said, make, strict):
    """A strict export prepares by itself, as compiling does."""
    layer = make()
    if not strict:
        layer.prepare()
    program = torch.export.export(layer, (X,), strict=strict)
    program.module()(X)
    assert said() == ([], [])


def test_tensors_lent_inside_of_a_trace_are_said_once(said):
    layer, lent = layer_of(), layer_of(5)
    compiled = torch.compile(
        lambda values, x: functional_call(layer, {"values": values}, x),
        fullgraph=True,
        backend="aot_eager",
    )
    for _ in range(2):
        compiled(lent.values, X)
    found, calls = said()
    assert found == [call.LENT] and len(calls) == 2
