"""U, V, P and Q in the activations' type: powers of two move between them so that products fit
fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RangeError
from ..format import MOST_LOST, PackedWeight, rounding_error

LARGEST_V = 8.0  # |v x| below 65504 up to |x| = 8188


def sign(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U [N, R] and V [K, R] in `dtype`.

    The median of |v| comes to [1/2, 1), or less where max |v| would exceed LARGEST_V. With an
    outlier in V scaled to 1, small activations times v would underflow: for x of 1e-3 and an
    outlier of 200, the error was 22 times that of a dense fp16 product.

    Raises: RangeError if U does not fit.
    """
    U, V = packed.sign_factors()
    U, V = U.double(), V[: packed.in_features].double()
    e = torch.maximum(_power(V.abs().median(0).values), _power(V.abs().amax(0) / LARGEST_V))
    return _checked("U", torch.ldexp(U, e), dtype), torch.ldexp(V, -e).to(dtype)


def adapter(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P [N, R'] and Q [K, R'] in `dtype`, with |x Q| <= |x| in the 2-norm.

    Raises: RangeError if P does not fit.
    """
    P, Q = packed.adapter()
    P, Q = P.double(), Q[: packed.in_features].double()  # fp32 has no squares of 1e30 and 1e-30
    e = _power(torch.linalg.vector_norm(Q, dim=0))
    return _checked("P", torch.ldexp(P, e), dtype), torch.ldexp(Q, -e).to(dtype)


def beside_results(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U [N, R] and V [K, R], or P and Q, in fp32 with powers of two moved between them.

    Max |u| of a rank comes to [1/2, 1), so that no x v is larger than a result (v of 1e30 beside u
    of 1e-30 made x v infinite for x of 1e9); or it stays above that where the smallest |u| but 0
    would leave fp32's normal numbers. Nothing is rounded: only what overflowed changes.
    """
    left, right = left.double(), right.double()
    size = left.abs()
    smallest = torch.where(size > 0, size, size.amax(0)).amin(0)
    e = torch.minimum(_power(size.amax(0)), _power(smallest) + 125)
    return torch.ldexp(left, -e).float(), torch.ldexp(right, e).float()


def _power(size: Tensor) -> Tensor:
    """e with size 2^-e in [1/2, 1); 0 where size is 0."""
    return torch.frexp(size).exponent.to(size.device)


def _checked(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`. Raises: RangeError if rounding loses too much of it."""
    if not rounding_error(t.float(), dtype) <= MOST_LOST:
        raise RangeError(
            f"{name}, scaled so that the other factor is below 1, does not fit {dtype}; use "
            "bfloat16 activations"
        )
    return t.to(dtype)
