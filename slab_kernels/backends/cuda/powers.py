"""A power of two for each output row, by which kernels that rebuild a weight in registers multiply
its numbers.

They multiply codes by the row's scale as an fp16 number. A scale of the stream may be far below
fp16's smallest normal number or above its largest; times the row's power it is neither, and the
sums are divided by it again, which rounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_EXPONENT = -7  # The largest scale of a row comes to half of this power of two, or above it.
SIGN_EXPONENT = 15  # The sign term of a row stays below this power of two.
MOST_EXPONENT = 126  # of a power of two that is normal in fp32, as its inverse is


def row_powers(scales: Tensor, U: Tensor | None, V: Tensor | None, largest: float) -> Tensor:
    """A power of two for each row: [N] fp32.

    It brings the largest of the row's scales to [2^-8, 2^-7), or to less where the sign term, or u
    by itself, would pass 2^15 otherwise. A row without scales has u and that sum alone to go by,
    one of zeros has 1.

    scales: [N, n] of the stream. U [N, R], V [R, K]: of the sign term, in the kernels' type, or
    None. largest: what the levels of several planes reach, 1 for one plane.
    """
    exponent = SCALE_EXPONENT - _exponents(scales.float().abs().amax(1))
    bounded = scales.ne(0).any(1)
    if U is not None and V is not None:
        # Where all of V is small, u itself is what may not pass.
        sums = U.float().abs() @ V.float().abs().amax(1).clamp(min=1) * largest
        room = SIGN_EXPONENT - _exponents(sums)
        exponent = torch.where(bounded, exponent, room)
        exponent = torch.where(sums > 0, exponent.minimum(room), exponent)
        bounded = bounded | (sums > 0)
    exponent = torch.where(bounded, exponent, 0).clamp(-MOST_EXPONENT, MOST_EXPONENT)
    return (exponent + 127 << 23).to(torch.int32).view(torch.float32)  # exact on every device


def _exponents(sizes: Tensor) -> Tensor:
    """e with size 2^-e in [1/2, 1), of fp32 numbers that are not 0; int32."""
    return torch.frexp(sizes).exponent.to(sizes.device)
