"""The Triton kernels: y[M,N] = x[M,K] W.T with W = S + (U V^T) * B + P Q^T, straight from the canonical packed tensors.

One function, `_weight`, rebuilds a tile of W in registers; three kernels use it: `linear_kernel` (decode and prefill: the
same body, other tiles), `dense_kernel` (writes W), and `adapter_kernel` gives the first z = x Q. Triton cannot emit
`mma.sp`, so the pruned entries are filled in and the product is an ordinary `tl.dot`, with the weight as its first operand:
out_features are the rows, and few tokens cost few columns.

A unit is 16 inputs of one row: 16 bits of metadata, 8 of signs, 8 kept values. 16-bit weights are handled as pairs in
32-bit words, in integer arithmetic that acts on both lanes at once: about 10 instructions a weight, where selecting entry by
entry takes 15 (counted in the machine code, tests/test_triton_code.py). No atomics, and every sum has one fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _bits(number):
    """A 16-bit float's bits in a 32-bit word."""
    return number.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _mask(word, shift):
    """Bit `shift` of each lane, spread over the lane: 0 or 0xFFFF."""
    return (word >> shift & 0x10001) * 0xFFFF


@triton.jit
def _positions(m):
    """Which of positions 0..3 a nibble i0 | i1 << 2 keeps: bit 4j for group j, other bits undefined.

    Legal nibbles are 4 8 C 9 D E, and on these: 0 is kept unless i0 > 0, 1 if i0 is odd or i1 < 2, 2 if i0 = 2 or
    i1 is even, 3 if i1 = 3 (bits 0 and 1 are i0, bits 2 and 3 are i1).
    """
    i0_low, i0_high, i1_low, i1_high = m, m >> 1, m >> 2, m >> 3
    return _not(i0_low | i0_high), i0_low | _not(i1_high), i0_high | _not(i1_low), i1_low & i1_high


@triton.jit
def _negative(m, s):
    """Signs of the pruned positions 0..3, 1 = negative: bit 4j for group j. s: 8 sign bits of a unit, two a group.

    Position 0 can only be the first pruned one and 3 only the second; 1 is the second if 0 is pruned too, that is
    if i0 = 2; 2 is the second unless i1 = 1.
    """
    s = (s | s << 4) & 0x0F0F
    s = s | s << 2  # two sign bits at the foot of each nibble
    second = s >> 1
    i0_high, i1_high = m >> 1, m >> 3
    return s, (i0_high & second) | (_not(i0_high) & s), (i1_high & second) | (_not(i1_high) & s), second


@triton.jit
def _integer(code, BITS: tl.constexpr):
    """A two's complement code at the foot of a word as fp32, by the magic number 2^23: conversions run at a quarter rate."""
    half: tl.constexpr = 1 << (BITS - 1)
    biased = (code & (2 * half - 1)) ^ half | 0x4B000000
    return biased.to(tl.float32, bitcast=True) - (8388608.0 + half)


