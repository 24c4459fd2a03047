"""A tile of W = S + (U V^T) * B rebuilt in registers from the canonical packed tensors: `weight`, for kernels.py.

A unit is 16 inputs of one row, four groups: 16 bits of metadata, 8 of signs in each plane, 8 kept values. `_plain` says what
a group means, entry by entry, in fp32. `_words` gives the same for 16-bit activations on NVIDIA GPUs, on pairs in 32-bit
words: `prmt` puts kept and pruned lanes into place, so that a weight costs a third of the instructions.

A pruned entry is (U V^T)_ij times a level, an odd number within +-(2^PLANES - 1): launch.py has U in units of the last plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...format.bits import LEGAL_NIBBLES


def _index(nibble: int) -> int:
    """A legal nibble as a number below 8, as `_words` computes it: i1's low bit, i1's high bit ^ i0's, i0's bits' ^."""
    return nibble & 4 | (nibble >> 2 ^ nibble) & 2 | (nibble ^ nibble >> 1) & 1


LANES = (
    0x10,
    0x32,
    0x54,
    0x76,
)  # what `prmt` takes for a lane: one of its first operand's two, or of its second's


def _table(choose) -> tuple[int, int]:
    """Of LANES, by three bits of an index: the two words in which `prmt` looks up."""
    chosen = bytes(LANES[choose(index)] for index in range(8))
    return int.from_bytes(chosen[:4], "little"), int.from_bytes(chosen[4:], "little")


def _by_nibble(choose) -> tuple[int, int]:
    """The table of a function of a group's kept and pruned positions."""
    kept = {_index(nibble): (nibble & 3, nibble >> 2) for nibble in LEGAL_NIBBLES}
    return _table(
        lambda i: choose(kept.get(i, ()), [p for p in range(4) if p not in kept.get(i, ())])
    )


def _source(position: int, kept, pruned, gathered: bool) -> int:
    """The lane of (kept pair, other pair) for a position. Pruned ones: first and second if `gathered`, else each its own lane."""
    return (
        kept.index(position)
        if position in kept
        else 2 + (pruned.index(position) if gathered else position) % 2
    )


LEVELS = {
    2: (3, 1, -3, -1),
    3: (7, 5, 3, 1),
}  # by planes: four lanes of `row_levels`; of three planes without the sign


def _level(index: int, planes: int) -> int:
    """The place in LEVELS for the signs in a nibble of `_spread`."""
    signs = (index, index >> 1) if planes == 2 else (index, index >> 2, index >> 1)
    level = sum((1 - 2 * (sign & 1)) << planes - 1 - p for p, sign in enumerate(signs))
    return LEVELS[planes].index(level if planes == 2 else abs(level))


def _constants(*tables: tuple[int, int]):
    """For `_look_up`."""
    return tl.constexpr(sum(tables, ()))


OWN = _constants(
    *(_by_nibble(lambda *group, p=p: _source(p, *group, gathered=False)) for p in range(4))
)
GATHERED = _constants(
    *(_by_nibble(lambda *group, p=p: _source(p, *group, gathered=True)) for p in range(4))
)
PRUNED = _constants(*(_by_nibble(lambda _, pruned, k=k: pruned[k]) for k in range(2)))
LEVEL = _constants(*(_table(lambda index, n=planes: _level(index, n)) for planes in LEVELS))


@triton.jit
def _not(word):
    return word ^ 0xFFFFFFFF  # `~` on unsigned words overflows in the interpreter


@triton.jit
def _pair(low, high):
    """Two 16-bit numbers (of wider words) as the lanes of one 32-bit word."""
    return low & 0xFFFF | high << 16


@triton.jit
def _low(word, T: tl.constexpr):
    return word.to(tl.uint16).to(T, bitcast=True)


@triton.jit
def _high(word, T: tl.constexpr):
    return (word >> 16).to(tl.uint16).to(T, bitcast=True)


