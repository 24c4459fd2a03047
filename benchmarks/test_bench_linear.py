"""pytest-benchmark cases small enough for CI: pytest benchmarks/test_bench_linear.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch

from slab_kernels import dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.format import INTEGER_RANGES, PackedLayout
from slab_kernels.testing import random_packed

N, K = 1024, 1024


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("values", ["dense", "fp16", "int8", "int4"])
def test_linear(benchmark, values, m):
    x = torch.randn(m, K)
    if values == "dense":
        W = torch.randn(N, K)
        benchmark(torch.nn.functional.linear, x, W)
        return
    layout = PackedLayout(N, K, values, 128 if values in INTEGER_RANGES else None, rank=1)
    backend = dispatch.select(LinearProblem.of(layout, m, x.dtype, "cpu"))
    state = backend.prepare(random_packed(layout))
    benchmark(backend.linear, x, state)
