"""The gate before timing: a kernel's result is compared with the reference in fp64."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.base import Backend
from ..errors import BenchError
from ..format import PackedWeight
from ..testing import ROUNDOFF, error_bound, oracle

GATE_ROWS = 256  # output rows that are compared


class Linear(Protocol):
    """What the gate needs of a backend."""

    @property
    def name(self) -> str: ...

    def linear(self, x: Tensor, state: Any) -> Tensor: ...


def gate(backend: Linear, x: Tensor, state: Any, packed: PackedWeight) -> None:
    """Compares the last GATE_ROWS outputs of x [M, K] with the reference in fp64.

    state: what the backend prepared from `packed`.

    Raises: BenchError if one is off by more than `tolerance`, or any output is not finite.
    """
    y = backend.linear(x, state)
    rows = min(GATE_ROWS, packed.out_features)
    part = packed.narrow_out(packed.out_features - rows, rows)
    exact, size = oracle(x, part)
    rounds = x.device.type == "cuda" or x.dtype == torch.bfloat16
    allowed = tolerance(size, exact, x.dtype, packed.in_features, rounds=rounds)
    if isinstance(backend, Backend) and backend.activations(state) == "int8":
        allowed = allowed + size * rounding_of_integers(packed.in_features)
    off = bool(((y[:, -rows:].double() - exact).abs() > allowed).any())
    if off or not bool(y.isfinite().all()):
        raise BenchError(
            f"backend {backend.name!r} disagrees with the reference on {packed.layout}; "
            "nothing was timed"
        )


def rounding_of_integers(K: int) -> float:
    """What 8-bit integers of x, and of pruned entries, may add to `tolerance`, in parts of `size`.

    For normally distributed x and weights an output is off by about 1 / (100 sqrt(K)) of the sum
    of its terms' sizes; this is ten times that, and at most the largest rounding of one term.
    """
    return min(0.02, 0.1 / K**0.5)


def tolerance(size: Tensor, exact: Tensor, dtype: torch.dtype, K: int, rounds: bool) -> Tensor:
    """The largest difference allowed from `exact` [M, N], whose terms' sizes sum to `size`.

    Sums are accumulated in fp32. With `rounds`, numbers are rounded to the activations' type before
    they are multiplied: on tensor cores values, v and v x, on a CPU that multiplies bf16 the
    entries of the weight. Of K such roundings, each at most ROUNDOFF and of either sign, 8 /
    sqrt(K) of their sum is six standard deviations and more; with few inputs it is their sum.
    """
    rounded = size * ROUNDOFF[dtype] * min(2.0, 8 / K**0.5) if rounds else 0.0
    return error_bound(size, exact, dtype, K) + rounded
