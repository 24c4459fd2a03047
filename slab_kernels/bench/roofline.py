"""How near to this machine's limits a time is: its shares of what was measured in the same run.

A linear with few tokens is bound by the bytes of its weight, one with many by 2·M·N·K operations.
Whichever share is larger says which limit is near and how near (S. Williams, A. Waterman and
D. Patterson, "Roofline", 2009). Both ceilings are measured, not taken from a data sheet. The matrix
rate is that of torch's dense product: a 2:4 product can pass it, up to twofold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .clocks import Clock

CPU_BYTES, GPU_BYTES = 256 << 20, 1 << 30
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of the square matrices
# Seconds of a product after which no larger one is tried: on a CPU torch's fp16 product takes 0.2 s
# at 512 and 60 s at 2048.
LONG_ENOUGH = 0.02


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to reach."""

    bandwidth: float  # bytes per second
    matrix: float  # floating-point operations per second

    @classmethod
    def measure(cls, device: torch.device | str, dtype: torch.dtype, clock: Clock) -> Ceilings:
        """Both, for products of that dtype."""
        return cls(bandwidth(device, clock), matrix_rate(device, dtype, clock))

    def shares(
        self, seconds: float, weight_bytes: int, m: int, n: int, k: int
    ) -> dict[str, float | str]:
        """The columns of a row for a product of that time.

        gbytes_per_s (weight bytes over time), bandwidth_share and matrix_share (of the ceilings),
        tflops, roofline (the larger share), bound ("bytes" or "matrix", whichever that is), and
        the ceilings as measured_gbytes_per_s and measured_tflops.
        """
        operations = 2 * m * n * k
        moved = weight_bytes / seconds / self.bandwidth
        computed = operations / seconds / self.matrix
        return {
            "gbytes_per_s": weight_bytes / seconds / 1e9,
            "bandwidth_share": moved,
            "tflops": operations / seconds / 1e12,
            "matrix_share": computed,
            "roofline": max(moved, computed),
            "bound": "bytes" if moved >= computed else "matrix",
            "measured_gbytes_per_s": self.bandwidth / 1e9,
            "measured_tflops": self.matrix / 1e12,
        }


def bandwidth(device: torch.device | str, clock: Clock) -> float:
    """Bytes per second of reading; on a GPU of copying if that is more.

    On a CPU a copy also reads what it overwrites, so it is not tried.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = GPU_BYTES if on_gpu else CPU_BYTES
    data = torch.ones(size // 4, device=device)
    rate = size / clock.fastest(data.sum)
    if on_gpu:
        target = torch.empty_like(data)
        rate = max(rate, 2 * size / clock.fastest(lambda: target.copy_(data)))
    return rate


def matrix_rate(device: torch.device | str, dtype: torch.dtype, clock: Clock) -> float:
    """Operations per second of a dense square product: the best over SIDES, up to the first that
    takes LONG_ENOUGH."""
    best = 0.0
    for side in SIDES:
        # Random numbers: a GPU that multiplies constants draws less power and clocks higher.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = clock.fastest(partial(torch.matmul, a, b))
        best = max(best, 2 * side**3 / seconds)
        if seconds > LONG_ENOUGH:
            break
    return best
