"""A tile's numbers as pairs of 16 bits in 32-bit words, by PTX: `words`, for tile.py.

`prmt` (PTX ISA, "prmt") puts kept and pruned lanes into place, so that a weight costs a third of
the instructions that it takes number by number. A lane is one 16-bit half of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl

from ...format.bits import LEGAL_NIBBLES
from .units import Four, RowLevels, bit, high_half, integer, low_half, negative, nibble_shift, wide

# Tables that `prmt` looks up, made at import.

# The bytes by which `prmt` takes a lane: one of its first operand's two, or of its second's.
LANES = (0x10, 0x32, 0x54, 0x76)
# The levels in the order of `RowLevels`, by planes. Those of three planes are without their sign.
LEVELS = {2: (3, 1, -3, -1), 3: (7, 5, 3, 1)}
Positions = Sequence[int]


def _index(nibble: int) -> int:
    """A legal nibble as a number below 8, as `nibble_indices` computes it: i1's low bit, then the
    xor of i1's and i0's high bits, then the xor of i0's bits."""
    return nibble & 4 | (nibble >> 2 ^ nibble) & 2 | (nibble ^ nibble >> 1) & 1


def _table(choose: Callable[[int], int]) -> tuple[int, int]:
    """A place in LANES for every number below 8, as the two words in which `prmt` looks up."""
    chosen = bytes(LANES[choose(index)] for index in range(8))
    return int.from_bytes(chosen[:4], "little"), int.from_bytes(chosen[4:], "little")


def _by_nibble(choose: Callable[[Positions, Positions], int]) -> tuple[int, int]:
    """The table of a function of a group's kept and pruned positions."""
    kept = {_index(nibble): (nibble & 3, nibble >> 2) for nibble in LEGAL_NIBBLES}

    def chosen(index: int) -> int:
        positions = kept.get(index, ())
        return choose(positions, [p for p in range(4) if p not in positions])

    return _table(chosen)


def _own_lane(position: int) -> tuple[int, int]:
    """The lane that a position takes from (kept pair, pair of the positions' own numbers)."""
    return _by_nibble(
        lambda kept, pruned: kept.index(position) if position in kept else 2 + position % 2
    )


def _gathered_lane(position: int) -> tuple[int, int]:
    """The lane that a position takes from (kept pair, pair of the pruned numbers)."""
    return _by_nibble(
        lambda kept, pruned: (
            kept.index(position) if position in kept else 2 + pruned.index(position) % 2
        )
    )


def _pruned_lane(which: int) -> tuple[int, int]:
    """The lane of the first or second pruned position, of the numbers of all four."""
    return _by_nibble(lambda kept, pruned: pruned[which])


def _level_lane(planes: int) -> tuple[int, int]:
    """The place in LEVELS for the signs in a nibble of `_spread`."""

    def place(index: int) -> int:
        signs = (index, index >> 1) if planes == 2 else (index, index >> 2, index >> 1)
        level = sum((1 - 2 * (sign & 1)) << planes - 1 - p for p, sign in enumerate(signs))
        return LEVELS[planes].index(level if planes == 2 else abs(level))

    return _table(place)


def _constants(*tables: tuple[int, int]) -> tl.constexpr:
    """Tables for `look_up`, two words each."""
    return tl.constexpr(tuple(word for table in tables for word in table))


OWN = _constants(*(_own_lane(position) for position in range(4)))
GATHERED = _constants(*(_gathered_lane(position) for position in range(4)))
PRUNED = _constants(_pruned_lane(0), _pruned_lane(1))
LEVEL = _constants(_level_lane(2), _level_lane(3))


@triton.jit
def _pair(low, high):
    """Two 16-bit numbers (of wider words) as the lanes of one 32-bit word."""
    return low & 0xFFFF | high << 16


