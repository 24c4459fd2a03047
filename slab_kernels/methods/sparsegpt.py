"""SparseGPT (arXiv 2301.00774): entries of least w^2 / [H^-1]_jj go, the others make up for them.

The error of each column is pushed onto the columns to its right (algorithm 1): see `solvers.sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.masks import select
from .solvers.sweep import curvature, sweep


@dataclass(frozen=True)
class SparseGPTConfig(Config):
    """The settings of `sparsegpt`; `damping` is 0.01 in the paper."""

    damping: float = setting(
        0.01, "share of the mean diagonal of the Gram matrix added to it", 0, 10
    )


def sparsegpt(weight: Tensor, stats: InputStats, config: SparseGPTConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S: masks by w^2 / [H^-1]_jj of the updated weights.

    n:m masks are chosen when the sweep reaches the group, unstructured ones row by row within each
    block of 128 columns; how many a row keeps in a block follows from its |w| / U_jj before the
    sweep. Inputs that were always zero count as weak independent inputs (see `damped_cholesky`).
    Integer values are rounded inside the sweep, as in GPTQ.
    """
    curve = curvature(stats.matrix, config.damping)
    pattern, grid = config.parsed, config.grid
    mask = None if pattern.structured else select(weight.abs() * curve.conditional_scale, pattern)
    swept = sweep(weight, curve, pattern, mask=mask, grid=grid, joint=False)
    values, group_size = (grid.values, grid.group_size) if grid else (None, None)
    return Decomposition(
        swept.approximation, swept.mask, scales=swept.scales, values=values, group_size=group_size
    )
