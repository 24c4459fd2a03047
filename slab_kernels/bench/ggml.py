"""llama.cpp's products of one linear, by the shared library of ggml in the package llama_cpp.

A weight goes where llama.cpp would put it: into a buffer that reorders it for this CPU where there
is one for its format, otherwise into a plain one. Only functions of ggml's public headers
(ggml.h, ggml-backend.h, ggml-cpu.h of 2026) are called, and no layout of a structure is assumed but
that of `ggml_init_params`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PeerError
from .clocks import Call
from .peer import Bind, Prepared

F32 = 0  # ggml_type of x and y
CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
NODES = 16  # tensors of one graph, more than enough
Pointer, Size, Text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p


class Kind(NamedTuple):
    """A format of ggml."""

    number: int  # ggml_type
    block: int  # inputs of which a row has a whole number
    group: int  # inputs that a scale covers


KINDS = {"q4_0": Kind(2, 32, 32), "q4_K": Kind(12, 256, 32), "q8_0": Kind(8, 32, 32)}


LogLine = ctypes.CFUNCTYPE(None, ctypes.c_int, Text, Pointer)
SILENCE = LogLine(lambda level, text, data: None)


class _Init(ctypes.Structure):
    _fields_ = (("size", Size), ("memory", Pointer), ("no_alloc", ctypes.c_bool))


# name -> what it returns, what it takes
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (LogLine, Pointer)),
    "ggml_init": (Pointer, (_Init,)),
    "ggml_free": (None, (Pointer,)),
    "ggml_tensor_overhead": (Size, ()),
    "ggml_graph_overhead": (Size, ()),
    "ggml_row_size": (Size, (ctypes.c_int, ctypes.c_int64)),
    "ggml_quantize_chunk": (
        Size,
        (ctypes.c_int, Pointer, Pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Pointer),
    ),
    "ggml_new_tensor_2d": (Pointer, (Pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
    "ggml_mul_mat": (Pointer, (Pointer, Pointer, Pointer)),
    "ggml_cast": (Pointer, (Pointer, Pointer, ctypes.c_int)),
    "ggml_new_graph": (Pointer, (Pointer,)),
    "ggml_build_forward_expand": (None, (Pointer, Pointer)),
    "ggml_backend_dev_by_type": (Pointer, (ctypes.c_int,)),
    "ggml_backend_dev_init": (Pointer, (Pointer, Text)),
    "ggml_backend_dev_backend_reg": (Pointer, (Pointer,)),
    "ggml_backend_dev_buffer_type": (Pointer, (Pointer,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (Pointer, Pointer)),
    "ggml_backend_reg_get_proc_address": (Pointer, (Pointer, Text)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, (Pointer, Pointer)),
    "ggml_backend_buffer_free": (None, (Pointer,)),
    "ggml_backend_free": (None, (Pointer,)),
    "ggml_backend_tensor_set": (None, (Pointer, Pointer, Size, Size)),
    "ggml_backend_tensor_get": (None, (Pointer, Pointer, Size, Size)),
    "ggml_backend_graph_compute": (ctypes.c_int, (Pointer, Pointer)),
}


def library_path() -> Path | None:
    """Where the package llama_cpp has ggml's shared library, which loads its parts."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec and spec.submodule_search_locations) or ():
        for name in ("libggml.so", "libggml.dylib", "ggml.dll"):
            if (path := Path(folder, "lib", name)).exists():
                return path
    return None


def missing() -> str | None:
    """Why ggml's products cannot be called here, or None."""
    if library_path() is None:
        return "the package 'llama_cpp' has no shared library of ggml in its folder lib"
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"ggml's library cannot be used: {error}"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    for name, (returned, taken) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    library.ggml_log_set(SILENCE, None)  # It says a line for every weight that it reorders.
    return library


class _Memory:
    """A context of ggml and the buffer of its tensors, which last as long as this object."""

    def __init__(self) -> None:
        self.ggml = _library()
        size = NODES * self.ggml.ggml_tensor_overhead() + self.ggml.ggml_graph_overhead()
        self.context = self.ggml.ggml_init(_Init(size, None, True))
        weakref.finalize(self, self.ggml.ggml_free, self.context)

    def tensor(self, kind: int, inputs: int, rows: int) -> int:
        return self.ggml.ggml_new_tensor_2d(self.context, kind, inputs, rows)

    def graph(self, result: int) -> int:
        """What computes the tensor `result`."""
        graph = self.ggml.ggml_new_graph(self.context)
        self.ggml.ggml_build_forward_expand(graph, result)
        return graph

    def fill(self, place: int) -> None:
        """Allocates all tensors so far in a buffer of that type."""
        buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, place)
        if not buffer:
            raise PeerError("ggml could not allocate a buffer")
        weakref.finalize(self, self.ggml.ggml_backend_buffer_free, buffer)


