"""Whole models prepared at once, and what is prepared when a model is opened."""

from __future__ import annotations

import pytest
import torch
from stand_ins import cuda_here
from torch import nn

import slab_kernels
from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.backends import dense_copy
from slab_kernels.errors import ArgumentError, BackendError
from slab_kernels.format import PackedLayout
from slab_kernels.nn import preparation
from slab_kernels.testing import random_packed

LAYOUT = PackedLayout(32, 64, "fp16", rank=1)
SIZE = 32 * 64 * 2  # bytes of a copy


def layer_of(seed=0):
    return SlabLinear.from_packed(random_packed(LAYOUT, seed=seed))


def model_of():
    """Four layers, two of them fused, one of them under two names."""
    alone = layer_of()
    fused = FusedSlabLinear([layer_of(1), layer_of(2)])
    return nn.ModuleDict({"a": alone, "again": alone, "fused": fused, "b": layer_of(3)})


def copies(model, dtype=torch.float16):
    layers = preparation.layers_of(model)
    return [layer._linears[dtype][-1].state.dense is not None for layer in layers]


@pytest.fixture
def memory(monkeypatch):
    found = {"free": 0}
    monkeypatch.setattr(dense_copy, "free", lambda device: found["free"])
    monkeypatch.setattr(dense_copy, "_kept", {})
    with cuda_here(monkeypatch):
        yield found


def test_every_layer_once_and_the_parts_of_a_fused_one_as_one():
    model = model_of()
    assert preparation.layers_of(model) == [model["fused"], model["a"], model["b"]]
    assert slab_kernels.prepare(model) is model
    assert model["a"].backend == "cpu" and model["fused"]._linears
    assert model["fused"].parts[0].backend is None and not preparation.dense_copy_bytes(model)


def test_auto_decides_for_the_whole_model(memory):
    """All copies or none, and a layer that is prepared anew later keeps to it."""
    for free, made in ((8 * SIZE - 1, False), (8 * SIZE, True)):
        model, memory["free"] = model_of(), free
        slab_kernels.prepare(model, torch.float16, prefill="auto")
        assert copies(model) == [made] * 3
        assert preparation.dense_copy_bytes(model) == (4 * SIZE if made else 0)
        memory["free"] = 100 * SIZE if not made else memory["free"]
        model["a"].values.add_(0)
        model["a"](torch.ones(1, 64).half())
        assert copies(model) == [made] * 3
    memory["free"] -= 4 * SIZE  # by the copies that are there already, which count on both sides
    slab_kernels.prepare(model, torch.float16, prefill="auto")
    assert copies(model) == [True] * 3


def test_one_word_for_all_or_each_as_it_was_told(memory, monkeypatch):
    model = slab_kernels.prepare(model_of(), torch.float16, prefill="dense")
    assert copies(model) == [True] * 3
    model["b"].prepare(torch.float16, prefill="packed")
    assert copies(slab_kernels.prepare(model, torch.float16)) == [True, True, False]
    assert copies(slab_kernels.prepare(model, torch.float16, prefill="packed")) == [False] * 3
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "dense")
    assert copies(slab_kernels.prepare(model_of(), torch.float16)) == [True] * 3
    with pytest.raises(ArgumentError, match="use one of packed, dense, auto"):
        slab_kernels.prepare(model, prefill="none")


def test_what_a_layer_was_told_holds_before_the_environment(memory, monkeypatch):
    """And layers that were told "auto" are weighed together without the word, too."""
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "auto")
    model, memory["free"] = model_of(), 100 * SIZE
    model["b"].prepare(torch.float16, prefill="packed")
    assert copies(slab_kernels.prepare(model, torch.float16)) == [True, True, False]
    monkeypatch.delenv(dense_copy.ENVIRONMENT)
    model, memory["free"] = model_of(), 8 * SIZE - 1
    preparation.prepare_opened(model, torch.float16, "auto")
    assert copies(slab_kernels.prepare(model, torch.float16)) == [False] * 3


def test_an_opened_model_is_prepared_on_a_gpu_and_by_its_first_call_on_a_cpu(memory, monkeypatch):
    model, memory["free"] = model_of(), 100 * SIZE
    for word in (None, "packed", "auto"):
        preparation.prepare_opened(model, torch.float16, word)
        assert not any(layer._linears for layer in preparation.layers_of(model))
        assert model["a"]._prefill == word
    model["a"](torch.ones(1, 64).half())
    assert model["a"]._linears[torch.float16][0].state.dense is not None
    monkeypatch.setattr(preparation, "_place", lambda layer: torch.device("cuda", 0))
    model = model_of()
    preparation.prepare_opened(model, torch.float16, None)
    assert copies(model) == [False] * 3
    preparation.prepare_opened(model, torch.float16, "auto")
    assert copies(model) == [True] * 3


def test_a_copy_that_cannot_be_is_refused_when_a_model_is_opened(monkeypatch):
    with pytest.raises(BackendError, match="the cpu backend keeps none of 32x64"):
        preparation.prepare_opened(model_of(), torch.float32, "dense")
    monkeypatch.setenv(dense_copy.ENVIRONMENT, "dense")
    preparation.prepare_opened(model_of(), torch.float32, None)  # a default speaks in a call
    with pytest.raises(BackendError, match="SLAB_KERNELS_PREFILL names it"):
        model_of()["a"](torch.ones(1, 64))
