"""backends/cuda/launch.py on a device that only remembers: what x becomes before a kernel sees it,
and which weight is prefetched."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from slab_kernels.backends.base import wait_until_written
from slab_kernels.backends.cuda import BACKEND, launch, layout, plan, prefetch
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.launch import CudaDevice, LinearParams, linear
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed


class Remembered:
    """A device, and the parameters of all that was queued on it."""

    def __init__(self):
        self.queued: list[tuple[str, LinearParams]] = []
        self.device = CudaDevice(GPUS[3], self._queue)

    def _queue(self, name, grid, block, shared_bytes, params, dependent):
        assert dependent
        self.queued.append((name, LinearParams.from_buffer_copy(params)))

    def run(self, x, state) -> list[LinearParams]:
        self.queued.clear()
        linear(x, state, None, self.device)
        return [params for name, params in self.queued if not name.startswith("reduce")]


def prepared(N=40, K=200, **more):
    more = {"values": "int4", "group_size": 64, "rank": 1} | more
    return BACKEND.prepare(random_packed(PackedLayout(N, K, **more)), torch.float16)


# ---- x


def aligned(K: int) -> torch.Tensor:
    return torch.randn(6, K).half()


X = {  # name -> x of 6 rows or 1, and whether it is read where it is
    "aligned rows": (lambda: aligned(200), True),
    "every second row": (lambda: torch.randn(12, 200).half()[::2], True),
    "a row 16 bytes on": (lambda: torch.randn(6, 208).half()[:, 8:], True),
    "one row of any stride": (lambda: torch.randn(6, 204).half()[2:3, :200], True),
    "one row 8 bytes on": (lambda: torch.randn(6, 204).half()[1:2, :200], False),
    "a row 2 bytes on": (lambda: torch.randn(6, 208).half()[:, 1:201], False),
    "rows 408 bytes apart": (lambda: torch.randn(6, 204).half()[:, :200], False),
    "columns": (lambda: torch.randn(200, 6).half().T, False),
    "the same row again": (lambda: torch.randn(1, 200).half().expand(6, 200), False),
    "every second input": (lambda: torch.randn(6, 400).half()[:, ::2], False),
    "ragged rows": (lambda: aligned(204), False),
    "ragged rows with room": (lambda: torch.randn(6, 208).half()[:, :204], True),
}


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("adapter_rank", (0, 3))
def test_kernels_see_rows_of_16_bytes(monkeypatch, name, adapter_rank):
    """Other x is copied first, once for the adapter's kernel and the linear's, by one torch call
    into memory of the allocator; what is aligned is read where it is."""
    make, as_it_is = X[name]
    x, copies = make(), []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, *rest: copies.append(to) or copy(to, *rest)
    )
    remembered = Remembered()
    found = remembered.run(x, prepared(K=x.shape[1], adapter_rank=adapter_rank))
    assert len(found) == 1 + bool(adapter_rank) and len(copies) == (not as_it_is)
    for params in found:
        assert params.x % 16 == 0 and (params.tokens == 1 or params.token_stride % 8 == 0)
        assert (params.x == x.data_ptr()) == as_it_is
        if copies:
            assert params.x == copies[0].data_ptr() and torch.equal(copies[0], x)


def test_a_rebuilt_weight_takes_x_as_it_is(monkeypatch):
    """cuBLAS reads any rows."""
    monkeypatch.setattr(launch, "choose", plan.rebuild)
    monkeypatch.setattr(launch, "_aligned", None)
    launch.launches.cache_clear()
    device = CudaDevice(GPUS[3], lambda *_: None)
    assert linear(torch.randn(6, 204).half()[:, :200], prepared(), None, device).shape == (6, 40)
    launch.launches.cache_clear()


# ---- the next weight


def test_the_next_weight_is_prefetched_only_where_somebody_said_so():
    remembered, x = Remembered(), torch.randn(1, 200).half()
    one, other = prepared(rank=0), prepared(N=64)
    (params,) = remembered.run(x, one)
    assert (params.next, params.next_bytes) == (0, 0)
    BACKEND.prefetch_next(one, other, 1000)
    (params,) = remembered.run(x, one)
    assert (params.next, params.next_bytes) == (other.stream.data_ptr(), 992)  # whole 16 bytes
    BACKEND.prefetch_next(one, other, 1 << 30)
    (params,) = remembered.run(x, one)
    assert params.next_bytes == other.stream.nbytes
    (params,) = remembered.run(x, other)
    assert params.next == 0
    BACKEND.prefetch_next(one, other, 0)
    (params,) = remembered.run(x, one)
    assert (params.next, params.next_bytes) == (0, 0) and not prefetch._successors


def test_the_adapters_kernel_prefetches_nothing():
    remembered, one, other = Remembered(), prepared(adapter_rank=3), prepared()
    BACKEND.prefetch_next(one, other, 1 << 30)
    first, second = remembered.run(torch.randn(1, 200).half(), one)
    assert first.next == 0 and second.next == other.stream.data_ptr()


@pytest.mark.parametrize("gone", (0, 1))
def test_a_link_goes_with_either_weight(gone):
    pair = [prepared(), prepared()]
    BACKEND.prefetch_next(*pair, 1 << 20)
    assert len(prefetch._successors) == 1
    del pair[gone]
    gc.collect()
    assert not prefetch._successors


def test_the_end_of_an_older_link_leaves_a_newer_one():
    one, old, new = prepared(), prepared(), prepared()
    BACKEND.prefetch_next(one, old, 1 << 20)
    BACKEND.prefetch_next(one, new, 1 << 20)
    del old
    gc.collect()
    assert prefetch.successor_of(one.stream.data_ptr()).address == new.stream.data_ptr()


def test_a_weight_on_another_device_is_not_linked():
    """And takes an older link away: its address means nothing here."""
    state, following = prepared(), prepared()
    prefetch.link(state, following, 1 << 20)
    elsewhere = following._replace(stream=following.stream.to("meta"))
    prefetch.link(state, elsewhere, 1 << 20)
    assert prefetch.successor_of(state.stream.data_ptr()) == prefetch.NONE


def test_states_that_are_no_stream_are_not_linked():
    BACKEND.prefetch_next((prepared(), 40), prepared(), 1 << 20)
    BACKEND.prefetch_next(prepared(), (prepared(), 40), 1 << 20)
    assert not prefetch._successors


# ---- prepare


def test_a_prepared_weight_is_finished_when_prepare_returns(monkeypatch):
    """Kernels read it before they wait for the kernel in front of them."""
    done = []

    def current_stream(device):
        return SimpleNamespace(synchronize=lambda: done.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    there, here = SimpleNamespace(is_cuda=True, device="cuda:3"), torch.zeros(1)
    layout.finish(SimpleNamespace(stream=there))
    assert done == ["cuda:3"]
    wait_until_written([there, here, there])  # as after a reload, once for a device
    wait_until_written([here])
    assert done == ["cuda:3", "cuda:3"]
    asked = []
    monkeypatch.setattr(layout, "finish", asked.append)
    state = prepared()
    assert asked == [state] and not state.stream.is_cuda
