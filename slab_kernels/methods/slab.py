"""S + (U V^T) * B + P Q^T in the Gram metric, any part optional, all of them solved together.

The sign term is SLaB's (arXiv 2604.04493), the adapter that of SLiM and 3BASiL; the solver is ours. In order:
1. Masked alternating least squares fits U, V to |W| on the pruned positions, column j weighted with 1 / U_jj of the
   Cholesky factor of H^-1: the error that is left in column j once the columns to its right have adapted.
2. A sweep in the manner of SparseGPT fixes each group's positions and levels by their exact common cost. Without a sign term
   3BASiL's ADMM takes the place of 1 and 2.
3. Rounds, each step monotone in tr(E H E^T): kept values with V, then with U, by conjugate gradients; coordinate descent over
   positions and levels of every group; the adapter as the best low-rank part of what is left; until a round gains less than
   `tolerance`.
4. The factors are rounded as they will be stored and the kept values solved once more for the rounded factors.
Integer values are rounded inside the sweep; in the rounds their step sizes are refitted and the descent moves them on
the grid, so that what is returned is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Decomposition, plane_unit, round_adapter, round_factors
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.descent import descend_groups, descend_levels
from .solvers.levels import nearest
from .solvers.lowrank import signed_factors, signs
from .solvers.metric import Metric, metric
from .solvers.quantize import expand_scales, quantize, round_to_grid, store_scale
from .solvers.refit import (
    AdapterOutput,
    InputFactor,
    KeptValues,
    OutputFactor,
    StepSizes,
    conjugate_gradients,
    gram_loss,
)
from .solvers.states import enumerable
from .solvers.sweep import Curvature, Grid, curvature, sweep
from .threebasil import SCHEDULES, ThreeBasilConfig, admm

REFIT_FLOOR = 1e-5  # of the mean diagonal, added in the refit


@dataclass(frozen=True)
class SlabConfig(Config):
    """A solve ends before its `iterations` where the preconditioned gradient has fallen by 1e-3. A
    `drift` of a quarter costs the layer itself little and bought most of the perplexity on the
    models tried; more overfits.
    """

    damping: float = setting(
        0.001, "of the sweep, a share of the mean diagonal of the Gram matrix", 0, 10
    )
    relative_damping: float = setting(0.01, "of the sweep, a share of each diagonal entry", 0, 10)
    refit_damping: float = setting(0.001, "share of each diagonal entry that the refit adds", 0, 10)
    alternations: int = setting(3, "of sweep and adapter before the rounds", 1, 10_000)
    rounds: int = setting(3, "rounds of refit and descent at most", 0, 10_000)
    tolerance: float = setting(5e-3, "relative fall of the root loss that a round must bring", 0, 1)
    iterations: int = setting(10, "conjugate gradient steps of a solve at most", 0, 10_000)
    drift: float = setting(
        0.25, "share of the error made before this layer that it is to undo", 0, 1
    )
    drift_damping: float = setting(
        0.1,
        "share of the mean diagonal added where that error is regressed on the inputs",
        0,
        10,
        above=True,
    )


@dataclass
class _State:
    """A feasible point: approximation [N,K] by S and the sign term, kept mask [N,K], U [N,R], V [K,R], step sizes, P, Q."""

    approximation: Tensor
    mask: Tensor
    U: Tensor | None
    V: Tensor | None
    scales: Tensor | None
    P: Tensor | None = None
    Q: Tensor | None = None
    basis: Tensor | None = None

    @property
    def low(self) -> Tensor | None:
        """U V^T [N,K], or None without a sign term."""
        return None if self.U is None else self.U @ self.V.T

    def without_adapter(self, W: Tensor) -> Tensor:
        """What S and the sign term are to approximate."""
        return W if self.P is None else W - self.P @ self.Q.T


def slab(weight: Tensor, stats: InputStats, config: SlabConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> folded Decomposition: S kept values, U V^T magnitudes, B levels of the pruned, P Q^T."""
    curve = curvature(stats.gram.to(weight.device), config.damping, config.relative_damping)
    W = weight
    if stats.drift is not None and config.drift:
        W = drift_target(weight, curve.gram, stats.drift, config.drift, config.drift_damping)
    diagonal = curve.gram.diagonal()
    # The floor keeps inputs of tiny energy from taking huge kept values to correct loud ones: without it, columns spread
    # over 9 decades ended in values beyond fp16; ordinary layers do not notice it.
    gram = curve.gram + torch.diag(config.refit_damping * diagonal + REFIT_FLOOR * diagonal.mean())
    space = metric(stats.gram.to(weight.device)) if config.adapter_rank or not config.rank else None
    state = _begin(W, curve, space, config)
    loss = float("inf")
    for _ in range(config.rounds):
        before, loss = loss, _round(W, gram, space, state, config)
        if loss > (1 - config.tolerance) ** 2 * before:
            break
    return _finish(W, gram, space, state, config)


