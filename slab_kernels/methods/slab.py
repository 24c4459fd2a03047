"""S + (U V^T) * B in the Gram metric: masked ALS, a sweep that chooses masks and signs, then rounds of refit.

The model is SLaB's (arXiv 2604.04493); the solver is ours. In order:
1. Masked alternating least squares fits U, V to |W| on the pruned positions, column j weighted with 1 / U_jj of the
   Cholesky factor of H^-1: the error that is left in column j once the columns to its right have adapted.
2. A sweep in the manner of SparseGPT fixes each group's positions and signs by their exact common cost.
3. Rounds, each step monotone in tr(E H E^T): kept values with V, then with U, by conjugate gradients; then
   coordinate descent over positions and signs of every group; until a round gains less than `tolerance`.
4. U and V are rounded as they will be stored and the kept values solved once more for the rounded factors.
Integer values are rounded inside the sweep; in the rounds their step sizes are refitted and the descent moves them on
the grid, so that what is returned is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import InputStats
from ..format import Decomposition, round_factors
from .config import Config
from .descent import descend_groups, descend_signs
from .lowrank import signed_factors, signs
from .quantize import expand_scales, round_to_grid, store_scale
from .refit import InputFactor, KeptValues, OutputFactor, StepSizes, conjugate_gradients, gram_loss
from .states import enumerable
from .sweep import Grid, curvature, sweep

REFIT_FLOOR = 1e-5  # of the mean diagonal, added in the refit


@dataclass(frozen=True)
class SlabConfig(Config):
    """damping: of the sweep, fraction of the mean diagonal of the Gram matrix; relative_damping: of each diagonal entry.
    refit_damping: fraction of each diagonal entry added in the refit.
    rounds: at most; tolerance: relative fall of the root loss that a round must bring.
    iterations: conjugate gradient steps at most a solve (the preconditioned gradient falling by 1e-3 ends it earlier).
    drift: share of the error made before this layer that the layer is to undo, where `stats` carries it; a quarter
        costs the layer itself little and bought most of the perplexity on the models tried, more overfits.
    drift_damping: fraction of the mean diagonal added where that error is regressed on the inputs.
    """

    damping: float = 0.001
    relative_damping: float = 0.01
    refit_damping: float = 0.001
    rounds: int = 3
    tolerance: float = 5e-3
    iterations: int = 10
    drift: float = 0.25
    drift_damping: float = 0.1


@dataclass
class _State:
    """A feasible point: approximation [N,K], kept mask [N,K], U [N,R], V [K,R], step sizes or None."""

    approximation: Tensor
    mask: Tensor
    U: Tensor
    V: Tensor
    scales: Tensor | None


def slab(weight: Tensor, stats: InputStats, config: SlabConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> folded Decomposition: S kept values, U V^T magnitudes, B signs of the pruned."""
    pattern, grid = config.parsed, config.grid
    curve = curvature(stats.gram.to(weight.device), config.damping, config.relative_damping)
    W = weight
    if stats.drift is not None and config.drift:
        W = drift_target(weight, curve.gram, stats.drift, config.drift, config.drift_damping)
    diagonal = curve.gram.diagonal()
    # The floor keeps inputs of tiny energy from taking huge kept values to correct loud ones: without it, columns spread
    # over 9 decades ended in values beyond fp16; ordinary layers do not notice it.
    gram = curve.gram + torch.diag(config.refit_damping * diagonal + REFIT_FLOOR * diagonal.mean())
    U, V, mask = signed_factors(W, curve.conditional_scale, pattern, config.rank)
    swept = sweep(W, curve, pattern, (U @ V.T).abs(), mask, grid)
    state = _State(swept.approximation, swept.mask, U, V, swept.scales)
    loss = float("inf")
    for _ in range(config.rounds):
        before, loss = loss, _round(W, gram, state, config)
        if loss > (1 - config.tolerance) ** 2 * before:
            break
    return _finish(W, gram, state, config)


