"""replace_linear: what a module does beyond x W.T + bias is carried over, or it is not replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from slab_kernels import SlabLinear, replace_linear
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

PACKED = random_packed(PackedLayout(24, 48))


class Lora(nn.Linear):
    def __init__(self):
        super().__init__(48, 24)
        self.A, self.B = nn.Parameter(torch.randn(4, 48)), nn.Parameter(torch.randn(24, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


class Renamed(nn.Linear):
    """Another name for the same."""


def patched():
    linear = nn.Linear(48, 24)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Lora, "it is a Lora, whose forward is not nn.Linear's; merge.*merge_and_unload"),
        (patched, "its forward was replaced on the instance"),
        (lambda: parametrizations.weight_norm(nn.Linear(48, 24)), "'parametrizations'.*fold that"),
        (lambda: nn.utils.spectral_norm(nn.Linear(48, 24)), "'weight_u', 'weight_v' beside"),
        (lambda: prune.identity(nn.Linear(48, 24), "weight"), "'weight_mask', 'weight_orig' be"),
    ],
)
def test_what_would_be_lost_is_refused_before_anything_is_replaced(make, message):
    model = nn.Sequential(nn.Linear(48, 24), make())
    with pytest.raises(TypeError, match=f"'1' cannot be replaced: .*{message}"):
        replace_linear(model, {"0": PACKED, "1": PACKED})
    assert type(model[0]) is nn.Linear


def test_a_weight_that_attention_reads_by_itself():
    model = nn.Sequential(nn.MultiheadAttention(48, 4))
    with pytest.raises(TypeError, match="nn.MultiheadAttention reads its weight"):
        replace_linear(model, {"0.out_proj": random_packed(PackedLayout(48, 48))})


def test_hooks_mode_and_every_name_are_carried_over():
    shared = Renamed(48, 24)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    x = torch.randn(2, 48)
    shared.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    handle = shared.register_forward_hook(lambda module, args, kwargs, y: y + 1, with_kwargs=True)
    want = SlabLinear.from_packed(PACKED, shared.bias)(2 * x)
    replace_linear(model, {"b.0": PACKED})
    assert model["a"] is model["b"][0] and type(model["a"]) is SlabLinear
    assert not model["a"].training
    assert torch.equal(model["a"](x), want + 1)
    handle.remove()
    assert torch.equal(model["a"](x), want)


def test_two_weights_for_one_module():
    shared, other = nn.Linear(48, 24), random_packed(PACKED.layout, seed=3)
    with pytest.raises(ValueError, match="'0' and '1' are one module, but two packed weights"):
        replace_linear(nn.Sequential(shared, shared), {"0": PACKED, "1": other})