def drift_target(W: Tensor, gram: Tensor, drift: Tensor, share: float, damping: float) -> Tensor:
    """The weight that would undo `share` of the drift: W + share * drift (H + damping)^-1, [N,K]."""
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return W + share * torch.linalg.solve(damped, drift.double(), left=False).to(W)


def _begin(W: Tensor, curve: Curvature, space: Metric | None, config: SlabConfig) -> _State:
    """Steps 1 and 2. With an adapter the sweep is repeated for what the adapter leaves of W."""
    if not config.rank:
        return _begin_plain(W, space, config)
    state = _State(W, W != 0, None, None, None)
    for _ in range(config.alternations if config.adapter_rank else 1):
        target = state.without_adapter(W)
        U, V, mask = signed_factors(
            target, curve.conditional_scale, config.parsed, config.rank, planes=config.planes
        )
        swept = sweep(
            target, curve, config.parsed, (U @ V.T).abs(), mask, config.grid, planes=config.planes
        )
        state = _State(
            swept.approximation, swept.mask, U, V, swept.scales, state.P, state.Q, state.basis
        )
        _truncate(W, space, state, config)
    return state


def _begin_plain(W: Tensor, space: Metric, config: SlabConfig) -> _State:
    """S + P Q^T by ADMM, values then rounded to their grid."""
    d, grid = space.scale, config.grid
    settings = ThreeBasilConfig(
        config.pattern, 0, config.values, config.group_size, adapter_rank=config.adapter_rank
    )
    split = admm(
        W * d, space, config.parsed, settings, SCHEDULES["threebasil"], config.adapter_rank
    )
    S, scales = split.D / d, None
    if grid:
        S, scales = quantize(S, split.mask, grid.values, grid.group_size, weight=d * d)
    state = _State(S, split.mask, None, None, scales)
    _truncate(W, space, state, config)
    return state


def _truncate(W: Tensor, space: Metric | None, state: _State, config: SlabConfig) -> None:
    """The adapter: the best low-rank part of what S and the sign term leave. Changes `state`."""
    if config.adapter_rank:
        rest = (W - state.approximation) * space.scale
        state.P, Q, state.basis = space.truncate(
            rest, config.adapter_rank, state.basis, 2 if state.basis is not None else 4
        )
        state.Q = Q / space.scale[:, None]


def _round(
    W: Tensor, gram: Tensor, space: Metric | None, state: _State, config: SlabConfig
) -> float:
    """One round of refit and descent; changes `state`, returns the loss."""
    for factor in ("V", "U") if config.rank else (None,):
        _refit(W, gram, state, config, factor)
    _descend(W, gram, state, config)
    _truncate(W, space, state, config)
    return float(gram_loss(state.without_adapter(W) - state.approximation, gram))


def _level_matrix(state: _State, config: SlabConfig) -> Tensor:
    """[N,K] levels of B on pruned positions, 0 on kept ones, so that it times U V^T is the approximation there."""
    low = state.low
    return (nearest(state.approximation, low.abs(), config.planes) * signs(low)).masked_fill(
        state.mask, 0.0
    )


