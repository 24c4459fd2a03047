"""What rounding to a stored type loses, and factors as they are stored: balanced and rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RangeError
from . import bits

MOST_LOST = 2.0**-8  # of a matrix, by rounding what it holds: what bf16 loses at worst


def rounding_error(t: Tensor, dtype: torch.dtype) -> float:
    """How much of t, fp32 of any scale, rounding to `dtype` loses, in the Frobenius norm: 0 to 1,
    or NaN or infinite if t does not fit.
    """
    most = t.abs().amax()
    if most == 0:
        return 0.0
    return float(((t.to(dtype).float() - t) / most).norm() / (t / most).norm())


def fitting_dtype(*pairs: tuple[Tensor, Tensor]) -> torch.dtype:
    """The type to store factors in: fp16, or fp32 if fp16 loses more than MOST_LOST of one."""
    half = torch.float16
    factors = [t for pair in pairs for t in _balanced(*pair, half)]
    return half if all(rounding_error(t, half) <= MOST_LOST for t in factors) else torch.float32


def round_adapter(
    P: Tensor, Q: Tensor, adapter_values: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """P [N,R'], Q [K,R'] as `pack` stores them, in fp32.

    With `adapter_values` None like `round_factors`, else int8 codes of rows with a shared power of
    two (MXINT8 of the OCP microscaling formats, a row for a block). Raises RangeError.
    """
    if adapter_values is None:
        return round_factors(P, Q, dtype)
    for name, t in (("P", P), ("Q", Q)):
        if not bool((t.abs() <= bits.SHARED_LIMIT).all()):
            raise RangeError(
                f"{name} reaches {float(t.abs().max()):.4g}; int8 adapters hold finite numbers up "
                f"to {bits.SHARED_LIMIT:.4g}"
            )
    stored = [bits.unpack_shared(bits.pack_shared(t.float())) for t in (P, Q)]
    if not all(torch.equal(a, b) for a, b in zip(stored, (P, Q), strict=True)):
        balanced = round_factors(P, Q, torch.float32)
        stored = [bits.unpack_shared(bits.pack_shared(t)) for t in balanced]
    return stored[0], stored[1]


def round_factors(U: Tensor, V: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """U [N,R], V [K,R] as `pack` stores them: each rank balanced by a power of two, then rounded.

    dtype None: the `fitting_dtype` of the two. Balancing (max|u_r| ~ max|v_r|) keeps both inside
    fp16's range. Factors already exact in `dtype` are left alone, so rounding twice changes
    nothing. Returns fp32 tensors. Raises RangeError if a factor does not fit.
    """
    dtype = dtype or fitting_dtype((U, V))
    pair = _balanced(U, V, dtype)
    for name, t in zip(("first", "second"), pair, strict=True):
        if not rounding_error(t, dtype) <= MOST_LOST:
            raise RangeError(
                f"the {name} factor, up to {float(t.abs().max()):.3g}, does not fit {dtype}; "
                "pack with factor_dtype=torch.bfloat16 or float32"
            )
    return pair[0].to(dtype).float(), pair[1].to(dtype).float()


def _balanced(U: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    U, V = U.float(), V.float()
    if all(bool((t.to(dtype).float() == t).all()) for t in (U, V)):
        return U, V
    high_u, high_v = U.abs().amax(0), V.abs().amax(0)
    both = (high_u > 0) & (high_v > 0)
    shift = torch.where(both, (high_v.log2() - high_u.log2()) / 2, 0.0).nan_to_num(0.0).round()
    return torch.ldexp(U, shift), torch.ldexp(V, -shift)
