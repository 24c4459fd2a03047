"""Canonical packed tensors -> the lane-ordered stream of csrc/cuda/params.h, and back. Plain torch, on any device.

A block is 16 output rows x 128 inputs. Lane 4 g + t of a warp holds rows g and g + 8; register i = 2 c + h of an m16n8
fragment is row g + 8 h and (compressed) columns 2t + 8c + {0, 1}: the same for `mma` and `mma.sp` (PTX ISA, "Matrix
fragments for mma.m16n8k16" and "mma.sp.m16n8k32"). So every permutation below is one `permute` of named axes.

Several weights of equal layout (q, k and v; gate and up) become one stream: the rows of each are padded to 16 and follow
each other, V, U, P and Q keep a slot each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import ArgumentTypeError, RangeError, ShapeError
from ...format import (
    INTEGER_RANGES,
    MOST_LOST,
    VALUE_TYPES,
    PackedWeight,
    bits,
    plane_unit,
    rounding_error,
)
from .. import factors
from ..base import differences

BLOCK_ROWS, BLOCK_INPUTS = 16, 128
W16, INT8, INT4, DENSE = range(4)  # StreamValues of csrc/cuda/params.h
# int3 is widened to int4's stream: it saves room on disk, on the GPU it takes int4's.
STREAM_VALUES = {"fp16": W16, "bf16": W16, "int8": INT8, "int4": INT4, "int3": INT4}
VALUE_BYTES = {W16: 2048, INT8: 1024, INT4: 512, DENSE: 4096}  # of a block
METADATA_BYTES, SIGN_BYTES = 256, 128
ACTIVATIONS = (torch.float16, torch.bfloat16)


class CudaState(NamedTuple):
    """What `slab_kernels::linear_cuda` wants after x: tensors, bias excepted, then sizes."""

    stream: Tensor  # [row blocks, K blocks, bytes of a block] uint8
    V: Tensor | None  # [parts, R, K padded to 128], activations' type, about 1
    U: Tensor | None  # [16 row blocks, R] int32: the 16-bit number twice
    P: Tensor | None  # [row blocks, R' / 16, 32 lanes, 16 bytes] uint8
    Q: Tensor | None  # [parts R' / 16, K blocks, 4096 bytes] uint8: Q transposed as a dense stream
    in_features: int
    rows: tuple[int, ...]  # out_features of each part
    values: int
    group_steps: int  # steps of 32 inputs that a scale covers: 1, 2, 4
    planes: int  # of signs: 1, 2, 3
    dtype: torch.dtype  # of the activations


def prepare(parts: Sequence[PackedWeight], dtype: torch.dtype) -> CudaState:
    """One stream for the parts, in order.

    fp16 and bf16 values are stored in the activations' type (an fp16 value rounds to bf16 as a dense bf16 weight would), int3
    values as int4.

    Raises: TypeError for another dtype, ShapeError for no or too many parts or parts of unequal layouts, RangeError for numbers that fp16
    activations' kernels cannot hold.
    """
    if dtype not in ACTIVATIONS:
        raise ArgumentTypeError(
            f"the CUDA kernels take float16 or bfloat16 activations, not {dtype}"
        )
    if found := differences(parts):
        raise ShapeError(found)
    layouts = [part.layout for part in parts]
    first = layouts[0]
    K = first.in_features
    stream = torch.cat([_stream(part, dtype) for part in parts])
    U = V = P = Q = None
    if first.rank:
        U, V = zip(*(_sign_factors(part, dtype) for part in parts), strict=True)
        U, V = torch.cat(U), torch.stack(V)
    if first.adapter_rank:
        P, Q = zip(*(_adapter(part, dtype) for part in parts), strict=True)
        P, Q = torch.cat(P), torch.cat(Q)
    rows = tuple(layout.out_features for layout in layouts)
    group_steps = (first.group_size or BLOCK_INPUTS) // 32
    return CudaState(
        stream, V, U, P, Q, K, rows, STREAM_VALUES[first.values], group_steps, first.planes, dtype
    )


def dense(stream: Tensor, V: Tensor | None, U: Tensor | None, in_features: int, rows: Sequence[int], values: int,
          group_steps: int, planes: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    """What a stream stands for, adapters excepted: [sum of rows, K] fp32. The inverse of `prepare` up to its rounding."""
    blocks, k_blocks, _ = stream.shape
    shape = (blocks, k_blocks)
    at = VALUE_BYTES[values]
    value_bytes = stream[..., :at].contiguous()
    if values == W16:
        kept = value_bytes.view(dtype).view(*shape, 4, 8, 4, 2, 2, 2).float()  # step g t c h half
        kept = kept.permute(0, 6, 3, 1, 2, 5, 4, 7)
    elif values == INT8:
        kept = value_bytes.view(*shape, 2, 8, 4, 2, 2, 2, 2).float() - 128  # j g t parity c half h
        kept = kept.permute(0, 8, 3, 1, 2, 5, 6, 4, 7)
    else:
        nibbles = torch.stack((value_bytes & 15, value_bytes >> 4), -1).view(
            *shape, 8, 4, 4, 2, 2, 2
        )  # g t s half c h
        kept = (nibbles.float() - 8).permute(0, 7, 2, 1, 4, 6, 3, 5)
    kept = kept.reshape(blocks, 16, k_blocks, 64)
    metadata = stream[..., at : at + METADATA_BYTES].reshape(
        *shape, 8, 2, 2, 2, 2, 2
    )  # g selector even h2 h pair
    metadata = metadata.permute(0, 6, 2, 1, 5, 3, 4, 7).reshape(blocks * 16, k_blocks * 16)
    at += METADATA_BYTES
    level = None
    if U is not None:
        level = 0.0
        for plane, (first, length, place) in enumerate(_sign_places(planes, stream.device)):
            words = (
                stream[..., at + first : at + first + length]
                .contiguous()
                .view(torch.int32 if length == SIGN_BYTES else torch.int64)
            )
            negative = (
                words.view(*shape, 8, 4, 1, 1, 1, 1) >> place & 1
            )  # blocks k g t half step c h
            level = level + (1 - 2 * negative) / 2.0**plane
        level = level.permute(0, 7, 2, 1, 5, 6, 3, 4).reshape(blocks * 16, k_blocks * 64)
        at += planes * SIGN_BYTES
    if values in (INT8, INT4):
        scales = stream[..., at:].contiguous().view(torch.bfloat16).float().view(*shape, -1, 8, 2)
        scales = scales.permute(0, 4, 3, 1, 2).reshape(blocks, 16, k_blocks, -1)
        kept = kept * scales.repeat_interleave(64 // scales.shape[-1], -1)
    kept = kept.reshape(blocks * 16, -1)
    i0, i1 = bits.kept_positions(metadata)
    W = bits.scatter_positions(kept, i0, i1)
    if U is not None:
        W = W + _sign_term(V, U, level, i0, i1, rows, dtype)
    parts, first = [], 0
    for count in rows:
        parts.append(W[first : first + count, :in_features])
        first += -(-count // BLOCK_ROWS) * BLOCK_ROWS
    return torch.cat(parts)


def adapters(
    P: Tensor, Q: Tensor, in_features: int, rows: Sequence[int], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """P [N, R'] and Q^T [R', K] of every part, R' padded to 16, in the activations' type."""
    steps, k_blocks = P.shape[1], Q.shape[1]
    left = (
        P.contiguous()
        .view(dtype)
        .view(-1, steps, 8, 4, 2, 2, 2)
        .permute(0, 5, 2, 1, 4, 3, 6)
        .reshape(-1, steps * 16)
    )
    right = (
        Q.contiguous()
        .view(dtype)
        .view(-1, k_blocks, 8, 8, 4, 2, 2, 2)
        .permute(0, 6, 3, 1, 2, 5, 4, 7)
    )
    right = right.reshape(len(rows), steps * 16, -1)[..., :in_features]
    parts, first = [], 0
    for slot, count in enumerate(rows):
        parts.append((left[first : first + count], right[slot]))
        first += -(-count // BLOCK_ROWS) * BLOCK_ROWS
    return parts


def _sign_term(V, U, level, i0, i1, rows, dtype) -> Tensor:
    u = U.contiguous().view(torch.int16)[:, ::2].contiguous().view(dtype).float()
    L, first = [], 0
    for slot, count in enumerate(rows):
        padded = -(-count // BLOCK_ROWS) * BLOCK_ROWS
        L.append(u[first : first + padded] @ V[slot].float())
        first += padded
    return torch.cat(L) * bits.scatter_positions(level, *bits.pruned_positions(i0, i1))


def _blocks(packed: PackedWeight) -> tuple[int, int]:
    return -(-packed.out_features // BLOCK_ROWS), -(-packed.in_features // BLOCK_INPUTS)


def _fill(t: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    """[N, k] -> [rows, columns], padded, or cut where canonical padding exceeds ours."""
    return pad(
        t[:, :columns], (0, columns - min(columns, t.shape[1]), 0, rows - t.shape[0]), value=value
    )


def _sign_places(planes: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """Of each plane: its first byte after the metadata, the bytes of all lanes' words, and the bit of a lane's word that holds
    the sign of each of its 32 pruned entries: [half, step, c, h], int64."""
    axes = (torch.arange(n, device=device) for n in (2, 4, 2, 2))
    half, step, c, h = (a.view([-1 if i == j else 1 for j in range(4)]) for i, a in enumerate(axes))
    if planes == 1:
        return [(0, SIGN_BYTES, 15 + 16 * half - 4 * step - 2 * c - h)]
    index = 32 * (step // 2) + 16 * half + 8 * (step % 2) + 4 * c + 2 * h
    third = (2 * SIGN_BYTES, SIGN_BYTES, 16 * half + 4 * step + c + 2 * h)
    return [(0, 2 * SIGN_BYTES, index + 1), (0, 2 * SIGN_BYTES, index), third][:planes]


def _stream(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    layout, (blocks, k_blocks) = packed.layout, _blocks(packed)
    rows, shape = blocks * BLOCK_ROWS, (blocks, k_blocks)
    parts = [_values(packed, dtype).reshape(*shape, -1)]
    metadata = _fill(packed.metadata, rows, k_blocks * 16, 0x44).view(
        blocks, 2, 8, k_blocks, 2, 2, 2, 2
    )
    # blocks h g k | h2 selector even pair -> blocks k g selector even | h2 h pair
    parts.append(metadata.permute(0, 3, 2, 5, 6, 4, 1, 7).reshape(*shape, -1))
    if packed.signs is not None:
        planes = layout.planes
        signs = _fill(packed.signs, rows, k_blocks * 8 * planes).unflatten(1, (-1, planes))
        negative = (
            bits.unpack_signs(signs.mT)
            .to(torch.int64)
            .view(blocks, 2, 8, planes, k_blocks, 4, 2, 4, 2)
        )
        negative = negative.permute(3, 0, 4, 2, 7, 8, 5, 6, 1)  # plane blocks k g t half step c h
        places = _sign_places(planes, signs.device)
        words = [
            (bit << place).sum((-4, -3, -2, -1))
            for bit, (*_, place) in zip(negative, places, strict=True)
        ]
        if planes > 1:
            parts.append((words.pop(0) | words.pop(0)).view(torch.uint8).reshape(*shape, -1))
        parts += [_low_words(word).view(torch.uint8).reshape(*shape, -1) for word in words]
    if packed.scales is not None:
        per_block = BLOCK_INPUTS // layout.group_size if layout.group_size else 1
        scales = packed.scales if layout.group_size else packed.scales.expand(-1, k_blocks)
        scales = (
            _fill(scales, rows, k_blocks * per_block)
            .view(blocks, 2, 8, k_blocks, per_block)
            .permute(0, 3, 4, 2, 1)
        )
        parts.append(scales.contiguous().view(torch.uint8).reshape(*shape, -1))
    return torch.cat(parts, -1)


def _low_words(words: Tensor) -> Tensor:
    """int64 holding 32 unsigned bits -> int32 with the same bits."""
    return (words - ((words >> 31 & 1) << 32)).to(torch.int32).contiguous()


def _values(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    (blocks, k_blocks), values = _blocks(packed), packed.layout.values
    q = bits.unpack_values(packed.values, values)
    if values not in INTEGER_RANGES and VALUE_TYPES[values] != dtype:
        if not rounding_error(q.float(), dtype) <= MOST_LOST:
            raise RangeError(
                f"a {values} value does not fit {dtype} activations' kernels; use {VALUE_TYPES[values]} ones"
            )
        q = q.to(dtype)
    # blocks h g k | step c t half
    q = _fill(q, blocks * 16, k_blocks * 64).view(blocks, 2, 8, k_blocks, 4, 2, 4, 2)
    if STREAM_VALUES[values] == INT4:
        q = (q + 8).to(torch.uint8).permute(0, 3, 2, 6, 4, 7, 5, 1)  # .. g t step half c h
        return q[..., 0] | q[..., 1] << 4
    if STREAM_VALUES[values] == INT8:
        q = (q.to(torch.int16) + 128).to(torch.uint8).view(blocks, 2, 8, k_blocks, 2, 2, 2, 4, 2)
        return q.permute(0, 3, 4, 2, 7, 5, 6, 8, 1)  # blocks k j g t parity c half h
    return _fragments(q)


def _fragments(q: Tensor) -> Tensor:
    """[blocks, h, g, k, step, c, t, half] 16-bit -> bytes in the order blocks k step g t c h half."""
    return q.permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous().view(torch.uint8)


def _sign_factors(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U as words of the 16-bit number twice, V transposed and padded.

    Of a rank above 1 the kernels round U times the level of several planes, so the largest must fit.
    """
    (blocks, k_blocks), planes = _blocks(packed), packed.layout.planes
    U, V = factors.sign(packed, dtype)
    most = 2 - plane_unit(planes)
    if (
        packed.layout.rank > 1
        and planes > 1
        and not bool((U.float() * most).to(dtype).isfinite().all())
    ):
        raise RangeError(
            f"U times the largest level, {most:g}, does not fit {dtype}; use bfloat16 activations"
        )
    word = _fill(U, blocks * 16, U.shape[1]).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return word | word << 16, pad(V, (0, 0, 0, k_blocks * BLOCK_INPUTS - V.shape[0])).T.contiguous()


def _adapter(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P as dense fragments, Q as a dense stream."""
    blocks, k_blocks = _blocks(packed)
    P, Q = factors.adapter(packed, dtype)
    steps = -(-P.shape[1] // 16)
    P = _fill(P, blocks * 16, steps * 16).view(blocks, 2, 8, 1, steps, 2, 4, 2)
    Q = _fill(Q.T, steps * 16, k_blocks * BLOCK_INPUTS).view(steps, 2, 8, k_blocks, 8, 2, 4, 2)
    return _fragments(P).reshape(blocks, steps, 32, 16), _fragments(Q).reshape(steps, k_blocks, -1)