def _kept_part(state: _State, gram: Tensor, grid: Grid | None):
    """The unknowns that stand for kept values, and where they are now."""
    kept = state.approximation.masked_fill(~state.mask, 0.0)
    if grid is None:
        return KeptValues(state.mask, gram.diagonal()), kept
    q = (kept / expand_scales(state.scales, kept.shape[1], grid.group_size)).round()
    return StepSizes(q, grid.group_size, gram.diagonal()), state.scales


def _refit(W: Tensor, gram: Tensor, state: _State, config: SlabConfig, factor: str | None) -> None:
    """Least squares over the kept values, one factor of the sign term (or none) and P: changes `state`."""
    grid, diagonal = config.grid, gram.diagonal()
    part, start = _kept_part(state, gram, grid)
    parts, x, names = [part], [start], ["kept"]
    fixed = 0.0
    if state.U is not None:
        B = _level_matrix(state, config)
        fixed = state.low * B
        if factor == "V":
            parts.append(InputFactor(state.U, B, diagonal))
        elif factor == "U":
            parts.append(OutputFactor(state.V, B, diagonal))
        if factor is not None:
            x, names = [*x, getattr(state, factor)], [*names, factor]
    target = state.without_adapter(W)
    if state.P is not None:
        parts.append(AdapterOutput(state.Q, gram))
        x, names = [*x, state.P], [*names, "P"]
    _, x = conjugate_gradients(
        target - part.expand(start) - fixed, gram, parts, x, config.iterations, 1e-3
    )
    for name, value in zip(names[1:], x[1:], strict=True):
        setattr(state, name, value)
    if grid is not None:
        state.scales = x[0]
    state.approximation = part.expand(x[0])
    if state.U is not None:
        state.approximation = state.approximation + state.low * B


def _descend(W: Tensor, gram: Tensor, state: _State, config: SlabConfig) -> None:
    """Coordinate descent over what is discrete: changes `state`."""
    pattern, planes = config.parsed, config.planes if config.rank else 0
    target = state.without_adapter(W)
    magnitude = state.low.abs() if config.rank else torch.zeros_like(W)
    settings = (
        magnitude,
        gram,
        *((pattern,) if (all_states := enumerable(pattern, planes)) else ()),
        state.scales,
        config.grid,
        planes,
    )
    if all_states:
        state.approximation, state.mask, _ = descend_groups(
            target, state.approximation, state.mask, *settings
        )
    else:
        state.approximation, _ = descend_levels(target, state.approximation, state.mask, *settings)


def _finish(
    W: Tensor, gram: Tensor, space: Metric | None, state: _State, config: SlabConfig
) -> Decomposition:
    """Round factors and step sizes as stored, and fit the kept values to what was stored."""
    grid, B = config.grid, None
    if state.P is not None:
        state.P, state.Q = round_adapter(state.P, state.Q, config.stored_adapter)
    if config.rank:
        B = _level_matrix(state, config)
        state.U, state.V = round_factors(state.U, state.V)
        state.approximation = torch.where(state.mask, state.approximation, state.low * B)
    if grid is None:
        P = state.P
        _refit(W, gram, state, config, None)
        if P is not None:  # P moved with the kept values, and is rounded again
            state.P, state.Q = round_adapter(state.P, state.Q, config.stored_adapter)
    else:
        state.scales = store_scale(state.scales)
        step = expand_scales(state.scales, W.shape[1], grid.group_size)
        state.approximation = torch.where(
            state.mask, round_to_grid(state.approximation, step, grid.values), state.approximation
        )
        _descend(W, gram, state, config)
        state.approximation = torch.where(
            state.mask, round_to_grid(state.approximation, step, grid.values), state.approximation
        )
        if config.rank:
            B = _level_matrix(state, config)
    if B is not None:
        B = (B / plane_unit(config.planes)).round().to(torch.int8)
    kept = state.approximation.masked_fill(~state.mask, 0.0)
    grid_parts = (
        (None, None, None) if grid is None else (state.scales, grid.values, grid.group_size)
    )
    return Decomposition(
        kept, state.mask, state.U, state.V, B, state.P, state.Q, *grid_parts, config.planes
    )
