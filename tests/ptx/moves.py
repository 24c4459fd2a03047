"""Moves, address conversion, selection and comparison (PTX ISA 9.7.5, 9.7.6, 9.7.9)."""

import numpy as np

from .decode import DTYPE, UNSIGNED, WINDOW, Pair, PtxError, Symbol, destination, opcode, source
from .integers import simple


@opcode("mov")
def move(i):
    """Registers, constants, addresses of variables, packing and unpacking of vectors (ISA 9.7.9.3,
    9.7.9.4)."""
    to, of = i.operands
    ty = i.type
    if isinstance(of, list):
        width = DTYPE[ty].itemsize // len(of)
        part, whole = f"b{8 * width}", UNSIGNED[DTYPE[ty].itemsize]
        put, sources = destination(to, ty), [source(o, part) for o in of]

        def pack(m, act):
            value = sources[0](m).astype(whole)
            for k, s in enumerate(sources[1:], 1):
                value = value | s(m).astype(whole) << whole.type(8 * width * k)
            put(m, act, value)

        return pack
    if isinstance(to, list):
        width = DTYPE[ty].itemsize // len(to)
        raw = UNSIGNED[width]
        get = source(of, f"b{8 * DTYPE[ty].itemsize}")
        puts = [destination(o, f"b{8 * width}") for o in to]

        def unpack(m, act):
            value = get(m)
            for k, put in enumerate(puts):
                put(m, act, (value >> value.dtype.type(8 * width * k)).astype(raw))

        return unpack
    return simple(i, lambda a: a)


@opcode("cvta")
def convert_address(i):
    """Between a state space and generic addresses (ISA 9.7.9.21)."""
    to = "to" in i.parts
    space = i.parts[2 if to else 1]
    window = WINDOW[space]
    if not to and isinstance(i.operands[1], Symbol):
        window = WINDOW[i.operands[1].space]
    dtype = DTYPE[i.type]
    if dtype.itemsize == 4:
        return simple(i, lambda a: a)  # 32-bit addresses are shared-memory offsets either way
    delta = dtype.type(window)
    return simple(i, (lambda a: a - delta) if to else (lambda a: a + delta))


@opcode("isspacep")
def is_space(i):
    window = WINDOW[i.parts[1]] >> 60
    return simple(i, lambda a: a >> np.uint64(60) == np.uint64(window), ["pred", "u64"])


@opcode("selp")
def select(i):
    return simple(i, lambda a, b, p: np.where(p, a, b), [i.type] * 3 + ["pred"])


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name, value_of=None):
    """The comparison of ISA 9.7.5;

    `value_of` turns bit patterns into floats. An ordered one is false if an operand is NaN.
    """

    def compare(a, b):
        if value_of is None:
            return _COMPARE[name](a, b)
        a, b = value_of(a), value_of(b)
        nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return ~nan if name == "num" else nan
        if name[-1] == "u":
            return _COMPARE[name[:-1]](a, b) | nan
        return _COMPARE[name](a, b) & ~nan

    return compare


def compare_into(i, compare):
    """setp.cmp{.bool}.type p{|q}, a, b{, c}: p = bool(a cmp b, c), q = bool(!(a cmp b), c)."""
    boolean = next((_BOOLEAN[p] for p in i.parts[2:-1] if p in _BOOLEAN), None)
    targets = i.operands[0] if isinstance(i.operands[0], Pair) else (i.operands[0],)
    puts = [destination(o, "pred") for o in targets]
    a, b = (source(o, i.type) for o in i.operands[1:3])
    c = source(i.operands[3], "pred") if boolean else None
    if boolean is None and len(i.operands) > 3:
        raise PtxError("setp with a third source needs .and, .or or .xor")

    def run(m, act):
        value = compare(a(m), b(m))
        third = c(m) if boolean else None
        for put, v in zip(puts, (value, ~value), strict=False):
            put(m, act, boolean(v, third) if boolean else v)

    return run


def integer_setp(i):
    return compare_into(i, comparison(i.parts[1]))
