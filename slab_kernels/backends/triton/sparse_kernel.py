"""One linear of few tokens by `mma.sp`: y[M,N] = x[M,K] W.T with W = S + (U V^T) * B + P Q^T, from
the prepared stream (csrc/cuda/params.h).

A program has 32 rows, and its warps are K groups, which take the K blocks in turn. The kept values
multiply x on the stored metadata, the signs multiply v x on its complement. Columns of the tensor
core's n8 tile are tokens for the kept values; for the signs they are pairs of rank and token.
"""

# Tuples grow in loops that Triton unrolls, which mypy cannot follow.
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .kernels import _rows as rows_of
from .pairs import product
from .sparse_block import (
    Magic,
    Words,
    kept_operand,
    load_block,
    load_half,
    load_words,
    sign_operand,
    where_exists,
)
from .sparse_operands import complement, load_inputs, load_pair, multiply_dense, multiply_sparse


class Place(NamedTuple):
    """Pointers [32 warps] to what a thread reads of a K block."""

    block: Any
    x: Any  # a tuple, one for each n8 tile of tokens
    v: Any  # a tuple, one for each v that the thread needs


@triton.jit
def _products(a, b, c, metadata, SELECTOR: tl.constexpr, FIRST: tl.constexpr, T: tl.constexpr):
    """The quads c[FIRST], c[FIRST + 1], ... plus a times each of the fragments b."""
    COUNT: tl.constexpr = len(b)
    new = ()
    for n in tl.static_range(COUNT):
        new += (multiply_sparse(a, b[n], c[FIRST + n], metadata, SELECTOR, T),)
    return new


@triton.jit
def _dense_products(half, x, c, TILE: tl.constexpr, STEP: tl.constexpr, T: tl.constexpr):
    """The same for dense values: both halves of a step."""
    COUNT: tl.constexpr = len(x)
    AT: tl.constexpr = 16 * TILE + 8 * (STEP % 2)
    new = ()
    for n in tl.static_range(COUNT):
        b = x[n]
        near = (half[AT], half[AT + 1], half[AT + 2], half[AT + 3])
        far = (half[AT + 4], half[AT + 5], half[AT + 6], half[AT + 7])
        sums = multiply_dense(near, b[0], b[1], c[TILE * COUNT + n], T)
        new += (multiply_dense(far, b[2], b[3], sums, T),)
    return new


