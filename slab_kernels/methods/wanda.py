"""Wanda (arXiv 2306.11695): S = W where |W_ij| * ||X_j||_2 is largest (equation 1)."""

from __future__ import annotations

from torch import Tensor

from ..format import Decomposition
from .config import Config
from .inputs import InputStats
from .magnitude import kept_only
from .solvers.masks import select


def wanda(weight: Tensor, stats: InputStats, config: Config) -> Decomposition:
    """weight [N,K] fp32, mean squares -> S, the highest scores of each row or n:m group."""
    score = weight.abs() * stats.diagonal.to(weight).sqrt()
    return kept_only(weight, select(score, config.parsed), config)
