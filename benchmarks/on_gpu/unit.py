"""hardware.cu of this folder: compiled by NVRTC beside the headers of csrc/cuda, loaded, launched.

The package's own loader knows the units of csrc/cuda alone, which are built ahead of time and
shipped. This one is compiled where it runs, in seconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from slab_kernels.backends.cuda import driver, images, nvrtc
from slab_kernels.backends.cuda.tensor_map import ALIGNMENT, BYTES

NAME = "hardware"
ARCHITECTURE = "sm_90a"
CAPABILITY = (9, 0)  # exactly: wgmma is of no other
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of cuda.h
_POINTERS = ("a", "metadata", "source", "sums", "bytes", "clocks")
_NUMBERS = ("column", "row", "loads", "copies")
# It takes name, CTAs, threads, dynamic shared bytes and parameters, and waits for the end.
Launch = Callable[[str, int, int, int, "HardwareParams"], None]


class _Fields(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_uint8 * BYTES),
        *((name, ctypes.c_uint64) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _NUMBERS),
    )


class HardwareParams(_Fields):
    """`HardwareParams` of hardware.cu, field by field (`from` is `source` here), as long as its
    alignment makes it."""

    _fields_ = (("padding", ctypes.c_uint8 * (-ctypes.sizeof(_Fields) % ALIGNMENT)),)


def sources() -> dict[str, str]:
    """Path -> text of hardware.cu and of all that it may include."""
    text = Path(__file__).with_name(f"{NAME}.cu").read_text(encoding="utf-8")
    return {**images.kernel_sources(), f"cuda/{NAME}.cu": text}


def compiled(architecture: str = ARCHITECTURE) -> bytes:
    """The image. Raises: CompileError with NVRTC's log, or if there is no NVRTC."""
    found = nvrtc.find(torch.version.cuda.split(".")[0] if torch.version.cuda else None)
    return nvrtc.compile_unit(sources(), NAME, architecture, found)


def loaded(device: str) -> Launch:
    """Launches on a device as torch names it, whose context is current.

    Raises: CompileError as `compiled`, CudaError if the driver refuses.
    """
    torch.zeros(1, device=device)  # It makes torch's context current.
    cuda, image, module = driver.library(), compiled(), ctypes.c_void_p()
    driver.check(cuda.cuModuleLoadData(ctypes.byref(module), image), f"{NAME} was not loaded")

    def launch(name: str, ctas: int, threads: int, shared: int, params: HardwareParams) -> None:
        handle = ctypes.c_void_p()
        found = cuda.cuModuleGetFunction(ctypes.byref(handle), module, name.encode())
        driver.check(found, f"kernel {name} was not found")
        allowed = cuda.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared)
        driver.check(allowed, f"kernel {name} was not allowed {shared} bytes of shared memory")
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        size = (ctas, 1, 1, threads, 1, 1, shared)
        queued = cuda.cuLaunchKernel(handle, *size, stream, arguments, None)
        driver.check(queued, f"kernel {name} was not launched")
        torch.cuda.synchronize()

    return launch
