"""The Triton kernels: y[M,N] = x[M,K] W.T with W = S + (U V^T) * B + P Q^T, from packed tensors.

tile.py rebuilds a tile of W in registers. Here are the kernels around it: `linear_kernel` (one body
for decode and prefill, with other tiles), `dense_kernel` (writes W), `adapter_kernel` (z = x Q) and
`sum_kernel`. `tl.dot` has no sparse product, so the pruned entries are filled in and the product is
an ordinary `tl.dot`. The weight is its first operand: out_features are the rows, and few tokens
cost few columns. There are no atomics, and every sum has one fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import row_levels
from .tile import weight
from .units import Place, Pointers


@triton.jit
def _rows(tile, N, start1, start2, start3, BN: tl.constexpr, PARTS: tl.constexpr):
    """Part, rows and whether they exist, of a tile: parts follow each other, no tile spans two."""
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
    return part, tl.minimum(rows, end - 1).to(tl.int64), exists  # int64: N K/2 may pass 2^31.


# What changes from call to call is not specialised: one compiled kernel serves every M of a regime,
# with bias or without.
@triton.jit(do_not_specialize=["M", "biased"])
def linear_kernel(
    x_ptr, values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, p_ptr, z_ptr, bias_ptr,
    y_ptr, biased, M, N, K, units, x_stride, start1, start2, start3,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr, Z_SPLITS: tl.constexpr, SPLITS: tl.constexpr,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, N] in the activations' type; with SPLITS > 1 fp32 sums [SPLITS, M, N] over shares of K.

    A program is BN out_features x BM tokens. The grid is (tiles, SPLITS).

    x [M, K] has x_stride. values, metadata and signs are stored tensors, viewed as one element per
    group (values) or unit. z [Z_SPLITS, M, parts * adapter rank] fp32 is of `adapter_kernel`;
    p [N, adapter rank] is in the activations' type.
    """
    ADAPTER: tl.constexpr = FORMAT.adapter_rank
    PARTS: tl.constexpr = FORMAT.parts
    token_tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    # Eight token tiles stand side by side: their programs run together and read a weight from
    # memory once.
    tiles = tl.num_programs(0) // token_tiles
    group = pid // (8 * tiles)
    wide = tl.minimum(token_tiles - 8 * group, 8)
    inner = pid - group * 8 * tiles
    part, rows, exists = _rows(inner // wide, N, start1, start2, start3, BN, PARTS)
    tokens = (8 * group + inner % wide) * BM + tl.arange(0, BM)
    readable = tl.minimum(tokens, M - 1).to(tl.int64)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK

    if FORMAT.rank > 0:
        v_ptr += part * FORMAT.rank * 4 * (units * 4)
    pointers = Pointers(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr)
    levels = row_levels(u_ptr, rows, FORMAT)
    total = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(split * share, tl.minimum(K, (split + 1) * share), BK):
        unit, of_k = k // 16 + tl.arange(0, BK // 16), k // 4 + tl.arange(0, BK // 4)
        w = weight(pointers, levels, Place(rows, unit, of_k, units, N), FORMAT, MASKED)
        inputs = k + tl.arange(0, BK)
        at = x_ptr + readable[None, :] * x_stride + inputs[:, None]
        x = tl.load(at, mask=(inputs < K)[:, None], other=0.0) if MASKED else tl.load(at)
        total = tl.dot(w, x, total, input_precision=PRECISION)
    if ADAPTER > 0:
        here = split == 0  # The other shares add nothing, in step with this one.
        for r in tl.range(0, ADAPTER, 16, num_stages=1):
            ranks = r + tl.arange(0, 16)
            p = tl.load(p_ptr + rows[:, None] * ADAPTER + ranks[None, :], mask=here, other=0.0)
            z = tl.zeros((16, BM), tl.float32)
            for i in tl.static_range(Z_SPLITS):
                token = (i * M + readable)[None, :]
                at = z_ptr + token * (PARTS * ADAPTER) + (part * ADAPTER + ranks)[:, None]
                z += tl.load(at, mask=here, other=0.0)
            total = tl.dot(p, z.to(FORMAT.dtype), total, input_precision=PRECISION)
    if SPLITS == 1:
        total += tl.load(bias_ptr + rows, mask=biased != 0, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + (split * M + tokens)[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=(tokens < M)[None, :] & exists[:, None])


@triton.jit(do_not_specialize=["M"])
def adapter_kernel(
    x_ptr, q_ptr, z_ptr, M, K, ranks, x_stride,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """z = x Q, [SPLITS, M, ranks] fp32 over one share of K each. The grid is (tiles, SPLITS).

    x [M, K] has x_stride; q [K, ranks] is in the same type.
    """
    token_tiles = tl.cdiv(M, BM)
    tokens = tl.program_id(0) % token_tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) // token_tiles * BR + tl.arange(0, BR)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    readable = tl.minimum(tokens, M - 1).to(tl.int64)
    z = tl.zeros((BM, BR), tl.float32)
    for k in tl.range(split * share, tl.minimum(K, (split + 1) * share), BK):
        inputs = k + tl.arange(0, BK)
        at = x_ptr + readable[:, None] * x_stride + inputs[None, :]
        x = tl.load(at, mask=(inputs < K)[None, :], other=0.0)
        at = q_ptr + inputs[:, None] * ranks + columns[None, :]
        q = tl.load(at, mask=(inputs < K)[:, None] & (columns < ranks)[None, :], other=0.0)
        z = tl.dot(x, q, z, input_precision=PRECISION)
    at = z_ptr + (split * M + tokens)[:, None].to(tl.int64) * ranks + columns[None, :]
    tl.store(at, z, mask=(tokens < M)[:, None] & (columns < ranks)[None, :])


@triton.jit(do_not_specialize=["biased", "size"])
def sum_kernel(
    partial_ptr, bias_ptr, y_ptr, biased, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [size] = the SPLITS partial sums [SPLITS, size] fp32 added in order, and the bias.

    size is M N. The grid is (size / BLOCK, rounded up).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + s * size.to(tl.int64) + i, mask=inside, other=0.0)
    total += tl.load(bias_ptr + i % N, mask=inside & (biased != 0), other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dense_kernel(
    values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr, p_ptr, q_ptr, w_ptr,
    N, K, units, start1, start2, start3,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w [N, K] in the activations' type, adapter included. The grid is (row tiles, K tiles).

    q is [K, parts * adapter rank] in the activations' type, the rest as in `linear_kernel`.
    """
    ADAPTER: tl.constexpr = FORMAT.adapter_rank
    PARTS: tl.constexpr = FORMAT.parts
    part, rows, exists = _rows(tl.program_id(0), N, start1, start2, start3, BN, PARTS)
    k = tl.program_id(1) * BK
    if FORMAT.rank > 0:
        v_ptr += part * FORMAT.rank * 4 * (units * 4)
    pointers = Pointers(values_ptr, metadata_ptr, signs_ptr, scales_ptr, u_ptr, v_ptr)
    levels = row_levels(u_ptr, rows, FORMAT)
    unit, group = k // 16 + tl.arange(0, BK // 16), k // 4 + tl.arange(0, BK // 4)
    w = weight(pointers, levels, Place(rows, unit, group, units, N), FORMAT, True)
    inputs = k + tl.arange(0, BK)
    if ADAPTER > 0:
        total = w.to(tl.float32)
        for r in tl.range(0, ADAPTER, 16, num_stages=1):
            ranks = r + tl.arange(0, 16)
            p = tl.load(p_ptr + rows[:, None] * ADAPTER + ranks[None, :])
            at = q_ptr + inputs[None, :] * (PARTS * ADAPTER) + (part * ADAPTER + ranks)[:, None]
            q = tl.load(at, mask=(inputs < K)[None, :], other=0.0)
            total = tl.dot(p, q, total, input_precision=PRECISION)
        w = total.to(FORMAT.dtype)
    at = w_ptr + rows[:, None] * K + inputs[None, :]
    tl.store(at, w, mask=exists[:, None] & (inputs < K)[None, :])
