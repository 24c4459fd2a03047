"""The levels of a pruned entry, as multiples of its magnitude |U V^T|_ij.

A level is a sum of signs, each worth half the one before. One plane of signs has -1 and +1; two
have -1.5, -0.5, +0.5, +1.5; three have the odd multiples of a quarter up to 1.75. Zero is not among
them: the magnitude is fitted to what is pruned, so the levels lie where the entries are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import plane_unit


def neighbours(w: Tensor, magnitude: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """The adjacent levels between which w / magnitude lies, or the outermost two, as multiples.

    w and magnitude >= 0 have one shape; the lower level comes first.
    """
    unit, most = plane_unit(planes), 2**planes - 1
    steps = w / (unit * magnitude).clamp_min(torch.finfo(w.dtype).tiny)
    below = (2 * ((steps - 1) / 2).floor() + 1).clamp(-most, most - 2) * unit
    return below, below + 2 * unit


def nearest(w: Tensor, magnitude: Tensor, planes: int) -> Tensor:
    """The level c with c * magnitude nearest to w, positive for w = 0; w and magnitude >= 0
    broadcast."""
    if planes == 1:
        return torch.where(w < 0, -1.0, 1.0).to(w.dtype)
    unit, most = plane_unit(planes), 2**planes - 1
    steps = w / (2 * unit * magnitude).clamp_min(torch.finfo(w.dtype).tiny)
    return (2 * steps.floor() + 1).clamp(-most, most) * unit
