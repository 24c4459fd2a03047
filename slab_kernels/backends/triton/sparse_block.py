"""A block of the prepared stream (csrc/cuda/params.h) in the registers of a warp, and the operands
that its words become, for sparse_kernel.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .sparse_operands import from_int4, from_int8, levels_of, prefetch, signs_of


class Kind(NamedTuple):
    """What the kernel is compiled for."""

    values: str  # w16, int8, int4, or dense for the adapter's Q
    value_bytes: int  # of a block
    block_bytes: int
    planes: int  # sign planes, 0 without signs
    rank: int  # of the sign term
    group_steps: int  # steps of 32 inputs that a scale covers
    adapter_steps: int  # steps of 16 that the adapter's rank takes
    parts: int  # fused weights
    dtype: tl.dtype  # of the activations
    tokens: int  # of a program: 1, 2, 4, 8 or 16
    sign_tiles: int  # n8 tiles of ranks and tokens
    warps: int  # of a program
    splits: int  # programs that share K
    z_splits: int  # shares of K in z
    overlap: bool  # whether it starts before the kernel before it has ended


class Words(NamedTuple):
    """What a thread holds of a block before it is multiplied, as tuples of words [32 warps]."""

    metadata: Any  # tile 0 word 0, tile 0 word 1, tile 1 word 0, tile 1 word 1
    signs: Any  # one plane: of tiles 0 and 1; more: 4 words as metadata, and of a third plane 2
    codes: Any  # int4: a word for each step of tile 0, then of tile 1
    scales: Any  # int8, int4: for each scale group rows g, g + 8 of tile 0 and of tile 1


class Magic(NamedTuple):
    """Constants that the compiler cannot know. LOP3 takes one immediate; the other operand must be
    a register."""

    codes: Any  # 1024, or in bf16 128, twice
    one: Any  # 1 twice


@triton.jit
def load_words(p, COUNT: tl.constexpr):
    """2 or 4 words of each thread by one load, as a tuple."""
    w = tl.load(p[:, None] + tl.arange(0, COUNT)[None, :])
    if COUNT == 2:
        words = tl.split(w)
    else:
        even, odd = tl.split(tl.reshape(w, (w.shape[0], 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        words = (w0, w1, w2, w3)
    return words


@triton.jit
def load_half(block, lane, exists, HALF: tl.constexpr, KIND: tl.constexpr):
    """The kept values of two steps, of tile 0 and then of tile 1, unless they are int4; 0 where no
    block exists."""
    LOADS: tl.constexpr = KIND.value_bytes // 2048
    codes = ()
    for tile in tl.static_range(2):
        for i in tl.static_range(LOADS):
            at = block + 128 * ((2 * tile + HALF) * LOADS + i)
            codes += load_words(at + lane * 4, 4)
    return codes if exists is None else where_exists(exists, codes, 0)


@triton.jit
def load_block(block, lane, KIND: tl.constexpr):
    """What is loaded a round ahead: all of a block but int8 codes and 16-bit values, which would
    take too many registers. They are only brought into L2."""
    VALUE_WORDS: tl.constexpr = KIND.value_bytes // 4
    metadata, signs, codes, scales = (), (), (), ()
    at = block + VALUE_WORDS
    if KIND.values == "int4":
        codes = load_words(block + lane * 4, 4) + load_words(block + 128 + lane * 4, 4)
    else:
        prefetch(block + lane * (VALUE_WORDS // 32))
    if KIND.values != "dense":
        metadata = load_words(at + lane * 4, 4)
        at += 128
    if KIND.planes == 1:
        signs = load_words(at + lane * 2, 2)
        at += 64
    if KIND.planes > 1:
        signs = load_words(at + lane * 4, 4)
        at += 128
    if KIND.planes == 3:
        signs += load_words(at + lane * 2, 2)
        at += 64
    if KIND.values == "int8" or KIND.values == "int4":
        GROUPS: tl.constexpr = 4 // KIND.group_steps
        for group in tl.static_range(GROUPS):
            scales += load_words(at + 16 * group + (lane >> 2) * 2, 2)
    return Words(metadata, signs, codes, scales)


@triton.jit
def where_exists(exists, words, other):
    """Every word of a tuple, or `other` where nothing exists."""
    COUNT: tl.constexpr = len(words)
    chosen = ()
    for i in tl.static_range(COUNT):
        chosen += (tl.where(exists, words[i], other),)
    return chosen


@triton.jit
def kept_operand(words, half, magic, TILE: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr):
    """The A fragment of the kept values of a row tile and a step. half: of `load_half`."""
    if KIND.values == "int4":
        a = from_int4(words.codes[4 * TILE + STEP], magic.codes, magic.one, KIND.dtype)
    elif KIND.values == "int8":
        AT: tl.constexpr = 4 * TILE + 2 * (STEP % 2)
        a = from_int8(half[AT], half[AT + 1], magic.codes, KIND.dtype)
    else:
        FIRST: tl.constexpr = 8 * TILE + 4 * (STEP % 2)
        a = (half[FIRST], half[FIRST + 1], half[FIRST + 2], half[FIRST + 3])
    return a


@triton.jit
def sign_operand(signs, magic, TILE: tl.constexpr, STEP: tl.constexpr, KIND: tl.constexpr):
    """The A fragment of the signs, or of the levels of several planes."""
    if KIND.planes == 1:
        a = signs_of(signs[TILE], magic.one, STEP)
    else:
        word = signs[2 * TILE + STEP // 2]
        third = word
        if KIND.planes == 3:
            third = signs[4 + TILE]
        a = levels_of(word, third, magic.codes, KIND.planes, STEP, KIND.dtype)
    return a
