"""What another library's kernel is to the benchmark: a weight in its own format, and a check.

Each peer gets a weight of its own nearest format and of the same shape, and has to agree with its
own dequantised weight before it is timed. One that is absent, refuses a shape or disagrees is left
out with a reason, never an error, since it is not ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import PeerError
from .clocks import Call

GROUP = 128  # inputs that a scale of most int4 peers covers
# The largest relative error in the Frobenius norm, by how x enters the product. Exact: rounding to
# bf16 makes 0.002, sums in fp16 make up to 0.01. int8: one scale for 128 inputs makes 0.007, one
# for all of x, as fbgemm has it, 0.012. A wrong layout makes 1.
WORST_ERROR = {"exact": 0.02, "int8": 0.03}
SIXTEEN_BITS = (torch.float16, torch.bfloat16)

Bind = Callable[[Tensor], Call]


@dataclass(frozen=True)
class Prepared:
    """A weight in a peer's format.

    bind: of x [M, K] gives the call that is timed; whatever form the library wants x in, and room
        for the result, is made before that call.
    dense: [N, K], the dense weight that it stands for.
    result: what a call returned, as y [M, N].
    another: `bind` of the same weight in other memory; None: the weight is prepared anew.
    saturates: the largest relative error where the library's sums saturate; None: they do not.
    """

    bind: Bind
    weight_bytes: int
    dense: Tensor
    result: Callable[[Any], Tensor] = lambda y: y
    another: Callable[[], Bind] | None = None
    saturates: float | None = None


def directly(linear: Callable[[Tensor], Tensor]) -> Bind:
    """The `bind` of a function of x [M, K] that returns y [M, N]."""
    return lambda x: partial(linear, x)


@dataclass(frozen=True)
class Peer:
    """A kernel of another library, and what it takes."""

    name: str
    packages: tuple[str, ...]  # what has to be importable
    values: str
    group_size: int | None
    multiples: tuple[int, int]  # N and K have to be multiples of these
    # It takes a dense weight [N, K] in the activations' dtype, and makes a new one each time.
    prepare: Callable[[Tensor], Prepared]
    device: str = "cuda"
    capability: tuple[int, int] = (0, 0)  # of a CUDA device, at least
    dtypes: tuple[torch.dtype, ...] = SIXTEEN_BITS  # of the activations that it takes
    # x is converted to this before it is handed over, which is not timed; None: it stays as it is.
    fed: torch.dtype | None = None
    activations: str = "exact"  # or "int8": it rounds x to 8-bit integers
    missing: Callable[[], str | None] = lambda: None  # what else this machine lacks

    def reason(self, n: int, k: int, dtype: torch.dtype, device: torch.device | str) -> str | None:
        """Why it cannot be timed on that problem, or None."""
        where = torch.device(device)
        if where.type != self.device:
            runs = "CPUs" if self.device == "cpu" else "CUDA devices"
            return f"it runs on {runs}, not on {where.type}"
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"the package {package!r} is not installed"
        if dtype not in self.dtypes and self.fed is None:
            names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
            takes = " and ".join(names[kind] for kind in self.dtypes)
            return f"it takes {takes} activations, not {str(dtype).removeprefix('torch.')}"
        if self.device == "cuda":
            if (found := torch.cuda.get_device_capability(where)) < self.capability:
                needed, has = ("{}.{}".format(*pair) for pair in (self.capability, found))
                return f"it needs compute capability {needed}, this device has {has}"
        if n % self.multiples[0] or k % self.multiples[1]:
            N, K = self.multiples
            return f"it takes N in multiples of {N} and K of {K}, not {n}x{k}"
        return self.missing()


def agree(x: Tensor, prepared: Prepared, activations: str = "exact") -> None:
    """Compares a peer's result with that of its own dequantised weight.

    x: [M, K] as it is fed. activations: how it enters the product, a key of WORST_ERROR.

    Raises: PeerError.
    """
    exact = x.float() @ prepared.dense.float().T
    found = prepared.result(prepared.bind(x)())
    error = ((found.float() - exact).norm() / exact.norm()).item()
    most = prepared.saturates or WORST_ERROR[activations]
    if not error <= most:  # NaN fails too.
        raise PeerError(
            f"it disagrees with its own dequantised weight by {error:.3g}, relative; at most "
            f"{most} is allowed with {activations} activations"
        )


def quantized(W: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """W [N, K] as int4 by the largest of each group.

    Returns codes 0 to 15 [N, K] uint8, scales [N, K/group] in W's dtype, and the dense weight
    (code - 8) · scale [N, K] that they stand for.
    """
    groups = W.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1) / 7).to(W.dtype)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    dense = (codes * scales.float()[..., None]).flatten(1)
    return (codes + 8).to(torch.uint8).flatten(1), scales, dense


def pairs(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [N, K] as bytes [N, K / 2], the input that comes first in the lower half."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
