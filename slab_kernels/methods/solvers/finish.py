"""The end that all methods with a plain adapter share: kept values on their grid, S and P Q^T solved again, both as stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import Decomposition, round_adapter
from ..config import Config
from .descent import descend_groups, descend_levels
from .metric import Metric
from .quantize import expand_scales, quantize, round_to_grid, store_scale
from .refit import AdapterOutput, KeptValues, StepSizes, conjugate_gradients
from .states import enumerable


def finish(
    T: Tensor,
    space: Metric,
    S: Tensor,
    mask: Tensor,
    P: Tensor | None,
    Q: Tensor | None,
    config: Config,
    rounds: int,
    swap: bool = True,
    scales: Tensor | None = None,
) -> Decomposition:
    """S [N,K] on `mask`, P [N,r] and Q [K,r] in the unit-diagonal coordinates of `space` -> Decomposition of the weight.

    T [N,K]: the weight there. rounds: of kept values with P by conjugate gradients, positions and values of every group by
    coordinate descent (with `swap`), and the adapter as the best low-rank part of what is left; no step raises the loss.
    Integer values are first rounded to grids of least squared error; then step sizes are refitted and the descent moves
    values on the grid. scales: of S, where it lies on the grid already.
    """
    grid, d = config.grid, space.scale
    if (
        grid and scales is None
    ):  # a step is shared by inputs of one group, so it lives in the weight's own coordinates
        S, scales = quantize(S / d, mask, grid.values, grid.group_size, weight=d * d)
        S = S * d
    basis = None

    def truncate() -> None:
        nonlocal P, Q, basis
        if P is not None:
            P, Q, basis = space.truncate(T - S, P.shape[1], basis)

    if grid:
        truncate()
    for _ in range(rounds):
        target = T if P is None else T - P @ Q.T
        S, P, scales = _refit(target, space, S, mask, P, Q, scales, config)
        target = T if P is None else T - P @ Q.T
        if swap:
            S, mask = _descend(target, space, S, mask, scales, config)
        truncate()
    if P is not None:
        P, Q = round_adapter(P, Q / d[:, None], config.stored_adapter)
    if grid:
        scales = store_scale(scales)
        S = round_to_grid(
            S / d, expand_scales(scales, S.shape[1], grid.group_size), grid.values
        ).masked_fill(~mask, 0.0)
        return Decomposition(
            S, mask, P=P, Q=Q, scales=scales, values=grid.values, group_size=grid.group_size
        )
    if rounds and P is not None:
        S, _, _ = _refit(T - P @ (Q * d[:, None]).T, space, S, mask, None, None, None, config)
    return Decomposition(S / d, mask, P=P, Q=Q)


def _refit(target, space, S, mask, P, Q, scales, config):
    """Kept values (or step sizes) and P by least squares; target: T - P Q^T. Returns S, P and the step sizes."""
    grid, d = config.grid, space.scale
    if grid:
        q = (S / d / expand_scales(scales, S.shape[1], grid.group_size)).round()
        part, start = StepSizes(q * d, grid.group_size, space.gram.diagonal()), scales
    else:
        part, start = KeptValues(mask, space.gram.diagonal()), S
    parts, x = [part], [start]
    if P is not None:
        parts, x = [part, AdapterOutput(Q, space.gram)], [start, P]
    _, x = conjugate_gradients(target - part.expand(start), space.gram, parts, x, 10, 1e-3)
    return part.expand(x[0]), x[1] if P is not None else None, x[0] if grid else None


def _descend(target, space, S, mask, scales, config):
    """Positions and values of every group, one after the other, each the best given the rest."""
    grid, pattern, d = config.grid, config.parsed, space.scale
    nothing = torch.zeros_like(S)
    if grid:  # on the grid one works in the weight's own coordinates
        target, S, gram = target / d, S / d, space.gram * d * d[:, None]
    else:
        gram = space.gram
    if enumerable(pattern, 0):
        S, mask, _ = descend_groups(target, S, mask, nothing, gram, pattern, scales, grid, planes=0)
    else:
        S, _ = descend_levels(target, S, mask, nothing, gram, scales, grid, planes=0)
    S = S.masked_fill(~mask, 0.0)
    return (S * d if grid else S), mask
