"""hardware.cu of benchmarks/on_gpu in the PTX interpreter: what `unit.loaded` gives, without a
GPU."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from on_gpu import hardware, unit
from ptx import Memory, Module, launch, tensor_map
from torch.utils._python_dispatch import TorchDispatchMode

COLUMNS = 64  # of a box


@functools.cache
def module() -> Module:
    return Module(unit.compiled("compute_90a").decode())


class _Kept(TorchDispatchMode):
    """Remembers the tensors that torch makes meanwhile, to find them again by their address."""

    def __init__(self):
        super().__init__()
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.append(weakref.ref(out.untyped_storage()))
        return out


def encode(address, columns, rows, row_bytes, box_rows, dtype) -> bytes:
    return tensor_map(address, columns, rows, row_bytes, COLUMNS, box_rows)


@contextlib.contextmanager
def stand(**options) -> Iterator[hardware.Stand]:
    """A stand on which tensors that are made meanwhile are what kernels may touch.

    options: those of `ptx.launch`.
    """
    with _Kept() as kept:

        def run(name, ctas, threads, shared, params) -> None:
            memory, seen = Memory(), set()
            for storage in filter(None, (made() for made in kept.made)):
                address, size = storage.data_ptr(), storage.nbytes()
                if size and address not in seen:
                    seen.add(address)
                    array = np.ctypeslib.as_array(
                        (np.ctypeslib.ctypes.c_uint8 * size).from_address(address)
                    )
                    memory.map(address, array, writable=True)
            kernel = module()[name]
            launch(
                kernel, (ctas,), (threads,), bytes(params), memory, shared_bytes=shared, **options
            )

        yield hardware.Stand("cpu", run, encode)
