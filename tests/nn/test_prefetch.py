"""`prefetch_in_order`: what a backend hears of the order of layers."""

from __future__ import annotations

import torch

from slab_kernels import reference
from slab_kernels.backends import dispatch
from slab_kernels.backends.base import Backend
from slab_kernels.format import PackedLayout
from slab_kernels.nn import FusedSlabLinear, SlabLinear, prefetch_in_order
from slab_kernels.testing import random_packed


class Listening(Backend):
    """A backend that notes who follows whom."""

    name = "listening"

    def __init__(self):
        self.heard = []

    def prepare(self, packed, dtype=None):
        return packed

    def linear(self, x, state, bias=None):
        return reference.linear(x, state, bias)

    def prefetch_next(self, state, following, most_bytes):
        self.heard.append((state, following, most_bytes))


def layer(N: int = 8) -> SlabLinear:
    return SlabLinear.from_packed(random_packed(PackedLayout(N, 32, "fp16", rank=1)))


def test_each_layer_is_linked_to_the_next(monkeypatch):
    backend = Listening()
    monkeypatch.setattr(dispatch, "select", lambda problem, name=None: backend)
    monkeypatch.setattr(
        dispatch, "prepare_fused", lambda parts, *_: (backend, backend.prepare_fused(parts))
    )
    layers = [layer(), FusedSlabLinear([layer(), layer(4)]), layer()]
    prefetch_in_order(layers, torch.float32, 4096)
    states = [module._prepared(torch.float32).state for module in layers]
    assert backend.heard == [(states[0], states[1], 4096), (states[1], states[2], 4096)]


def test_other_backends_do_nothing():
    """Nor does one layer alone, or none."""
    layers = [layer(), layer()]
    before = [module(torch.ones(1, 32)) for module in layers]
    for some in (layers, layers[:1], []):
        prefetch_in_order(some, torch.float32)
    assert all(map(torch.equal, before, [module(torch.ones(1, 32)) for module in layers]))