@triton.jit
def prmt(a, b, selector):
    """Four bytes of a and b (PTX ISA, "prmt")."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def convert(low, high, T: tl.constexpr):
    """Two fp32 numbers, rounded to nearest even, as a pair."""
    FP16: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    BF16: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    TO: tl.constexpr = FP16 if T == tl.float16 else BF16
    return tl.inline_asm_elementwise(TO, "=r,r,r", [low, high], tl.uint32, is_pure=True, pack=1)


@triton.jit
def product(a, b, T: tl.constexpr):
    """Products of pairs, rounded to nearest even.

    bf16 products as such exist from sm_90 on; a b + (-0) is the same number.
    """
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


# Each takes a pair of codes in word $1 and the scale in both lanes of $2, by magic numbers: fp16
# has a step of 1 from 1024 on, bf16 from 128 on, so that a code's bits become the number's. fp16
# takes q 2^-8 times 2^8 scale, which is a normal number for scales from 2.4e-7 to 255.
INT8_TO_FP16 = tl.constexpr("""{ .reg .b32 q, c, d;
    xor.b32 q, $1, 0x8080; prmt.b32 q, q, 0x64, 0x4140;
    mov.b32 c, 0x1C001C00; mov.b32 d, 0xC480C480; fma.rn.f16x2 q, q, c, d;
    mul.rn.f16x2 $0, q, $2; }""")
INT4_TO_FP16 = tl.constexpr("""{ .reg .b32 q, c, d;
    mul.lo.u32 q, $1, 0x1001; lop3.b32 q, q, 0x000F000F, 0x64086408, 0x6A;
    mov.b32 c, 0x1C001C00; mov.b32 d, 0xC408C408; fma.rn.f16x2 q, q, c, d;
    mul.rn.f16x2 $0, q, $2; }""")
INT4_TO_BF16 = tl.constexpr("""{ .reg .b32 q, c, d;
    mul.lo.u32 q, $1, 0x1001; lop3.b32 q, q, 0x000F000F, 0x43084308, 0x6A;
    mov.b32 c, 0x3F803F80; mov.b32 d, 0xC308C308; fma.rn.bf16x2 q, q, c, d;
    mov.b32 d, 0x80008000; fma.rn.bf16x2 $0, q, $2, d; }""")


@triton.jit
def _integers(word, scale, BITS: tl.constexpr, T: tl.constexpr):
    """Two two's complement codes at the foot of a word times an fp32 scale, as a pair rounded once.

    The scale is exact in bf16. A bf16 number has room for 7 bits only, so that int8 goes through
    fp32.
    """
    if T == tl.bfloat16 and BITS == 8:
        pair = convert(integer(word, 8) * scale, integer(word >> 8, 8) * scale, T)
    else:
        CODE: tl.constexpr = (
            INT8_TO_FP16 if BITS == 8 else (INT4_TO_FP16 if T == tl.float16 else INT4_TO_BF16)
        )
        shifted = scale * (256.0 if T == tl.float16 else 1.0)
        pair = tl.inline_asm_elementwise(
            CODE, "=r,r,r", [word, convert(shifted, shifted, T)], tl.uint32, is_pure=True, pack=1
        )
    return pair


@triton.jit
def look_up(TABLES: tl.constexpr, which: tl.constexpr, index):
    """Four bytes: `prmt` looks up in eight with four nibbles at once."""
    return prmt(TABLES[2 * which], TABLES[2 * which + 1], index)


@triton.jit
def nibble_indices(metadata):
    """`_index` of every nibble."""
    high = (metadata >> 2 ^ metadata) & 0x22222222
    return metadata & 0x44444444 | high | (metadata ^ metadata >> 1) & 0x11111111


@triton.jit
def _group_byte():
    """The selector of a group's byte in both operands of `prmt`, [1, 1, 4]."""
    return (0x40 + 0x11 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]


@triton.jit
def _fill(kept, other01, other23, metadata, IS_GATHERED: tl.constexpr):
    """Every group as two pairs: the kept pair's lanes where the nibble says so, others elsewhere.

    The others are pairs of the positions' own numbers, or if gathered the pair of pruned numbers.
    """
    index = nibble_indices(metadata)
    if IS_GATHERED:
        s0 = look_up(GATHERED, 0, index)
        s1 = look_up(GATHERED, 1, index)
        s2 = look_up(GATHERED, 2, index)
        s3 = s0 ^ s1 ^ s2  # The four hold each of LANES once, and those cancel.
    else:
        s0, s1 = look_up(OWN, 0, index), look_up(OWN, 1, index)
        s2, s3 = look_up(OWN, 2, index), look_up(OWN, 3, index)
    w01 = prmt(kept, other01, prmt(s0, s1, _group_byte()))
    w23 = prmt(kept, other23, prmt(s2, s3, _group_byte()))
    return w01, w23


