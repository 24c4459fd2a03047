"""SLaB as published (arXiv 2604.04493): W ~ S + (U V^T) * B, S and the sign term in turn.

It is the baseline that `slab` is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.lowrank import signs, truncated_svd
from .solvers.masks import select
from .solvers.quantize import quantize


@dataclass(frozen=True)
class SlabPaperConfig(Config):
    """The settings of `slab_paper`.

    `iterations` is 20 in the paper. The paper has no `scaled_svd`, which makes a fairer baseline on
    inputs of uneven energy.
    """

    iterations: int = setting(20, "alternations of S and the sign term", 1, 10_000)
    scaled_svd: bool = setting(False, "the SVD is of |W - S| * ||X_j|| instead of |W - S|")


def slab_paper(weight: Tensor, stats: InputStats, config: SlabPaperConfig) -> Decomposition:
    """weight [N,K] fp32, mean squares -> S + (U V^T) * B, on every position; packing folds them.

    From L = 0, alternately S = prune(W - L * B) by |Y_S| * ||X_j||_2 per output row or group of
    n:m, then B = sign(W - S) and L = U V^T = SVD_R(|W - S|), unweighted. Ends with S. Integer
    values are rounded after folding.
    """
    norm = stats.diagonal.to(weight).sqrt()
    pattern, grid = config.parsed, config.grid
    scale = torch.ones_like(norm)
    if config.scaled_svd:
        smallest = norm[norm > 0].min() if bool((norm > 0).any()) else 1.0
        scale = torch.where(norm > 0, norm, smallest)
    mask = select(weight.abs() * norm, pattern)
    S = weight.masked_fill(~mask, 0.0)
    for _ in range(config.iterations):
        residual = weight - S
        B = signs(residual)
        U, V = truncated_svd(residual.abs() * scale, config.rank)
        V = V / scale[:, None]
        Y = weight - (U @ V.T) * B
        mask = select(Y.abs() * norm, pattern)
        S = Y.masked_fill(~mask, 0.0)
    found = Decomposition(S, mask, U, V, B.to(torch.int8))
    if grid is None:
        return found
    folded = found.folded()
    S, scales = quantize(folded.S, mask, grid.values, grid.group_size)
    return replace(folded, S=S, scales=scales, values=grid.values, group_size=grid.group_size)
