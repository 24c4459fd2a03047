"""Floating-point values, conversions and arithmetic (PTX ISA 9.7.3 to 9.7.5, 9.7.9.22 "cvt").

Every result is rounded once: f16 and bf16 are computed in f32, where a sum, product or quotient of
two 11-bit significands rounds innocuously (24 >= 2*11 + 2), and fma in f64 with the sum rounded to
odd before the final rounding. NaN results of 16-bit types are canonical (0x7FFF); f32 and f64 NaNs
keep numpy's payload. The .approx functions are numpy's, more exact than the hardware's."""

import numpy as np

from . import integers, moves
from .decode import DTYPE, SIGNED, UNSIGNED, Pair, PtxError, array, destination, opcode, source

FLOAT = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


def value(bits, ty):
    """The floats held by bit patterns: f16 and bf16 as f32; a packed pair becomes two consecutive
    elements."""
    if ty in ("f32", "f64"):
        return bits.view(DTYPE[ty])
    halves = np.atleast_1d(bits).view(np.uint16)
    if ty.startswith("f16"):
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_odd(x):
    """f64 to f32, rounded to odd: inexact results have their last bit set, so a later rounding is
    the only one.
    """
    y = x.astype(np.float32)
    back = y.astype(np.float64)
    inexact = (back != x) & ~np.isnan(x)
    bits = y.view(np.uint32)
    bits = np.where(inexact & (np.abs(back) > np.abs(x)), bits - np.uint32(1), bits)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)


