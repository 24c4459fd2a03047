"""SLiM (arXiv 2410.09615): quantise, prune, and put what both cost into a low-rank adapter weighted by saliency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import INTEGER_RANGES, Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.finish import finish
from .solvers.lowrank import truncated_svd
from .solvers.masks import select
from .solvers.metric import metric
from .solvers.quantize import expand_scales, grid_scales, round_to_grid, store_scale

BINS = (
    512,
    20000,
)  # of the histogram: at least, at most; between them a thousandth of the weight's entries


@dataclass(frozen=True)
class SlimConfig(Config):
    """One alternation is the paper's pass; every further one quantises and prunes W - P Q^T, as the
    released code does once, and ends with the SVD, which it does not. `group_size` None is
    SLiM-Quant, one step for the whole weight (section 3.1); otherwise steps are absolute maxima of
    groups. `polish`: see `finish`.
    """

    alternations: int = setting(4, "of quantiser, mask and SVD", 1, 10_000)
    polish: int = setting(
        3, "rounds in the Gram metric afterwards; 0 is the published method alone", 0, 10_000
    )


def slim(weight: Tensor, stats: InputStats, config: SlimConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix (its diagonal for SLiM itself) -> S + P Q^T (section 3, algorithm 1).

    C = mask(Q(W)) by |Q(W)| * ||X_j||, then P Q^T diag(x) = SVD_r((W - C) diag(x)) with x the saliency, invertible.
    """
    x, rank = saliency(stats.diagonal.to(weight)), config.adapter_rank
    P = Q = V = scales = None
    for _ in range(config.alternations if rank else 1):
        target = weight if P is None else weight - P @ Q.T
        rounded, scales = _quantised(target, config)
        mask = select(rounded.abs() * x, config.parsed)
        C = rounded.masked_fill(~mask, 0.0)
        if rank:
            P, V = truncated_svd((weight - C) * x, rank, start=V)
            Q = V / x[:, None]
    space = metric(stats.gram)
    d = space.scale
    return finish(
        weight * d,
        space,
        C * d,
        mask,
        P,
        None if Q is None else Q * d[:, None],
        config,
        config.polish,
        scales=scales,
    )


def saliency(mean_square: Tensor) -> Tensor:
    """[K] root mean square of each input, shifted by the smallest positive one so that none is zero (section 3.2)."""
    x = mean_square.sqrt()
    positive = x[x > 0]
    return x + (positive.min() if positive.numel() else 1.0)


def _quantised(W: Tensor, config: SlimConfig) -> tuple[Tensor, Tensor | None]:
    """W [N,K] on its grid, every entry (the mask is chosen on it), and the step sizes; fp16 and bf16 leave W alone."""
    if config.grid is None:
        return W, None
    if config.group_size is None:
        scales = store_scale(slim_quant(W, config.values)).expand(W.shape[0], 1).contiguous()
    else:
        scales = grid_scales(
            W, torch.ones_like(W, dtype=torch.bool), config.values, config.group_size, search=False
        )
    return round_to_grid(
        W, expand_scales(scales, W.shape[1], config.group_size), config.values
    ), scales


def slim_quant(W: Tensor, values: str) -> Tensor:
    """The step size of one symmetric grid for all of W that minimises E(a) = sum f(v) (Q_a(v) - v)^2 over a histogram of |w|.

    Searched is the quantiser that is applied, clipping and rounding included (the released code models a step of a/8 and
    applies a/7: 6.7 % more squared error). Coarse to fine over the cap a (section 3.1).
    """
    size = W.abs().flatten()
    top = float(size.max())
    if top == 0:
        return torch.ones((), dtype=W.dtype, device=W.device)
    bins = max(BINS[0], min(W.numel() // 1000, BINS[1]))
    counts = torch.histc(size, bins, 0.0, top)
    centres = (torch.arange(bins, device=W.device, dtype=W.dtype) + 0.5) * (top / bins)
    high = INTEGER_RANGES[values][1]

    def error(caps: Tensor) -> Tensor:
        step = (caps / high)[:, None]
        rounded = (centres / step).round().clamp(max=high) * step
        return ((rounded - centres) ** 2 * counts).sum(1)

    low, width = top / 50, top
    for _ in range(3):
        caps = torch.linspace(low, width, 50, dtype=W.dtype, device=W.device)
        best = float(caps[error(caps).argmin()])
        reach = (width - low) / 49
        low, width = max(best - reach, top / 1000), min(best + reach, top)
    return torch.as_tensor(best / high, dtype=W.dtype, device=W.device)
