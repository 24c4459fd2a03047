"""OATS and SSLC: A ~ S + P Q^T for A = W diag(rms x), alternating a threshold and a truncated SVD.

OATS: arXiv 2409.13652, algorithm 1. SSLC: arXiv 2510.26446, section 3. Both minimise
||(W - S - P Q^T) diag(rms x)||_F, the error where inputs are uncorrelated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .inputs import InputStats
from .solvers.finish import PolishedConfig, Split, finish
from .solvers.lowrank import truncated_svd
from .solvers.masks import select
from .solvers.metric import Metric, metric


@dataclass(frozen=True)
class OatsConfig(PolishedConfig):
    """The settings of `oats`; `rounds` is 80 in the paper."""

    rounds: int = setting(80, "alternations of the low-rank part and the kept values", 1, 10_000)


@dataclass(frozen=True)
class SslcConfig(PolishedConfig):
    """The settings of `sslc`; `rounds` are 20 to 40 in the paper."""

    rounds: int = setting(
        40, "alternations of the kept values and the low-rank part at most", 1, 10_000
    )
    tolerance: float = setting(1e-3, "relative change of the error at which the rounds stop", 0, 1)
    pinned: float = setting(
        0.01, "share of the most salient entries kept whatever the low-rank part takes", 0, 1
    )


def oats(weight: Tensor, stats: InputStats, config: OatsConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T, from S = 0.

    L = SVD_r(A - S), then S = the largest of A - L, row by row or in each n:m group. The Gram
    matrix serves `polish`.
    """
    scaled = _scaled(weight, stats)
    A, S, L = scaled.A, torch.zeros_like(scaled.A), _LowRank()
    for _ in range(config.rounds):
        L = L.following(A - S, config.adapter_rank)
        rest = L.taken_from(A)
        mask = select(rest.abs(), config.parsed)
        S = rest.masked_fill(~mask, 0.0)
        if L.P is None:
            break
    return _finished(weight, scaled, S, mask, L, config)


def sslc(weight: Tensor, stats: InputStats, config: SslcConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T: pruning and SVD in turn, salient entries pinned.

    No code was published. Our reading: the `pinned` share of largest |A| stays in S through every
    round (as many as the pattern has room for in each group); S comes first, from L = 0; the error
    watched is ||A - S - L||. The paper's optional recovery training is `compression.training`.
    """
    scaled = _scaled(weight, stats)
    A, size, L = scaled.A, scaled.A.abs(), _LowRank()
    salient = torch.zeros_like(A, dtype=torch.bool)
    if config.pinned:
        count = max(1, int(config.pinned * A.numel()))
        salient = size >= size.flatten().kthvalue(A.numel() - count + 1).values
    before = float("inf")
    for _ in range(config.rounds):
        rest = L.taken_from(A)
        # Salient entries come above all others, in the order of their own size.
        score = torch.where(salient, rest.abs().max() + size, rest.abs())
        mask = select(score, config.parsed)
        S = rest.masked_fill(~mask, 0.0)
        if not config.adapter_rank:
            break
        L = L.following(A - S, config.adapter_rank)
        error = float((L.taken_from(A - S)).norm())
        if abs(before - error) <= config.tolerance * error:
            break
        before = error
    return _finished(weight, scaled, S, mask, L, config)


class _LowRank(NamedTuple):
    """L = P Q^T, P [N,r] and Q [K,r], or nothing."""

    P: Tensor | None = None
    Q: Tensor | None = None

    def taken_from(self, A: Tensor) -> Tensor:
        """A - L [N,K]."""
        return A if self.P is None or self.Q is None else A - self.P @ self.Q.T

    def following(self, A: Tensor, rank: int) -> _LowRank:
        """The truncated SVD of A, by one subspace iteration from this one where there is one."""
        if not rank:
            return self
        return _LowRank(*truncated_svd(A, rank, 4 if self.Q is None else 1, start=self.Q))


class _Scaled(NamedTuple):
    """The Gram metric, A = W diag(scale) [N,K] and scale [K], the rms of each input."""

    space: Metric
    A: Tensor
    scale: Tensor


def _scaled(weight: Tensor, stats: InputStats) -> _Scaled:
    """Inputs that were always zero count as in the damped metric."""
    space = metric(stats.matrix)
    rms = stats.diagonal.to(weight).sqrt()
    scale = torch.where(rms > 0, rms, space.scale)
    return _Scaled(space, weight * scale, scale)


def _finished(
    weight: Tensor,
    scaled: _Scaled,
    S: Tensor,
    mask: Tensor,
    L: _LowRank,
    config: PolishedConfig,
) -> Decomposition:
    """Carries S and P Q^T from the coordinates of A to those of the metric, and finishes them."""
    d, scale = scaled.space.scale, scaled.scale
    Q = None if L.Q is None else L.Q / scale[:, None] * d[:, None]
    split = Split(S / scale * d, mask, L.P, Q)
    return finish(weight * d, scaled.space, split, config, config.polish)