def bits_of(x, ty):
    """Round f32 or f64 values to the type (nearest even): the inverse of value()."""
    if ty in ("f32", "f64"):
        return x.astype(DTYPE[ty])
    x = np.atleast_1d(x)
    if ty.startswith("f16"):
        halves = x.astype(np.float16).view(np.uint16)
    else:
        b = (_to_odd(x) if x.dtype == np.float64 else x).view(np.uint32)
        halves = (
            (b + np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        ).astype(np.uint16)
    nan = np.isnan(x)
    if nan.any():
        halves = np.where(nan, np.uint16(0x7FFF), halves)
    return halves.view(np.uint32) if ty.endswith("x2") else halves


def fma(a, b, c):
    """a*b + c in f64, rounded to odd; the product of two f32 is exact there."""
    a, b, c = (v.astype(np.float64) for v in (a, b, c))
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (
        c - part
    )  # Knuth's TwoSum: total + error is the exact sum
    nudge = (
        (error != 0)
        & np.isfinite(total)
        & (np.atleast_1d(total).view(np.uint64) & np.uint64(1) == 0)
    )
    return np.where(nudge, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _flush(x):
    """.ftz: subnormal f32 values become zeros of the same sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def _relu(x):
    """.relu: negative results become +0; NaN stays."""
    return np.where((x > 0) | np.isnan(x), x, x.dtype.type(0))


def operation(i, function, sources=None):
    """An instruction that is a function of floats of one type."""
    ty = i.type
    ftz = "ftz" in i.parts and ty == "f32"
    put = destination(i.operands[0], ty)
    gets = [(array if ty.endswith("x2") else source)(o, ty) for o in i.operands[1:]]
    relu, sat = "relu" in i.parts, "sat" in i.parts

    def run(m, act):
        x = [value(g(m), ty) for g in gets]
        result = function(*(map(_flush, x) if ftz else x))
        if relu:
            result = _relu(result)
        if sat:
            result = np.clip(np.nan_to_num(result), 0, 1)
        result = bits_of(result, ty)
        put(m, act, _flush(result) if ftz else result)

    return run


_ROUNDINGS = {"rz", "rm", "rp"}


def _both(name, integer, function):
    """Register an opcode that exists for integers and floats."""

    @opcode(name)
    def decode(i):
        if i.type not in FLOAT:
            return integer(i)
        if _ROUNDINGS & set(i.parts):
            raise PtxError(f"rounding mode of {'.'.join(i.parts)} is not implemented")
        return operation(i, function)


def _signed_min(a, b):
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))  # -0 < +0 (ISA 9.7.3.11)


def _signed_max(a, b):
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


_both("add", integers.pair, np.add)
_both("sub", integers.pair, np.subtract)
_both("mul", integers.multiply, np.multiply)
_both("mad", integers.multiply, fma)
_both("div", integers.divide, np.divide)


@opcode("rem")
def remainder(i):
    return integers.divide(i)


@opcode("min", "max")
def extreme(i):
    if i.type not in FLOAT:
        return integers.pair(i)
    low = i.parts[0] == "min"
    if "NaN" in i.parts:
        return operation(i, np.minimum if low else np.maximum)
    return operation(i, _signed_min if low else _signed_max)


@opcode("fma")
def fused(i):
    if _ROUNDINGS & set(i.parts):
        raise PtxError("only fma.rn is implemented")
    return operation(i, fma)


def _sign_bits(i, integer, function):
    """abs and neg of floats act on the sign bit alone."""
    if i.type not in FLOAT:
        return integer(i)
    width = DTYPE[i.type].itemsize
    sign = UNSIGNED[width].type(
        {"f16x2": 0x80008000, "bf16x2": 0x80008000}.get(i.type, 1 << 8 * width - 1)
    )
    return integers.simple(i, lambda a: function(a, sign), [f"b{8 * width}"] * 2)


@opcode("abs")
def absolute(i):
    return _sign_bits(i, integers.absolute, lambda a, sign: a & ~sign)


@opcode("neg")
def negate(i):
    return _sign_bits(i, integers.negate, lambda a, sign: a ^ sign)


@opcode("copysign")
def copysign(i):
    return operation(i, lambda a, b: np.copysign(b, a))


_FUNCTIONS = {
    "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@opcode(*_FUNCTIONS)
def function_of_one(i):
    return operation(i, _FUNCTIONS[i.parts[0]])


@opcode("setp")
def setp(i):
    if i.type not in FLOAT:
        return moves.integer_setp(i)
    if i.type.endswith("x2"):
        p = i.operands[0]
        if not isinstance(p, Pair) or len(i.operands) > 3:
            raise PtxError("setp of a packed type needs p|q and no third source")
        compare = moves.comparison(i.parts[1], lambda bits: value(bits, i.type).reshape(-1, 2))
        puts, (a, b) = (
            [destination(o, "pred") for o in p],
            [array(o, i.type) for o in i.operands[1:]],
        )

        def run(m, act):
            both = compare(a(m), b(m))
            for k in (0, 1):
                puts[k](m, act, np.ascontiguousarray(both[:, k]))

        return run
    return moves.compare_into(i, moves.comparison(i.parts[1], lambda bits: value(bits, i.type)))


@opcode("testp")
def testp(i):
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
    }[i.parts[1]]
    return integers.simple(i, lambda a: test(a), ["pred", i.type])


_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(x, rounding, dtype):
    """Saturating float to integer.

    NaN gives 0 (ISA 9.7.9.22), except that hardware gives 0x8000... for 64 bits.
    """
    info = np.iinfo(dtype)
    x = rounding(np.atleast_1d(x).astype(np.float64))
    inside = (x > float(info.min)) & (x < float(info.max))
    out = np.where(inside, x, 0.0).astype(dtype)
    out = np.where(~inside & (x > 0), dtype.type(info.max), out)
    return np.where(~inside & (x < 0), dtype.type(info.min), out)


def _truncated(x, ty):
    """Round towards zero (.rz) to f16, bf16 or f32."""
    if ty == "bf16":
        x = x.astype(np.float32) if x.dtype != np.float64 else _to_odd(x)
        return np.where(
            np.isnan(x), np.uint16(0x7FFF), (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        )
    raw = UNSIGNED[DTYPE[ty].itemsize]
    near = bits_of(x, ty)
    over = np.abs(near.view(DTYPE[ty]).astype(np.float64)) > np.abs(x)
    return np.where(over, near.view(raw) - raw.type(1), near.view(raw)).view(near.dtype)


def _to_tf32(bits):
    """cvt.rna: to nearest, ties away from zero. The ISA leaves tf32's layout open; this is what
    ptxas makes of it for sm_80 and sm_90: 0x1000 added to finite numbers, then the lower 13 bits of
    anything cleared."""
    finite = bits & np.uint32(0x7F800000) != np.uint32(0x7F800000)
    return np.where(finite, bits + np.uint32(0x1000), bits) & np.uint32(0xFFFFE000)


@opcode("cvt")
def convert(i):
    """cvt between integers, floats and packed pairs (the first source is the upper half)."""
    to, of = i.parts[-2:]
    flags = set(i.parts[1:-2])
    if (to, of, flags) == ("tf32", "f32", {"rna"}):
        return integers.simple(i, _to_tf32, ["b32", "b32"])
    unknown = flags - {"rn", "rz", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu"}
    if unknown or (to not in DTYPE) or (of not in DTYPE):
        raise PtxError(
            f"cvt with {', '.join(sorted(unknown)) or to + ' from ' + of} is not implemented"
        )
    put = destination(i.operands[0], to)
    gets = [source(o, of) for o in i.operands[1:]]
    relu, sat, ftz = "relu" in flags, "sat" in flags, "ftz" in flags
    integral = next((_INTEGRAL[f] for f in flags if f in _INTEGRAL), None)
    rounded = _truncated if "rz" in flags else bits_of

    def narrow(x, ty):
        if relu:
            x = _relu(x)
        if sat:
            x = np.clip(np.nan_to_num(x), 0, 1)
        return rounded(x, ty)

    if to.endswith("x2"):
        if len(gets) != 2:
            raise PtxError("cvt to a packed type takes two sources")
        one = to[:-2]

        def pack(m, act):
            high, low = (
                narrow(value(np.atleast_1d(g(m)), of), one).astype(np.uint32) for g in gets
            )
            put(m, act, high << np.uint32(16) | low)

        return pack
    (get,) = gets
    if to in FLOAT:
        if of in FLOAT:

            def run(m, act):
                x = value(get(m), of)
                x = _flush(x) if ftz and of == "f32" else x
                put(m, act, narrow(integral(x) if integral else x, to))

        else:
            # An integer of up to 32 bits is exact in f64; larger ones go straight to the target to
            # be rounded once.
            wide = DTYPE[to] if of[1:] == "64" and to in ("f32", "f64") else np.float64

            def run(m, act):
                put(m, act, narrow(get(m).astype(wide), to))

        return run
    dtype = DTYPE[to]
    if of in FLOAT:

        def whole(m, act):
            x = value(get(m), of)
            put(
                m,
                act,
                _to_integer(_flush(x) if ftz and of == "f32" else x, integral or np.trunc, dtype),
            )

        return whole
    if sat:
        info = np.iinfo(dtype)

        def clamp(m, act):
            x = get(m)
            own = np.iinfo(x.dtype)
            x = np.clip(
                x, x.dtype.type(max(info.min, own.min)), x.dtype.type(min(info.max, own.max))
            )
            put(m, act, x.astype(dtype))

        return clamp
    # The source is extended by its own sign, then cut or reinterpreted.
    extended = (SIGNED if of[0] == "s" else UNSIGNED)[dtype.itemsize]
    return lambda m, act: put(m, act, get(m).astype(extended).view(dtype))
