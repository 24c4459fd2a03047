"""A new word for activations holds for every dtype that a layer has run in."""

from __future__ import annotations

import pytest
import torch

from slab_kernels import FusedSlabLinear, SlabLinear
from slab_kernels.format import PackedLayout
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
