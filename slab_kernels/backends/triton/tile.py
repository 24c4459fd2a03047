"""A tile of W = S + (U V^T) * B rebuilt in registers from packed tensors: `weight`, for kernels.py.

`_plain` says what a group means, entry by entry, in fp32. `words` of pairs.py gives the same for
16-bit activations on NVIDIA GPUs, on pairs of numbers.

A pruned entry is (U V^T)_ij times a level, an odd number within +-(2^planes - 1): launch.py holds U
in units of the last plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import words
from .units import Four, Units, bit, high_half, integer, low_half, negative, nibble_shift, wide


@triton.jit
def _signed(units, magnitudes, PLANES: tl.constexpr):
    """Magnitudes at the four positions times their levels, in fp32, rounded once."""
    m = magnitudes
    shift = nibble_shift()
    if PLANES == 1:
        n = negative(units.metadata, units.signs)
        signed = Four(
            tl.where(bit(n.p0, shift), -m.p0, m.p0),
            tl.where(bit(n.p1, shift), -m.p1, m.p1),
            tl.where(bit(n.p2, shift), -m.p2, m.p2),
            tl.where(bit(n.p3, shift), -m.p3, m.p3),
        )
    else:
        level = Four(0.0, 0.0, 0.0, 0.0)
        for plane in tl.static_range(PLANES):
            n = negative(units.metadata, units.signs >> 8 * plane & 0xFF)
            level = Four(
                2 * level.p0 + tl.where(bit(n.p0, shift), -1.0, 1.0),
                2 * level.p1 + tl.where(bit(n.p1, shift), -1.0, 1.0),
                2 * level.p2 + tl.where(bit(n.p2, shift), -1.0, 1.0),
                2 * level.p3 + tl.where(bit(n.p3, shift), -1.0, 1.0),
            )
        signed = Four(m.p0 * level.p0, m.p1 * level.p1, m.p2 * level.p2, m.p3 * level.p3)
    return signed


@triton.jit
def _plain(units, magnitudes, FORMAT: tl.constexpr):
    """The four entries of every group in fp32.

    They are the kept values where the nibble says so, and signed magnitudes elsewhere.
    """
    kept = units.kept
    if FORMAT.values == "int8":
        first, second = integer(kept, 8) * units.scale, integer(kept >> 8, 8) * units.scale
    elif FORMAT.values == "int4":
        first, second = integer(kept, 4) * units.scale, integer(kept >> 4, 4) * units.scale
    elif FORMAT.values == "bf16":
        first, second = wide(kept), wide(kept >> 16)
    else:
        first = low_half(kept, tl.float16).to(tl.float32)
        second = high_half(kept, tl.float16).to(tl.float32)
    shift = nibble_shift()
    i0, i1 = units.metadata >> shift & 3, units.metadata >> shift >> 2 & 3
    other = magnitudes
    if FORMAT.rank > 0:
        other = _signed(units, magnitudes, FORMAT.planes)
    return Four(
        tl.where(i0 == 0, first, other.p0),
        tl.where(i0 == 1, first, tl.where(i1 == 1, second, other.p1)),
        tl.where(i0 == 2, first, tl.where(i1 == 2, second, other.p2)),
        tl.where(i1 == 3, second, other.p3),
    )


@triton.jit
def _load(pointer, inside, MASKED: tl.constexpr):
    """What is inside, zeros elsewhere; MASKED: whether anything is elsewhere."""
    return tl.load(pointer, mask=inside, other=0) if MASKED else tl.load(pointer)


@triton.jit
def _row_of_v(pointers, place, row: tl.constexpr, MASKED: tl.constexpr):
    """v at one position of every group, [1, BK/16, 4]; row: 4 times the rank, and the position."""
    groups = place.units * 4
    v = _load(pointers.v_ptr + row * groups + place.group, place.group < groups, MASKED)
    return tl.reshape(v, (1, place.group.shape[0] // 4, 4))


@triton.jit
def _magnitude(pointers, place, position: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr):
    """U V^T at one position of every group, [BN, BK/16, 4] in fp32."""
    total = 0.0
    for r in tl.static_range(RANK):
        v = _row_of_v(pointers, place, 4 * r + position, MASKED)
        total += tl.load(pointers.u_ptr + r * place.N + place.rows)[:, None, None] * v
    return total


@triton.jit
def _magnitudes(pointers, place, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """U V^T at the four positions of every group, or v alone where `row_levels` has u."""
    if FORMAT.packed and FORMAT.rank == 1:
        four = Four(
            _row_of_v(pointers, place, 0, MASKED),
            _row_of_v(pointers, place, 1, MASKED),
            _row_of_v(pointers, place, 2, MASKED),
            _row_of_v(pointers, place, 3, MASKED),
        )
    else:
        four = Four(
            _magnitude(pointers, place, 0, FORMAT.rank, MASKED),
            _magnitude(pointers, place, 1, FORMAT.rank, MASKED),
            _magnitude(pointers, place, 2, FORMAT.rank, MASKED),
            _magnitude(pointers, place, 3, FORMAT.rank, MASKED),
        )
    return four


@triton.jit
def _scales(pointers, place, GROUP_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """The scale of every unit, [BN, BK/16 or 1, 1] in fp32."""
    if GROUP_SIZE == 0:
        scale = tl.load(pointers.scales_ptr + place.rows)[:, None]
    else:
        per_row = place.units * 16 // GROUP_SIZE
        column = place.unit // (GROUP_SIZE // 16)
        at = pointers.scales_ptr + place.rows[:, None] * per_row + column[None, :]
        scale = _load(at, (place.unit < place.units)[None, :], MASKED)
    return tl.expand_dims(wide(scale), 2)


@triton.jit
def _to_groups(units):
    """[BN, BK/16] -> [BN, BK/16, 4], the same for every group."""
    return tl.broadcast_to(tl.expand_dims(units, 2), (units.shape[0], units.shape[1], 4))


@triton.jit
def weight(pointers, levels, place, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """A tile of W without its adapter, [BN, BK] in the activations' type.

    levels: from `row_levels`. MASKED: whether the tile may reach beyond the last unit.
    """
    BN: tl.constexpr = place.rows.shape[0]
    C: tl.constexpr = place.unit.shape[0]
    groups = place.units * 4
    inside = (place.unit < place.units)[None, :]
    at = place.rows[:, None] * place.units + place.unit[None, :]
    metadata = _to_groups(_load(pointers.metadata_ptr + at, inside, MASKED).to(tl.uint32))
    kept = pointers.values_ptr + place.rows[:, None] * groups + place.group[None, :]
    kept = _load(kept, (place.group < groups)[None, :], MASKED)
    kept = tl.reshape(kept, (BN, C, 4)).to(tl.uint32)
    signs, scale, magnitudes = 0, 0.0, Four(0.0, 0.0, 0.0, 0.0)
    if FORMAT.values == "int8" or FORMAT.values == "int4":
        scale = _scales(pointers, place, FORMAT.group_size, MASKED)
    if FORMAT.rank > 0:
        plane = place.N * place.units  # Three planes are stored one behind the other.
        signs = _load(pointers.signs_ptr + at, inside, MASKED).to(tl.uint32)
        if FORMAT.planes == 3:
            signs |= _load(pointers.signs_ptr + plane + at, inside, MASKED).to(tl.uint32) << 8
            signs |= _load(pointers.signs_ptr + 2 * plane + at, inside, MASKED).to(tl.uint32) << 16
        signs = _to_groups(signs)
        magnitudes = _magnitudes(pointers, place, FORMAT, MASKED)
    units = Units(metadata, signs, kept, scale)
    if FORMAT.packed:
        w = words(units, levels, magnitudes, FORMAT)
    else:
        w = _plain(units, magnitudes, FORMAT)
    tile = tl.reshape(tl.join(tl.join(w.p0, w.p2), tl.join(w.p1, w.p3)), (BN, 16 * C))
    tile = tile.to(FORMAT.dtype)
    if FORMAT.packed:
        # The move is opaque to the compiler, which therefore converts the layout of the finished
        # tile and not of its parts: both operands of the product are then read by ldmatrix.
        tile = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=False, pack=2
        )
    return tile