class _Cpu:
    """ggml's CPU backend with as many threads as torch has now."""

    def __init__(self) -> None:
        self.ggml = ggml = _library()
        self.device = ggml.ggml_backend_dev_by_type(CPU_DEVICE)
        self.backend = ggml.ggml_backend_dev_init(self.device, None)
        weakref.finalize(self, ggml.ggml_backend_free, self.backend)
        set_threads = self._function(
            b"ggml_backend_set_n_threads", ctypes.CFUNCTYPE(None, Pointer, ctypes.c_int)
        )
        set_threads(self.backend, torch.get_num_threads())
        self.plain = ggml.ggml_backend_dev_buffer_type(self.device)

    def _function(self, name: bytes, kind: Callable[[int], Any]) -> Any:
        registry = self.ggml.ggml_backend_dev_backend_reg(self.device)
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, name)
        if not address:
            raise PeerError(f"this ggml has no {name.decode()}")
        return kind(address)

    def places(self) -> list[int]:
        """Types of buffers that reorder weights, in llama.cpp's order, then the plain one."""
        many = self._function(
            b"ggml_backend_dev_get_extra_bufts",
            ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer),
        )(self.device)
        found: list[int] = []
        while many and many[len(found)]:
            found.append(many[len(found)])
        return [*found, self.plain]

    def compute(self, graph: int) -> None:
        if status := self.ggml.ggml_backend_graph_compute(self.backend, graph):
            raise PeerError(f"ggml computes nothing: status {status}")

    def put(self, tensor: int, numbers: Tensor) -> None:
        self.ggml.ggml_backend_tensor_set(tensor, numbers.data_ptr(), 0, numbers.nbytes)

    def got(self, tensor: int, rows: int, columns: int) -> Tensor:
        numbers = torch.empty(rows, columns)
        self.ggml.ggml_backend_tensor_get(tensor, numbers.data_ptr(), 0, numbers.nbytes)
        return numbers


def prepare(W: Tensor, kind: Kind) -> Prepared:
    """W [N, K] in a format of ggml. Raises: PeerError if ggml refuses something."""
    ggml, cpu, (N, K) = _library(), _Cpu(), W.shape
    numbers = W.float().contiguous()
    blocks = torch.empty(N * ggml.ggml_row_size(kind.number, K), dtype=torch.uint8)
    ggml.ggml_quantize_chunk(kind.number, numbers.data_ptr(), blocks.data_ptr(), 0, N, K, None)

    def another() -> Bind:
        memory, weight = _placed(cpu, kind, blocks, N, K)
        return functools.partial(_bind, cpu, memory, weight, N)

    dense = _dequantized(cpu, kind, blocks, N, K)
    return Prepared(another(), blocks.nbytes, dense, _Product.y, another)


def _placed(cpu: _Cpu, kind: Kind, blocks: Tensor, N: int, K: int) -> tuple[_Memory, int]:
    """The weight in the first place from which the product can be computed."""
    for place in cpu.places():
        memory, around = _Memory(), _Memory()
        weight = memory.tensor(kind.number, K, N)
        memory.fill(place)
        product = cpu.ggml.ggml_mul_mat(around.context, weight, around.tensor(F32, K, 1))
        if cpu.ggml.ggml_backend_dev_supports_op(cpu.device, product):
            cpu.put(weight, blocks)
            return memory, weight
    raise PeerError("ggml has no product for this format")


def _bind(cpu: _Cpu, memory: _Memory, weight: int, N: int, x: Tensor) -> Call:
    M, K = x.shape
    around = _Memory()
    given = around.tensor(F32, K, M)
    result = cpu.ggml.ggml_mul_mat(around.context, weight, given)
    graph = around.graph(result)
    around.fill(cpu.plain)
    cpu.put(given, x.contiguous())

    return _Product(cpu, (memory, around), graph, result, (M, N))


@dataclass(frozen=True)
class _Product:
    """The call that is timed. It returns itself, since y lasts no longer than its memory."""

    cpu: _Cpu
    held: tuple[_Memory, _Memory]
    graph: int
    tensor: int  # y
    shape: tuple[int, int]

    def __call__(self) -> _Product:
        self.cpu.compute(self.graph)
        return self

    def y(self) -> Tensor:
        return self.cpu.got(self.tensor, *self.shape)


def _dequantized(cpu: _Cpu, kind: Kind, blocks: Tensor, N: int, K: int) -> Tensor:
    """The dense weight [N, K] by ggml's own conversion."""
    memory = _Memory()
    weight = memory.tensor(kind.number, K, N)
    dense = cpu.ggml.ggml_cast(memory.context, weight, F32)
    graph = memory.graph(dense)
    memory.fill(cpu.plain)
    cpu.put(weight, blocks)
    cpu.compute(graph)
    return cpu.got(dense, N, K)
