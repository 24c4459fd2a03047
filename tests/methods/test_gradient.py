"""The gradient E H that the solver of `slab` carries from step to step, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pairwise import grid

from slab_kernels.errors import CalibrationError, RangeError
from slab_kernels.methods import decompose
from slab_kernels.methods import slab as slab_file
from slab_kernels.methods.inputs import InputStats
from slab_kernels.methods.solvers import compiled

Solver = slab_file._Solver
STEPS = ("begin", "_refit", "descend", "_fit_adapter", "round", "_round_adapter", "_settle_on")


def layer(N, K):
    g = torch.Generator().manual_seed(N * K)
    x = torch.randn(2 * K + 50, K, generator=g) @ torch.randn(K, K, generator=g).div(K**0.5)
    stats = InputStats.from_inputs(x * torch.logspace(-1, 1, K))
    return torch.randn(N, K, generator=g), stats


def watch(monkeypatch):
    """[largest error of a gradient that was kept, how many were seen] after every step."""
    seen = [0.0, 0]

    def watched(step):
        def run(self, *arguments, **named):
            result = step(self, *arguments, **named)
            if self.gradient is not None:
                E, H = (self.target - self.approximation).double(), self.gram.double()
                size = float((self.W.double() @ H).abs().max())
                seen[0] = max(seen[0], float((self.gradient - E @ H).abs().max()) / size)
                seen[1] += 1
            return result

        return run

    for name in STEPS:
        monkeypatch.setattr(Solver, name, watched(getattr(Solver, name)))
    return seen


@grid(
    **{
        "N, K": [(1, 4), (9, 12), (18, 132)],
        "rank, planes": [(0, 1), (1, 1), (1, 3), (2, 2)],
        "adapter_rank": [0, 2],
        "values": ["fp16", "int8", "int3"],
        "group_size": [None, 32],
        "road": ["compiled", "torch"],
    }
)
def test_a_gradient_is_absent_or_right_after_every_step(
    monkeypatch, N, K, rank, planes, adapter_rank, values, group_size, road
):
    if road == "torch":
        monkeypatch.setattr(compiled, "usable", lambda *_: False)
    W, stats = layer(N, K)
    rank, adapter_rank = min(rank, N), min(adapter_rank, N)
    planes = planes if rank else 1
    seen = watch(monkeypatch)
    decompose(
        W, stats, values=values, group_size=group_size, rank=rank, planes=planes,
        adapter_rank=adapter_rank,
    )  # fmt: skip
    assert seen[1] > 3 and seen[0] < 1e-5


@pytest.mark.parametrize("values", ["fp16", "int4"])
def test_a_gradient_is_right_where_other_rows_gave_their_v(monkeypatch, values):
    W, stats = layer(40, 64)
    V = decompose(W[::2], stats, values=values, group_size=32).V
    seen = watch(monkeypatch)
    found = decompose(W[1::2], replace(stats, input_factor=V), values=values, group_size=32)
    assert torch.equal(found.V, V) and torch.equal(found.U, found.U.half().float())
    assert seen[1] > 3 and seen[0] < 1e-5


def test_rows_too_large_for_a_given_v_are_refused_in_a_sentence():
    W, stats = layer(16, 64)
    V = decompose(W, stats).V
    W[3] *= 1e6
    with pytest.raises(RangeError, match="does not fit fp16 beside the V that other rows"):
        decompose(W, replace(stats, input_factor=V))


@pytest.mark.parametrize("shape", [(64,), (60, 1), (64, 2)])
def test_a_given_v_of_another_shape_is_refused(shape):
    W, stats = layer(16, 64)
    stats = replace(stats, input_factor=torch.ones(shape))
    with pytest.raises(
        CalibrationError, match=r"input_factor has shape .*, expected .* 64 x rank=1"
    ):
        decompose(W, stats)
    decompose(W, stats, rank=0)  # has no V
