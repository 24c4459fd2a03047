"""Small PTX programs around a body, for the interpreter's own tests."""

import struct

import numpy as np

from ptx import Memory, Module, launch

WIDTHS = {2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%d", "b64")}
REGISTERS = (
    ".reg .b16 %h<20>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>; .reg .pred %p<10>;"
)


def program(body, parameters="", shared="", directives=""):
    head = (
        f".version 8.0\n.target sm_90\n.address_size 64\n{shared}\n"
        f".visible .entry k({parameters}) {directives}"
    )
    return f"{head}\n{{\n{REGISTERS}\n{body}\nret;\n}}"


def run(
    body,
    *arrays,
    block=32,
    grid=1,
    shared="",
    shared_bytes=0,
    read_only=(),
    early=(),
    directives="",
    **options,
):
    """Run a kernel whose parameters p0, p1, ... are the arrays' addresses, loaded into %d10, %d11,
    ...; `read_only` and `early` name arrays by their numbers.
    """
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(arrays)))
    head = "\n".join(f"ld.param.u64 %d{10 + k}, [p{k}];" for k in range(len(arrays)))
    body = "mov.u32 %r30, %tid.x;\n" + head + "\n" + body
    module = Module(program(body, parameters, shared, directives))
    memory = Memory()
    for k, a in enumerate(arrays):
        data = a.reshape(-1).view(np.uint8)
        memory.map(a.ctypes.data, data, writable=k not in read_only, early=k in early)
    buffer = struct.pack(f"<{len(arrays)}Q", *(a.ctypes.data for a in arrays))
    grid = grid if isinstance(grid, tuple) else (grid,)
    return launch(module["k"], grid, (block,), buffer, memory, shared_bytes, **options)


def evaluate(code, *inputs, out=np.uint32):
    """Each thread's inputs are in %h0/%r0/%d0, ... by their width; the code leaves its result in
    register 9 of out's width.
    """
    inputs = [np.atleast_1d(np.asarray(a)) for a in inputs]
    n = max(a.size for a in inputs)
    inputs = [np.ascontiguousarray(np.resize(a, n)) for a in inputs]
    result = np.zeros(n, out)
    lines = []
    for k, a in enumerate([result, *inputs]):
        prefix, ty = WIDTHS[a.dtype.itemsize]
        lines.append(f"mad.wide.u32 %d{10 + k}, %r30, {a.dtype.itemsize}, %d{10 + k};")
        if k:
            lines.append(f"ld.global.{ty} {prefix}{k - 1}, [%d{10 + k}];")
    prefix, ty = WIDTHS[result.dtype.itemsize]
    run("\n".join(lines) + f"\n{code}\nst.global.{ty} [%d10], {prefix}9;", result, *inputs, block=n)
    return result


def u32(*values):
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def u16(*values):
    return np.array(values, np.uint16)


def f32(*values):
    return np.array(values, np.float32)


def bf16_exact(x):
    """f64 to bf16 bits, nearest even, by brute force over the neighbours."""
    candidates = np.arange(0x7F80, dtype=np.uint32)
    values = (candidates << 16).view(np.float32).astype(np.float64)
    distance = np.abs(values - abs(x))
    best = candidates[distance == distance.min()]
    return int(best[best % 2 == 0][0] if len(best) == 2 else best[0]) | (
        0x8000 if np.signbit(x) else 0
    )
