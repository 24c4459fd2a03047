"""Integer, logic, shift and bit-field instructions (PTX ISA 9.7.1, 9.7.2, 9.7.8)."""

import numpy as np

from .decode import DTYPE, SIGNED, UNSIGNED, Imm, destination, opcode, source

_PAIRS = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def simple(i, function, types=None):
    """An instruction that is one numpy function of its sources, all of the instruction's type
    unless told otherwise.
    """
    types = types or [i.type] * len(i.operands)
    put = destination(i.operands[0], types[0])
    sources = [source(o, t) for o, t in zip(i.operands[1:], types[1:], strict=True)]
    if len(sources) == 2:
        a, b = sources
        return lambda m, act: put(m, act, function(a(m), b(m)))
    return lambda m, act: put(m, act, function(*[s(m) for s in sources]))


def pair(i):
    """add, sub, min, max of integers."""
    return simple(i, _PAIRS[i.parts[0]])


@opcode("and", "or", "xor")
def logic(i):
    return simple(i, _LOGIC[i.parts[0]])


@opcode("not")
def invert(i):
    return simple(i, np.invert)


@opcode("cnot")
def cnot(i):
    return simple(i, lambda a: (a == 0).astype(a.dtype))


def _wide(ty):
    return ty[0] + str(2 * int(ty[1:]))


