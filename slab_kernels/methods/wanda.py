"""Wanda (arXiv 2306.11695): keep the largest |w| * ||x||."""

from __future__ import annotations

from torch import Tensor

from ..format import Decomposition
from .config import Config
from .inputs import InputStats
from .magnitude import kept_only
from .solvers.masks import select


def wanda(weight: Tensor, stats: InputStats, config: Config) -> Decomposition:
    """weight [N,K] fp32 -> S = weight where |W_ij| * ||X_j||_2 (eq. 1) is highest, in each row or group of n:m."""
    score = weight.abs() * stats.diagonal.to(weight).sqrt()
    return kept_only(weight, select(score, config.parsed), config)
