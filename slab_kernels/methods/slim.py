"""SLiM (arXiv 2410.09615): P Q^T diag(x) = SVD_r((W - C) diag(x)), C what is left of W.

x is the saliency of the inputs. C is the quantised weight Q(W) where |Q(W)_ij| * ||X_j|| is
largest, zero elsewhere (section 3, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import INTEGER_RANGES, Decomposition
from ..settings import setting
from .inputs import InputStats
from .solvers.finish import PolishedConfig, Split, finish
from .solvers.lowrank import truncated_svd
from .solvers.masks import select
from .solvers.metric import metric
from .solvers.quantize import expand_scales, grid_scales, round_to_grid, store_scale

# The histogram has a thousandth as many bins as the weight has entries, within these limits.
LEAST_BINS, MOST_BINS = 512, 20000


@dataclass(frozen=True)
class SlimConfig(PolishedConfig):
    """The settings of `slim`.

    One alternation is the paper's pass; every further one quantises and prunes W - P Q^T, as the
    released code does once, and ends with the SVD, which it does not. `group_size` None is
    SLiM-Quant, one step for the whole weight (section 3.1); otherwise steps are absolute maxima of
    groups.
    """

    alternations: int = setting(4, "of quantiser, mask and SVD", 1, 10_000)


def slim(weight: Tensor, stats: InputStats, config: SlimConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix (its diagonal for SLiM itself) -> S + P Q^T."""
    x, rank = saliency(stats.diagonal.to(weight)), config.adapter_rank
    space = metric(stats.matrix)
    d = space.scale
    rest, V = weight, None
    for _ in range(config.alternations if rank else 1):
        rounded, scales = _quantised(rest, config)
        mask = select(rounded.abs() * x, config.parsed)
        C = rounded.masked_fill(~mask, 0.0)
        split = Split(C * d, mask, scales=scales)
        if rank:
            P, V = truncated_svd((weight - C) * x, rank, start=V)
            Q = V / x[:, None]
            split = split._replace(P=P, Q=Q * d[:, None])
            rest = weight - P @ Q.T
    return finish(weight * d, space, split, config, config.polish)


def saliency(mean_square: Tensor) -> Tensor:
    """[K] root mean square of each input plus the smallest positive one, so that none is zero
    (section 3.2)."""
    x = mean_square.sqrt()
    positive = x[x > 0]
    return x + (positive.min() if positive.numel() else 1.0)


def _quantised(W: Tensor, config: SlimConfig) -> tuple[Tensor, Tensor | None]:
    """All of W [N,K] on its grid, since the mask is chosen on it, and the step sizes [N,groups].

    W stays as it is for fp16 and bf16, which have no step sizes.
    """
    if config.grid is None:
        return W, None
    if config.group_size is None:
        scales = store_scale(slim_quant(W, config.values)).expand(W.shape[0], 1).contiguous()
    else:
        everything = torch.ones_like(W, dtype=torch.bool)
        scales = grid_scales(W, everything, config.values, config.group_size, search=False)
    steps = expand_scales(scales, W.shape[1], config.group_size)
    return round_to_grid(W, steps, config.values), scales


def slim_quant(W: Tensor, values: str) -> Tensor:
    """The step size of one symmetric grid for all of W: SLiM-Quant (section 3.1).

    Minimises E(a) = sum f(v) (Q_a(v) - v)^2 over the cap a, f being a histogram of |w|, from coarse
    to fine. Searched is the quantiser that is applied, clipping and rounding included. (The
    released code models a step of a/8 and applies a/7, which makes the squared error 6.7 % larger.)
    """
    size = W.abs().flatten()
    top = float(size.max())
    if top == 0:
        return torch.ones((), dtype=W.dtype, device=W.device)
    bins = max(LEAST_BINS, min(W.numel() // 1000, MOST_BINS))
    counts = torch.histc(size, bins, 0.0, top)
    centres = (torch.arange(bins, device=W.device, dtype=W.dtype) + 0.5) * (top / bins)
    high = INTEGER_RANGES[values][1]

    def error(caps: Tensor) -> Tensor:
        step = (caps / high)[:, None]
        rounded = (centres / step).round().clamp(max=high) * step
        return ((rounded - centres) ** 2 * counts).sum(1)

    first, last = top / 50, top
    for _ in range(3):
        caps = torch.linspace(first, last, 50, dtype=W.dtype, device=W.device)
        best = float(caps[error(caps).argmin()])
        spacing = (last - first) / 49
        first, last = max(best - spacing, top / 1000), min(best + spacing, top)
    return torch.as_tensor(best / high, dtype=W.dtype, device=W.device)
