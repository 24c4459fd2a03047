"""What a pruned entry may be, in units of its magnitude l = (U V^T)_ij: a sum of `planes` signs, each half the one before.

One plane: -1, +1. Two: -1.5, -0.5, +0.5, +1.5. Three: the odd multiples of a quarter up to 1.75. Zero is not among them:
the magnitude is fitted to what is pruned, so the levels lie where the entries are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import plane_unit


def levels(planes: int) -> tuple[float, ...]:
    """The 2^planes multiples, the largest first."""
    unit = plane_unit(planes)
    return tuple(unit * odd for odd in range(2**planes - 1, -(2**planes), -2))


def neighbours(w: Tensor, magnitude: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """The two levels next to each other between which w / magnitude lies, or the outermost two; both as multiples."""
    unit, most = plane_unit(planes), 2**planes - 1
    steps = w / (unit * magnitude).clamp_min(torch.finfo(w.dtype).tiny)
    below = (2 * ((steps - 1) / 2).floor() + 1).clamp(-most, most - 2) * unit
    return below, below + 2 * unit


def nearest(w: Tensor, magnitude: Tensor, planes: int) -> Tensor:
    """The multiple c of `magnitude` >= 0 with c * magnitude nearest to w (+ for w = 0); both broadcast."""
    if planes == 1:
        return torch.where(w < 0, -1.0, 1.0).to(w.dtype)
    unit, most = plane_unit(planes), 2**planes - 1
    steps = w / (2 * unit * magnitude).clamp_min(torch.finfo(w.dtype).tiny)
    return (2 * steps.floor() + 1).clamp(-most, most) * unit
