"""A new word for activations holds for every dtype that a layer has run in."""

from __future__ import annotations

import pytest
import torch

from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.format import PackedLayout
from slab_kernels.nn import preparation
from slab_kernels.testing import random_packed


def layer(fused: bool) -> SlabLinear | FusedSlabLinear:
    parts = [
        SlabLinear.from_packed(random_packed(PackedLayout(40, 200, "int4", 32, rank=1), seed=seed))
        for seed in range(2)
    ]
    return FusedSlabLinear(parts) if fused else parts[0]


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("words", [("int8", "exact"), ("exact", "int8")])
def test_a_new_word_holds_for_every_dtype(fused, words):
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = [first(layer(fused).prepare(torch.bfloat16, activations=word)(x)) for word in words]
    if torch.equal(*wanted):
        pytest.skip("no kernels with int8 activations run here")
    one = layer(fused).prepare(torch.bfloat16, activations=words[0])
    assert torch.equal(first(one(x)), wanted[0])
    one.prepare(activations=words[1])
    assert torch.equal(first(one(x)), wanted[1])


def test_a_part_of_a_fused_layer_called_alone_runs_in_its_mode():
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    exact = layer(True)
    alone = exact.prepare(activations="exact").parts[1](x)
    rounded = layer(False).prepare(activations="int8")  # the first part's weight, by itself
    if torch.equal(rounded(x), layer(False).prepare(activations="exact")(x)):
        pytest.skip("no kernels with int8 activations run here")
    fused = layer(True)
    fused.parts[1](x)  # a part that was prepared by itself, before the word
    fused.prepare(activations="int8")
    together = fused(x)
    assert torch.equal(fused.parts[0](x), rounded(x))
    for part, y in zip(fused.parts, together, strict=True):
        assert torch.equal(part(x), y)
    fused.prepare(activations="exact")
    assert torch.equal(fused.parts[1](x), alone)


def test_parts_of_a_model_opened_in_a_mode_have_it_too():
    model = torch.nn.Sequential(layer(True))
    preparation.prepare_opened(model, torch.float32, None, "int8")
    assert {part._activations for part in model[0].parts} == {"int8"}


def test_the_mode_of_a_model_is_that_of_its_layers():
    model = torch.nn.Sequential(layer(False), layer(True))
    assert preparation.activations_of(model) is None, "nothing has run yet"
    alone = layer(False).prepare(activations="int8")
    for word in ("exact", "int8", "exact"):
        preparation.prepare(model, activations=word)
        said = alone.extra_repr() if word == "int8" else "exact"
        assert preparation.activations_of(model) == ("int8" if "int8" in said else "exact")
    model[1].prepare(activations="int8")
    assert preparation.activations_of(model) == preparation.activations_of(model[1])
