"""Launches kernels through the CUDA driver's own interface, libcuda.so.1, by ctypes.

There is no cudart and nothing to link. libcuda is opened on first use, never at import. `launch` is
the only call on the hot path: one dictionary look-up, one struct.pack_into into memory of the
calling thread, two calls of the driver.
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
_DEPENDENT_SINCE = 90  # compute_90 is the first with programmatic dependent launch.
# CUDA graphs have edges for it from 12.3 on. A linear may be captured at any time, so an older
# driver's launches do not overlap.
_OVERLAPS_SINCE = 12030

# The numbers below are those of cuda.h.
_NOT_FOUND = 500
# These errors mean that the driver cannot use an image, but perhaps another: invalid image, no
# binary for the device, no JIT compiler, and PTX or a cubin of a toolkit newer than the driver.
_UNUSABLE = {200, 209, 218, 220, 221, 222, 223}
_OUT_OF_RESOURCES = 701  # It is found at once; the other errors from 700 on may come late.
_STATIC_SHARED, _PTX_VERSION, _MAX_DYNAMIC_SHARED = 1, 5, 8  # CU_FUNC_ATTRIBUTE_*
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# CUlaunchConfig holds grid, block, shared bytes, stream, attributes and their number. The pointer
# kernelParams[0] is kept behind it.
_CONFIG = struct.Struct("@7IxxxxQQIxxxxQ")
_PARAMETERS_AT = 56


class _Function(NamedTuple):
    """A kernel that is loaded in a context."""

    handle: ctypes.c_void_p
    # The address of the launch attribute of dependent launches, 0 where the kernel has none.
    attributes: int
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
        cuda = library()
        self.get_context, self.launch = cuda.cuCtxGetCurrent, cuda.cuLaunchKernelEx
        self.buffer = ctypes.create_string_buffer(_CONFIG.size)
        start = ctypes.addressof(self.buffer)
        self.config = ctypes.c_void_p(start)
        self.parameters = ctypes.c_void_p(start + _PARAMETERS_AT)
        self.context = ctypes.c_void_p()
        self.context_out = ctypes.byref(self.context)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slot = _Slot()


_thread: _Thread | None = None  # The first launch makes it.
_lock = threading.RLock()
_modules: dict[tuple[str, int, int], ctypes.c_void_p] = {}  # by unit, device, context
_loaded: dict[tuple[str, int, int], _Function] = {}  # by kernel, device, context
# The same, of kernels that were launched: the size of their params has been checked.
_functions: dict[tuple[str, int, int | None], _Function] = {}
_usable: set[int] = set()  # devices on which nothing is missing
# One CUlaunchAttribute of 72 bytes: id, 4 bytes of padding, the value 1. It is only ever read.
_attribute = ctypes.create_string_buffer(struct.pack("@I4xi", _SERIALIZATION, 1), 72)


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda, as a CDLL, which lets go of the GIL: a launch waits while the queue is full.

    Raises: CudaError if there is none.
    """
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
    """The compute capability, (9, 0) for an H100.

    Raises: what torch raises if there is no such device; so do the functions below.
    """
    return _properties(device).major, _properties(device).minor


def multiprocessors(device: int) -> int:
    return _properties(device).multi_processor_count


def shared_limit(device: int) -> int:
    """Bytes of shared memory, static and dynamic, that one block may use."""
    return _properties(device).shared_memory_per_block_optin


def missing(device: int | None = None) -> str | None:
    """Why nothing can be launched on that device and what to do about it, or None.

    device: default torch's current one. Nothing is compiled, and a device without a fault is
    remembered. Whether the kernels know such a GPU at all is for the backend to say.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    try:
        library()
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
    *,
    device: int,
    stream: int,
    dependent: bool = False,
) -> None:
    """Queue kernel `name` on a stream of the device.

    The first launch loads the module, which graph capture does not allow: call `load` before.

    shared_bytes: dynamic shared memory of a block.
    params: the kernel's one argument; it is copied before this returns.
    stream: the handle of the stream.
    dependent: the kernel may start before its predecessor in the stream ends, and waits for it by
        itself; ignored on devices older than capability 9.0.

    Raises: CudaError if the driver refuses, or if params has not the size of the kernel's argument;
    and as `load` does.
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
            return launch(
                name,
                grid,
                block,
                shared_bytes,
                params,
                device=device,
                stream=stream,
                dependent=dependent,
            )
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
        size = f"grid {grid}, block {block} and {shared_bytes} bytes of shared memory"
        raise _error(code, f"kernel {name} with {size} was not launched on device {device}")