def drift_target(W: Tensor, gram: Tensor, drift: Tensor, share: float, damping: float) -> Tensor:
    """The weight that would undo `share` of the drift: W + share * drift (H + damping)^-1, [N,K]."""
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return W + share * torch.linalg.solve(damped, drift.double(), left=False).to(W)


def _round(W: Tensor, gram: Tensor, state: _State, config: SlabConfig) -> float:
    """One round of refit and descent; changes `state`, returns the loss."""
    _refit(W, gram, state, config, "V")
    _refit(W, gram, state, config, "U")
    _descend(W, gram, state, config)
    return float(gram_loss(W - state.approximation, gram))


def _sign_matrix(state: _State) -> Tensor:
    """[N,K] B on pruned positions, 0 on kept ones, so that B * (U V^T) is the approximation there."""
    B = signs(state.approximation) * signs(state.U @ state.V.T)
    return B.masked_fill(state.mask, 0.0)


def _kept_part(state: _State, gram: Tensor, grid: Grid | None):
    """The unknowns that stand for kept values, and where they are now."""
    kept = state.approximation.masked_fill(~state.mask, 0.0)
    if grid is None:
        return KeptValues(state.mask, gram.diagonal()), kept
    q = (kept / expand_scales(state.scales, kept.shape[1], grid.group_size)).round()
    return StepSizes(q, grid.group_size, gram.diagonal()), state.scales


def _refit(W: Tensor, gram: Tensor, state: _State, config: SlabConfig, factor: str | None) -> None:
    """Least squares over the kept values and one factor (or none): changes `state`."""
    grid, B = config.grid, _sign_matrix(state)
    part, start = _kept_part(state, gram, grid)
    parts, x = [part], [start]
    if factor == "V":
        parts, x = [*parts, InputFactor(state.U, B, gram.diagonal())], [*x, state.V]
    elif factor == "U":
        parts, x = [*parts, OutputFactor(state.V, B, gram.diagonal())], [*x, state.U]
    fixed = (state.U @ state.V.T) * B
    _, x = conjugate_gradients(W - part.expand(start) - fixed, gram, parts, x, config.iterations, 1e-3)
    if factor is not None:
        setattr(state, factor, x[1])
    if grid is not None:
        state.scales = x[0]
    state.approximation = part.expand(x[0]) + (state.U @ state.V.T) * B


def _descend(W: Tensor, gram: Tensor, state: _State, config: SlabConfig) -> None:
    """Coordinate descent over what is discrete: changes `state`."""
    grid, pattern = config.grid, config.parsed
    if enumerable(pattern):
        magnitude = (state.U @ state.V.T).abs()
        state.approximation, state.mask, _ = descend_groups(
            W, state.approximation, state.mask, magnitude, gram, pattern, state.scales, grid
        )
    else:
        state.approximation, _ = descend_signs(W, state.approximation, state.mask, gram, state.scales, grid)


def _finish(W: Tensor, gram: Tensor, state: _State, config: SlabConfig) -> Decomposition:
    """Round U, V and step sizes as stored, and fit the kept values to what was stored."""
    grid = config.grid
    B = _sign_matrix(state)
    state.U, state.V = round_factors(state.U, state.V)
    fixed = (state.U @ state.V.T) * B
    if grid is None:
        state.approximation = torch.where(state.mask, state.approximation, fixed)
        _refit(W, gram, state, config, None)
        kept = state.approximation.masked_fill(~state.mask, 0.0)
        return Decomposition(kept, state.mask, state.U, state.V, B.to(torch.int8))
    state.scales = store_scale(state.scales)
    step = expand_scales(state.scales, W.shape[1], grid.group_size)
    kept = round_to_grid(state.approximation, step, grid.values)
    state.approximation = torch.where(state.mask, kept, fixed)
    _descend(W, gram, state, config)
    B = _sign_matrix(state)
    kept = round_to_grid(state.approximation, step, grid.values).masked_fill(~state.mask, 0.0)
    return Decomposition(
        kept,
        state.mask,
        state.U,
        state.V,
        B.to(torch.int8),
        None,
        None,
        state.scales,
        grid.values,
        grid.group_size,
    )
