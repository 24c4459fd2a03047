"""Dense integer weights to compare with: round to nearest, and GPTQ, as methods of this process.

They keep every weight, so they are no decomposition of the library's, and are added to its table
of methods only while a benchmark runs.
"""

from __future__ import annotations

import math

from torch import Tensor

from slab_kernels.format import INTEGER_RANGES, Decomposition
from slab_kernels.methods import METHODS, Config, InputStats, Method
from slab_kernels.methods.solvers.masks import Pattern
from slab_kernels.methods.solvers.quantize import Grid, quantize
from slab_kernels.methods.solvers.sweep import curvature, sweep

NAMES = ("rtn", "gptq")
SCALE_BITS = 16
GPTQ_DAMPING = 0.01  # a share of the mean diagonal (GPTQ, section 3.3)


def register(bits: int, group_size: int) -> None:
    """Add `rtn` and `gptq` with integers of so many bits and one scale for `group_size` inputs."""
    values = f"int{bits}"
    INTEGER_RANGES.setdefault("int2", (-2, 1))

    def dense(S: Tensor, mask: Tensor, scales: Tensor) -> Decomposition:
        return Decomposition(S, mask, scales=scales, values=values, group_size=group_size)

    def rtn(weight: Tensor, stats: InputStats | None, config: Config) -> Decomposition:
        """Round every weight to a symmetric grid, whose step has the least squared error."""
        mask = weight.new_ones(weight.shape).bool()
        S, scales = quantize(weight, mask, values, group_size)
        return dense(S, mask, scales)

    def gptq(weight: Tensor, stats: InputStats, config: Config) -> Decomposition:
        """GPTQ (arXiv 2210.17323): the sweep with every weight kept.

        The steps of a group are searched when the sweep reaches it.
        """
        mask = weight.new_ones(weight.shape).bool()
        swept = sweep(
            weight,
            curvature(stats.matrix, GPTQ_DAMPING),
            Pattern(),
            mask=mask,
            grid=Grid(values, group_size),
            joint=False,
        )
        assert swept.scales is not None
        return dense(swept.approximation, swept.mask, swept.scales)

    METHODS["rtn"] = Method("rtn", rtn, Config, "none", "dense integers, round to nearest")
    METHODS["gptq"] = Method("gptq", gptq, Config, "gram", "dense integers, GPTQ")


def stored_bits(bits: int, group_size: int, shapes: list[tuple[int, int]]) -> float:
    """Bits per weight of all layers of these shapes (N, K) together, scales included."""
    weights = sum(N * K for N, K in shapes)
    scales = sum(N * math.ceil(K / group_size) for N, K in shapes)
    return bits + SCALE_BITS * scales / weights