def load(name: str, device: int) -> None:
    """Make kernel `name` ready on the device; its first launch then compiles and reads nothing.

    Raises: CudaError if there is no such kernel or the driver takes none of its images,
    CompileError if NVRTC refuses the source, OSError if an image cannot be read.
    """
    with _current(device) as context:
        _function(name, device, context)


@contextlib.contextmanager
def _current(device: int) -> Iterator[int]:
    """The calling thread's context if it is of that device; else the primary one, which is torch's.

    A thread that had no context keeps the primary one. A context of another device is current
    again afterwards.
    """
    cuda, context, ordinal = library(), ctypes.c_void_p(), ctypes.c_int()
    refused = f"the context of device {device} was not made current"
    cuda.cuCtxGetCurrent(ctypes.byref(context))
    if context.value is None:
        primary = _primary(device)
        check(cuda.cuCtxSetCurrent(ctypes.c_void_p(primary)), refused)
        yield primary
        return
    check(cuda.cuCtxGetDevice(ctypes.byref(ordinal)), "the current context has no device")
    if ordinal.value == _ordinal(device):
        yield context.value
        return
    primary = _primary(device)
    check(cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(primary)), refused)
    try:
        yield primary
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))


@functools.cache
def _ordinal(device: int) -> int:
    found = ctypes.c_int()
    check(library().cuDeviceGet(ctypes.byref(found), device), f"device {device} is not there")
    return found.value


@functools.cache
def _primary(device: int) -> int:
    """The primary context, retained once per device and never released.

    torch holds it until the process ends anyway.
    """
    context = ctypes.c_void_p()
    _properties(device)  # This makes torch start CUDA if nobody has.
    what = f"device {device} has no context"
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), _ordinal(device)), what)
    if context.value is None:
        raise CudaError(what)
    return context.value


def _admit(name: str, device: int, context: int, shared_bytes: int, size: int) -> None:
    """Enter the kernel in `_functions`: its params are checked and shared memory is allowed to it.

    size: bytes of the params.
    """
    with _lock:
        function = _function(name, device, context)
        _check_params(name, function, size)
        if shared_bytes > _PLAIN_SHARED:
            limit = _allow_shared(name, function, device, shared_bytes)
            function = _loaded[name, device, context] = function._replace(limit=limit)
        _functions[name, device, context] = function


def _check_params(name: str, function: _Function, size: int) -> None:
    """Raises: CudaError if the kernel's argument has another size, where the driver can tell."""
    cuda = library()
    if not hasattr(cuda, "cuFuncGetParamInfo"):  # Drivers have it from CUDA 12.4 on.
        return
    first, offset, taken = ctypes.c_size_t(0), ctypes.c_size_t(), ctypes.c_size_t()
    code = cuda.cuFuncGetParamInfo(
        function.handle, first, ctypes.byref(offset), ctypes.byref(taken)
    )
    if not code and taken.value != size:
        raise CudaError(f"kernel {name} takes a struct of {taken.value} bytes, params has {size}")