def _high(a, b):
    """Upper half of a product."""
    dtype = a.dtype
    if dtype.itemsize < 8:
        wide = (SIGNED if dtype.kind == "i" else UNSIGNED)[2 * dtype.itemsize]
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * dtype.itemsize)).astype(dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = np.atleast_1d(a).view(np.uint64), np.atleast_1d(b).view(np.uint64)
    carry = (x & low) * (y & low) >> half
    middle = (x >> half) * (y & low) + carry
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if dtype.kind == "i":  # a negative factor counted 2^64 too much
        high = (
            high
            - np.where(x >> np.uint64(63), y, np.uint64(0))
            - np.where(y >> np.uint64(63), x, np.uint64(0))
        )
    return high.view(dtype)


def multiply(i):
    """mul and mad, .lo .hi .wide (ISA 9.7.1.3, 9.7.1.4)."""
    ty, mode = i.type, i.parts[1]
    out = _wide(ty) if mode == "wide" else ty
    dtype = DTYPE[out]

    def product(a, b):
        if mode == "wide":
            return a.astype(dtype) * b.astype(dtype)
        return _high(a, b) if mode == "hi" else a * b

    if i.parts[0] == "mul":
        return simple(i, product, [out, ty, ty])
    return simple(i, lambda a, b, c: product(a, b) + c, [out, ty, ty, out])


def divide(i):
    """div and rem of integers truncate towards zero; division by zero gives all ones, as the
    hardware does.
    """
    ones = ~DTYPE[i.type].type(0)
    rem = i.parts[0] == "rem"

    def run(a, b):
        safe = np.where(b == 0, b.dtype.type(1), b)
        rest = np.fmod(a, safe)  # fmod has the sign of a, as PTX's rem
        return np.where(b == 0, a if rem else ones, rest if rem else (a - rest) // safe)

    return simple(i, run)


@opcode("shl", "shr")
def shift(i):
    """Shift amounts clamp to the width (ISA 9.7.8.8, 9.7.8.9)."""
    ty = i.type
    dtype = DTYPE[ty]
    bits = 8 * dtype.itemsize
    left = i.parts[0] == "shl"
    function = np.left_shift if left else np.right_shift
    signed = dtype.kind == "i" and not left
    amount = i.operands[2]
    if isinstance(amount, Imm) and (0 <= amount.bits < bits or signed):
        n = dtype.type(min(amount.bits, bits - 1))
        return simple_unary(i, lambda a: function(a, n))

    def run(a, n):
        value = function(a, np.minimum(n, bits - 1).astype(dtype))
        return value if signed else np.where(n >= bits, dtype.type(0), value)

    return simple(i, run, [ty, ty, "u32"])


def simple_unary(i, function):
    put, a = destination(i.operands[0], i.type), source(i.operands[1], i.type)
    return lambda m, act: put(m, act, function(a(m)))


@opcode("shf")
def funnel(i):
    """shf.{l,r}.{wrap,clamp}.b32 d, low, high, n (ISA 9.7.8.7)."""
    left, wrap = i.parts[1] == "l", i.parts[2] == "wrap"

    def run(low, high, n):
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        both = (both << n) >> np.uint64(32) if left else both >> n
        return both.astype(np.uint32)

    return simple(i, run, ["b32"] * 3 + ["u32"])


# All functions of two bits, indexed by their truth table (bit 2b+c).
_TWO = [
    lambda b, c: b & np.uint32(0), lambda b, c: ~(b | c), lambda b, c: ~b & c, lambda b, c: ~b,
    lambda b, c: b & ~c, lambda b, c: ~c, lambda b, c: b ^ c, lambda b, c: ~(b & c),
    lambda b, c: b & c, lambda b, c: ~(b ^ c), lambda b, c: c, lambda b, c: ~b | c,
    lambda b, c: b, lambda b, c: b | ~c, lambda b, c: b | c, lambda b, c: b | np.uint32(0xFFFFFFFF),
]  # fmt: skip


@opcode("lop3")
def lop3(i):
    """d = F(a, b, c) with truth table immLut (ISA 9.7.8.6):

    F = g0 ^ (a & (g0 ^ g1)), g_a the table's half for that a.
    """
    table = i.operands[4].bits
    zero, differ = _TWO[table & 15], _TWO[(table ^ table >> 4) & 15]
    short = type(i)(i.text, i.line, i.scope)
    short.parts, short.operands = i.parts, i.operands[:4]
    if table & 15 == 0:
        return simple(short, lambda a, b, c: a & differ(b, c))
    return simple(short, lambda a, b, c: zero(b, c) ^ (a & differ(b, c)))


def _selector_bytes(mode, k, low):
    """Source byte of result byte k in prmt's special modes (ISA 9.7.8.5, table 35)."""
    if mode == "f4e":
        return low + k
    if mode == "b4e":
        return (low - k) & 7
    if mode == "rc8":
        return low
    if mode == "ecl":
        return np.maximum(low, k)
    if mode == "ecr":
        return np.minimum(low, k)
    return (low & 1) * 2 + (k & 1)  # rc16


@opcode("prmt")
def permute(i):
    mode = i.parts[2] if len(i.parts) > 2 else None
    put = destination(i.operands[0], "b32")
    get = [source(o, "b32") for o in i.operands[1:]]
    selector = i.operands[3].bits if isinstance(i.operands[3], Imm) else None

    def pick(both, index):
        return (both >> (index.astype(np.uint64) << np.uint64(3))).astype(np.uint32) & np.uint32(
            255
        )

    def run(m, act):
        both = get[1](m).astype(np.uint64) << np.uint64(32) | get[0](m).astype(np.uint64)
        s = get[2](m)
        value = np.uint32(0)
        for k in range(4):
            if mode:
                byte = pick(
                    both, _selector_bytes(mode, np.uint32(k), s & np.uint32(3)) & np.uint32(7)
                )
            else:
                nibble = (s >> np.uint32(4 * k)) & np.uint32(15)
                byte = pick(both, nibble & np.uint32(7))
                if selector is None or selector >> 4 * k & 8:  # replicate the byte's sign
                    sign = (byte >> np.uint32(7)) * np.uint32(255)
                    byte = np.where(nibble & np.uint32(8), sign, byte)
            value = value | byte << np.uint32(8 * k)
        put(m, act, value)

    return run


@opcode("bfe")
def extract(i):
    """Bit field extract (ISA 9.7.1.19): fields past the top are filled with the sign (signed) or
    zero.
    """
    dtype = DTYPE[i.type]
    bits, unsigned = 8 * dtype.itemsize, UNSIGNED[dtype.itemsize]

    def run(a, at, length):
        at, length = (np.atleast_1d(v & np.uint32(255)).astype(np.int64) for v in (at, length))
        a = np.atleast_1d(a)
        shifted = np.right_shift(a, np.minimum(at, bits - 1).astype(dtype))
        if dtype.kind == "u":
            shifted = np.where(at >= bits, dtype.type(0), shifted)
        keep = np.clip(bits - length, 0, bits - 1).astype(dtype)
        up = np.left_shift(shifted.view(unsigned), keep.astype(unsigned)).view(dtype)
        return np.where(length == 0, dtype.type(0), np.right_shift(up, keep))

    return simple(i, run, [i.type, i.type, "u32", "u32"])


@opcode("bfi")
def insert(i):
    """Bit field insert of a into b (ISA 9.7.1.20)."""
    dtype = DTYPE[i.type]
    bits = 8 * dtype.itemsize

    def run(a, b, at, length):
        at, length = (np.atleast_1d(v & np.uint32(255)).astype(np.uint64) for v in (at, length))
        one, top = np.uint64(1), np.uint64(bits - 1)
        full = np.uint64((1 << bits) - 1)
        ones = np.where(length >= bits, full, (one << np.minimum(length, top)) - one)
        shift_ = np.minimum(at, top)
        mask = np.where(at >= bits, np.uint64(0), ones << shift_ & full)
        a, b = a.astype(np.uint64), b.astype(np.uint64)
        return ((b & ~mask) | (a << shift_ & mask)).astype(dtype)

    return simple(i, run, [i.type] * 3 + ["u32", "u32"])


def _count(i, function):
    """popc, clz, bfind: a 32-bit result."""
    return simple(i, lambda a: function(a).astype(np.uint32), ["u32", i.type])


def _top_bit(a):
    """Index of the highest set bit, -1 for zero, exactly (a float64 would round 2^64 - 1 up)."""
    if a.dtype.itemsize == 4:
        return np.frexp(a.astype(np.float64))[1] - 1
    high, low = (a >> np.uint64(32)).astype(np.uint32), a.astype(np.uint32)
    return np.where(high != 0, _top_bit(high) + 32, _top_bit(low))


@opcode("popc")
def popc(i):
    return _count(i, np.bitwise_count)


@opcode("clz")
def clz(i):
    bits = int(i.type[1:])
    return _count(i, lambda a: bits - 1 - _top_bit(a))


@opcode("bfind")
def bfind(i):
    unsigned = UNSIGNED[DTYPE[i.type].itemsize]
    bits = 8 * unsigned.itemsize

    def run(a):
        a = np.where(a < 0, ~a, a).view(unsigned)
        top = _top_bit(a)
        return np.where(a == 0, -1, bits - 1 - top if "shiftamt" in i.parts else top).astype(
            np.int32
        )

    return _count(i, run)


@opcode("brev")
def brev(i):
    bits = int(i.type[1:])

    def run(a):
        one = a.dtype.type(1)
        value = a & a.dtype.type(0)
        for k in range(bits):
            value = value | (a >> a.dtype.type(k) & one) << a.dtype.type(bits - 1 - k)
        return value

    return simple(i, run)


@opcode("dp4a")
def dp4a(i):
    """Dot product of four bytes (ISA 9.7.1.23)."""
    kinds = [np.int8 if t[0] == "s" else np.uint8 for t in i.parts[-2:]]

    def run(a, b, c):
        a, b = (
            np.atleast_1d(v).view(k).reshape(-1, 4).astype(np.int32)
            for v, k in zip((a, b), kinds, strict=True)
        )
        return (a * b).sum(1, dtype=np.int32).view(c.dtype) + c

    return simple(i, run, ["b32"] * 4)


def absolute(i):
    return simple(i, np.abs)


def negate(i):
    return simple(i, np.negative)
