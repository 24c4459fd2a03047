"""Registers of `mma.sp` in Triton: a tensor [32 warps] of 32-bit words is one register of every
thread, and `inline_asm_elementwise` applies one instruction to each thread's own.

Element i is lane i % 32 of warp i // 32. Triton gives a tensor of as many elements as threads this
layout, and to [32 warps, 4] the one in which a thread holds a row, but does not promise it: tests
execute the PTX, and `sparse.self_check` compares a block on the device.

A fragment is a tuple of four words (PTX ISA, "Matrix fragments for mma.sp.m16n8k32"), the sums of
one product a tuple of four fp32 numbers. T is the activations' type.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SUMS = "{$0, $1, $2, $3}"
_SPARSE = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.%s.%s.f32 " + _SUMS + ", "
    "{$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, %d;"
)
_DENSE = (
    "mma.sync.aligned.m16n8k16.row.col.f32.%s.%s.f32 " + _SUMS + ", "
    "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
# For each step the words 0, 4, 8 and 12 behind a pointer; of `_LOAD_LEFT` only those that are left.
_LOAD = "ld.global.b32 $%d, [$4 + %d];"
_LOAD_LEFT = "setp.gt.s32 here, $5, %d; mov.b32 $%d, 0; @here ld.global.b32 $%d, [$4 + %d];"
LOADS = tl.constexpr(
    tuple(" ".join(_LOAD % (i, 64 * s + 16 * i) for i in range(4)) for s in range(4))
)
LOADS_LEFT = tl.constexpr(
    tuple(
        "{ .reg .pred here; "
        + " ".join(_LOAD_LEFT % (16 * s + 4 * i, i, i, 64 * s + 16 * i) for i in range(4))
        + " }"
        for s in range(4)
    )
)
LOAD_PAIR = tl.constexpr(
    "{ .reg .pred here; setp.ne.b32 here, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
    "@here ld.global.b32 $0, [$2]; @here ld.global.b32 $1, [$2 + 4]; }"
)
SPARSE_FP16 = tl.constexpr(tuple(_SPARSE % ("f16", "f16", selector) for selector in (0, 1)))
SPARSE_BF16 = tl.constexpr(tuple(_SPARSE % ("bf16", "bf16", selector) for selector in (0, 1)))
DENSE_FP16 = tl.constexpr(_DENSE % ("f16", "f16"))
DENSE_BF16 = tl.constexpr(_DENSE % ("bf16", "bf16"))


@triton.jit
def multiply_sparse(a, b, c, metadata, SELECTOR: tl.constexpr, T: tl.constexpr):
    """c + a b, where `metadata` says which 16 of the 32 inputs of b the numbers of a meet."""
    TEXT: tl.constexpr = SPARSE_FP16[SELECTOR] if T == tl.float16 else SPARSE_BF16[SELECTOR]
    return tl.inline_asm_elementwise(
        TEXT,
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], metadata],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def multiply_dense(a, b0, b1, c, T: tl.constexpr):
    """c + a b of 16 inputs."""
    TEXT: tl.constexpr = DENSE_FP16 if T == tl.float16 else DENSE_BF16
    return tl.inline_asm_elementwise(
        TEXT,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_inputs(p, left, STEP: tl.constexpr):
    """The B fragment of x or v for 32 inputs; 0 beyond the words that are left, unless that is
    None: all are there.

    It is one text and not four `tl.load`: for each of those Triton's choice of layouts walks
    through the whole kernel, again from each operation, which took four fifths of the time to
    compile. The text has effects, so it stays behind `gdc_wait`. An output is not to share a
    register with the pointer, which later loads need.
    """
    if left is None:
        TEXT: tl.constexpr = LOADS[STEP]
        b = tl.inline_asm_elementwise(
            TEXT,
            "=&r,=&r,=&r,=&r,l",
            [p],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        TEXT_LEFT: tl.constexpr = LOADS_LEFT[STEP]
        b = tl.inline_asm_elementwise(
            TEXT_LEFT,
            "=&r,=&r,=&r,=&r,l,r",
            [p, left],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    return b


@triton.jit
def load_pair(p, exists):
    """Two fp32 numbers that follow each other, 0 where `exists` is not, as `load_inputs` does."""
    return tl.inline_asm_elementwise(
        LOAD_PAIR,
        "=&f,=&f,l,r",
        [p, exists.to(tl.int32)],
        dtype=(tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch(p):
    """Asks for the line in L2 that each thread's pointer is in (PTX ISA, "prefetch")."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // nothing in $0",
        "=r,l",
        [p.to(tl.int64)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def complement(metadata):
    """The metadata of the pruned positions, for eight groups."""
    t = ((metadata >> 3) ^ (metadata >> 1)) & 0x11111111
    return metadata ^ (0xAAAAAAAA - 5 * t)


@triton.jit
def _plus(a, CONSTANT: tl.constexpr):
    """a + a constant, two fp16 numbers."""
    return tl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, CONSTANT], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _plus_bf16(a, one, CONSTANT: tl.constexpr):
    """The same of bf16 numbers, which have no sum before sm_90."""
    TEXT: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(
        TEXT, "=r,r,r,r", [a, one, CONSTANT], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _minus(a, b):
    """b - a, two bf16 numbers."""
    TEXT: tl.constexpr = "{ .reg .b32 u; mov.b32 u, 0xBF80BF80; fma.rn.bf16x2 $0, $1, u, $2; }"
    return tl.inline_asm_elementwise(TEXT, "=r,r,r", [a, b], tl.uint32, is_pure=True, pack=1)


@triton.jit
def _rotated(w, BITS: tl.constexpr):
    """w rotated right. (Written with shifts, LLVM splits each masked use: three times the LOP3.)"""
    TEXT: tl.constexpr = "shf.r.wrap.b32 $0, $1, $1, $2;"
    return tl.inline_asm_elementwise(TEXT, "=r,r,n", [w, BITS], tl.uint32, is_pure=True, pack=1)


@triton.jit
def _even_bytes(w, magic):
    """fp16 1024 + byte, of bytes 0 and 2."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5250;", "=r,r,r", [w, magic], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _odd_bytes(w, magic):
    """fp16 1024 + byte, of bytes 1 and 3."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5351;", "=r,r,r", [w, magic], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _bytes_bf16(w, magic):
    """q of the bytes 0 and 2, which hold q + 128, exactly: 128 + the low seven bits, less 256 or
    128 by the eighth. bf16 has seven bits behind the leading one."""
    return _minus(w & 0x00800080 ^ (magic ^ 0x00800080), w & 0x007F007F | magic)


@triton.jit
def from_int8(w, later, magic, T: tl.constexpr):
    """A fragment of codes: w holds those of a0 and a1, later those of a2 and a3."""
    if T == tl.float16:
        a0, a1 = _plus(_even_bytes(w, magic), 0xE480E480), _plus(_odd_bytes(w, magic), 0xE480E480)
        a2 = _plus(_even_bytes(later, magic), 0xE480E480)
        a3 = _plus(_odd_bytes(later, magic), 0xE480E480)
    else:
        a0, a1 = _bytes_bf16(w, magic), _bytes_bf16(w >> 8, magic)
        a2, a3 = _bytes_bf16(later, magic), _bytes_bf16(later >> 8, magic)
    return a0, a1, a2, a3


@triton.jit
def from_int4(w, magic, one, T: tl.constexpr):
    """A fragment of codes times 4 or, in fp16, of rows g + 8 times 64, exactly.

    fp16: 1024 + 4 (q + 8) - 1056 and 1024 + 64 (q + 8) - 1536; bf16: 128 + 4 (q + 8) - 160.
    """
    if T == tl.float16:
        turned = _rotated(w, 8)
        a0 = _plus(w & 0x003C003C | magic, 0xE420E420)
        a1 = _plus(w & 0x03C003C0 | magic, 0xE600E600)
        a2 = _plus(turned & 0x003C003C | magic, 0xE420E420)
        a3 = _plus(turned & 0x03C003C0 | magic, 0xE600E600)
    else:
        a0 = _plus_bf16(w & 0x003C003C | magic, one, 0xC320C320)
        a1 = _plus_bf16(_rotated(w, 4) & 0x003C003C | magic, one, 0xC320C320)
        a2 = _plus_bf16(_rotated(w, 8) & 0x003C003C | magic, one, 0xC320C320)
        a3 = _plus_bf16(_rotated(w, 12) & 0x003C003C | magic, one, 0xC320C320)
    return a0, a1, a2, a3


@triton.jit
def signs_of(word, one, STEP: tl.constexpr):
    """A fragment of +-1, one plane. one: 1 twice, in the activations' type."""
    at: tl.constexpr = 4 * STEP
    return (
        word << at & 0x80008000 | one,
        word << at + 1 & 0x80008000 | one,
        word << at + 2 & 0x80008000 | one,
        word << at + 3 & 0x80008000 | one,
    )


@triton.jit
def _and_or(a, MASK: tl.constexpr, c):
    """a & MASK | c. (Of several in a row LLVM makes three instructions for two.)"""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [a, MASK, c], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _shifted_down(w, BITS: tl.constexpr):
    return w >> BITS if BITS >= 0 else w << -BITS


@triton.jit
def _level(
    word,
    third,
    magic,
    PLANES: tl.constexpr,
    STEP: tl.constexpr,
    REGISTER: tl.constexpr,
    T: tl.constexpr,
):
    """One register of `levels_of`: 3/2 (two planes) or 7/4 (three) less the index.

    The index is put into the mantissa of 1024, or in bf16 of 128; the third plane's bit goes right
    below it, where it counts half a unit.
    """
    COLUMN: tl.constexpr = REGISTER // 2
    INDEX_AT: tl.constexpr = 4 if T == tl.float16 else 2
    AT: tl.constexpr = INDEX_AT + 2 * (REGISTER % 2)
    SCALE: tl.constexpr = 0x00010001 * (AT << (10 if T == tl.float16 else 7))
    TOP: tl.constexpr = (0x00030003 << (AT - 1)) if PLANES == 2 else (0x00070007 << (AT - 2))
    ONE: tl.constexpr = 0x3C003C00 if T == tl.float16 else 0x3F803F80
    MAGIC: tl.constexpr = 0x64006400 if T == tl.float16 else 0x43004300
    FACTOR: tl.constexpr = (ONE - SCALE) | 0x80008000
    ADDED: tl.constexpr = MAGIC - SCALE + TOP
    index = _shifted_down(word, 8 * (STEP % 2) + 4 * COLUMN - INDEX_AT)
    number = _and_or(index, 0x00030003 << AT, magic)
    if PLANES == 3:
        half = _shifted_down(third, 4 * STEP + COLUMN + 1 - INDEX_AT)
        number = _and_or(half, 0x00010001 << (AT - 1), number)
    FP16: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
    BF16: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(
        FP16 if T == tl.float16 else BF16, "=r,r,r,r", [number, FACTOR, ADDED], tl.uint32,
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def levels_of(word, third, magic, PLANES: tl.constexpr, STEP: tl.constexpr, T: tl.constexpr):
    """A fragment of the levels of two or three planes. word: of this step's half of the block."""
    return (
        _level(word, third, magic, PLANES, STEP, 0, T),
        _level(word, third, magic, PLANES, STEP, 1, T),
        _level(word, third, magic, PLANES, STEP, 2, T),
        _level(word, third, magic, PLANES, STEP, 3, T),
    )
