"""What a tile of a packed weight is made of, as tuples inside Triton kernels, and its bits.

A unit is 16 inputs of one row, in four groups: 16 bits of metadata, 8 bits of signs in each plane
and 8 kept values. Tensors of units are [rows, units, 4 groups]. All four groups hold the unit's
whole metadata and signs, and shift to their own nibble.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Format(NamedTuple):
    """What a kernel is compiled for, besides its tile: one constant of every kernel."""

    values: str  # fp16, bf16, int8 or int4
    group_size: int  # inputs that a scale covers; 0 = a row, or no scales
    rank: int  # of the sign term
    planes: int  # sign planes
    adapter_rank: int
    parts: int  # fused weights
    dtype: tl.dtype  # of the activations
    packed: bool  # whether PTX instructions work on pairs of 16-bit numbers


# Kernels make the tuples below. Their fields must not be called values, type or T, since those are
# names of Triton's own tuple.


class Pointers(NamedTuple):
    """The packed tensors of a weight; v_ptr is that of the tile's part."""

    values_ptr: Any  # [N, groups] one element per group
    metadata_ptr: Any  # [N, units] uint16
    signs_ptr: Any  # [N, units] uint8, of two planes uint16; of three planes [3, N, units] uint8
    scales_ptr: Any  # [N, scales per row], the bits of bf16 numbers
    u_ptr: Any  # [rank, N] fp32
    v_ptr: Any  # [rank, 4 positions, groups] fp32


class Place(NamedTuple):
    """Where in the weight a tile is."""

    rows: Any  # [BN]
    unit: Any  # [BK / 16]
    group: Any  # [BK / 4]
    units: Any  # of a row
    N: Any  # rows of the weight


class Units(NamedTuple):
    """What is stored of a tile's units, [BN, BK / 16, 4] each."""

    metadata: Any  # uint32: the nibbles of the unit's four groups
    signs: Any  # uint32: one byte per plane
    kept: Any  # uint32: the kept values of the group
    scale: Any  # fp32


class Four(NamedTuple):
    """One number for each of a group's positions 0 .. 3."""

    p0: Any
    p1: Any
    p2: Any
    p3: Any


class RowLevels(NamedTuple):
    """u times the four numbers of LEVELS as two pairs, and as two more what rounding left of them.

    They are words, [BN, 1, 1].
    """

    high: Any
    higher: Any
    low: Any
    lower: Any


@triton.jit
def not_(word):
    return word ^ 0xFFFFFFFF  # `~` on unsigned words overflows in the interpreter.


@triton.jit
def low_half(word, T: tl.constexpr):
    return word.to(tl.uint16).to(T, bitcast=True)


@triton.jit
def high_half(word, T: tl.constexpr):
    return (word >> 16).to(tl.uint16).to(T, bitcast=True)


@triton.jit
def wide(number):
    """bf16 bits as fp32: a bf16 number is the upper half of an fp32 one."""
    return (number.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bit(word, shift):
    return (word >> shift & 1) != 0


@triton.jit
def nibble_shift():
    """How far a group's nibble stands above the unit's lowest, [1, 1, 4]."""
    return (4 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]


@triton.jit
def negative(metadata, signs):
    """The signs of the pruned positions 0 .. 3, 1 = negative: bit 4 j for group j.

    All other bits are undefined. signs: the 8 bits of one plane.

    Position 0 can only be the first pruned one and 3 only the second; 1 is the second if 0 is
    pruned too, that is if i0 = 2; 2 is the second unless i1 = 1.
    """
    signs = (signs | signs << 4) & 0x0F0F
    first = signs | signs << 2  # The two sign bits of a group are at the foot of its nibble.
    second = first >> 1
    i0_high, i1_high = metadata >> 1, metadata >> 3
    return Four(
        first,
        i0_high & second | not_(i0_high) & first,
        i1_high & second | not_(i1_high) & first,
        second,
    )


@triton.jit
def above_zero(code, HALF: tl.constexpr):
    """A code that is HALF too large, and so not negative, as fp32.

    It uses the magic number 2^23, since conversions run at a quarter of the rate.
    """
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + HALF)


@triton.jit
def integer(code, BITS: tl.constexpr):
    """A two's complement code at the foot of a word as fp32."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    return above_zero(code & (2 * HALF - 1) ^ HALF, HALF)
