"""Launches kernels through the CUDA driver's own interface, libcuda.so.1, by ctypes: no cudart, nothing to link.

libcuda is opened on first use, never at import. `launch` is the only call on the hot path: one dictionary look-up, one
struct.pack_into into memory of the calling thread, two calls of the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...errors import CudaError
from . import images

LIBRARY = "libcuda.so.1"
_PLAIN_SHARED = 48 * 1024  # dynamic shared memory that every kernel may use without asking
_DEPENDENT_SINCE = 90  # compute_90: programmatic dependent launch

# cuda.h
_NOT_FOUND = 500
# The driver cannot use this image, another one may do: invalid image, no binary for the device, no JIT compiler, and PTX or
# a cubin of a toolkit that is newer than the driver.
_UNUSABLE = {200, 209, 218, 220, 221, 222, 223}
_STATIC_SHARED, _PTX_VERSION, _MAX_DYNAMIC_SHARED = 1, 5, 8  # CU_FUNC_ATTRIBUTE_*
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# CUlaunchConfig: grid, block, shared bytes, stream, attributes, their number; behind it kernelParams[0]
_CONFIG = struct.Struct("@7IxxxxQQIxxxxQ")
_PARAMETERS_AT = 56


class _Function(NamedTuple):
    handle: ctypes.c_void_p
    attributes: (
        int  # address of the launch attribute of dependent launches, 0 where the device has none
    )
    limit: int  # dynamic shared bytes that the driver allows it so far


class _Slot:
    """The memory that one thread hands to the driver, and the two calls of the hot path."""

    __slots__ = (
        "buffer",
        "config",
        "context",
        "context_out",
        "get_context",
        "launch",
        "parameters",
    )

    def __init__(self) -> None:
        cuda = _cuda()
        self.get_context, self.launch = cuda.cuCtxGetCurrent, cuda.cuLaunchKernelEx
        self.buffer = ctypes.create_string_buffer(_CONFIG.size)
        start = ctypes.addressof(self.buffer)
        self.config, self.parameters = (
            ctypes.c_void_p(start),
            ctypes.c_void_p(start + _PARAMETERS_AT),
        )
        self.context = ctypes.c_void_p()
        self.context_out = ctypes.byref(self.context)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slot = _Slot()


_thread: _Thread | None = None  # made by the first launch
_lock = threading.RLock()
_modules: dict[tuple[str, int, int], ctypes.c_void_p] = {}  # unit, device, context
_loaded: dict[tuple[str, int, int], _Function] = {}  # kernel, device, context
_functions: dict[
    tuple[str, int, int | None], _Function
] = {}  # the same, once launched: its params have been checked
_usable: set[int] = set()
# One CUlaunchAttribute, 72 bytes: id, 4 bytes of padding, the value 1. Only ever read.
_attribute = ctypes.create_string_buffer(struct.pack("@I4xi", _SERIALIZATION, 1), 72)


@functools.cache
def _cuda() -> ctypes.CDLL:
    """libcuda. Raises: CudaError if there is none. A CDLL lets go of the GIL: a launch waits while the queue is full."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        raise CudaError(
            f"the library {LIBRARY} of the NVIDIA driver is not found; install the driver"
        ) from None


@functools.cache
def _properties(device: int) -> Any:
    return torch.cuda.get_device_properties(device)


def capability(device: int) -> tuple[int, int]:
    """(9, 0) for an H100. Raises: what torch raises if there is no such device, here and below."""
    return _properties(device).major, _properties(device).minor


def multiprocessors(device: int) -> int:
    return _properties(device).multi_processor_count


def shared_limit(device: int) -> int:
    """Bytes of shared memory, static and dynamic, that one block may use."""
    return _properties(device).shared_memory_per_block_optin


