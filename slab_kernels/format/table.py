"""A matrix as int8 codes with one scale a row: how an embedding is stored.

The scale of a row gives its largest entry the code 127. One of least squared error, tried on a real
model (SmolLM2-135M), lowered the squared error by less than a hundredth and clipped large entries,
which a head reads together with the large hidden states: KL rose by a tenth, so it is not taken.
Scales are bf16, two bytes a row: codes are chosen for the scale as it is stored, so its rounding
costs next to nothing, and unlike fp16 it holds rows of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DtypeError, RangeError, ShapeError

MOST_CODE = 127
TABLE_NAMES = ("codes", "scales")
NUMBERS_AT_ONCE = 1 << 22  # of the matrix, so that no large copy is made


class Int8Table(NamedTuple):
    """codes int8 [V,D] in -127 .. 127, scales bf16 [V], positive; entry = code * scale."""

    codes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """[V,D] fp32."""
        return self.codes.float() * self.scales.float()[:, None]


def table_tensors(rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of the tensors of a table."""
    return {"codes": (torch.int8, (rows, columns)), "scales": (torch.bfloat16, (rows,))}


@torch.no_grad()
def int8_table(weight: Tensor) -> Int8Table:
    """The table that is nearest to a matrix [V,D] of any floating type, row by row.

    A row of zeros has codes of zero and the scale 1.

    Raises: RangeError for NaN and infinite entries.
    """
    at_once = max(1, NUMBERS_AT_ONCE // max(1, weight.shape[1]))
    parts = [_of_rows(rows) for rows in weight.detach().split(at_once)]
    return Int8Table(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]))


def _of_rows(weight: Tensor) -> Int8Table:
    """`int8_table` of some rows at once."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    if bad := int((~largest.isfinite()).sum()):
        raise RangeError(f"{bad} rows of the matrix hold NaN or infinite numbers")
    empty = largest == 0
    scales = _stored(largest / MOST_CODE).masked_fill(empty, 1.0)
    codes = (weight / scales[:, None]).round_().clamp_(-MOST_CODE, MOST_CODE)
    return Int8Table(codes.to(torch.int8), scales.to(torch.bfloat16))


def _stored(scales: Tensor) -> Tensor:
    """Scales as bf16 holds them, above zero and so that no code overflows fp32."""
    info = torch.finfo(torch.bfloat16)
    bounded = scales.clamp(info.tiny, info.max / 256)
    return bounded.to(torch.bfloat16).float()


def check_table(tensors: dict[str, Tensor], rows: int, columns: int) -> Int8Table:
    """The table that `tensors` are, if they are exactly one of [rows, columns].

    Raises: DtypeError, ShapeError, or RangeError for the code -128 and scales that are not
        positive and finite.
    """
    for name, (dtype, shape) in table_tensors(rows, columns).items():
        if tensors[name].dtype != dtype:
            raise DtypeError(f"{name} is {tensors[name].dtype}, expected {dtype}")
        if tuple(tensors[name].shape) != shape:
            raise ShapeError(f"{name} has shape {list(tensors[name].shape)}, expected {shape}")
    table = Int8Table(tensors["codes"], tensors["scales"])
    if int(table.codes.amin()) < -MOST_CODE:
        raise RangeError("codes holds -128, but int8 codes are symmetric: -127 .. 127")
    least, largest = (float(end) for end in torch.stack(table.scales.float().aminmax()))
    if not (least > 0 and largest * 128 <= torch.finfo(torch.float32).max):  # NaN is neither
        raise RangeError(
            f"scales range from {least:.3g} to {largest:.3g}; they must be positive and far below "
            "fp32's end"
        )
    return table
