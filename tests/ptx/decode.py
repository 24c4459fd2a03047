"""Operands of one instruction, and the table of decoders (PTX ISA 6 "Instruction Operands", 9.7
"Instructions").

Every instruction is decoded once into a closure `run(m, act)`: `m` is the machine (`m.R` is its
list of registers, each a numpy array with one lane per thread) and `act` is the mask of executing
lanes, or None when that is all of them. A register's array is replaced by a write and never changed
in place, so two registers may share one array and a cache may compare by identity."""

from typing import NamedTuple

import numpy as np


class PtxError(RuntimeError):
    """Any fault found in a PTX program.

    `lane` is the index of the first offending lane inside the running chunk, if known.
    """

    def __init__(self, message, lane=None):
        super().__init__(message)
        self.lane = lane


class Reg(NamedTuple):
    slot: int
    width: int  # bytes; 0 is a predicate
    negated: bool = False


class Imm(NamedTuple):
    bits: int


class Symbol(NamedTuple):
    name: str
    space: str
    address: int


class Address(NamedTuple):
    base: Reg | Symbol | None
    offset: int


class TileOperand(NamedTuple):
    """[map, {column, row}]"""

    map: Address
    coordinates: tuple


class Pair(NamedTuple):
    """d|p"""

    first: Reg | None
    second: Reg | None


UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
SIGNED = {1: np.dtype("i1"), 2: np.dtype("i2"), 4: np.dtype("i4"), 8: np.dtype("i8")}
# bf16 and the packed pairs stay bit patterns here; floats.py gives them their value.
DTYPE = {
    f"{kind}{8 * w}": (SIGNED if kind == "s" else UNSIGNED)[w]
    for kind in "bus"
    for w in (1, 2, 4, 8)
}
DTYPE |= {
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),
}
DTYPE |= {"f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "pred": np.dtype(bool)}

# Generic addresses carry their state space in the top bits; global ones are the process's own
# addresses (below 2^47), and the low 32 bits are the offset, so that cvt.u32.u64 of a generic
# shared address is the shared address, as nvcc relies on.
WINDOW = {"global": 0, "const": 0, "shared": 1 << 60, "local": 2 << 60, "param": 3 << 60}

DECODERS = {}


def opcode(*names):
    """Register a decoder `decode(instruction) -> run(m, act)` for these base opcodes."""

    def register(decode):
        DECODERS.update(dict.fromkeys(names, decode))
        return decode

    return register


def source(operand, ty):
    """A function of the machine giving the operand as an array (or numpy scalar) of the type's
    dtype.
    """
    dtype = DTYPE[ty]
    if isinstance(operand, Reg):
        slot, width = operand.slot, operand.width
        if width == 0:
            return (lambda m: ~m.R[slot]) if operand.negated else (lambda m: m.R[slot])
        unsigned = UNSIGNED[dtype.itemsize]
        if width != dtype.itemsize:
            return lambda m: m.R[slot].astype(unsigned).view(dtype)
        return (lambda m: m.R[slot]) if dtype == unsigned else (lambda m: m.R[slot].view(dtype))
    if not isinstance(operand, Imm | Symbol):
        raise PtxError(f"operand {operand!r} cannot be read as .{ty}")
    bits = operand.bits if isinstance(operand, Imm) else operand.address
    if dtype.kind == "b":
        value = np.bool_(bits)
    else:
        value = np.array(bits & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]).view(
            dtype
        )[()]
    return lambda m: value


def array(operand, ty):
    """Like source, but always a full array."""
    get = source(operand, ty)
    if isinstance(operand, Reg):
        return get
    return lambda m: np.full(m.n, get(m))


def destination(operand, ty):
    """A function put(m, act, value) writing a register; a wider register gets the value extended
    (ISA 9.4.1).
    """
    if operand is None:  # "_", the sink
        return lambda m, act, v: None
    if not isinstance(operand, Reg):
        raise PtxError(f"destination {operand!r} is not a register")
    slot, width = operand.slot, operand.width
    if width == 0:

        def put(m, act, v):
            if v.ndim == 0:
                v = np.full(m.n, v)
            m.R[slot] = v if act is None else np.where(act, v, m.R[slot])

        return put
    raw, wide = UNSIGNED[width], None
    if width != DTYPE[ty].itemsize:
        wide = (SIGNED if ty[0] == "s" else UNSIGNED)[width]

    def put(m, act, v):
        if wide is not None:
            v = v.astype(wide)
        v = v.view(raw)
        if v.ndim == 0:
            v = np.full(m.n, v)
        m.R[slot] = v if act is None else np.where(act, v, m.R[slot])

    return put


def address(operand):
    """A function of the machine giving the byte address of every lane as int64."""
    if not isinstance(operand, Address):
        raise PtxError(f"operand {operand!r} is not an address")
    base, offset = operand
    if isinstance(base, Reg):
        slot = base.slot
        if base.width == 8:
            return lambda m: (
                m.R[slot].view(np.int64) + offset if offset else m.R[slot].view(np.int64)
            )
        return lambda m: m.R[slot].astype(np.int64) + offset
    constant = offset + (base.address if base else 0)
    return lambda m: np.full(m.n, constant, np.int64)


def lanes_of(m, act):
    """Indices of the executing lanes."""
    return m.lanes if act is None else np.flatnonzero(act)


def whole_warps(m, act, what):
    """Refuse a warp-wide (.aligned) instruction that only part of a warp executes.

    Returns None, or the mask of executing warps.
    """
    if act is None:
        return None
    rows = act.reshape(-1, 32)
    some = rows.any(1)
    part = some & ~rows.all(1)
    if part.any():
        warp = int(np.flatnonzero(part)[0])
        raise PtxError(
            f"{what} executed by a partial warp", warp * 32 + int(np.flatnonzero(~rows[warp])[0])
        )
    return some
