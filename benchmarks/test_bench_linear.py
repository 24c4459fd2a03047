"""pytest-benchmark cases small enough for CI, each checked before it is timed.

pytest benchmarks --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from slab_kernels.backends import dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.bench import correctness
from slab_kernels.format import INTEGER_RANGES, VALUE_TYPES, PackedLayout
from slab_kernels.testing import random_packed

SHAPES = ((1024, 1024), (1000, 1030))  # the second fits no block, no vector and no group of scales
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("values", ["dense", *VALUE_TYPES])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_linear(benchmark, shape, values, m):
    n, k = shape
    x = torch.randn(m, k, device=DEVICE, dtype=DTYPE)
    if values == "dense":
        W = torch.randn(n, k, device=DEVICE, dtype=DTYPE)
        call = lambda: torch.nn.functional.linear(x, W)  # noqa: E731
    else:
        layout = PackedLayout(n, k, values, 128 if values in INTEGER_RANGES else None, rank=1)
        packed = random_packed(layout).to(DEVICE)
        backend = dispatch.select(LinearProblem.of(layout, m, DTYPE, DEVICE))
        state = backend.prepare(packed, DTYPE)
        correctness.gate(backend, x, state, packed)
        call = lambda: backend.linear(x, state)  # noqa: E731
    benchmark.group = f"{n}x{k}, m={m}"

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # one call with its launch; bench_linear.py times without it

    benchmark(run)