def missing(device: int | None = None) -> str | None:
    """Why nothing can be launched on that device (default: torch's current one) and what to do about it, or None.

    Compiles nothing; a device that can is remembered. Whether the kernels know such a GPU at all is the backend's to say.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    try:
        _cuda()
    except CudaError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    device = torch.cuda.current_device() if device is None else device
    if device in _usable:
        return None
    if reason := images.missing(capability(device), _toolkit()):
        return reason
    _usable.add(device)
    return None


def launch(
    name: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    params: ctypes.Structure,
    device: int,
    stream: int,
    dependent: bool = False,
) -> None:
    """Queue kernel `name` on the stream (its handle, of `device`); params, its one argument, is copied before this returns.

    dependent: the kernel may start before its predecessor in the stream ends, and waits for it by itself (from capability
    9.0; ignored elsewhere). The first launch loads the module, which graph capture does not allow: call `load` before.
    Raises: CudaError if the driver refuses, if params has not the size of the kernel's argument, and as `load` does.
    """
    global _thread
    if _thread is None:
        _thread = _Thread()
    slot = _thread.slot
    slot.get_context(slot.context_out)
    function = _functions.get((name, device, slot.context.value))
    if function is None or shared_bytes > function.limit:
        with _current(device) as context:
            _admit(name, device, context, shared_bytes, ctypes.sizeof(params))
            return launch(name, grid, block, shared_bytes, params, device, stream, dependent)
    handle, attributes, _ = function
    counted = 1 if dependent and attributes else 0
    _CONFIG.pack_into(
        slot.buffer,
        0,
        *grid,
        *block,
        shared_bytes,
        stream,
        attributes,
        counted,
        ctypes.addressof(params),
    )
    if code := slot.launch(slot.config, handle, slot.parameters, None):
        what = f"kernel {name} with grid {grid}, block {block} and {shared_bytes} bytes of shared memory"
        raise _error(code, f"{what} was not launched on device {device}")


def load(name: str, device: int) -> None:
    """Make kernel `name` ready on the device, so that its first launch neither compiles nor reads anything.

    Raises: CudaError if there is no such kernel or the driver takes none of its images, nvrtc.CompileError if NVRTC refuses
    the source, OSError if an image cannot be read.
    """
    with _current(device) as context:
        _function(name, device, context)


@contextlib.contextmanager
def _current(device: int) -> Iterator[int]:
    """The calling thread's context if it is of that device; else the primary one, which is torch's.

    A thread without a context keeps it; another device's is back afterwards.
    """
    cuda, context, ordinal = _cuda(), ctypes.c_void_p(), ctypes.c_int()
    cuda.cuCtxGetCurrent(ctypes.byref(context))
    if context.value is None:
        primary = _primary(device)
        _check(
            cuda.cuCtxSetCurrent(ctypes.c_void_p(primary)),
            f"the context of device {device} was not made current",
        )
        yield primary
        return
    _check(cuda.cuCtxGetDevice(ctypes.byref(ordinal)), "the current context has no device")
    if ordinal.value == _ordinal(device):
        yield context.value
        return
    primary = _primary(device)
    _check(
        cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(primary)),
        f"the context of device {device} was not made current",
    )
    try:
        yield primary
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))


@functools.cache
def _ordinal(device: int) -> int:
    found = ctypes.c_int()
    _check(_cuda().cuDeviceGet(ctypes.byref(found), device), f"device {device} is not there")
    return found.value


@functools.cache
def _primary(device: int) -> int:
    """The primary context, retained once a device and never released: torch holds it until the process ends anyway."""
    context = ctypes.c_void_p()
    _properties(device)  # torch starts CUDA if nobody has
    _check(
        _cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), _ordinal(device)),
        f"device {device} has no context",
    )
    return context.value


def _admit(name: str, device: int, context: int, shared_bytes: int, size: int) -> None:
    """Enter the kernel in `_functions`, its params checked and as much shared memory allowed as the device has."""
    with _lock:
        cuda, function, taken = _cuda(), _function(name, device, context), ctypes.c_size_t()
        if hasattr(cuda, "cuFuncGetParamInfo"):  # driver 12.4
            offset = ctypes.c_size_t()
            code = cuda.cuFuncGetParamInfo(
                function.handle, ctypes.c_size_t(0), ctypes.byref(offset), ctypes.byref(taken)
            )
            if not code and taken.value != size:
                raise CudaError(
                    f"kernel {name} takes a struct of {taken.value} bytes, params has {size}"
                )
        if shared_bytes > _PLAIN_SHARED:
            static = ctypes.c_int()
            _check(
                cuda.cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, function.handle),
                f"kernel {name}: attributes",
            )
            most = shared_limit(device) - static.value
            if shared_bytes > most:
                raise CudaError(
                    f"kernel {name} asks for {shared_bytes} bytes of shared memory, device {device} allows it {most}"
                )
            code = cuda.cuFuncSetAttribute(function.handle, _MAX_DYNAMIC_SHARED, most)
            _check(
                code,
                f"kernel {name} was not allowed {most} bytes of shared memory on device {device}",
            )
            function = _loaded[name, device, context] = function._replace(limit=most)
        _functions[name, device, context] = function


def _function(name: str, device: int, context: int) -> _Function:
    with _lock:
        if found := _loaded.get((name, device, context)):
            return found
        cuda, handle = _cuda(), ctypes.c_void_p()
        for unit in images.kernel_units():
            code = cuda.cuModuleGetFunction(
                ctypes.byref(handle), _module(unit, device, context), name.encode()
            )
            if code == _NOT_FOUND:
                continue
            _check(code, f"kernel {name} was not found in the module {unit}")
            attributes = ctypes.addressof(_attribute) if _waits(handle) else 0
            return _loaded.setdefault(
                (name, device, context), _Function(handle, attributes, _PLAIN_SHARED)
            )
        raise CudaError(
            f"there is no kernel {name} in csrc/cuda ({', '.join(images.kernel_units()) or 'no sources'})"
        )


def _waits(function: ctypes.c_void_p) -> bool:
    """Whether the kernel was compiled with its griddepcontrol.wait: a PTX of compute_80 has none, on whatever device."""
    version = ctypes.c_int()
    _check(
        _cuda().cuFuncGetAttribute(ctypes.byref(version), _PTX_VERSION, function),
        "a kernel has no PTX version",
    )
    return version.value >= _DEPENDENT_SINCE


def _module(unit: str, device: int, context: int) -> ctypes.c_void_p:
    if found := _modules.get((unit, device, context)):
        return found
    module, refused = ctypes.c_void_p(), []
    for image in images.images(unit, capability(device), _toolkit()):
        code = _cuda().cuModuleLoadData(ctypes.byref(module), image.data)
        if not code:
            return _modules.setdefault((unit, device, context), module)
        refused.append(f"{image.origin}: {_says(code)}")
        if code not in _UNUSABLE:
            break
    reasons = (
        "; ".join(refused) or images.missing(capability(device), _toolkit()) or "there is no image"
    )
    raise CudaError(
        f"the kernels of {unit} were not loaded on device {device}, {_properties(device).name}: {reasons}"
    )


def _toolkit() -> str | None:
    """CUDA's major version that torch was built with, "13"."""
    return torch.version.cuda.split(".")[0] if torch.version.cuda else None


def _says(code: int) -> str:
    """CUDA_ERROR_INVALID_VALUE (invalid argument)"""
    texts = []
    for ask in (_cuda().cuGetErrorName, _cuda().cuGetErrorString):
        text = ctypes.c_char_p()
        ask(code, ctypes.byref(text))
        texts.append((text.value or b"unknown").decode())
    return f"{texts[0]} ({texts[1]})"


def _error(code: int, what: str) -> CudaError:
    late = (
        "; an earlier kernel may be the cause" if 700 <= code < 720 and code != 701 else ""
    )  # 701: out of resources, at once
    return CudaError(f"{what}: {_says(code)}{late}")


def _check(code: int, what: str) -> None:
    if code:
        raise _error(code, what)
