"""The gate before timing: a kernel's result is compared with the reference in fp64."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import BenchError
from ..format import PackedWeight
from ..testing import ROUNDOFF, error_bound, oracle

GATE_ROWS = 256  # output rows that are compared
# With int8 activations a result may be off by so many times the sum of |w x| over sqrt(K), twice
# the most that was seen with random weights of up to 4 ranks and 3 planes. A wrong one is off by 1
# and more. docs/cpu.md has the strict bound, which says less about a sum of many roundings.
INT8_ERROR = 0.2


class Linear(Protocol):
    """What the gate needs of a backend."""

    @property
    def name(self) -> str: ...

    def linear(self, x: Tensor, state: Any) -> Tensor: ...


def gate(
    backend: Linear, x: Tensor, state: Any, packed: PackedWeight, activations: str = "exact"
) -> None:
    """Compares the last GATE_ROWS outputs of x [M, K] with the reference in fp64.

    state: what the backend prepared from `packed`. activations: its accuracy mode.

    Raises: BenchError if one is off by more than `tolerance`, with "int8" by more than INT8_ERROR
    beyond that, or any output is not finite.
    """
    y = backend.linear(x, state)
    rows = min(GATE_ROWS, packed.out_features)
    part = packed.narrow_out(packed.out_features - rows, rows)
    exact, size = oracle(x, part)
    rounds = x.device.type == "cuda" or x.dtype == torch.bfloat16
    allowed = tolerance(size, exact, x.dtype, packed.in_features, rounds=rounds)
    if activations == "int8":
        allowed = allowed + INT8_ERROR * size / packed.in_features**0.5
    off = bool(((y[:, -rows:].double() - exact).abs() > allowed).any())
    if off or not bool(y.isfinite().all()):
        raise BenchError(
            f"backend {backend.name!r} disagrees with the reference on {packed.layout}; "
            "nothing was timed"
        )


def tolerance(size: Tensor, exact: Tensor, dtype: torch.dtype, K: int, rounds: bool) -> Tensor:
    """The largest difference allowed from `exact` [M, N], whose terms' sizes sum to `size`.

    Sums are accumulated in fp32. With `rounds`, numbers are rounded to the activations' type before
    they are multiplied: on tensor cores values, v and v x, on a CPU that multiplies bf16 the
    entries of the weight. Of K such roundings, each at most ROUNDOFF and of either sign, 8 /
    sqrt(K) of their sum is six standard deviations and more; with few inputs it is their sum.
    """
    rounded = size * ROUNDOFF[dtype] * min(2.0, 8 / K**0.5) if rounds else 0.0
    return error_bound(size, exact, dtype, K) + rounded
