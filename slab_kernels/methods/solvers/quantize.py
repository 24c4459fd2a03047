"""Symmetric integer grids for kept values: W_ij ~ q_ij * scale, q an integer, one scale per group.

Step sizes are rounded to bf16, as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...format import INTEGER_RANGES

# Fractions of the absolute maximum that the search tries. Device and dtype are named, since the
# importing program may have set other defaults, such as the meta device.
SEARCH = torch.linspace(0.5, 1.0, 21, dtype=torch.float32, device="cpu").tolist()


@dataclass(frozen=True)
class Grid:
    """The integer type of kept values, and how many inputs share a scale (None: a whole row)."""

    values: str
    group_size: int | None


def store_scale(scale: Tensor) -> Tensor:
    """The step sizes as stored: bf16, returned in fp32. A group without values gets 1."""
    stored = scale.to(torch.bfloat16).float()
    return torch.where(stored > 0, stored, 1.0)


def round_to_grid(x: Tensor, scale: Tensor, values: str) -> Tensor:
    """The nearest point of the grid scale * {low..high}; `scale` broadcasts against x."""
    low, high = INTEGER_RANGES[values]
    return (x / scale).round().clamp(low, high) * scale


def group_scale(
    x: Tensor, mask: Tensor, values: str, search: bool = True, weight: Tensor | None = None
) -> Tensor:
    """One step size for the last dimension of x, mask [..., g]: [..., 1], rounded to bf16.

    search=False: the largest kept |x| divided by the largest integer. Otherwise the one of 21
    fractions of it that has the least squared rounding error on the kept entries, weighted by
    `weight` [..., g].
    """
    _, high = INTEGER_RANGES[values]
    x = torch.where(mask, x, 0.0)
    largest = x.abs().amax(-1, keepdim=True) / high
    best = store_scale(largest)
    if not search:
        return best
    error = torch.full_like(best, torch.inf)
    for fraction in SEARCH:
        scale = store_scale(fraction * largest)
        miss = (round_to_grid(x, scale, values) - x) ** 2
        loss = (miss if weight is None else miss * weight).sum(-1, keepdim=True)
        best = torch.where(loss < error, scale, best)
        error = torch.minimum(loss, error)
    return best


def grid_scales(
    x: Tensor,
    mask: Tensor,
    values: str,
    group_size: int | None,
    search: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """Step sizes of x [N,K] with kept `mask`: [N, ceil(K / group_size)] fp32, rounded to bf16.

    group_size None means one scale per row, [N,1].
    weight [K]: of the squared rounding error of each input, for the search.
    """
    K = x.shape[1]
    size = group_size or K

    def grouped(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, -K % size)).unflatten(-1, (-1, size))

    return group_scale(
        grouped(x), grouped(mask), values, search, None if weight is None else grouped(weight)
    )[..., 0]


def expand_scales(scales: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """[N,K]: the step size of every entry, from scales [N,groups]."""
    return scales.repeat_interleave(group_size or in_features, dim=1)[:, :in_features]


def quantize(
    x: Tensor, mask: Tensor, values: str, group_size: int | None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Kept entries of x [N,K] on a searched grid, zero elsewhere, and the scales [N,groups]."""
    scales = grid_scales(x, mask, values, group_size, weight=weight)
    rounded = round_to_grid(x, expand_scales(scales, x.shape[1], group_size), values)
    return torch.where(mask, rounded, 0.0), scales
