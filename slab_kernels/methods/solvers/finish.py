"""How methods with a plain adapter end: least tr(E H E^T) for E = W - S - P Q^T, all as stored.

Kept values go to their grid, then S and P Q^T are solved for again in rounds: kept values (or step
sizes) with P by conjugate gradients, positions and values of every group by coordinate descent, and
the adapter as the best low-rank part of what is left (EoRA, arXiv 2410.21271, equations 4-6). No
step raises the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...format import Decomposition, round_adapter
from ...settings import setting
from ..config import Config
from .descent import descend
from .metric import Metric
from .quantize import Grid, expand_scales, quantize, round_to_grid, store_scale
from .refit import AdapterOutput, KeptValues, Part, StepSizes, conjugate_gradients

ITERATIONS = 10  # conjugate gradient steps of a solve, at most
TOLERANCE = 1e-3  # the fall of the preconditioned gradient that ends a solve before


@dataclass(frozen=True)
class PolishedConfig(Config):
    """The settings of methods that end here.

    A round of `polish` solves for kept values and adapter again and, where the states of a group
    can be enumerated, swaps positions one group at a time.
    """

    polish: int = setting(
        3, "rounds in the Gram metric afterwards, which the published method has not", 0, 10_000
    )


class Split(NamedTuple):
    """S + P Q^T in the unit-diagonal coordinates of a Metric.

    S [N,K] on `mask` [N,K] bool; P [N,r] and Q [K,r], or None without an adapter.
    scales [N,groups]: the step sizes of S in the weight's own coordinates, where it lies on a grid.
    """

    S: Tensor
    mask: Tensor
    P: Tensor | None = None
    Q: Tensor | None = None
    scales: Tensor | None = None

    def without_adapter(self, T: Tensor) -> Tensor:
        """T - P Q^T [N,K]: what S is to approximate."""
        return T if self.P is None or self.Q is None else T - self.P @ self.Q.T


def finish(
    T: Tensor,
    space: Metric,
    split: Split,
    config: Config,
    rounds: int,
    *,
    swap: bool = True,
) -> Decomposition:
    """The decomposition of the weight whose unit-diagonal form T [N,K] `split` approximates.

    rounds: how often everything is solved for again. swap: whether positions and values move by
    coordinate descent. Values that are to be integers and have no step sizes yet are first rounded
    to grids of least squared error; the rounds then refit the step sizes and move values on the
    grid.
    """
    grid, d = config.grid, space.scale
    if grid and split.scales is None:
        # Inputs of one group share a step, so the grid lives in the weight's own coordinates.
        S, scales = quantize(split.S / d, split.mask, grid.values, grid.group_size, weight=d * d)
        split = split._replace(S=S * d, scales=scales)
    basis = None
    if grid:
        split, basis = _fit_adapter(T, space, split, basis)
    for _ in range(rounds):
        split = _refit(split.without_adapter(T), space, split, grid)
        if swap:
            split = _descend(split.without_adapter(T), space, split, config)
        split, basis = _fit_adapter(T, space, split, basis)
    return _as_stored(T, space, split, config, solve=rounds > 0)


def _as_stored(
    T: Tensor, space: Metric, split: Split, config: Config, *, solve: bool
) -> Decomposition:
    """Everything as it will be stored, in the weight's own coordinates.

    solve: whether kept values without a grid are fitted once more to the rounded adapter.
    """
    S, mask, P, Q, scales = split
    grid, d = config.grid, space.scale
    if P is not None and Q is not None:
        P, Q = round_adapter(P, Q / d[:, None], config.stored_adapter)
    if grid and scales is not None:
        scales = store_scale(scales)
        steps = expand_scales(scales, S.shape[1], grid.group_size)
        S = round_to_grid(S / d, steps, grid.values).masked_fill(~mask, 0.0)
        return Decomposition(
            S, mask, P=P, Q=Q, scales=scales, values=grid.values, group_size=grid.group_size
        )
    if solve and P is not None and Q is not None:
        S = _refit(T - P @ (Q * d[:, None]).T, space, Split(S, mask), None).S
    return Decomposition(S / d, mask, P=P, Q=Q)


def _fit_adapter(
    T: Tensor, space: Metric, split: Split, basis: Tensor | None
) -> tuple[Split, Tensor | None]:
    """P Q^T becomes the best low-rank part of T - S. `basis` is where the last call ended."""
    if split.P is None:
        return split, None
    P, Q, basis = space.truncate(T - split.S, split.P.shape[1], basis)
    return split._replace(P=P, Q=Q), basis


def _refit(target: Tensor, space: Metric, split: Split, grid: Grid | None) -> Split:
    """Kept values (or step sizes) and P by least squares; target: T - P Q^T [N,K]."""
    d, diagonal = space.scale, space.gram.diagonal()
    kept: Part
    start: Tensor
    if grid and split.scales is not None:
        steps = expand_scales(split.scales, split.S.shape[1], grid.group_size)
        q = (split.S / d / steps).round()
        kept, start = StepSizes(q * d, grid.group_size, diagonal), split.scales
    else:
        kept, start = KeptValues(split.mask, diagonal), split.S
    parts: list[Part] = [kept]
    unknowns = [start]
    if split.P is not None and split.Q is not None:
        parts.append(AdapterOutput(split.Q, space.gram))
        unknowns.append(split.P)
    residual = target - kept.expand(start)
    found = conjugate_gradients(residual, space.gram, parts, unknowns, ITERATIONS, TOLERANCE)
    return split._replace(
        S=kept.expand(found[0]),
        P=found[1] if len(found) > 1 else None,
        scales=found[0] if grid else None,
    )


def _descend(target: Tensor, space: Metric, split: Split, config: Config) -> Split:
    """Positions and values of every group, one after the other, each the best given the rest."""
    grid, d = config.grid, space.scale
    gram, S, nothing = space.gram, split.S, torch.zeros_like(split.S)
    if grid:  # the grid lives in the weight's own coordinates
        target, S, gram = target / d, S / d, gram * d * d[:, None]
    S, mask = descend(
        target,
        S,
        split.mask,
        nothing,
        gram,
        config.parsed,
        scales=split.scales,
        grid=grid,
        planes=0,
    )
    S = S.masked_fill(~mask, 0.0)
    return split._replace(S=S * d if grid else S, mask=mask)
