"""Triton kernels without a GPU: compiled ahead of time, and the PTX that Triton emits for them,
interpreted.

`compile_kernel` and `run` are the two halves; `Emulated(kernel)[grid](...)` is called as the
kernel itself would be and chooses the signature as Triton's launcher does.
"""

from __future__ import annotations

import functools
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from emulation import span
from ptx import Memory, Module, launch
from sass.counter import listing
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = (
    Path(triton.__file__).parent / "backends/nvidia/bin"
)  # in the wheel, of the CUDA release of its ptxas
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.bool: "*i1", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8", torch.uint16: "*u16", torch.uint32: "*u32", torch.uint64: "*u64",
}  # fmt: skip
SCALARS = {"i1": "?", "u1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i",
           "u32": "I",
           "i64": "q", "u64": "Q",
           "fp32": "f", "fp64": "d"}  # fmt: skip
APART = (
    1 << 40
)  # between the addresses of two tensors: no access beside one of them falls into another


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture, and what it needs of an SM."""

    name: str
    ptx: str
    cubin: bytes
    signature: dict[str, str]  # the launch arguments in order: those that are not constants
    divisible: frozenset[str]  # arguments that were promised to be multiples of 16
    arch: int
    warps: int
    shared_bytes: int  # dynamic: all that Triton's kernels have
    registers: int
    stack: int  # bytes of a thread's stack; spilled registers live there
    local: int

    @functools.cached_property
    def kernel(self):
        return Module(self.ptx)[self.name]

    @functools.cached_property
    def sass(self) -> str:
        """The machine code, as `nvdisasm -c` writes it."""
        return listing(str(TOOLS / "nvdisasm"), "-c", self.cubin)


def compile_kernel(
    fn,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int = 80,
    warps: int = 4,
    stages: int = 3,
    divisible: Iterable[str] = (),
) -> Compiled:
    """Compile a @triton.jit function for sm_`arch`, once a process.

    Every parameter is in `signature` ("*fp16", "*u32", "i32", ...) or in `constants`:
    constexprs, absent pointers (None), and the integers that are 1, which Triton's launcher
    makes constants as well. `divisible`: arguments that are multiples of 16, which that launcher
    finds out too; wide loads and cp.async depend on it. Raises: RuntimeError where
    TRITON_INTERPRET=1 has replaced the compiler, ValueError for parameters given twice or never.
    """
    if triton.knobs.runtime.interpret or not isinstance(fn, triton.JITFunction):
        raise RuntimeError(
            f"{fn!r} cannot be compiled: it needs @triton.jit, imported without TRITON_INTERPRET=1"
        )
    given = [*signature, *constants]
    if sorted(given) != sorted(fn.arg_names):
        odd = sorted({n for n in given if given.count(n) > 1} | set(given) ^ set(fn.arg_names))
        raise ValueError(
            f"{fn.__name__}: in neither or both of signature and constants, or unknown: "
            f"{', '.join(odd)}"
        )
    divisible = frozenset(divisible)
    if not divisible <= set(signature):
        raise ValueError(
            f"{fn.__name__}: divisible, but no argument: "
            f"{', '.join(sorted(divisible - set(signature)))}"
        )
    ordered = tuple((n, signature[n]) for n in fn.arg_names if n in signature)
    return _compile(fn, ordered, tuple(sorted(constants.items())), arch, warps, stages, divisible)


@functools.cache
def _compile(fn, signature, constants, arch, warps, stages, divisible) -> Compiled:
    types = dict.fromkeys(fn.arg_names, "constexpr") | dict(signature)
    attributes = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in sorted(divisible)}
    source = ASTSource(fn=fn, signature=types, constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    meta = made.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise NotImplementedError(f"{meta.name} wants scratch memory")
    usage = listing(str(TOOLS / "cuobjdump"), "--dump-resource-usage", made.asm["cubin"])
    found = re.search(rf"Function {meta.name}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found.groups())
    return Compiled(
        meta.name,
        made.asm["ptx"],
        made.asm["cubin"],
        dict(signature),
        divisible,
        arch,
        meta.num_warps,
        meta.shared,
        registers,
        stack,
        local,
    )


def run(
    compiled: Compiled,
    grid: tuple[int, ...],
    arguments: Mapping[str, torch.Tensor | int | float],
    outputs: Iterable[str],
    **options,
) -> Counter[str]:
    """Execute a grid on CPU tensors; `outputs` names the tensors that may be written. Returns
    `ptx.launch`'s counts.

    Nothing outside a tensor's first to last element can be touched, and nothing beside it is
    mapped: every tensor has addresses of its own, with the alignment of its real one modulo
    4096. Outputs keep their contents, so fill them with NaN first. Triton's last two pointers,
    scratch memory that no kernel here asks for, are null. `options` are `ptx.launch`'s:
    check_races, equal_writes, chunk. Raises: ptx.PtxError for any fault; ValueError for
    arguments that the kernel was not compiled for.
    """
    outputs = set(outputs)
    if arguments.keys() != compiled.signature.keys() or not outputs <= arguments.keys():
        raise ValueError(
            f"{compiled.name} takes {', '.join(compiled.signature)}; given {', '.join(arguments)}"
        )
    kernel, memory = compiled.kernel, Memory()
    if len(kernel.parameters) != len(compiled.signature) + 2:
        raise NotImplementedError(
            f"{compiled.name}'s entry takes {len(kernel.parameters)} parameters, not its arguments "
            "and 2"
        )
    buffer = bytearray(kernel.parameter_bytes)
    # The entry's parameters are the launch arguments in order, then the scratch pointers, which
    # stay null.
    for k, ((name, type_), offset) in enumerate(
        zip(compiled.signature.items(), kernel.parameters.values(), strict=False)
    ):
        value = arguments[name]
        if type_[0] == "*":
            if not isinstance(value, torch.Tensor) or POINTERS.get(value.dtype) != type_:
                raise ValueError(f"{name} is not a tensor of {type_}")
            address = (k + 1) * APART + value.data_ptr() % 4096
            memory.map(address, span(value), writable=name in outputs)
            value, format_ = address, "Q"
        else:
            if isinstance(value, torch.Tensor):
                raise ValueError(f"{name} is a tensor, not an {type_}")
            format_ = SCALARS[type_]
        if name in compiled.divisible and value % 16:
            raise ValueError(f"{name} is not a multiple of 16, as {compiled.name} was promised")
        try:
            struct.pack_into(f"<{format_}", buffer, offset, value)
        except struct.error as error:
            raise ValueError(f"{name} = {value!r}: {error}") from None
    # Where a tile is too small for all warps, Triton lets several hold the same part of it and
    # store it twice: allowed if the bytes are the same (ptx/races.py).
    options = {"equal_writes": True} | options
    return launch(
        kernel, grid, (32 * compiled.warps,), buffer, memory, compiled.shared_bytes, **options
    )


class Emulated:
    """Stands where a @triton.jit function stood: `Emulated(fn, ("y_ptr",))[grid](*args,
    num_warps=4)` on CPU tensors.

    With execute=False launches are compiled and recorded only.
    """

    def __init__(self, fn, outputs: Iterable[str], arch: int = 80, execute: bool = True, **options):
        self.fn, self.outputs, self.arch, self.execute, self.options = (
            fn,
            tuple(outputs),
            arch,
            execute,
            options,
        )
        self.launched: list[tuple[Compiled, tuple[int, ...], Counter[str]]] = []

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(
        self, grid, *args, num_warps: int = 4, num_stages: int = 3, launch_pdl=False, **kwargs
    ):
        named = dict(zip(self.fn.arg_names, args, strict=False)) | kwargs
        constexprs = {p.name for p in self.fn.params if p.is_constexpr}
        open_ = {p.name for p in self.fn.params if p.do_not_specialize}
        signature, constants, divisible = {}, {}, []
        for name, value in named.items():
            if (
                name in constexprs
                or value is None
                or (type(value) is int and value == 1 and name not in open_)
            ):
                constants[name] = value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = POINTERS[value.dtype], value.data_ptr()
            elif isinstance(value, bool | float):
                signature[name], number = "u1" if isinstance(value, bool) else "fp32", 1
            else:
                signature[name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
            if number % 16 == 0 and name not in open_:
                divisible.append(name)
        compiled = compile_kernel(
            self.fn, signature, constants, self.arch, num_warps, num_stages, divisible
        )
        arguments = {name: named[name] for name in signature}
        outputs = [name for name in self.outputs if name in signature]
        counts = (
            run(compiled, grid, arguments, outputs, **self.options) if self.execute else Counter()
        )
        self.launched.append((compiled, grid, counts))
