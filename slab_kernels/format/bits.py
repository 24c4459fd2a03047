"""Bits and nibbles of the packed form: 2:4 metadata, sign bits, int4 and int3 values in uint8
tensors.

Everything here is arithmetic on plain tensors, exact on every device. docs/format.md specifies the
layout; `csrc/format.h` is the same layout for C++ and CUDA. N is the number of rows, Kp that of
padded inputs; a group is four inputs of a row, a unit sixteen.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The six ways to keep two of four inputs, as nibbles i0 | i1 << 2 with i0 < i1: the encoding that
# `mma.sp::ordered_metadata` reads (PTX ISA, "Sparse matrix storage").
LEGAL_NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)


def kept_positions(metadata: Tensor) -> tuple[Tensor, Tensor]:
    """First and second kept position of every group: [N, Kp/8] uint8 -> two [N, Kp/4] int64 in
    0..3."""
    nibbles = _split_nibbles(metadata).to(torch.int64)
    return nibbles & 3, nibbles >> 2


def pruned_positions(i0: Tensor, i1: Tensor) -> tuple[Tensor, Tensor]:
    """First and second pruned position of every group, from its kept ones; all tensors [N,
    Kp/4]."""
    p0 = torch.where(i0 > 0, 0, torch.where(i1 > 1, 1, 2))
    return p0, 6 - i0 - i1 - p0  # the four positions sum to 0 + 1 + 2 + 3


def pack_metadata(mask: Tensor) -> Tensor:
    """[N, Kp] bool with exactly two kept of every four -> [N, Kp/8] uint8.

    Groups of even number are in the low nibbles.
    """
    k = mask.unflatten(-1, (-1, 4))
    i0 = torch.where(k[..., 0], 0, torch.where(k[..., 1], 1, 2))
    i1 = torch.where(k[..., 3], 3, torch.where(k[..., 2], 2, 1))
    return _join_nibbles((i0 | i1 << 2).to(torch.uint8))


def unpack_mask(metadata: Tensor) -> Tensor:
    """Inverse of `pack_metadata`: [N, Kp/8] uint8 -> [N, Kp] bool."""
    i0, i1 = kept_positions(metadata)
    position = torch.arange(4, device=metadata.device)
    return ((position == i0[..., None]) | (position == i1[..., None])).flatten(-2)


def illegal_nibbles(metadata: Tensor) -> int:
    """How many nibbles are not ascending pairs, for which the result of mma.sp is undefined."""
    i0, i1 = kept_positions(metadata)
    return int((i0 >= i1).sum())


def pack_signs(negative: Tensor) -> Tensor:
    """[N, Kp/2] bool of pruned entries in ascending order -> [N, Kp/16] uint8, entry e in bit e %
    8."""
    shifts = torch.arange(8, device=negative.device)
    return (negative.unflatten(-1, (-1, 8)).to(torch.int64) << shifts).sum(-1).to(torch.uint8)


def unpack_signs(signs: Tensor) -> Tensor:
    """Inverse of `pack_signs`: [N, Kp/16] uint8 -> [N, Kp/2] bool (True = negative)."""
    shifts = torch.arange(8, device=signs.device)
    return ((signs[..., None].to(torch.int64) >> shifts) & 1).bool().flatten(-2)


def pack_int4(q: Tensor) -> Tensor:
    """[N, Kp/2] integers in [-8, 7] -> [N, Kp/4] uint8, two's complement, the first in the low
    nibble."""
    return _join_nibbles((q.to(torch.int64) & 15).to(torch.uint8))


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`: [N, Kp/4] uint8 -> [N, Kp/2] int8."""
    q = _split_nibbles(packed).to(torch.int8)
    return q - 16 * (q > 7).to(torch.int8)


def pack_int3(q: Tensor) -> Tensor:
    """[N, Kp/2] integers in [-4, 3] -> [N, 3 Kp/16] uint8.

    Three bytes hold the eight values of a unit, value i in bits 3i .. 3i+2.
    """
    eight = (q.to(torch.int64) & 7).unflatten(-1, (-1, 8))
    word = (eight << 3 * torch.arange(8, device=q.device)).sum(-1, keepdim=True)
    return (word >> 8 * torch.arange(3, device=q.device) & 255).to(torch.uint8).flatten(-2)