@triton.jit
def _kept(values_ptr, scales_ptr, rows, k, units, inside, VALUES: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
          BK: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The first and second kept value of every group, [BN, BK/16, 4]: as one word of two lanes if T has 16 bits, else as fp32."""
    C: tl.constexpr = BK // 16
    g = k // 4 + tl.arange(0, 4 * C)
    at = values_ptr + rows[:, None] * (units * 4) + g[None, :]
    word = tl.load(at, mask=(g < units * 4)[None, :], other=0) if MASKED else tl.load(at)
    word = tl.reshape(word, (BN, C, 4)).to(tl.uint32)
    if VALUES == "int8" or VALUES == "int4":
        BITS: tl.constexpr = 8 if VALUES == "int8" else 4
        if GROUP == 0:
            scale = tl.load(scales_ptr + rows)[:, None]
        else:
            c = k // 16 + tl.arange(0, C)
            at = scales_ptr + rows[:, None] * (units * 16 // GROUP) + (c // (GROUP // 16))[None, :]
            scale = tl.load(at, mask=inside[None, :], other=0) if MASKED else tl.load(at)
        scale = tl.expand_dims((scale.to(tl.uint32) << 16).to(tl.float32, bitcast=True), 2)  # bf16: fp32's upper half
        first, second = _integer(word, BITS) * scale, _integer(word >> BITS, BITS) * scale
        if T.primitive_bitwidth == 16:
            return _pair(_bits(first.to(T)), _bits(second.to(T))), first
        return first, second
    if T.primitive_bitwidth == 16:
        return word, word
    if VALUES == "bf16":
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    return _low(word, tl.float16).to(tl.float32), _high(word, tl.float16).to(tl.float32)


@triton.jit
def _magnitudes(u_ptr, v_ptr, rows, k, units, N, plane: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """(U V^T) at one position of every group, [BN, C, 4] in fp32."""
    g = k // 4 + tl.arange(0, 4 * C)
    total = 0.0
    for r in tl.static_range(RANK):
        at = v_ptr + (4 * r + plane) * (units * 4) + g
        v = tl.load(at, mask=g < units * 4, other=0.0) if MASKED else tl.load(at)
        total += tl.load(u_ptr + r * N + rows)[:, None, None] * tl.reshape(v, (1, C, 4))
    return total


@triton.jit
def _weight(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, u, rows, k, units, N, VALUES: tl.constexpr,
            GROUP: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, T: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """W[rows, k : k + BK] without its adapter, [BN, BK] in T. v_ptr is the rows' part's; u from `_scale_of_rows`.

    With 16 bits, kept values and pruned magnitudes never overlap, so that one fused multiply-add of pairs, kept + u v,
    puts them together without a rounding more than the product's.
    """
    C: tl.constexpr = BK // 16
    c = k // 16 + tl.arange(0, C)
    inside = c < units
    at = rows[:, None] * units + c[None, :]
    m = tl.load(metadata_ptr + at, mask=inside[None, :], other=0) if MASKED else tl.load(metadata_ptr + at)
    m = tl.broadcast_to(tl.expand_dims(m.to(tl.uint32), 2), (BN, C, 4))
    k0, k1, k2, k3 = _positions(m)
    first, second = _kept(values_ptr, scales_ptr, rows, k, units, inside, VALUES, GROUP, BN, BK, T, MASKED)
    shift = (4 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
    if RANK > 0:
        s = tl.load(signs_ptr + at, mask=inside[None, :], other=0) if MASKED else tl.load(signs_ptr + at)
        s = tl.broadcast_to(tl.expand_dims(s.to(tl.uint32), 2), (BN, C, 4))
        n0, n1, n2, n3 = _negative(m, s)
    if T.primitive_bitwidth == 32:
        k0, k1, k2, k3 = k0 >> shift & 1, k1 >> shift & 1, k2 >> shift & 1, k3 >> shift & 1
        w0, w1, w2, w3 = first, tl.where(k0 != 0, second, first), tl.where(k3 != 0, first, second), second
        zero = tl.zeros_like(first)
        l0, l1, l2, l3 = zero, zero, zero, zero
        if RANK > 0:
            l0 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 0, RANK, C, MASKED)
            l1 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 1, RANK, C, MASKED)
            l2 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 2, RANK, C, MASKED)
            l3 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 3, RANK, C, MASKED)
            l0, l1 = tl.where((n0 >> shift & 1) != 0, -l0, l0), tl.where((n1 >> shift & 1) != 0, -l1, l1)
            l2, l3 = tl.where((n2 >> shift & 1) != 0, -l2, l2), tl.where((n3 >> shift & 1) != 0, -l3, l3)
        w0, w1 = tl.where(k0 != 0, w0, l0), tl.where(k1 != 0, w1, l1)
        w2, w3 = tl.where(k2 != 0, w2, l2), tl.where(k3 != 0, w3, l3)
    else:
        word = first  # lanes: first and second kept value
        kept01, kept23 = _mask(_pair(k0, k1), shift), _mask(_pair(k2, k3), shift)
        # Position 0 takes the first kept value and 1 the second if 0 is kept, else the first: the word, or the word a lane up.
        both = kept01 << 16 | 0xFFFF
        w01 = (word & both | word << 16 & _not(both)) & kept01
        # Position 3 takes the second and 2 the first if 3 is kept, else the second: an arithmetic shift makes the choice's mask.
        both = (kept23.to(tl.int32) >> 16).to(tl.uint32)
        w23 = (word & both | word >> 16 & _not(both)) & kept23
        w0, w1, w2, w3 = _low(w01, T), _high(w01, T), _low(w23, T), _high(w23, T)
        if RANK > 0:
            if RANK == 1:
                g = k // 4 + tl.arange(0, 4 * C)
                v01 = tl.load(v_ptr + g, mask=g < units * 4, other=0) if MASKED else tl.load(v_ptr + g)
                v_ptr += units * 4
                v23 = tl.load(v_ptr + g, mask=g < units * 4, other=0) if MASKED else tl.load(v_ptr + g)
                v01, v23 = tl.reshape(v01, (1, C, 4)), tl.reshape(v23, (1, C, 4))
                l0, l1, l2, l3 = _low(v01, T), _high(v01, T), _low(v23, T), _high(v23, T)
            else:
                l0 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 0, RANK, C, MASKED).to(T)
                l1 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 1, RANK, C, MASKED).to(T)
                l2 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 2, RANK, C, MASKED).to(T)
                l3 = _magnitudes(u_ptr, v_ptr, rows, k, units, N, 3, RANK, C, MASKED).to(T)
            u01 = (u ^ _pair(n0, n1) << 15 - shift & 0x80008000) & _not(kept01)
            u23 = (u ^ _pair(n2, n3) << 15 - shift & 0x80008000) & _not(kept23)
            w0, w1 = _low(u01, T) * l0 + w0, _high(u01, T) * l1 + w1
            w2, w3 = _low(u23, T) * l2 + w2, _high(u23, T) * l3 + w3
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BN, BK))


@triton.jit
def _scale_of_rows(u_ptr, rows, RANK: tl.constexpr, T: tl.constexpr):
    """What the signs of 16-bit weights are given to, in both lanes: u if there is one, else 1 (magnitudes then come whole)."""
    if RANK == 1:
        u = tl.load(u_ptr + rows).to(tl.uint32)
    else:
        ONE: tl.constexpr = 0x3C00 if T == tl.float16 else 0x3F80
        u = (rows * 0 + ONE).to(tl.uint32)
    return tl.expand_dims(tl.expand_dims(u | u << 16, 1), 2)


@triton.jit
def _rows(tile, N, start1, start2, start3, BN: tl.constexpr, PARTS: tl.constexpr):
    """Part, rows and whether they exist, of a tile: fused weights follow each other, a tile never spans two."""
    part, first, begin, end = 0, 0, 0, N
    if PARTS > 1:
        end = start1
        for i in tl.static_range(1, PARTS):
            start = start1 if i == 1 else (start2 if i == 2 else start3)
            after = N if i == PARTS - 1 else (start2 if i == 1 else start3)
            tiles = first + tl.cdiv(end - begin, BN)
            beyond = (part == i - 1) & (tile >= tiles)
            part = tl.where(beyond, i, part)
            first = tl.where(beyond, tiles, first)
            begin = tl.where(beyond, start, begin)
            end = tl.where(beyond, after, end)
    rows = begin + (tile - first) * BN + tl.arange(0, BN)
    exists = rows < end
    return part, tl.minimum(rows, end - 1).to(tl.int64), exists  # int64: N K/2 may pass 2^31


@triton.jit
def linear_kernel(x_ptr, values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, p_ptr, z_ptr, bias_ptr, y_ptr,
                  M, N, K, units, x_stride, start1, start2, start3, T: tl.constexpr, VALUES: tl.constexpr,
                  GROUP: tl.constexpr, RANK: tl.constexpr, ADAPTER: tl.constexpr, Z_SPLITS: tl.constexpr,
                  PARTS: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y[M,N] in T, or with SPLITS > 1 the fp32 sums over one share of K each, [SPLITS, M, N]. Grid: (tiles, SPLITS).

    A program is BN out_features x BM tokens. x [M, K] with x_stride; values, metadata and signs as stored, viewed as one
    element a group (values) or unit; z [Z_SPLITS, M, PARTS * ADAPTER] fp32 from `adapter_kernel`; p [N, ADAPTER] in T.
    """
    token_tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    # Eight token tiles side by side: their programs run together and read a weight from memory once.
    tiles = tl.num_programs(0) // token_tiles
    group = pid // (8 * tiles)
    wide = tl.minimum(token_tiles - 8 * group, 8)
    inner = pid - group * 8 * tiles
    part, rows, exists = _rows(inner // wide, N, start1, start2, start3, BN, PARTS)
    tokens = (8 * group + inner % wide) * BM + tl.arange(0, BM)
    readable = tl.minimum(tokens, M - 1).to(tl.int64)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK

    PLANES: tl.constexpr = 2 if T.primitive_bitwidth == 16 and RANK == 1 else 4
    u = 0
    if RANK > 0:
        v_ptr += part * (RANK * PLANES) * (units * 4)
        if T.primitive_bitwidth == 16:
            u = _scale_of_rows(u_ptr, rows, RANK, T)
    total = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(split * share, tl.minimum(K, (split + 1) * share), BK):
        w = _weight(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, u, rows, k, units, N, VALUES, GROUP,
                    RANK, BN, BK, T, MASKED)  # fmt: skip
        inputs = k + tl.arange(0, BK)
        at = x_ptr + readable[None, :] * x_stride + inputs[:, None]
        x = tl.load(at, mask=(inputs < K)[:, None], other=0.0) if MASKED else tl.load(at)
        total = tl.dot(w, x, total, input_precision=PRECISION)
    if ADAPTER > 0:
        here = split == 0  # the others add nothing, in step with this one
        for r in tl.static_range(0, ADAPTER, 16):
            ranks = r + tl.arange(0, 16)
            p = tl.load(p_ptr + rows[:, None] * ADAPTER + ranks[None, :], mask=here, other=0.0)
            z = tl.zeros((16, BM), tl.float32)
            for i in tl.static_range(Z_SPLITS):
                at = z_ptr + (i * M + readable)[None, :] * (PARTS * ADAPTER) + (part * ADAPTER + ranks)[:, None]
                z += tl.load(at, mask=here, other=0.0)
            total = tl.dot(p, z.to(T), total, input_precision=PRECISION)
    if bias_ptr is not None and SPLITS == 1:
        total += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    at = y_ptr + (split * M + tokens)[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=(tokens < M)[None, :] & exists[:, None])


@triton.jit
def adapter_kernel(x_ptr, q_ptr, z_ptr, M, K, ranks, x_stride, T: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
                   BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """z = x Q over one share of K each: x [M, K], q [K, ranks] in T, z [SPLITS, M, ranks] fp32. Grid: (tiles, SPLITS)."""
    token_tiles = tl.cdiv(M, BM)
    tokens = tl.program_id(0) % token_tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) // token_tiles * BR + tl.arange(0, BR)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    readable = tl.minimum(tokens, M - 1).to(tl.int64)
    z = tl.zeros((BM, BR), tl.float32)
    for k in tl.range(split * share, tl.minimum(K, (split + 1) * share), BK):
        inputs = k + tl.arange(0, BK)
        x = tl.load(x_ptr + readable[:, None] * x_stride + inputs[None, :], mask=(inputs < K)[None, :], other=0.0)
        at = q_ptr + inputs[:, None] * ranks + columns[None, :]
        q = tl.load(at, mask=(inputs < K)[:, None] & (columns < ranks)[None, :], other=0.0)
        z = tl.dot(x, q, z, input_precision=PRECISION)
    at = z_ptr + (split * M + tokens)[:, None].to(tl.int64) * ranks + columns[None, :]
    tl.store(at, z, mask=(tokens < M)[:, None] & (columns < ranks)[None, :])


@triton.jit
def sum_kernel(partial_ptr, bias_ptr, y_ptr, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the SPLITS partial sums added in order, and the bias: partial [SPLITS, size] fp32, y [size], size = M N."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + s * size.to(tl.int64) + i, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dense_kernel(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, p_ptr, q_ptr, w_ptr, N, K, units,
                 start1, start2, start3, T: tl.constexpr, VALUES: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
                 ADAPTER: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr):  # fmt: skip
    """w[N, K] in T, adapter included: q [K, PARTS * ADAPTER] in T. Grid: (row tiles, K tiles)."""
    part, rows, exists = _rows(tl.program_id(0), N, start1, start2, start3, BN, PARTS)
    k = tl.program_id(1) * BK
    PLANES: tl.constexpr = 2 if T.primitive_bitwidth == 16 and RANK == 1 else 4
    u = 0
    if RANK > 0:
        v_ptr += part * (RANK * PLANES) * (units * 4)
        if T.primitive_bitwidth == 16:
            u = _scale_of_rows(u_ptr, rows, RANK, T)
    w = _weight(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, u, rows, k, units, N, VALUES, GROUP, RANK,
                BN, BK, T, True)  # fmt: skip
    inputs = k + tl.arange(0, BK)
    if ADAPTER > 0:
        total = w.to(tl.float32)
        for r in tl.static_range(0, ADAPTER, 16):
            ranks = r + tl.arange(0, 16)
            p = tl.load(p_ptr + rows[:, None] * ADAPTER + ranks[None, :])
            at = q_ptr + inputs[None, :] * (PARTS * ADAPTER) + (part * ADAPTER + ranks)[:, None]
            q = tl.load(at, mask=(inputs < K)[None, :], other=0.0)
            total = tl.dot(p, q, total, input_precision=PRECISION)
        w = total.to(T)
    at = w_ptr + rows[:, None] * K + inputs[None, :]
    tl.store(at, w, mask=exists[:, None] & (inputs < K)[None, :])
