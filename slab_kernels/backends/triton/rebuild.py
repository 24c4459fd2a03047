"""The Triton kernel that rebuilds a dense weight from the stream of backends/cuda/layout.py.

What csrc/cuda/params.h says of a block holds here: lane = 4 g + t, register i = 2 c + h holds the
two kept values of one group of four inputs, of row g + 8 h and the group 8 step + 4 c + t. A thread
rebuilds the eight groups of one lane in one step of 32 inputs; four tables of pairs.py, looked up
by `prmt`, say where kept and pruned numbers go. Nothing depends on which thread that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import GATHERED, PRUNED, convert, look_up, nibble_indices, prmt, product
from .units import above_zero, high_half, low_half


@triton.jit
def _widened(pair, T: tl.constexpr):
    """Both numbers of a pair in fp32."""
    return low_half(pair, T).to(tl.float32), high_half(pair, T).to(tl.float32)


@triton.jit
def _turned(word, BITS: tl.constexpr):
    """A word rotated right by fewer than 32 bits."""
    return word >> BITS | word << (32 - BITS)


@triton.jit
def _at_bits(word, MASK: tl.constexpr):
    """What stands at bits 0 and 16 of a word, as fp32."""
    return (word & MASK).to(tl.float32), (word >> 16 & MASK).to(tl.float32)


@triton.jit
def _entry(low, high):
    """A tuple of the one word of 64 bits that holds two pairs."""
    return (high.to(tl.uint64) << 32 | low.to(tl.uint64),)


# Nothing gains by being known: one compiled kernel serves all sizes of a kind of weight.
@triton.jit(do_not_specialize=["rows", "K", "row_groups"])
def rebuild_kernel(
    stream_ptr, u_ptr, v_ptr, w_ptr, rows, K, row_groups,
    VALUES: tl.constexpr, GROUP_STEPS: tl.constexpr, RANK: tl.constexpr, PLANES: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """w [rows, row_groups], four numbers of type T each: W = S + (U V^T) * B without the adapter.

    A program rebuilds one block, 32 rows x 128 inputs. The grid is (K blocks, row pairs).

    stream [row pairs, K blocks, words of a block], u [row pairs * 32, RANK] words that hold a
    number twice and v [RANK, 32 K blocks], four numbers each, are a CudaState's, of one part of the
    weight or of some row pairs of it. Groups of w from K on are not written.
    VALUES is w16, int8 or int4; GROUP_STEPS: steps of 32 inputs that a scale covers.
    """
    VALUE_WORDS: tl.constexpr = 512 if VALUES == "w16" else (256 if VALUES == "int8" else 128)
    METADATA: tl.constexpr = 2 * VALUE_WORDS  # the first word behind the values of both tiles
    SIGNS: tl.constexpr = METADATA + 128
    SCALES: tl.constexpr = SIGNS + (64 * PLANES if RANK > 0 else 0)
    WORDS: tl.constexpr = SCALES + (0 if VALUES == "w16" else 16 * (4 // GROUP_STEPS))
    k_block, k_blocks = tl.program_id(0), tl.num_programs(0)
    row_pair = tl.program_id(1).to(tl.int64)
    TOP: tl.constexpr = 1.75 if PLANES == 3 else 1.5  # the largest level
    item = tl.arange(0, 128)
    step, lane = item >> 5, item & 31
    g, t = lane >> 2, lane & 3
    odd, upper = step & 1, step >> 1
    block = stream_ptr + (row_pair * k_blocks + k_block) * WORDS

    # The eight nibbles, of tile r, half h and column block c: bit 4 (c + 2 r) + 16 h of one word.
    nibbles = tl.zeros((128,), tl.uint32)
    for r in tl.static_range(2):
        for c in tl.static_range(2):
            word = tl.load(block + METADATA + 4 * (4 * g + 2 * odd + c) + 2 * r + upper)
            nibbles |= (word >> (4 * t).to(tl.uint32) & 0x000F000F) << (4 * c + 8 * r)
    index = nibble_indices(nibbles)
    entries = ()
    for r in tl.static_range(2):
        if RANK > 0 and PLANES == 1:
            signs = tl.load(block + SIGNS + 2 * lane + r) << (4 * step).to(tl.uint32)
        elif RANK > 0:
            levels = tl.load(block + SIGNS + 4 * lane + 2 * r + upper) >> (8 * odd).to(tl.uint32)
            if PLANES == 3:
                third = tl.load(block + SIGNS + 128 + 2 * lane + r) >> (4 * step).to(tl.uint32)
        for h in tl.static_range(2):
            row = row_pair * 32 + 16 * r + 8 * h + g
            # A byte of these is the selector of one group: bytes 2 r + c belong to this tile.
            here = index >> 16 * h
            lane0, lane1 = look_up(GATHERED, 0, here), look_up(GATHERED, 1, here)
            lane2, lane3 = look_up(GATHERED, 2, here), look_up(GATHERED, 3, here)
            if RANK > 0:
                pruned0, pruned1 = look_up(PRUNED, 0, here), look_up(PRUNED, 1, here)
            if VALUES != "w16":
                group = step // GROUP_STEPS
                scale = tl.load(block + SCALES + 16 * group + 2 * g + r)
                scale = (scale << 16 if h == 0 else scale & 0xFFFF0000).to(tl.float32, bitcast=True)
                if VALUES == "int4":
                    scale *= 4.0 if h == 0 or T == tl.bfloat16 else 64.0
            for c in tl.static_range(2):
                both = 0x40 + 0x11 * (2 * r + c)  # the selector of byte 2 r + c of two words
                if VALUES == "w16":
                    kept = tl.load(block + VALUE_WORDS * r + 128 * step + 4 * lane + 2 * c + h)
                elif VALUES == "int8":
                    at = block + VALUE_WORDS * r + 128 * upper + 4 * lane + 2 * odd + c
                    codes = tl.load(at) >> 8 * h
                    low, high = above_zero(codes & 0xFF, 128), above_zero(codes >> 16 & 0xFF, 128)
                    kept = convert(low * scale, high * scale, T)
                else:
                    word = tl.load(block + VALUE_WORDS * r + 4 * lane + step)
                    codes = _turned(word, 2 + 4 * (2 * c + h))
                    low, high = above_zero(codes & 15, 8), above_zero(codes >> 16 & 15, 8)
                    kept = convert(low * scale, high * scale, T)
                k = k_block * 32 + 8 * step + 4 * c + t  # the group of four inputs
                other = tl.zeros((128,), tl.uint32)
                if RANK > 0:
                    first, second = 0.0, 0.0
                    which = prmt(pruned0, pruned1, both)
                    for rank in tl.static_range(RANK):
                        four = tl.load(v_ptr + rank * (32 * k_blocks) + k)
                        v = prmt(four.to(tl.uint32), (four >> 32).to(tl.uint32), which)
                        u = tl.load(u_ptr + row * RANK + rank)
                        if RANK == 1 and PLANES == 1:
                            other = product(u, v, T)
                        else:
                            u = low_half(u, T).to(tl.float32)
                            v_first, v_second = _widened(v, T)
                            first, second = first + u * v_first, second + u * v_second
                    if PLANES > 1:
                        # 3/2 - index, or with a third plane 7/4 - index - its bit / 2.
                        index0, index1 = _at_bits(levels >> 4 * c + 2 * h, 3)
                        if PLANES == 3:
                            bit0, bit1 = _at_bits(third >> c + 2 * h, 1)
                            index0, index1 = index0 + 0.5 * bit0, index1 + 0.5 * bit1
                        first, second = first * (TOP - index0), second * (TOP - index1)
                    if RANK > 1 or PLANES > 1:
                        other = convert(first, second, T)
                    if PLANES == 1:
                        other ^= signs << 2 * c + h & 0x80008000
                low = prmt(kept, other, prmt(lane0, lane1, both))
                high = prmt(kept, other, prmt(lane2, lane3, both))
                entries += _entry(low, high)
    # Stores come last, since no load could be moved before one.
    for r in tl.static_range(2):
        for h in tl.static_range(2):
            row = row_pair * 32 + 16 * r + 8 * h + g
            for c in tl.static_range(2):
                k = k_block * 32 + 8 * step + 4 * c + t
                inside = (row < rows) & (4 * k < K)
                tl.store(w_ptr + row * row_groups + k, entries[4 * r + 2 * h + c], mask=inside)