@triton.jit
def _spread(signs, PLANES: tl.constexpr):
    """A unit's signs of two or three planes as nibbles.

    First pruned entries' are in the low half, second ones' in the high half, groups in the order
    0 2 1 3. Two planes are bits 0 and 1 of a nibble, three are bits 0, 2 and 1.

    Plane p = (p1 p0) of entry e = (e2 e1 e0) comes as bit p1 p0 e2 e1 e0 of the word. A step moves
    or exchanges digits of that number; all together take 6 or 8 instructions per unit.
    """
    s = signs
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
def _leveled(units, row_levels, magnitudes, FORMAT: tl.constexpr):
    """The two pruned entries of every group, of two or three planes, as a pair.

    The pruned lanes are brought together before they are multiplied: half the products, and signs
    need no places. A weight of two planes costs half an instruction more than one of one plane, all
    of it for fp16's second product. Of rank 1 the magnitudes are v alone, and u is in row_levels.
    """
    T: tl.constexpr = FORMAT.dtype
    PLANES: tl.constexpr = FORMAT.planes
    m = magnitudes
    signs = _spread(units.signs, PLANES)
    nibble = 2 * (tl.arange(0, 4) & 1) + (tl.arange(0, 4) >> 1)[None, None, :]
    first, second = look_up(LEVEL, PLANES - 2, signs), look_up(LEVEL, PLANES - 2, signs >> 16)
    which = prmt(first, second, (0x40 + 0x11 * nibble).to(tl.uint32))
    if FORMAT.rank == 1:
        index = nibble_indices(units.metadata)
        lanes = prmt(look_up(PRUNED, 0, index), look_up(PRUNED, 1, index), _group_byte())
        v = prmt(convert(m.p0, m.p1, T), convert(m.p2, m.p3, T), lanes)
        level = prmt(row_levels.high, row_levels.higher, which)
        if T == tl.float16:
            pair = _sum(level, v, product(prmt(row_levels.low, row_levels.lower, which), v, T))
        else:
            pair = product(level, v, T)
    else:
        # The operands hold LEVELS as bf16 numbers.
        if PLANES == 2:
            level = prmt(0x3F804040, 0xBF80C040, which)
        else:
            level = prmt(0x40A040E0, 0x3F804040, which)
        shift = nibble_shift()
        i0, i1 = units.metadata >> shift & 3, units.metadata >> shift & 12
        first = tl.where(i0 != 0, m.p0, tl.where(bit(units.metadata, shift + 3), m.p1, m.p2))
        second = tl.where(i1 != 12, m.p3, tl.where(bit(units.metadata, shift + 1), m.p1, m.p2))
        pair = convert(wide(level) * first, wide(level >> 16) * second, T)
    if PLANES == 3:
        pair = pair ^ (signs << (15 - 4 * nibble).to(tl.uint32) & 0x80008000)
    return pair


@triton.jit
def words(units, row_levels, magnitudes, FORMAT: tl.constexpr):
    """`_plain` rounded to the activations' type, by words of two lanes.

    Of rank 1 the magnitudes are v alone, and its product with u comes rounded once.
    """
    T: tl.constexpr = FORMAT.dtype
    kept = units.kept
    if FORMAT.values == "int8":
        kept = _integers(kept, units.scale, 8, T)
    elif FORMAT.values == "int4":
        kept = _integers(kept, units.scale, 4, T)
    if FORMAT.planes > 1:
        other01 = _leveled(units, row_levels, magnitudes, FORMAT)
        other23 = other01
    elif FORMAT.rank > 0:
        n = negative(units.metadata, units.signs)
        shift = nibble_shift()
        n01 = _pair(n.p0, n.p1) << 15 - shift & 0x80008000
        n23 = _pair(n.p2, n.p3) << 15 - shift & 0x80008000
        other01 = convert(magnitudes.p0, magnitudes.p1, T)
        other23 = convert(magnitudes.p2, magnitudes.p3, T)
        if FORMAT.rank == 1:
            other01 = product(row_levels.high ^ n01, other01, T)
            other23 = product(row_levels.high ^ n23, other23, T)
        else:
            other01, other23 = other01 ^ n01, other23 ^ n23
    else:
        other01, other23 = tl.zeros_like(kept), tl.zeros_like(kept)
    w01, w23 = _fill(kept, other01, other23, units.metadata, FORMAT.planes > 1)
    return Four(low_half(w01, T), high_half(w01, T), low_half(w23, T), high_half(w23, T))


@triton.jit
def _halves(a, b, T: tl.constexpr):
    """Two fp32 numbers as a pair, and as another pair what that leaves of them.

    The sum of exact products with both pairs comes rounded once.
    """
    pair = convert(a, b, T)
    rest_a, rest_b = a - low_half(pair, T).to(tl.float32), b - high_half(pair, T).to(tl.float32)
    return pair, convert(rest_a, rest_b, T)


@triton.jit
def row_levels(u_ptr, rows, FORMAT: tl.constexpr):
    """The `RowLevels` of a sign term of rank 1, made once before the loop over K.

    Of one plane `high` is u in both lanes. All that is not needed is 0.
    """
    T: tl.constexpr = FORMAT.dtype
    high, higher, low, lower = 0, 0, 0, 0
    if FORMAT.packed and FORMAT.rank == 1:
        u = tl.load(u_ptr + rows)[:, None, None]
        if FORMAT.planes == 1:
            high = convert(u, u, T)
        elif FORMAT.planes == 2:
            high, low = _halves(3 * u, u, T)
            higher, lower = high ^ 0x80008000, low ^ 0x80008000
        else:
            high, low = _halves(7 * u, 5 * u, T)
            higher, lower = _halves(3 * u, u, T)
    return RowLevels(high, higher, low, lower)
