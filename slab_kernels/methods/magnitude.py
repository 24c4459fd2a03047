"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): S = W where |W_ij| is largest.

It is the baseline that needs no data.
"""

from __future__ import annotations

from torch import Tensor

from ..format import Decomposition
from .config import Config
from .inputs import InputStats
from .solvers.masks import select
from .solvers.quantize import quantize


def magnitude(weight: Tensor, stats: InputStats | None, config: Config) -> Decomposition:
    """weight [N,K] fp32 -> S = weight where |weight| is highest in its row or n:m group.

    `stats` is not read.
    """
    return kept_only(weight, select(weight.abs(), config.parsed), config)


def kept_only(weight: Tensor, mask: Tensor, config: Config) -> Decomposition:
    """S = weight on `mask` [N,K], rounded to a searched grid where integers are asked for."""
    if config.grid is None:
        return Decomposition(weight.masked_fill(~mask, 0.0), mask)
    S, scales = quantize(weight, mask, config.values, config.group_size)
    return Decomposition(S, mask, scales=scales, values=config.values, group_size=config.group_size)
