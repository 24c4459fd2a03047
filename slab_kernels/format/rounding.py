"""Rounding to a stored type: what it loses, what does not fit, and factors as they are stored."""

from __future__ import annotations

from reprlib import repr as short

import torch
from torch import Tensor

from ..errors import DtypeError, RangeError
from . import bits

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of dense weights
# The fraction of a matrix that rounding may lose, in the Frobenius norm: what bf16 loses at worst.
MOST_LOST = 2.0**-8


def weight_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`dtype`, or the one that it names, such as "float16" or "fp16", if dense weights can have it.

    Raises: DtypeError.
    """
    known = {str(d).removeprefix("torch."): d for d in WEIGHT_DTYPES}
    short_names = {name.replace("float", "fp").replace("bfp", "bf"): d for name, d in known.items()}
    named = isinstance(dtype, torch.dtype | str)
    every = known | short_names
    found = every.get(str(dtype).removeprefix("torch.")) if named else None
    if found is None:
        raise DtypeError(f"dtype={short(dtype)} is none of weights; use {', '.join(known)}")
    return found


def cast(t: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`t` rounded to `dtype`.

    Raises: RangeError that calls it `name` if a number does not fit, with the dtypes that hold it.
    """
    rounded = t.to(dtype)
    if rounded.is_floating_point() and not bool(rounded.isfinite().all()):
        most = float(t.abs().max())
        wide = [d for d in WEIGHT_DTYPES if most <= torch.finfo(d).max]
        fitting = [str(d).removeprefix("torch.") for d in wide]
        raise RangeError(
            f"{name} reaches {most:.4g}, which {str(dtype).removeprefix('torch.')} does not hold; "
            + (f"dtype {' or '.join(fitting)} does" if fitting else "the weights are damaged")
        )
    return rounded


def rounding_error(t: Tensor, dtype: torch.dtype) -> float:
    """The fraction of t, fp32 of any scale, that rounding to `dtype` loses, in the Frobenius norm.

    It is 0 to 1, or NaN or infinite if t does not fit.
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
    two: MXINT8 of the OCP microscaling formats (specification 1.0), with a row for a block.

    Raises: RangeError if a number does not fit.
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
    nothing. Returns fp32 tensors.

    Raises: RangeError if a factor does not fit.
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
    """U and V in fp32, their largest entries alike in every rank; exact ones stay as they are."""
    U, V = U.float(), V.float()
    if all(bool((t.to(dtype).float() == t).all()) for t in (U, V)):
        return U, V
    high_u, high_v = U.abs().amax(0), V.abs().amax(0)
    both = (high_u > 0) & (high_v > 0)
    shift = torch.where(both, (high_v.log2() - high_u.log2()) / 2, 0.0).nan_to_num(0.0).round()
    return torch.ldexp(U, shift), torch.ldexp(V, -shift)
