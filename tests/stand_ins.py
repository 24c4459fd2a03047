"""The GPU backends on CPU tensors, with torch in place of their kernels: what layers do around it.

`cuda_here` and `triton_here` let a dispatch find no fault with CPU tensors. A packed product is the
stream's own dense weight in fp32, and is counted; a dense copy is multiplied as it is on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from slab_kernels.backends import cuda
from slab_kernels.backends import triton as triton_backend
from slab_kernels.backends.cuda import unpack
from slab_kernels.backends.cuda.device import CudaDevice
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.backends.triton import launch, sparse, stream
from slab_kernels.backends.triton.rows import TritonDevice

H100 = TritonDevice("NVIDIA H100 80GB HBM3", 132, 232448, 90)
DENSE_FROM = 33  # tokens, of the stand-in for the CUDA backend


class Packed:
    """Products from the stream, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, state: CudaState, bias: Tensor | None, *device: object) -> Tensor:
        self.calls += 1
        W = unpack.dense(state)
        if state.P is not None:
            factors = unpack.adapters(state)
            W = W + torch.cat([P.float() @ Q.float() for P, Q in factors])
        y = x.float() @ W.T
        return (y if bias is None else y + bias.float()).to(x.dtype)


@contextlib.contextmanager
def cuda_here(monkeypatch) -> Iterator[Packed]:
    """The CUDA backend runs CPU tensors; a copy is used from DENSE_FROM tokens on."""
    packed, real = Packed(), cuda.CudaBackend.not_supported_reasons
    backend = type(cuda.BACKEND)
    monkeypatch.setattr(
        backend,
        "not_supported_reasons",
        lambda self, problem: real(self, replace(problem, device="cpu"))[:-1],
    )
    monkeypatch.setattr(cuda, "device_of", lambda _: CudaDevice(GPUS[0], None, None))
    monkeypatch.setattr(cuda, "_gpu", lambda name: GPUS[0])
    monkeypatch.setattr(cuda, "linear", packed)
    monkeypatch.setattr(cuda, "takes_dense", lambda sizes, M, gpu: M >= DENSE_FROM)
    cuda.register()
    with torch.library._scoped_library(cuda.NAMESPACE, "IMPL") as library:
        for name in ("linear_cuda", "linear_cuda_frozen"):
            library.impl(name, cuda._linear, "CPU")
        yield packed


@contextlib.contextmanager
def triton_here(monkeypatch) -> Iterator[Packed]:
    """The Triton backend runs CPU tensors from a stream."""
    packed = Packed()
    monkeypatch.setattr(
        type(triton_backend.BACKEND), "not_supported_reasons", lambda self, problem: []
    )
    monkeypatch.setattr(launch, "speaks_ptx", lambda device: True)
    monkeypatch.setattr(stream, "_TRUSTED", {})
    monkeypatch.setattr(sparse, "self_check", lambda device: True, raising=False)
    monkeypatch.setattr(triton_backend, "device_of", lambda index: H100)
    monkeypatch.setattr(stream, "decoded", packed)
    monkeypatch.setattr(stream, "rebuilt", packed)
    yield packed