@triton.jit
def _wide(number):
    """bf16 bits as fp32: bf16 is fp32's upper half."""
    return (number.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bit(word, shift):
    return (word >> shift & 1) != 0


@triton.jit
def _negative(m, s):
    """Signs of the pruned positions 0..3, 1 = negative: bit 4j for group j, other bits undefined. s: a unit's 8 sign bits.

    Position 0 can only be the first pruned one and 3 only the second; 1 is the second if 0 is pruned too, that is
    if i0 = 2; 2 is the second unless i1 = 1.
    """
    s = (s | s << 4) & 0x0F0F
    s = s | s << 2  # a group's two sign bits at the foot of its nibble
    second = s >> 1
    i0_high, i1_high = m >> 1, m >> 3
    return s, i0_high & second | _not(i0_high) & s, i1_high & second | _not(i1_high) & s, second


@triton.jit
def _integer(code, BITS: tl.constexpr):
    """A two's complement code at the foot of a word as fp32, by the magic number 2^23: conversions run at a quarter rate."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    biased = code & (2 * HALF - 1) ^ HALF | 0x4B000000
    return biased.to(tl.float32, bitcast=True) - (8388608.0 + HALF)


@triton.jit
def _load(pointer, inside, MASKED: tl.constexpr):
    return tl.load(pointer, mask=inside, other=0) if MASKED else tl.load(pointer)


@triton.jit
def _magnitude(
    u_ptr,
    v_ptr,
    rows,
    g,
    groups,
    N,
    position: tl.constexpr,
    RANK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(U V^T) at one position of every group, [BN, BK/16, 4] in fp32; u [RANK, N] and v [RANK, 4, groups] fp32."""
    total = 0.0
    for r in tl.static_range(RANK):
        v = _load(v_ptr + (4 * r + position) * groups + g, g < groups, MASKED)
        total += tl.load(u_ptr + r * N + rows)[:, None, None] * tl.reshape(
            v, (1, g.shape[0] // 4, 4)
        )
    return total


@triton.jit
def _signed(m, s, shift, l0, l1, l2, l3, PLANES: tl.constexpr):
    """Magnitudes at the positions 0..3 times their levels, in fp32, rounded once."""
    if PLANES == 1:
        n0, n1, n2, n3 = _negative(m, s)
        l0, l1 = tl.where(_bit(n0, shift), -l0, l0), tl.where(_bit(n1, shift), -l1, l1)
        l2, l3 = tl.where(_bit(n2, shift), -l2, l2), tl.where(_bit(n3, shift), -l3, l3)
    else:
        c0, c1, c2, c3 = 0.0, 0.0, 0.0, 0.0
        for p in tl.static_range(PLANES):
            n0, n1, n2, n3 = _negative(m, s >> 8 * p & 0xFF)
            c0, c1 = (
                2 * c0 + tl.where(_bit(n0, shift), -1.0, 1.0),
                2 * c1 + tl.where(_bit(n1, shift), -1.0, 1.0),
            )
            c2, c3 = (
                2 * c2 + tl.where(_bit(n2, shift), -1.0, 1.0),
                2 * c3 + tl.where(_bit(n3, shift), -1.0, 1.0),
            )
        l0, l1, l2, l3 = l0 * c0, l1 * c1, l2 * c2, l3 * c3
    return l0, l1, l2, l3


@triton.jit
def _plain(
    m,
    s,
    word,
    scale,
    shift,
    l0,
    l1,
    l2,
    l3,
    VALUES: tl.constexpr,
    RANK: tl.constexpr,
    PLANES: tl.constexpr,
):
    """The four entries of every group in fp32: the kept values where the nibble says so, signed magnitudes elsewhere."""
    if VALUES == "int8":
        first, second = _integer(word, 8) * scale, _integer(word >> 8, 8) * scale
    elif VALUES == "int4":
        first, second = _integer(word, 4) * scale, _integer(word >> 4, 4) * scale
    elif VALUES == "bf16":
        first, second = _wide(word), _wide(word >> 16)
    else:
        first, second = (
            _low(word, tl.float16).to(tl.float32),
            _high(word, tl.float16).to(tl.float32),
        )
    i0, i1 = m >> shift & 3, m >> shift >> 2 & 3
    if RANK > 0:
        l0, l1, l2, l3 = _signed(m, s, shift, l0, l1, l2, l3, PLANES)
    w0, w1 = tl.where(i0 == 0, first, l0), tl.where(i0 == 1, first, tl.where(i1 == 1, second, l1))
    w2, w3 = tl.where(i0 == 2, first, tl.where(i1 == 2, second, l2)), tl.where(i1 == 3, second, l3)
    return w0, w1, w2, w3


@triton.jit
def _prmt(a, b, selector):
    """Four bytes of a and b (PTX ISA, "prmt")."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _convert(low, high, T: tl.constexpr):
    """Two fp32 numbers, rounded to nearest even, as a pair."""
    TO: tl.constexpr = (
        "cvt.rn.f16x2.f32 $0, $2, $1;" if T == tl.float16 else "cvt.rn.bf16x2.f32 $0, $2, $1;"
    )
    return tl.inline_asm_elementwise(TO, "=r,r,r", [low, high], tl.uint32, is_pure=True, pack=1)


@triton.jit
def _product(a, b, T: tl.constexpr):
    """Products of pairs, rounded to nearest even. bf16 products as such exist from sm_90 on; a b + (-0) is the same number."""
    FP16: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    BF16: tl.constexpr = "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
    return tl.inline_asm_elementwise(
        FP16 if T == tl.float16 else BF16, "=r,r,r", [a, b], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _sum(a, b, c):
    """a b + c of fp16 pairs, rounded once."""
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _integers(word, scale, BITS: tl.constexpr, T: tl.constexpr):
    """Two two's complement codes at the foot of a word times an fp32 scale (exact in bf16), as a pair rounded once.

    By magic numbers: fp16 has a step of 1 from 1024 on, bf16 from 128 on, so that a code's bits become the number's. bf16
    has room for 7 bits only: int8 goes through fp32. fp16 takes q 2^-8 times scale 2^8, a normal number from 2.4e-7 to 255.
    """
    if T == tl.bfloat16 and BITS == 8:
        pair = _convert(_integer(word, 8) * scale, _integer(word >> 8, 8) * scale, T)
    else:
        if BITS == 8:
            CODE: tl.constexpr = """{ .reg .b32 q, c, d; xor.b32 q, $1, 0x8080; prmt.b32 q, q, 0x64, 0x4140;
                mov.b32 c, 0x1C001C00; mov.b32 d, 0xC480C480; fma.rn.f16x2 q, q, c, d; mul.rn.f16x2 $0, q, $2; }"""
        elif T == tl.float16:
            CODE: tl.constexpr = """{ .reg .b32 q, c, d; mul.lo.u32 q, $1, 0x1001; lop3.b32 q, q, 0x000F000F, 0x64086408, 0x6A;
                mov.b32 c, 0x1C001C00; mov.b32 d, 0xC408C408; fma.rn.f16x2 q, q, c, d; mul.rn.f16x2 $0, q, $2; }"""
        else:
            CODE: tl.constexpr = """{ .reg .b32 q, c, d; mul.lo.u32 q, $1, 0x1001; lop3.b32 q, q, 0x000F000F, 0x43084308, 0x6A;
                mov.b32 c, 0x3F803F80; mov.b32 d, 0xC308C308; fma.rn.bf16x2 q, q, c, d;
                mov.b32 d, 0x80008000; fma.rn.bf16x2 $0, q, $2, d; }"""
        shifted = scale * (256.0 if T == tl.float16 else 1.0)
        pair = tl.inline_asm_elementwise(
            CODE, "=r,r,r", [word, _convert(shifted, shifted, T)], tl.uint32, is_pure=True, pack=1
        )
    return pair


@triton.jit
def _look_up(TABLES: tl.constexpr, which: tl.constexpr, index):
    """Four bytes: `prmt` looks up in eight with four nibbles at once."""
    return _prmt(TABLES[2 * which], TABLES[2 * which + 1], index)


@triton.jit
def _indices(m):
    """`_index` of a unit's nibbles."""
    return m & 0x4444 | (m >> 2 ^ m) & 0x2222 | (m ^ m >> 1) & 0x1111


@triton.jit
def _mine():
    """Of a group: byte j of both operands."""
    return (0x40 + 0x11 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]


@triton.jit
def _fill(word, l01, l23, m, IS_GATHERED: tl.constexpr):
    """Every group as two pairs: the kept pair's lanes where the nibble says so, l01's and l23's elsewhere (`_source`)."""
    index = _indices(m)
    if IS_GATHERED:
        s0, s1, s2 = (
            _look_up(GATHERED, 0, index),
            _look_up(GATHERED, 1, index),
            _look_up(GATHERED, 2, index),
        )
        s3 = s0 ^ s1 ^ s2  # each of LANES once, and those cancel
    else:
        s0, s1 = _look_up(OWN, 0, index), _look_up(OWN, 1, index)
        s2, s3 = _look_up(OWN, 2, index), _look_up(OWN, 3, index)
    return _prmt(word, l01, _prmt(s0, s1, _mine())), _prmt(word, l23, _prmt(s2, s3, _mine()))


@triton.jit
def _spread(s, PLANES: tl.constexpr):
    """A unit's signs as nibbles: first pruned entries' in the low half, second ones' in the high half, groups in the order 0 2 1 3.

    Two planes are bits 0 and 1 of a nibble, three 0, 2 and 1. Plane p = (p1 p0) of entry e = (e2 e1 e0) comes as bit
    p1 p0 e2 e1 e0 of the word; a step moves or exchanges digits of that number, 6 or 8 instructions a unit together.
    """
    if PLANES == 2:
        s = (s | s << 15) & 0x55555555  # e0 p0 e2 e1 -
        s = (s | s >> 7) & 0x00FF00FF  # e0 - e2 e1 p0
        s = (s | s << 6) & 0x33333333  # e0 e1 e2 - p0
    else:
        both = (s >> 15 ^ s) & 0x0000AAAA
        s = s ^ both ^ both << 15  # e0 p0 e2 e1 p1
        both = (s >> 6 ^ s) & 0x00CC00CC
        s = s ^ both ^ both << 6  # e0 e1 e2 p0 p1
    return s


@triton.jit
def _leveled(
    m, s, shift, levels, l0, l1, l2, l3, RANK: tl.constexpr, PLANES: tl.constexpr, T: tl.constexpr
):
    """The two pruned entries of every group, of two or three planes, as a pair.

    The pruned lanes are brought together before they are multiplied: half the products, and signs need no places. Of two planes
    a weight costs half an instruction more than of one, all of it for fp16's second product. Of rank 1, l is v, `levels` u's.
    """
    s = _spread(s, PLANES)
    nibble = 2 * (tl.arange(0, 4) & 1) + (tl.arange(0, 4) >> 1)[None, None, :]
    first, second = _look_up(LEVEL, PLANES - 2, s), _look_up(LEVEL, PLANES - 2, s >> 16)
    which = _prmt(first, second, (0x40 + 0x11 * nibble).to(tl.uint32))
    if RANK == 1:
        high, higher, low, lower = levels
        index = _indices(m)
        lanes = _prmt(_look_up(PRUNED, 0, index), _look_up(PRUNED, 1, index), _mine())
        v = _prmt(_convert(l0, l1, T), _convert(l2, l3, T), lanes)
        level = _prmt(high, higher, which)
        if T == tl.float16:
            pair = _sum(level, v, _product(_prmt(low, lower, which), v, T))
        else:
            pair = _product(level, v, T)
    else:  # levels as pairs of bf16
        level = (
            _prmt(0x3F804040, 0xBF80C040, which)
            if PLANES == 2
            else _prmt(0x40A040E0, 0x3F804040, which)
        )
        first = tl.where(m >> shift & 3 != 0, l0, tl.where(_bit(m, shift + 3), l1, l2))
        second = tl.where(m >> shift & 12 != 12, l3, tl.where(_bit(m, shift + 1), l1, l2))
        pair = _convert(_wide(level) * first, _wide(level >> 16) * second, T)
    if PLANES == 3:
        pair = pair ^ (s << (15 - 4 * nibble).to(tl.uint32) & 0x80008000)
    return pair


@triton.jit
def _words(m, s, word, scale, shift, levels, l0, l1, l2, l3, VALUES: tl.constexpr, RANK: tl.constexpr, PLANES: tl.constexpr,
           T: tl.constexpr):  # fmt: skip
    """`_plain` rounded to T, as words of two lanes. RANK 1: l is v, and its product with u, a pair, comes rounded once."""
    if VALUES == "int8":
        word = _integers(word, scale, 8, T)
    elif VALUES == "int4":
        word = _integers(word, scale, 4, T)
    if PLANES > 1:
        l01 = _leveled(m, s, shift, levels, l0, l1, l2, l3, RANK, PLANES, T)
        l23 = l01
    elif RANK > 0:
        n0, n1, n2, n3 = _negative(m, s)
        n01, n23 = (
            _pair(n0, n1) << 15 - shift & 0x80008000,
            _pair(n2, n3) << 15 - shift & 0x80008000,
        )
        l01, l23 = _convert(l0, l1, T), _convert(l2, l3, T)
        if RANK == 1:
            l01, l23 = _product(levels[0] ^ n01, l01, T), _product(levels[0] ^ n23, l23, T)
        else:
            l01, l23 = l01 ^ n01, l23 ^ n23
    else:
        l01, l23 = tl.zeros_like(word), tl.zeros_like(word)
    w01, w23 = _fill(word, l01, l23, m, PLANES > 1)
    return _low(w01, T), _high(w01, T), _low(w23, T), _high(w23, T)


@triton.jit
def _halves(a, b, T: tl.constexpr):
    """Two fp32 numbers as a pair, and as another pair what that leaves of them: exact products of both come rounded once."""
    pair = _convert(a, b, T)
    return pair, _convert(a - _low(pair, T).to(tl.float32), b - _high(pair, T).to(tl.float32), T)


@triton.jit
def row_levels(
    u_ptr, rows, RANK: tl.constexpr, PLANES: tl.constexpr, T: tl.constexpr, PACKED: tl.constexpr
):
    """Of a sign term of rank 1, before the loop over K: u times LEVELS in two pairs, [BN, 1, 1], then what these leave of it.

    Of one plane the first is u in both lanes, the others are nothing; so are all of them for other ranks.
    """
    high, higher, low, lower = 0, 0, 0, 0
    if PACKED and RANK == 1:
        u = tl.load(u_ptr + rows)[:, None, None]
        if PLANES == 1:
            high = _convert(u, u, T)
        elif PLANES == 2:
            high, low = _halves(3 * u, u, T)
            higher, lower = high ^ 0x80008000, low ^ 0x80008000
        else:
            high, low = _halves(7 * u, 5 * u, T)
            higher, lower = _halves(3 * u, u, T)
    return high, higher, low, lower


@triton.jit
def weight(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, levels, rows, k, units, N, VALUES: tl.constexpr,
           GROUP: tl.constexpr, RANK: tl.constexpr, PLANES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, T: tl.constexpr,
           MASKED: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """W[rows, k : k + BK] without its adapter, [BN, BK] in T. v_ptr is the rows' part's; levels from `row_levels`."""
    C: tl.constexpr = BK // 16
    c, g = k // 16 + tl.arange(0, C), k // 4 + tl.arange(0, 4 * C)
    inside = (c < units)[None, :]
    at = rows[:, None] * units + c[None, :]
    m = _load(metadata_ptr + at, inside, MASKED).to(tl.uint32)
    m = tl.broadcast_to(tl.expand_dims(m, 2), (BN, C, 4))
    word = _load(
        values_ptr + rows[:, None] * (units * 4) + g[None, :], (g < units * 4)[None, :], MASKED
    )
    word = tl.reshape(word, (BN, C, 4)).to(tl.uint32)
    s, scale, l0, l1, l2, l3 = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    if VALUES == "int8" or VALUES == "int4":
        if GROUP == 0:
            scale = tl.load(scales_ptr + rows)[:, None]
        else:
            scale = (
                scales_ptr + rows[:, None] * (units * 16 // GROUP) + (c // (GROUP // 16))[None, :]
            )
            scale = _load(scale, inside, MASKED)
        scale = tl.expand_dims(_wide(scale), 2)
    if RANK > 0:
        s = _load(signs_ptr + at, inside, MASKED).to(tl.uint32)
        if PLANES == 3:  # each plane by itself
            s |= _load(signs_ptr + N * units + at, inside, MASKED).to(tl.uint32) << 8
            s |= _load(signs_ptr + 2 * N * units + at, inside, MASKED).to(tl.uint32) << 16
        s = tl.broadcast_to(tl.expand_dims(s, 2), (BN, C, 4))
        if PACKED and RANK == 1:
            l0 = tl.reshape(_load(v_ptr + g, g < units * 4, MASKED), (1, C, 4))
            l1 = tl.reshape(_load(v_ptr + units * 4 + g, g < units * 4, MASKED), (1, C, 4))
            l2 = tl.reshape(_load(v_ptr + units * 8 + g, g < units * 4, MASKED), (1, C, 4))
            l3 = tl.reshape(_load(v_ptr + units * 12 + g, g < units * 4, MASKED), (1, C, 4))
        else:
            l0 = _magnitude(u_ptr, v_ptr, rows, g, units * 4, N, 0, RANK, MASKED)
            l1 = _magnitude(u_ptr, v_ptr, rows, g, units * 4, N, 1, RANK, MASKED)
            l2 = _magnitude(u_ptr, v_ptr, rows, g, units * 4, N, 2, RANK, MASKED)
            l3 = _magnitude(u_ptr, v_ptr, rows, g, units * 4, N, 3, RANK, MASKED)
    shift = (4 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
    if PACKED:
        w0, w1, w2, w3 = _words(
            m, s, word, scale, shift, levels, l0, l1, l2, l3, VALUES, RANK, PLANES, T
        )
    else:
        w0, w1, w2, w3 = _plain(m, s, word, scale, shift, l0, l1, l2, l3, VALUES, RANK, PLANES)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BN, BK)).to(T)
    if PACKED:
        w = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [w], w.dtype, is_pure=False, pack=2
        )
    return w