def unpack_int3(packed: Tensor) -> Tensor:
    """Inverse of `pack_int3`: [N, 3 Kp/16] uint8 -> [N, Kp/2] int8."""
    three = packed.unflatten(-1, (-1, 3)).to(torch.int64)
    word = (three << 8 * torch.arange(3, device=packed.device)).sum(-1, keepdim=True)
    q = (word >> 3 * torch.arange(8, device=packed.device) & 7).to(torch.int8).flatten(-2)
    return q - 8 * (q > 3).to(torch.int8)


def pack_planes(odd: Tensor, planes: int) -> Tensor:
    """Levels of pruned entries, [N, Kp/2] odd within +-(2^planes - 1) -> [N, planes Kp/16] uint8.

    Plane i counts 2^(planes-1-i), negative where its bit is set. The bytes of a unit follow each
    other, the largest plane first.
    """
    # The largest level has index 0; the bits of the index, the highest first, are the planes.
    index = (2**planes - 1 - odd.to(torch.int64)) >> 1
    stored = [pack_signs((index >> planes - 1 - i & 1).bool()) for i in range(planes)]
    return torch.stack(stored, -1).flatten(-2)


def unpack_planes(signs: Tensor, planes: int) -> Tensor:
    """Inverse of `pack_planes`: [N, planes Kp/16] uint8 -> [N, Kp/2] int8."""
    odd = torch.zeros((), dtype=torch.int8, device=signs.device)
    for i, plane in enumerate(signs.unflatten(-1, (-1, planes)).unbind(-1)):
        odd = odd + 2 ** (planes - 1 - i) * (1 - 2 * unpack_signs(plane).to(torch.int8))
    return odd


LEAST_EXPONENT, MOST_EXPONENT = -126, 120  # of a row of codes
SHARED_LIMIT = 127 * 2.0**MOST_EXPONENT  # the largest number that a row of codes holds


def pack_shared(rows: Tensor) -> Tensor:
    """[n, r] float -> [n, r + 1] int8: r codes in -127 .. 127 and the exponent e of their row, code
    * 2^e.

    e is the smallest with room for the row's largest entry, within LEAST_EXPONENT .. MOST_EXPONENT:
    what is unpacked packs to the same bytes, and every number is exact in fp16 (inside its range)
    and in bf16. The caller refuses entries beyond SHARED_LIMIT.
    """
    mantissa, exponent = torch.frexp(rows.abs().amax(1, keepdim=True).double() / 127)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # a power of two is met exactly
    exponent = torch.where(mantissa == 0, 0, exponent).clamp(LEAST_EXPONENT, MOST_EXPONENT)
    codes = torch.ldexp(rows.double(), -exponent).round().clamp(-127, 127)
    exponent = torch.where((codes == 0).all(1, keepdim=True), 0, exponent)
    return torch.cat([codes, exponent], 1).to(torch.int8)


def unpack_shared(stored: Tensor) -> Tensor:
    """Inverse of `pack_shared`: [n, r + 1] int8 -> [n, r] fp32."""
    return torch.ldexp(stored[:, :-1].float(), stored[:, -1:].int())


# How the types below a byte are packed and unpacked.
INTEGER_PACKING = {"int4": (pack_int4, unpack_int4), "int3": (pack_int3, unpack_int3)}


def unpack_values(values: Tensor, value_type: str) -> Tensor:
    """Stored values -> [N, Kp/2] of their own dtype; int4 and int3 as int8."""
    return INTEGER_PACKING[value_type][1](values) if value_type in INTEGER_PACKING else values


def pack_values(q: Tensor, value_type: str) -> Tensor:
    """Inverse of `unpack_values`."""
    return INTEGER_PACKING[value_type][0](q) if value_type in INTEGER_PACKING else q


def gather_positions(dense: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The two entries of every group at the given positions: [N, Kp] -> [N, Kp/2], ascending."""
    groups = dense.unflatten(-1, (-1, 4))
    return groups.gather(-1, torch.stack((first, second), -1)).flatten(-2)


def scatter_positions(entries: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Inverse of `gather_positions` with zeros elsewhere: [N, Kp/2] -> [N, Kp]."""
    pairs = entries.unflatten(-1, (-1, 2))
    groups = torch.zeros(*pairs.shape[:-1], 4, dtype=entries.dtype, device=entries.device)
    return groups.scatter(-1, torch.stack((first, second), -1), pairs).flatten(-2)


def _split_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _join_nibbles(nibbles: Tensor) -> Tensor:
    pairs = nibbles.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4
