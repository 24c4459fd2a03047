"""SparseGPT (arXiv 2301.00774): pruning with the error of each column pushed onto the columns to its right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.masks import top_of_rows
from .solvers.sweep import curvature, sweep


@dataclass(frozen=True)
class SparseGPTConfig(Config):
    """`damping` is 0.01 in the paper."""

    damping: float = setting(
        0.01, "share of the mean diagonal of the Gram matrix added to it", 0, 10
    )


def sparsegpt(weight: Tensor, stats: InputStats, config: SparseGPTConfig) -> Decomposition:
    """weight [N,K] fp32 -> S (algorithm 1): mask by w^2 / [H^-1]_jj of the updated weights, kept entries as updated.

    n:m masks are chosen when the sweep reaches the group, unstructured ones row by row within each block of 128
    columns; how many a row keeps in a block follows from its |w| / U_jj before the sweep. Inputs that were always zero
    count as weak independent inputs (see `curvature`). Integer values are rounded inside the sweep, as in GPTQ.
    """
    curve = curvature(stats.gram.to(weight.device), config.damping)
    pattern, grid = config.parsed, config.grid
    mask = None
    if not pattern.structured:
        keep = torch.full_like(
            weight[:, :1], pattern.kept_in_row(weight.shape[1]), dtype=torch.long
        )
        mask = top_of_rows(weight.abs() * curve.conditional_scale, keep)
    swept = sweep(weight, curve, pattern, mask=mask, grid=grid, joint=False)
    if grid is None:
        return Decomposition(swept.approximation, swept.mask)
    return Decomposition(
        swept.approximation,
        swept.mask,
        scales=swept.scales,
        values=grid.values,
        group_size=grid.group_size,
    )
