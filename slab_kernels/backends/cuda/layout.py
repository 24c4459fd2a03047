"""Canonical packed tensors -> the lane-ordered stream of csrc/cuda/params.h; unpack.py is the way
back. It is plain torch and runs on any device.

A block is a pair of row tiles, 2 x 16 output rows x 128 inputs, in one contiguous piece, because a
warp multiplies both tiles and then copies with few instructions. Lane 4 g + t of a warp holds rows
g and g + 8 of each tile. Register i = 2 c + h of an m16n8 fragment holds row g + 8 h and the
(compressed) columns 2 t + 8 c + {0, 1}. That is so for `mma` and for `mma.sp` (PTX ISA, "Matrix
fragments for mma.m16n8k16" and "mma.sp.m16n8k32"), so every permutation below is one `permute` of
named axes, and `_paired` then brings the two tiles of a pair together.
A comment beside it names the axes: `tiles` and k count row tiles and K blocks, `step` the four
steps of 32 inputs of a K block, `half` the two numbers of a register. In metadata the step is
2 h2 + selector, the lane's t is 2 selector + even, and `byte` counts bytes; in int8 values the step
is 2 j + parity.

Several weights of equal layout (q, k and v; gate and up) become one stream: the rows of each are
padded to 32 and follow each other; V and Q keep one slot for each part.
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
    ceil_div,
    plane_unit,
    rounding_error,
)
from .. import factors
from ..base import differences, wait_until_written
from .powers import row_powers

TILE_ROWS, BLOCK_ROWS, BLOCK_INPUTS = 16, 32, 128
W16, INT8, INT4, DENSE = range(4)  # These are StreamValues of csrc/cuda/params.h.
# int3 is widened to int4's stream: it saves room on disk, and takes int4's room on the GPU.
STREAM_VALUES = {"fp16": W16, "bf16": W16, "int8": INT8, "int4": INT4, "int3": INT4}
VALUE_BYTES = {W16: 4096, INT8: 2048, INT4: 1024, DENSE: 8192}  # bytes per block
METADATA_BYTES, SIGN_BYTES = 512, 256  # bytes per block, and per block and sign plane
PADDING_METADATA = 0x44  # two groups that keep their positions 0 and 1
ACTIVATIONS = (torch.float16, torch.bfloat16)


# The schema of an op's arguments that make a CudaState: its TENSORS tensors, then its sizes.
TENSOR_ARGUMENTS = (
    "Tensor stream, Tensor? V, Tensor? U, Tensor? P, Tensor? Q, Tensor? powers, Tensor? dense, "
    "Tensor? P_rows"
)
SIZE_ARGUMENTS = (
    "int in_features, int[] rows, int value_type, int group_steps, int planes, ScalarType dtype"
)
TENSORS = 8


class CudaState(NamedTuple):
    """The arguments of `slab_kernels::linear_cuda` after x: tensors, bias excepted, then sizes."""

    stream: Tensor  # [row pairs, K blocks, bytes of a block] uint8
    V: Tensor | None  # [parts, R, K padded to 128] in the activations' type, entries about 1
    U: Tensor | None  # [32 row pairs, R] int32, each holding the 16-bit number twice
    P: Tensor | None  # [2 row pairs, R' / 16, 32 lanes, 16 bytes] uint8
    Q: Tensor | None  # [pairs of parts R', K blocks, 8192 bytes] uint8: Q^T as a dense stream
    powers: Tensor | None  # [32 row pairs] fp32: of each row, see powers.py; None: 1 everywhere
    dense: Tensor | None  # [sum of rows, K] in the activations' type: the weight with its adapter
    P_rows: Tensor | None  # [32 row pairs, R' padded to 16] in the activations' type: P for cuBLAS
    in_features: int
    rows: tuple[int, ...]  # out_features of each part
    values: int  # W16, INT8 or INT4
    group_steps: int  # steps of 32 inputs that a scale covers: 1, 2, 4
    planes: int  # sign planes: 1, 2, 3
    dtype: torch.dtype  # of the activations


def prepare(parts: Sequence[PackedWeight], dtype: torch.dtype) -> CudaState:
    """One stream for the parts, in order, for activations of `dtype`.

    On a GPU it is there when this returns: kernels read a prepared weight before they wait for the
    kernel in front of them, so nobody may write into its tensors afterwards either.

    fp16 and bf16 values are stored in the activations' type (an fp16 value rounds to bf16 as a
    dense bf16 weight would), int3 values as int4.

    Raises: ArgumentTypeError for another dtype, ShapeError for no or too many parts or parts of
    unequal layouts, RangeError for numbers that the kernels for fp16 activations cannot hold.
    """
    if dtype not in ACTIVATIONS:
        raise ArgumentTypeError(
            f"the CUDA kernels take float16 or bfloat16 activations, not {dtype}"
        )
    if found := differences(parts):
        raise ShapeError(found)
    layouts = [part.layout for part in parts]
    first = layouts[0]
    stream = torch.cat([_stream(part, dtype) for part in parts])
    U = V = P = Q = P_rows = powers = None
    if first.rank:
        signs = [_sign_factors(part, dtype) for part in parts]
        U, V = torch.cat([u for u, _ in signs]), torch.stack([v for _, v in signs])
    if first.adapter_rank:
        adapter = [_adapter(part, dtype) for part in parts]
        P_rows, Q = torch.cat([p for p, _ in adapter]), _even(torch.cat([q for _, q in adapter]))
        P, Q = _adapter_fragments(P_rows), _paired(Q, 2).flatten(2)
    if dtype == torch.float16 and STREAM_VALUES[first.values] in (INT8, INT4):
        powers = torch.cat([_powers(part) for part in parts])
    state = CudaState(
        stream,
        V,
        U,
        P,
        Q,
        powers,
        dense=None,
        P_rows=P_rows,
        in_features=first.in_features,
        rows=tuple(layout.out_features for layout in layouts),
        values=STREAM_VALUES[first.values],
        group_steps=(first.group_size or BLOCK_INPUTS) // 32,
        planes=first.planes,
        dtype=dtype,
    )
    finish(state)
    return state


def finish(state: CudaState) -> None:
    """Waits, on a GPU, until all that was queued to write the prepared tensors has been done."""
    wait_until_written((state.stream,))


class SignPlane(NamedTuple):
    """Where a block holds the signs of one plane."""

    first: int  # its first byte after the metadata
    length: int  # bytes of all lanes' words
    bit: Tensor  # [half, step, c, h] int64: the bit of a lane's word for each of its pruned entries


def sign_places(planes: int, device: torch.device) -> list[SignPlane]:
    """The places of each plane's signs, the plane of the largest worth first."""
    axes = (torch.arange(n, device=device) for n in (2, 4, 2, 2))
    half, step, c, h = (a.view([-1 if i == j else 1 for j in range(4)]) for i, a in enumerate(axes))
    if planes == 1:
        return [SignPlane(0, SIGN_BYTES, 15 + 16 * half - 4 * step - 2 * c - h)]
    index = 32 * (step // 2) + 16 * half + 8 * (step % 2) + 4 * c + 2 * h
    first, second = (SignPlane(0, 2 * SIGN_BYTES, index + above) for above in (1, 0))
    third = SignPlane(2 * SIGN_BYTES, SIGN_BYTES, 16 * half + 4 * step + c + 2 * h)
    return [first, second, third][:planes]


# int4: where a word holds q + 8. Register i = 2 c + h has its low half's nibble at bit 2 + 4 i and
# its high half's 16 above that, modulo 32, so that two masks and one rotation by 8 bring all of
# them below the leading one of fp16's 1024 = 0x6400, as 4 (q + 8) for rows g and 64 (q + 8) for
# rows g + 8. In bf16, which has seven bits, a rotation by 4 i brings every one to bits 2 to 5. The
# stream's scales are divided by these powers of two. (A scale below 2^-120 may lose bits by that.
# Its products are less than 1e-34.)
WORD = 0xFFFFFFFF


def nibble_places(device: torch.device) -> Tensor:
    """[half, c, h] int64: the lowest bit of a nibble."""
    half, c, h = (torch.arange(2, device=device).view(shape) for shape in ((2, 1, 1), (2, 1), 2))
    return (2 + 4 * (2 * c + h) + 16 * half) % 32


def code_units(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[h] fp32: by how much the kernels' int4 codes of rows g and g + 8 are too large."""
    units = (4.0, 64.0) if dtype == torch.float16 else (4.0, 4.0)
    return torch.tensor(units, device=device)


def padded_rows(rows: Sequence[int]) -> list[int]:
    """The rows that each part takes in the stream."""
    return [ceil_div(count, BLOCK_ROWS) * BLOCK_ROWS for count in rows]


def _tiles(packed: PackedWeight) -> tuple[int, int]:
    """Row tiles, two for each pair, and K blocks of a weight."""
    pairs = ceil_div(packed.out_features, BLOCK_ROWS)
    return 2 * pairs, ceil_div(packed.in_features, BLOCK_INPUTS)


def _fill(t: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    """[N, k] -> [rows, columns], padded, or cut where canonical padding exceeds the stream's."""
    missing = columns - min(columns, t.shape[1]), rows - t.shape[0]
    return pad(t[:, :columns], (0, missing[0], 0, missing[1]), value=value)


def _paired(field: Tensor, place: int) -> Tensor:
    """[tiles, k, ...] -> [pairs, k, ...], where the axis of a pair's two tiles is at `place`."""
    return field.unflatten(0, (-1, 2)).movedim(1, place)


def _even(tiles: Tensor) -> Tensor:
    """[tiles, ...] with a tile of zeros more if their number is odd."""
    return torch.cat([tiles, torch.zeros_like(tiles[:1])]) if tiles.shape[0] % 2 else tiles


def _bytes(t: Tensor, blocks: int, k_blocks: int) -> Tensor:
    """A tensor whose axes begin with the rows' and the K blocks, as each block's bytes."""
    return t.contiguous().view(torch.uint8).reshape(blocks, k_blocks, -1)


def _stream(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The blocks of one weight: [row pairs, K blocks, bytes of a block] uint8."""
    tiles, k_blocks = _tiles(packed)
    # The two tiles follow each other in values; in metadata and signs they do in each lane, in
    # scales in each g.
    fields = [_paired(_values(packed, dtype), 2), _paired(_metadata(packed), 5)]
    if packed.signs is not None:
        fields += [_paired(words, 4) for words in _signs(packed.signs, packed)]
    if packed.scales is not None:
        fields.append(_paired(_scales(packed.scales, packed, dtype), 4))
    return torch.cat([_bytes(field, tiles // 2, k_blocks) for field in fields], -1)


def _metadata(packed: PackedWeight) -> Tensor:
    tiles, k_blocks = _tiles(packed)
    metadata = _fill(packed.metadata, tiles * TILE_ROWS, k_blocks * 16, PADDING_METADATA)
    # The axes tiles h g k | h2 selector even byte become tiles k g selector even | h2 h byte.
    return metadata.view(tiles, 2, 8, k_blocks, 2, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7)


def _signs(signs: Tensor, packed: PackedWeight) -> list[Tensor]:
    """The lanes' words: of one plane, or of the first two together, and of a third by itself."""
    (tiles, k_blocks), planes = _tiles(packed), packed.layout.planes
    signs = _fill(signs, tiles * TILE_ROWS, k_blocks * 8 * planes).unflatten(1, (-1, planes))
    negative = bits.unpack_signs(signs.mT).to(torch.int64)
    negative = negative.view(tiles, 2, 8, planes, k_blocks, 4, 2, 4, 2)
    negative = negative.permute(3, 0, 4, 2, 7, 8, 5, 6, 1)  # plane tiles k g t half step c h
    places = sign_places(planes, signs.device)
    words = [
        (bit << plane.bit).sum((-4, -3, -2, -1))
        for bit, plane in zip(negative, places, strict=True)
    ]
    if planes == 1:
        return [_low_words(words[0])]
    return [words[0] | words[1], *map(_low_words, words[2:])]


def _low_words(words: Tensor) -> Tensor:
    """int64 holding 32 unsigned bits -> int32 with the same bits."""
    return (words - ((words >> 31 & 1) << 32)).to(torch.int32)


def _scales(scales: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    (tiles, k_blocks), group_size = _tiles(packed), packed.layout.group_size
    per_block = BLOCK_INPUTS // group_size if group_size else 1
    if not group_size:  # The one scale of a row is repeated in every block.
        scales = scales.expand(-1, k_blocks)
    scales = _fill(scales, tiles * TILE_ROWS, k_blocks * per_block)
    scales = scales.view(tiles, 2, 8, k_blocks, per_block).permute(0, 3, 4, 2, 1)  # tiles k s g h
    if STREAM_VALUES[packed.layout.values] == INT4:
        scales = (scales.float() / code_units(dtype, scales.device)).to(torch.bfloat16)
    return scales


def _values(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The kept values in the order of the stream, as the head of csrc/cuda/params.h lays them out.

    Raises: RangeError if a number does not fit the activations' type.
    """
    (tiles, k_blocks), values = _tiles(packed), packed.layout.values
    q = bits.unpack_values(packed.values, values)
    if values not in INTEGER_RANGES and VALUE_TYPES[values] != dtype:
        if not rounding_error(q.float(), dtype) <= MOST_LOST:
            raise RangeError(
                f"a {values} value does not fit {dtype} activations' kernels; "
                f"use {VALUE_TYPES[values]} ones"
            )
        q = q.to(dtype)
    q = _fill(q, tiles * TILE_ROWS, k_blocks * 64)
    q = q.view(tiles, 2, 8, k_blocks, 4, 2, 4, 2)  # tiles h g k | step c t half
    if STREAM_VALUES[values] == INT4:
        q = (q + 8).to(torch.int64).permute(0, 3, 2, 6, 4, 7, 5, 1)  # tiles k g t step half c h
        words = (q << nibble_places(q.device)).sum((-3, -2, -1))
        return _low_words(words & WORD | words >> 32)  # The last nibble wraps around.
    if STREAM_VALUES[values] == INT8:
        q = (q.to(torch.int16) + 128).to(torch.uint8).view(tiles, 2, 8, k_blocks, 2, 2, 2, 4, 2)
        return q.permute(0, 3, 4, 2, 7, 5, 6, 8, 1)  # tiles k j g t parity c half h
    return _fragments(q)


def _fragments(q: Tensor) -> Tensor:
    """[tiles, h, g, k, step, c, t, half] -> [tiles, k, step, g, t, c, h, half]."""
    return q.permute(0, 3, 4, 2, 6, 5, 1, 7)


def _sign_factors(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U as words that hold the 16-bit number twice, and V transposed and padded.

    Of a rank above 1 the kernels round U times the level of several planes, so U times the largest
    level must fit.
    """
    (tiles, k_blocks), layout = _tiles(packed), packed.layout
    U, V = factors.sign(packed, dtype)
    largest = 2 - plane_unit(layout.planes)
    if layout.rank > 1 and layout.planes > 1:
        if not bool((U.float() * largest).to(dtype).isfinite().all()):
            raise RangeError(
                f"U times the largest level, {largest:g}, does not fit {dtype}; "
                "use bfloat16 activations"
            )
    word = _fill(U, tiles * TILE_ROWS, U.shape[1]).contiguous().view(torch.int16)
    word = word.to(torch.int32) & 0xFFFF
    V = pad(V, (0, 0, 0, k_blocks * BLOCK_INPUTS - V.shape[0]))
    return word | word << 16, V.T.contiguous()


def _powers(packed: PackedWeight) -> Tensor:
    """The powers of a weight's rows, for fp16 activations: [32 row pairs] fp32."""
    (tiles, _), scales = _tiles(packed), packed.scales
    assert scales is not None, "int8 and int4 values have scales"
    scales = _scales(scales, packed, torch.float16).permute(0, 4, 3, 1, 2)  # tiles h g k s
    U = V = None
    if packed.layout.rank:
        U, V = factors.sign(packed, torch.float16)
        U, V = _fill(U, tiles * TILE_ROWS, U.shape[1]), V.T
    largest = 2 - plane_unit(packed.layout.planes)
    return row_powers(scales.reshape(tiles * TILE_ROWS, -1), U, V, largest)


def _adapter(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P with padded rows and columns [rows, R'], and Q transposed as dense tiles
    [R' / 16, K blocks, 4096] uint8."""
    tiles, k_blocks = _tiles(packed)
    P, Q = factors.adapter(packed, dtype)
    steps = ceil_div(P.shape[1], 16)
    P = _fill(P, tiles * TILE_ROWS, steps * 16)
    Q = _fill(Q.T, steps * 16, k_blocks * BLOCK_INPUTS).view(steps, 2, 8, k_blocks, 8, 2, 4, 2)
    return P, _bytes(_fragments(Q), steps, k_blocks)


def _adapter_fragments(P: Tensor) -> Tensor:
    """P [rows, R'] as dense fragments [tiles, R' / 16, 32, 16] uint8."""
    tiles, steps = P.shape[0] // TILE_ROWS, P.shape[1] // 16
    fragments = _fragments(P.view(tiles, 2, 8, 1, steps, 2, 4, 2))
    return _bytes(fragments, tiles, steps).reshape(tiles, steps, 32, 16)
