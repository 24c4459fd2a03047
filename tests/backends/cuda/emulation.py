"""A CUDA device without a GPU: `launch.linear` runs on it unchanged, every launch is the PTX that
nvcc emits, interpreted.

Only the ranges that a launch may touch are mapped: inputs read-only and exactly as long as their
last element, outputs and scratch writable and poisoned with NaN. An access beside them, a race
in shared memory, an illegal nibble is an error. Code for Hopper (compute_90) is launched as a
dependent kernel where the library asks for it, and may then touch nothing but the prepared weight
before it has waited for the kernel ahead of it.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch
from ptx import Memory, Module, launch, tensor_map
from ptx.parse import Kernel
from sass import counter as sass
from torch.utils._python_dispatch import TorchDispatchMode

from slab_kernels.backends.cuda import tensor_map as tensor_maps
from slab_kernels.backends.cuda.device import CudaDevice
from slab_kernels.backends.cuda.gpus import GPUS, Gpu
from slab_kernels.backends.cuda.launch import linear
from slab_kernels.backends.cuda.layout import TENSORS, CudaState


@functools.cache
def ptx() -> Module:
    """All kernels' PTX for sm_80, compiled once for any number of test processes."""
    return Module(sass.image("compute_80").decode())


@functools.cache
def kernel_of(name: str, architecture: str = "compute_80") -> Kernel:
    """One kernel. If no build has compiled all of them, it is compiled alone, in a second.

    Those of prefill.cu are for compute_90a whatever the architecture.
    """
    row = name.replace("_fp16", "", 1).replace("_bf16", "", 1)
    if row.startswith("prefill_"):
        rows = (row.removeprefix("prefill_"),)
        return _module(sass.image("compute_90a", rows, unit="prefill"))[name]
    if architecture == "compute_80" and sass.built(architecture):
        return ptx()[name]
    values = {"w16": "kW16", "int8": "kI8", "int4": "kI4"}
    if row.startswith("dense_"):
        row = row.removeprefix("dense_")
        row = f"{row}_{values[row.removesuffix('_any')]}"
    return _module(sass.image(architecture, (row,)))[name]


@functools.cache
def _module(text: bytes) -> Module:
    return Module(text.decode())


def span(t: torch.Tensor) -> np.ndarray:
    """The bytes from a tensor's first element to its last."""
    reach = (
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    )
    return _bytes(t.data_ptr(), reach * t.element_size())


def _bytes(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))


class _Allocations(TorchDispatchMode):
    """Keeps what torch allocates meanwhile: fresh memory is poisoned, copies are inputs."""

    def __init__(self):
        super().__init__()
        self.fresh: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            if "empty" in str(function):
                out.fill_(float("nan"))
                self.fresh.append(out)
            else:
                self.copies.append(out)
        return out


def encode(address, columns, rows, row_bytes, box_rows, dtype) -> bytes:
    """The interpreter's own tensor map, in place of the driver's (backends/cuda/tensor_map.py)."""
    return tensor_map(address, columns, rows, row_bytes, tensor_maps.COLUMNS, box_rows)


class Launched:
    """What was launched, in order: kernel names, their statistics, whether each may start before
    the one before it ends."""

    def __init__(self):
        self.kernels: list[str] = []
        self.stats: list = []
        self.dependent: list[bool] = []


def run(
    x: torch.Tensor,
    state: CudaState,
    bias=None,
    gpu: Gpu = GPUS[0],
    architecture: str = "compute_80",
    launched: Launched | None = None,
    late_products: bool = True,
) -> torch.Tensor:
    """`launch.linear` of CPU tensors on the emulated device.

    late_products: asynchronous products are computed when they are waited for, not at once.
    """
    with _Allocations() as memory:

        def queue(name, grid, block, shared_bytes, params, dependent):
            assert shared_bytes <= gpu.shared_limit
            mapped = Memory()
            inputs = [t for t in (x, *state[:TENSORS], bias, *memory.copies) if t is not None]
            seen = {}
            for t in memory.fresh:
                seen[t.data_ptr()] = (span(t), True)
            for t in inputs:
                old = seen.get(t.data_ptr())
                if old is None or (not old[1] and old[0].size < span(t).size):
                    seen[t.data_ptr()] = (span(t), False)
            prepared = {t.data_ptr() for t in state[:TENSORS] if t is not None}
            for address, (array, writable) in seen.items():
                mapped.map(address, array, writable=writable, early=address in prepared)
            if getattr(params, "next", 0):  # the next linear's weight, which is prefetched
                mapped.map(params.next, _bytes(params.next, params.next_bytes), False, early=True)
            kernel = kernel_of(name, architecture)
            stats = launch(
                kernel,
                grid,
                block,
                bytes(params),
                mapped,
                shared_bytes=shared_bytes,
                dependent=dependent and kernel.module.target >= 90,
                late_products=late_products,
            )
            if launched is not None:
                launched.kernels.append(name)
                launched.stats.append(stats)
                launched.dependent.append(dependent)

        return linear(x, state, bias, CudaDevice(gpu, queue, encode))