def _allow_shared(name: str, function: _Function, device: int, shared_bytes: int) -> int:
    """Allow the kernel as much dynamic shared memory as the device has, and return how much.

    Raises: CudaError if that is less than shared_bytes.
    """
    cuda, static = library(), ctypes.c_int()
    code = cuda.cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, function.handle)
    check(code, f"kernel {name}: attributes")
    most = shared_limit(device) - static.value
    if shared_bytes > most:
        raise CudaError(
            f"kernel {name} asks for {shared_bytes} bytes of shared memory, "
            f"device {device} allows it {most}"
        )
    code = cuda.cuFuncSetAttribute(function.handle, _MAX_DYNAMIC_SHARED, most)
    refused = f"kernel {name} was not allowed {most} bytes of shared memory on device {device}"
    check(code, refused)
    return most


def _function(name: str, device: int, context: int) -> _Function:
    """The kernel, loaded with the first unit that has it.

    Raises: as `load`.
    """
    with _lock:
        if found := _loaded.get((name, device, context)):
            return found
        cuda, handle = library(), ctypes.c_void_p()
        units = images.kernel_units(capability(device))
        for unit in units:
            code = cuda.cuModuleGetFunction(
                ctypes.byref(handle), _module(unit, device, context), name.encode()
            )
            if code == _NOT_FOUND:
                continue
            check(code, f"kernel {name} was not found in the module {unit}")
            overlaps = _waits(handle) and _version() >= _OVERLAPS_SINCE
            attributes = ctypes.addressof(_attribute) if overlaps else 0
            return _loaded.setdefault(
                (name, device, context), _Function(handle, attributes, _PLAIN_SHARED)
            )
        number, known = ".".join(map(str, capability(device))), ", ".join(units) or "no sources"
        raise CudaError(f"there is no kernel {name} for capability {number} in csrc/cuda ({known})")


@functools.cache
def _version() -> int:
    """The newest CUDA that the driver knows, such as 13000 for 13.0."""
    version = ctypes.c_int()
    check(library().cuDriverGetVersion(ctypes.byref(version)), "the driver has no version")
    return version.value


def _waits(function: ctypes.c_void_p) -> bool:
    """Whether the kernel was compiled with its griddepcontrol.wait (PTX ISA, "griddepcontrol").

    A PTX of compute_80 has none, on whatever device it runs.
    """
    version = ctypes.c_int()
    check(
        library().cuFuncGetAttribute(ctypes.byref(version), _PTX_VERSION, function),
        "a kernel has no PTX version",
    )
    return version.value >= _DEPENDENT_SINCE


def _module(unit: str, device: int, context: int) -> ctypes.c_void_p:
    """The module of a unit's first image that the driver takes.

    Raises: CudaError with every refusal.
    """
    if found := _modules.get((unit, device, context)):
        return found
    module, refused = ctypes.c_void_p(), []
    for image in images.images(unit, capability(device), _toolkit()):
        code = library().cuModuleLoadData(ctypes.byref(module), image.data)
        if not code:
            return _modules.setdefault((unit, device, context), module)
        refused.append(f"{image.origin}: {_says(code)}")
        if code not in _UNUSABLE:
            break
    missing = images.missing(capability(device), _toolkit()) or "there is no image"
    raise CudaError(
        f"the kernels of {unit} were not loaded on device {device}, {_properties(device).name}: "
        + ("; ".join(refused) or missing)
    )


def _toolkit() -> str | None:
    """The major version of CUDA that torch was built with, such as "13"; None without CUDA."""
    return torch.version.cuda.split(".")[0] if torch.version.cuda else None


def _says(code: int) -> str:
    """An error's name and text, such as "CUDA_ERROR_INVALID_VALUE (invalid argument)"."""
    texts = []
    for ask in (library().cuGetErrorName, library().cuGetErrorString):
        text = ctypes.c_char_p()
        ask(code, ctypes.byref(text))
        texts.append((text.value or b"unknown").decode())
    return f"{texts[0]} ({texts[1]})"


def _error(code: int, what: str) -> CudaError:
    may_be_late = 700 <= code < 720 and code != _OUT_OF_RESOURCES
    hint = "; an earlier kernel may be the cause" if may_be_late else ""
    return CudaError(f"{what}: {_says(code)}{hint}")


def check(code: int, what: str) -> None:
    if code:
        raise _error(code, what)
