"""OATS (arXiv 2409.13652) and SSLC (arXiv 2510.26446): sparse plus low rank with each input scaled by its root mean square."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.finish import finish
from .solvers.lowrank import truncated_svd
from .solvers.masks import select
from .solvers.metric import Metric, metric


@dataclass(frozen=True)
class OatsConfig(Config):
    """`rounds` is 80 in the paper. `polish`: see `finish`."""

    rounds: int = setting(80, "alternations of the low-rank part and the kept values", 1, 10_000)
    polish: int = setting(
        3, "rounds in the Gram metric afterwards; 0 is the published method alone", 0, 10_000
    )


@dataclass(frozen=True)
class SslcConfig(Config):
    """`rounds` are 20 to 40 in the paper. `polish`: see `finish`."""

    rounds: int = setting(
        40, "alternations of the kept values and the low-rank part at most", 1, 10_000
    )
    tolerance: float = setting(1e-3, "relative change of the error at which the rounds stop", 0, 1)
    pinned: float = setting(
        0.01, "share of the most salient entries kept whatever the low-rank part takes", 0, 1
    )
    polish: int = setting(
        3, "rounds in the Gram metric afterwards; 0 is the published method alone", 0, 10_000
    )


def oats(weight: Tensor, stats: InputStats, config: OatsConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T: alternating thresholding of W diag(rms x) (algorithm 1), from S = 0.

    L = SVD_r(A - S), then S = the largest of A - L, row by row or in each n:m group. The Gram matrix serves `polish`.
    """
    space, A, scale = _scaled(weight, stats)
    S, mask, P, Q, V = torch.zeros_like(A), None, None, None, None
    for _ in range(config.rounds):
        P, Q, V = _low_rank(A - S, config.adapter_rank, V)
        rest = A if P is None else A - P @ Q.T
        mask = select(rest.abs(), config.parsed)
        S = rest.masked_fill(~mask, 0.0)
        if P is None:
            break
    return _finished(weight, space, S / scale, mask, P, Q, scale, config)


def sslc(weight: Tensor, stats: InputStats, config: SslcConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T: the paper's alternation of pruning and randomised SVD, salient entries pinned.

    No code was published. Our reading: A = W diag(rms x); the `pinned` share of largest |A| stay in S through every round (as
    many as the pattern has room for in each group); S first, from L = 0; the error watched is ||A - S - L||. Its optional
    recovery training is `training`.
    """
    space, A, scale = _scaled(weight, stats)
    pattern, size = config.parsed, A.abs()
    count = max(1, int(config.pinned * A.numel()))
    threshold = (
        size.flatten().kthvalue(A.numel() - count + 1).values if config.pinned else torch.inf
    )
    salient = size >= threshold
    P = Q = V = None
    before = float("inf")
    for _ in range(config.rounds):
        rest = A if P is None else A - P @ Q.T
        mask = select(_pinned_score(rest, salient, size), pattern)
        S = rest.masked_fill(~mask, 0.0)
        if not config.adapter_rank:
            break
        P, Q, V = _low_rank(A - S, config.adapter_rank, V)
        error = float((A - S - P @ Q.T).norm())
        if abs(before - error) <= config.tolerance * error:
            break
        before = error
    return _finished(weight, space, S / scale, mask, P, Q, scale, config)


def _pinned_score(rest: Tensor, salient: Tensor, size: Tensor) -> Tensor:
    """|rest|, and above all of it the salient entries in the order of their own size."""
    return torch.where(salient, rest.abs().max() + size, rest.abs())


def _scaled(weight: Tensor, stats: InputStats) -> tuple[Metric, Tensor, Tensor]:
    """The metric, A = W diag(rms x) and rms x [K]; inputs that were always zero count as in the damped metric."""
    space = metric(stats.gram)
    rms = stats.diagonal.to(weight).sqrt()
    scale = torch.where(rms > 0, rms, space.scale)
    return space, weight * scale, scale


def _low_rank(
    A: Tensor, rank: int, start: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not rank:
        return None, None, None
    P, V = truncated_svd(A, rank, 4 if start is None else 1, start=start)
    return P, V, V


def _finished(
    weight: Tensor,
    space: Metric,
    S: Tensor,
    mask: Tensor,
    P: Tensor | None,
    Q: Tensor | None,
    scale: Tensor,
    config: OatsConfig | SslcConfig,
) -> Decomposition:
    """From S in the weight's coordinates and P Q^T in those of A."""
    d = space.scale
    Q = None if Q is None else Q / scale[:, None] * d[:, None]
    return finish(weight * d, space, S * d, mask, P, Q, config, config.polish)