@triton.jit
def _scaled(kept, sums, scales, GROUP: tl.constexpr):
    """kept + the sums of a scale group times its scale."""
    TILES: tl.constexpr = len(kept)
    new = ()
    for i in tl.static_range(TILES):
        pair = scales[2 * GROUP + i // (TILES // 2)]
        near = (pair << 16).to(tl.float32, bitcast=True)
        far = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        c, s = kept[i], sums[i]
        new += ((
            tl.fma(near, s[0], c[0]), tl.fma(near, s[1], c[1]),
            tl.fma(far, s[2], c[2]), tl.fma(far, s[3], c[3]),
        ),)  # fmt: skip
    return new


@triton.jit
def _round(kept, signs, words, place, lane, magic, exists, left, KIND: tl.constexpr):
    """The sums with one K block more in each warp, or only where one exists.

    kept holds quads [2 row tiles][n8 tiles of tokens], signs [2 row tiles][n8 tiles of ranks and
    tokens]. The sums of a scale group begin at zero.
    """
    T: tl.constexpr = KIND.dtype
    X_TILES: tl.constexpr = len(place.x)
    V_COUNT: tl.constexpr = len(place.v)
    INTEGER: tl.constexpr = KIND.values == "int8" or KIND.values == "int4"
    GROUP_STEPS: tl.constexpr = KIND.group_steps
    SIGN_TILES: tl.constexpr = KIND.sign_tiles
    zero = tl.zeros_like(kept[0][0])
    sums = kept
    pruned = ()
    if KIND.planes > 0:
        for i in tl.static_range(4):
            pruned += (complement(words.metadata[i]),)
    half = ()
    for step in tl.static_range(4):
        if KIND.values != "int4" and step % 2 == 0:
            half = load_half(place.block, lane, exists, step // 2, KIND)
        x, z = (), ()
        for n in tl.static_range(X_TILES):
            x += (load_inputs(place.x[n], left, step),)
        for j in tl.static_range(V_COUNT):
            v = load_inputs(place.v[j], left, step)
            for n in tl.static_range(X_TILES):
                b = x[n]
                z += ((
                    product(b[0], v[0], T), product(b[1], v[1], T),
                    product(b[2], v[2], T), product(b[3], v[3], T),
                ),)  # fmt: skip
        if KIND.values == "dense":
            near = _dense_products(half, x, kept, 0, step, T)
            kept = near + _dense_products(half, x, kept, 1, step, T)
        else:
            if INTEGER and step % GROUP_STEPS == 0:
                sums = ()
                for _i in tl.static_range(2 * X_TILES):
                    sums += ((zero, zero, zero, zero),)
            metadata = words.metadata
            a = kept_operand(words, half, magic, 0, step, KIND)
            near = _products(a, x, sums, metadata[step // 2], step % 2, 0, T)
            a = kept_operand(words, half, magic, 1, step, KIND)
            sums = near + _products(a, x, sums, metadata[2 + step // 2], step % 2, X_TILES, T)
            if INTEGER and step % GROUP_STEPS == GROUP_STEPS - 1:
                kept = _scaled(kept, sums, words.scales, step // GROUP_STEPS)
        if KIND.planes > 0:
            a = sign_operand(words.signs, magic, 0, step, KIND)
            near = _products(a, z, signs, pruned[step // 2], step % 2, 0, T)
            a = sign_operand(words.signs, magic, 1, step, KIND)
            signs = near + _products(a, z, signs, pruned[2 + step // 2], step % 2, SIGN_TILES, T)
    if not INTEGER and KIND.values != "dense":
        kept = sums
    return kept, signs


@triton.jit
def _adapter_inputs(p, zero, M, exists, KIND: tl.constexpr):
    """The B fragment of z for 16 ranks: the shares of K added, in the activations' type."""
    T: tl.constexpr = KIND.dtype
    Z_SPLITS: tl.constexpr = KIND.z_splits
    RANKS: tl.constexpr = KIND.parts * KIND.adapter_steps * 16
    b = ()
    for half in tl.static_range(2):
        low, high = zero, zero
        for s in tl.static_range(Z_SPLITS):
            more = load_pair(p + 8 * half + s * M * RANKS, exists)
            low += more[0]
            high += more[1]
        low_bits = low.to(T).to(tl.uint16, bitcast=True).to(tl.uint32)
        b += (low_bits | high.to(T).to(tl.uint16, bitcast=True).to(tl.uint32) << 16,)
    return b


@triton.jit
def _adapted(kept, p_ptr, z_ptr, pair, part, tokens, M, lane, warp, here, KIND: tl.constexpr):
    """kept + P z: steps of 16 ranks, which the warps take in turn.

    tokens: of the n8 tiles' columns, as tuples [32 warps].
    """
    W: tl.constexpr = KIND.warps
    STEPS: tl.constexpr = KIND.adapter_steps
    X_TILES: tl.constexpr = len(tokens)
    T: tl.constexpr = KIND.dtype
    RANKS: tl.constexpr = KIND.parts * STEPS * 16
    ROUNDS: tl.constexpr = (STEPS + W - 1) // W
    for i in tl.static_range(ROUNDS):
        exists = here & (i * W + warp < STEPS)
        step = tl.minimum(i * W + warp, STEPS - 1)
        first = (part * STEPS + step) * 16 + 2 * (lane & 3)
        zero = tl.zeros_like(kept[0][0])
        b, new = (), ()
        for r in tl.static_range(2):
            at = p_ptr + ((2 * pair + r) * STEPS + step) * 128 + lane * 4
            a = where_exists(exists, load_words(at, 4), 0)
            if r == 0:  # The other row tile takes the same.
                for n in tl.static_range(X_TILES):
                    b += _adapter_inputs(z_ptr + tokens[n] * RANKS + first, zero, M, exists, KIND)
            for n in tl.static_range(X_TILES):
                sums = kept[r * X_TILES + n]
                new += (multiply_dense(a, b[2 * n], b[2 * n + 1], sums, T),)
        kept = new
    return kept


@triton.jit
def _total(c, d, W: tl.constexpr):
    """The quads of both row tiles, added over the warps: [32 rows, 8 columns]."""
    near = tl.join(tl.join(c[0], c[1]), tl.join(c[2], c[3]))
    far = tl.join(tl.join(d[0], d[1]), tl.join(d[2], d[3]))
    # The axes warp g t | parity half tile.
    both = tl.reshape(tl.join(near, far), (W, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(tl.sum(both, axis=0), (4, 3, 0, 1, 2)), (32, 8))


@triton.jit
def _columns(total, WHICH: tl.constexpr, COUNT: tl.constexpr):
    """The columns COUNT WHICH, ... of [32, 8]: [32, COUNT]."""
    GROUPS: tl.constexpr = 8 // COUNT
    if GROUPS == 1:
        chosen = total
    else:
        here = (tl.arange(0, GROUPS) == WHICH)[None, :, None]
        bits = tl.reshape(total, (32, GROUPS, COUNT)).to(tl.int32, bitcast=True)
        chosen = tl.sum(tl.where(here, bits, 0), axis=1).to(tl.float32, bitcast=True)
    return chosen


@triton.jit
def _widened(word, T: tl.constexpr):
    """The number in the low half of a word, in fp32."""
    return (word & 0xFFFF).to(tl.uint16).to(T, bitcast=True).to(tl.float32)


# What changes from call to call is not specialised: one compiled kernel serves every M of a regime,
# with bias or without, and any alignment of x.
@triton.jit(
    do_not_specialize=[
        "x_ptr", "bias_ptr", "y_ptr", "biased", "M", "N", "words", "k_blocks", "share", "x_stride",
        "start1", "start2", "start3",
    ]
)  # fmt: skip
def decode_kernel(
    x_ptr, stream_ptr, v_ptr, u_ptr, p_ptr, z_ptr, bias_ptr, y_ptr, biased, M, N, words, k_blocks,
    share, x_stride, start1, start2, start3, KIND: tl.constexpr,
):  # fmt: skip
    """y [M, N] in the activations' type; fp32 sums [splits, M, N] where K is split or dense.

    The grid is (token tiles, row pairs, splits). A split takes `share` of the K blocks.
    x [M, words] of two numbers each, x_stride words apart. stream, v, p are a CudaState's tensors
    as words; u is its U; z [z_splits, M, parts, 16 adapter_steps] fp32.
    """
    T: tl.constexpr = KIND.dtype
    W: tl.constexpr = KIND.warps
    R: tl.constexpr = KIND.rank
    TOKENS: tl.constexpr = KIND.tokens
    COLUMNS: tl.constexpr = TOKENS if TOKENS < 8 else 8  # different tokens in an n8 tile
    X_TILES: tl.constexpr = 2 if TOKENS == 16 else 1
    SIGN_TILES: tl.constexpr = KIND.sign_tiles
    V_COUNT: tl.constexpr = SIGN_TILES // X_TILES
    BLOCK: tl.constexpr = KIND.block_bytes // 4
    PARTS: tl.constexpr = KIND.parts
    if KIND.overlap:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * W)
    lane, warp = thread & 31, thread >> 5
    g, t = lane >> 2, lane & 3
    pair, split = tl.program_id(1), tl.program_id(2)
    part, rows, row_exists = rows_of(pair, N, start1, start2, start3, 32, PARTS)
    first, last = split * share, tl.minimum((split + 1) * share, k_blocks)
    k = first + warp
    first_token = tl.program_id(0) * TOKENS
    x, v, tokens = (), (), ()
    for n in tl.static_range(X_TILES):
        token = tl.minimum(first_token + 8 * n + (g & (COLUMNS - 1)), M - 1)
        tokens += (token,)
        x += (x_ptr + token.to(tl.int64) * x_stride + k * 64 + t,)
    for j in tl.static_range(V_COUNT):
        rank = j if TOKENS == 16 else tl.minimum((8 * j + g) // COLUMNS, R - 1)
        v += (v_ptr + (part * R + rank) * k_blocks * 64 + k * 64 + t,)
    nothing = (M >> 31).to(tl.uint32)
    magic = Magic(
        nothing + (0x64006400 if T == tl.float16 else 0x43004300),
        nothing + (0x3C003C00 if T == tl.float16 else 0x3F803F80),
    )
    zero = tl.zeros((32 * W,), tl.float32)
    kept, signs = (), ()
    for _i in tl.static_range(2 * X_TILES):
        kept += ((zero, zero, zero, zero),)
    for _i in tl.static_range(2 * SIGN_TILES):
        signs += ((zero, zero, zero, zero),)
    # A warp without a block reads one that exists.
    at = pair.to(tl.int64) * k_blocks + tl.minimum(k, last - 1)
    place = Place(stream_ptr + at * BLOCK, x, v)

    # All warps have a whole block in these rounds. The next block's words are asked for before this
    # one's are used.
    rounds = (tl.minimum(last, words // 64) - first) // W
    held = load_block(place.block, lane, KIND)
    if KIND.overlap:
        gdc_wait()  # Weights do not depend on the kernel before; x, z and y's memory do.
    for _ in tl.range(0, rounds, 1, num_stages=1):
        k += W
        block = place.block + tl.where(k < last, W * BLOCK, 0)
        ahead = load_block(block, lane, KIND)
        kept, signs = _round(kept, signs, held, place, lane, magic, None, None, KIND)
        x, v = (), ()
        for n in tl.static_range(X_TILES):
            x += (place.x[n] + 64 * W,)
        for j in tl.static_range(V_COUNT):
            v += (place.v[j] + 64 * W,)
        place = Place(block, x, v)
        held = ahead
    if first + rounds * W < last:
        # The last round: some warps have no block, or one with inputs beyond K.
        exists = k < last
        left = tl.where(exists, words - k * 64 - t, 0)
        metadata = where_exists(exists, held.metadata, 0x44444444)
        end = Words(metadata, held.signs, held.codes, where_exists(exists, held.scales, 0))
        kept, signs = _round(kept, signs, end, place, lane, magic, exists, left, KIND)
    if KIND.adapter_steps > 0:
        kept = _adapted(
            kept, p_ptr, z_ptr, pair, part, tokens, M, lane, warp, split == 0, KIND
        )  # fmt: skip

    # The warps' sums are added first, so that the order is the same for any TOKENS.
    totals = ()
    for j in tl.static_range(SIGN_TILES):
        totals += (_total(signs[j], signs[SIGN_TILES + j], W),)
    levels = pair * 32 + tl.arange(0, 32)
    for n in tl.static_range(X_TILES):
        y = _columns(_total(kept[n], kept[X_TILES + n], W), 0, COLUMNS)
        for r in tl.static_range(R):
            total = totals[r * X_TILES + n if TOKENS == 16 else r * COLUMNS // 8]
            sign = _columns(total, r % (8 // COLUMNS), COLUMNS)
            y = tl.fma(_widened(tl.load(u_ptr + levels * R + r), T)[:, None], sign, y)
        if KIND.splits == 1 and KIND.values != "dense":
            bias = tl.load(bias_ptr + rows, mask=biased != 0, other=0.0)
            y += bias.to(tl.float32)[:, None]
        token = first_token + 8 * n + tl.arange(0, COLUMNS)
        at = y_ptr + (split * M + token)[None, :].to(tl.int64) * N + rows[:, None]
        mask = (token < M)[None, :] & row_exists[:, None]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)
