"""Loads every kernel that a weight may use, so that no other part has to wait for NVRTC.

python -m on_gpu.kernels
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import torch

from on_gpu.verdicts import Verdict
from on_gpu.weights import DTYPES, Weight, large, small
from slab_kernels.backends.cuda import device_of, driver, images
from slab_kernels.backends.cuda.gpus import Gpu
from slab_kernels.backends.cuda.launch import kernel_names
from slab_kernels.backends.cuda.layout import STREAM_VALUES
from slab_kernels.backends.cuda.tiles import CudaSizes
from slab_kernels.format import ceil_div


def names(weights: Iterable[Weight], gpu: Gpu) -> list[str]:
    """The kernels that these weights may use on a GPU, for any number of tokens."""
    found: dict[str, None] = {}
    for weight in weights:
        sizes = CudaSizes(
            K=weight.K,
            rows=weight.rows,
            values=STREAM_VALUES[weight.values],
            group_steps=(weight.group_size or 128) // 32,
            rank=weight.rank,
            adapter_steps=ceil_div(weight.adapter_rank, 16),
            planes=weight.planes,
        )
        found |= dict.fromkeys(kernel_names(sizes, DTYPES[weight.dtype], gpu))
    return list(found)


def main() -> int:
    index = torch.cuda.current_device()
    if reason := driver.missing(index):
        Verdict(reason, False).say()
        return 1
    start, wanted = time.monotonic(), names([*small(), *large()], device_of(index).gpu)
    built = [
        path.name
        for unit in images.kernel_units(driver.capability(index))
        for path in images.ahead_of_time(unit, driver.capability(index))[:1]
    ]
    for name in wanted:
        driver.load(name, index)
    origin = ", ".join(built) or "NVRTC or its cache"
    took = time.monotonic() - start
    Verdict(f"{len(wanted)} kernels are loaded, from {origin}, in {took:.0f} s", True).say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
