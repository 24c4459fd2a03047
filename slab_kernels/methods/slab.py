"""W ~ S + (U V^T) * B + P Q^T in the Gram metric, any part optional, all of them solved together.

Minimises tr(E H E^T), E = W - S - (U V^T) * B - P Q^T, with H the Gram matrix of the inputs. The
sign term is SLaB's (arXiv 2604.04493), the adapter that of SLiM and 3BASiL; the solver is ours. In
order:

1. Masked alternating least squares fits U, V to |W| on the pruned positions, column j weighted with
   1 / U_jj of the Cholesky factor of H^-1: the error that is left in column j once the columns to
   its right have adapted.
2. A sweep in the manner of SparseGPT fixes each group's positions and levels by their exact common
   cost. Without a sign term 3BASiL's ADMM takes the place of 1 and 2.
3. Coordinate descent over positions, levels and kept values of every group follows, then rounds, no
   step of which raises the loss: kept values with U by conjugate gradients, descent, kept values
   with V, descent; the adapter as the best low-rank part of what is left. They end when a round
   gains less than `tolerance`.
4. The factors are rounded as they will be stored, and the kept values are solved for once more.

Integer values are rounded inside the sweep; in the rounds their step sizes are refitted and the
descent moves them on the grid, so that what is returned is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import RangeError
from ..format import Decomposition, plane_unit, round_adapter, round_factors
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.descent import descend
from .solvers.levels import nearest
from .solvers.lowrank import signed_factors, signs
from .solvers.metric import Metric, metric, once_per_gram
from .solvers.quantize import Grid, expand_scales, quantize, round_to_grid, store_scale
from .solvers.refit import (
    AdapterOutput,
    InputFactor,
    KeptValues,
    OutputFactor,
    Part,
    StepSizes,
    conjugate_gradients,
    row_dot,
)
from .solvers.sweep import Curvature, curvature, sweep
from .threebasil import SCHEDULES, ThreeBasilConfig, admm

REFIT_FLOOR = 1e-5  # the fraction of the mean diagonal that the refit adds to each diagonal entry
FACTORS: tuple[Literal["U", "V"], ...] = ("U", "V")  # in the order in which a round refits them
TOLERANCE = 0.1  # the fall of the preconditioned gradient that ends a solve


@dataclass(frozen=True)
class SlabConfig(Config):
    """The settings of `slab`.

    A solve ends before its `iterations` where the preconditioned gradient has fallen to a tenth.

    `relative_damping` and `refit_damping` are what keeps a layer from being fitted to its
    calibration text: a tenth of an input's energy counts as independent of all other inputs, so
    that no error may hide where that text happened to have few tokens. The best value hardly
    depends on how many tokens there are. A hundredth leaves rare tokens, such as parts of names, to
    chance, and they make up a large part of the divergence from the dense model.
    """

    damping: float = setting(
        0.001, "of the sweep, a share of the mean diagonal of the Gram matrix", 0, 10
    )
    relative_damping: float = setting(0.1, "of the sweep, a share of each diagonal entry", 0, 10)
    refit_damping: float = setting(0.1, "share of each diagonal entry that the refit adds", 0, 10)
    alternations: int = setting(3, "of sweep and adapter before the rounds", 1, 10_000)
    rounds: int = setting(3, "rounds of refit and descent at most", 0, 10_000)
    tolerance: float = setting(5e-3, "relative fall of the root loss that a round must bring", 0, 1)
    iterations: int = setting(5, "conjugate gradient steps of a solve at most", 0, 10_000)
    drift: float = setting(
        0.75, "share of the error made before this layer that it is to undo", 0, 1
    )
    drift_damping: float = setting(
        0.1,
        "share of the mean diagonal added where that error is regressed on the inputs",
        0,
        10,
        above=True,
    )


def slab(weight: Tensor, stats: InputStats, config: SlabConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> folded Decomposition.

    Folded: S holds the kept values, and U V^T and B matter on pruned positions alone.
    """
    curve = curvature(stats.matrix, config.damping, config.relative_damping)
    W = weight
    if stats.drift is not None and config.drift:
        W = drift_target(weight, curve.gram, stats.drift, config.drift, config.drift_damping)
    solver = _Solver(W, refit_gram(curve.gram, config.refit_damping), stats, config)
    solver.begin(curve)
    if config.rounds:
        solver.descend()
    loss = float("inf")
    for _ in range(config.rounds):
        before, loss = loss, solver.round()
        if loss > (1 - config.tolerance) ** 2 * before:
            break
    return solver.finish()


@once_per_gram
def refit_gram(gram: Tensor, damping: float) -> Tensor:
    """[K,K] the Gram matrix of the refit: a share `damping` of each diagonal entry, and a floor.

    The floor keeps inputs of tiny energy from taking huge kept values to correct loud ones: without
    it, columns spread over 9 decades ended in values beyond fp16. Ordinary layers do not notice it.
    """
    diagonal = gram.diagonal()
    return gram + torch.diag(damping * diagonal + REFIT_FLOOR * diagonal.mean())


@once_per_gram
def drift_factor(gram: Tensor, damping: float) -> Tensor:
    """[K,K] fp64: the Cholesky factor of H with a share `damping` of its mean diagonal added."""
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return torch.linalg.cholesky(damped)


def drift_target(W: Tensor, gram: Tensor, drift: Tensor, share: float, damping: float) -> Tensor:
    """[N,K] W + share * drift (H + damping)^-1: the weight that would undo `share` of the drift."""
    solved = torch.cholesky_solve(drift.double().T, drift_factor(gram, damping))
    return W + share * solved.T.to(W)


class _Factors(NamedTuple):
    """U [N,R] and V [K,R] of the sign term."""

    U: Tensor
    V: Tensor

    @property
    def product(self) -> Tensor:
        return self.U @ self.V.T


class _Adapter(NamedTuple):
    """P [N,r], Q [K,r], and the basis from which the next truncation starts."""

    P: Tensor
    Q: Tensor
    basis: Tensor


class _Solver:
    """A feasible point of one layer and the steps that improve it.

    W [N,K]: the weight to approximate. gram [K,K]: H, damped for the refit.
    approximation [N,K]: S and the sign term together. mask [N,K] bool: kept positions.
    factors: of the sign term, or None. scales [N,groups]: step sizes of integer values, or None.
    gradient [N,K]: E H of the error E that is left, or None where it has to be computed. Refit and
        descent keep it current, which saves three products of N x K x K a round.
    """

    approximation: Tensor
    mask: Tensor

    def __init__(self, W: Tensor, gram: Tensor, stats: InputStats, config: SlabConfig):
        self.W, self.gram, self.stats, self.config = W, gram, stats, config
        self.factors: _Factors | None = None
        self.scales: Tensor | None = None
        self.adapter: _Adapter | None = None
        self.gradient: Tensor | None = None

    @cached_property
    def space(self) -> Metric:
        """The metric that the adapter and the ADMM work in; nothing else needs it."""
        return metric(self.stats.matrix)

    @property
    def target(self) -> Tensor:
        """[N,K]: what S and the sign term are to approximate."""
        return self.W if self.adapter is None else self.W - self.adapter.P @ self.adapter.Q.T

    def begin(self, curve: Curvature) -> None:
        """Steps 1 and 2. With an adapter the sweep is repeated for what the adapter leaves of W."""
        config = self.config
        if not config.rank:
            return self._begin_without_signs()
        for _ in range(config.alternations if config.adapter_rank else 1):
            target = self.target
            scale, given = curve.conditional_scale, self.stats.input_factor
            U, V, mask = signed_factors(
                target, scale, config.parsed, config.rank, planes=config.planes, given=given
            )
            magnitude = (U @ V.T).abs()
            self.factors = _Factors(U, V)
            self.approximation, self.mask, self.scales = sweep(
                target, curve, config.parsed, magnitude, mask, config.grid, planes=config.planes
            )
            self._fit_adapter()

    def _begin_without_signs(self) -> None:
        """S + P Q^T by ADMM; the values are then rounded to their grid."""
        config, d, grid = self.config, self.space.scale, self.config.grid
        settings = ThreeBasilConfig(
            config.pattern, 0, config.values, config.group_size, adapter_rank=config.adapter_rank
        )
        schedule = SCHEDULES["threebasil"]
        split = admm(self.W * d, self.space, settings, schedule, config.adapter_rank)
        self.approximation, self.mask = split.S / d, split.mask
        if grid:
            self.approximation, self.scales = quantize(
                self.approximation, split.mask, grid.values, grid.group_size, weight=d * d
            )
        self._fit_adapter()

    def _fit_adapter(self) -> None:
        """The adapter becomes the best low-rank part of what S and the sign term leave."""
        if not self.config.adapter_rank:
            return
        d = self.space.scale
        rest = (self.W - self.approximation) * d
        basis, iterations = (None, 4) if self.adapter is None else (self.adapter.basis, 2)
        P, Q, basis = self.space.truncate(rest, self.config.adapter_rank, basis, iterations)
        self.adapter, self.gradient = _Adapter(P, Q / d[:, None], basis), None

    def round(self) -> float:
        """One round of refit and descent; returns the loss."""
        if self.factors is None:
            self._refit()
            self.descend()
        else:
            for factor in FACTORS:
                if factor == "U" or self.stats.input_factor is None:
                    self._refit(factor)
                    self.descend()
        self._fit_adapter()
        return self._loss()

    def _current_gradient(self) -> Tensor:
        """E H [N,K]."""
        if self.gradient is None:
            self.gradient = (self.target - self.approximation) @ self.gram
        return self.gradient

    def _loss(self) -> float:
        """tr(E H E^T)."""
        error = self.target - self.approximation
        return float(row_dot(error, self._current_gradient()).double().sum())

    def _levels(self, product: Tensor) -> Tensor:
        """[N,K] levels of B: times U V^T they approximate W where it is pruned; 0 on kept ones."""
        level = nearest(self.approximation, product.abs(), self.config.planes)
        return torch.where(self.mask, 0.0, level.mul_(signs(product)))

    def _kept_part(self) -> tuple[Part, Tensor]:
        """The unknowns that stand for kept values, and where they are now."""
        kept = torch.where(self.mask, self.approximation, 0.0)
        grid, diagonal = self.config.grid, self.gram.diagonal()
        if grid is None or self.scales is None:
            return KeptValues(self.mask, diagonal), kept
        q = (kept / expand_scales(self.scales, kept.shape[1], grid.group_size)).round()
        return StepSizes(q, grid.group_size, diagonal), self.scales

    def _refit(self, factor: Literal["U", "V"] | None = None) -> None:
        """Least squares over the kept values, one factor of the sign term (or none) and P."""
        kept, start = self._kept_part()
        parts, unknowns = [kept], [start]
        residual = self.target - kept.expand(start)
        if self.factors is not None:
            U, V = self.factors
            product = self.factors.product
            level = self._levels(product)
            residual = residual - product * level
            if factor == "V":
                parts.append(InputFactor(U, level, self.gram.diagonal()))
                unknowns.append(V)
            elif factor == "U":
                parts.append(OutputFactor(V, level, self.gram.diagonal()))
                unknowns.append(U)
        if self.adapter is not None:
            parts.append(AdapterOutput(self.adapter.Q, self.gram))
            unknowns.append(self.adapter.P)
        if self.gradient is None:
            self.gradient = residual @ self.gram
        found = conjugate_gradients(
            residual,
            self.gram,
            parts,
            unknowns,
            self.config.iterations,
            TOLERANCE,
            gradient=self.gradient,
        )
        self.approximation = kept.expand(found[0])
        if self.config.grid is not None:
            self.scales = found[0]
        if self.factors is not None:
            if factor is not None:
                self.factors = self.factors._replace(**{factor: found[1]})
            self.approximation = self.approximation + self.factors.product * level
        if self.adapter is not None:
            self.adapter = self.adapter._replace(P=found[-1])

    def descend(self, keep_gradient: bool = True) -> None:
        """Coordinate descent over what is discrete. The gradient is not wanted after the last."""
        if not keep_gradient:
            self.gradient = None
        magnitude, planes = torch.zeros_like(self.W), 0
        if self.factors is not None:
            magnitude, planes = self.factors.product.abs(), self.config.planes
        self.approximation, self.mask = descend(
            self.target,
            self.approximation,
            self.mask,
            magnitude,
            self.gram,
            self.config.parsed,
            scales=self.scales,
            grid=self.config.grid,
            planes=planes,
            gradient=self._current_gradient() if keep_gradient else None,
        )

    def finish(self) -> Decomposition:
        """Step 4: round factors and step sizes as stored, and fit the kept values to them."""
        grid = self.config.grid
        U = V = B = P = Q = None
        self._round_adapter()
        if self.factors is not None:
            B = self._levels(self.factors.product)
            U, V = self._rounded_factors(*self.factors)
            self.factors = _Factors(U, V)
            pruned = self.factors.product * B
            self.approximation = torch.where(self.mask, self.approximation, pruned)
        self.gradient = None
        if grid is None:
            self._refit()
            self._round_adapter()  # P moved with the kept values
        else:
            self._settle_on(grid)
            if self.factors is not None:
                B = self._levels(self.factors.product)
        if B is not None:
            B = (B / plane_unit(self.config.planes)).round().to(torch.int8)
        if self.adapter is not None:
            P, Q = self.adapter.P, self.adapter.Q
        kept = self.approximation.masked_fill(~self.mask, 0.0)
        values, group_size = (grid.values, grid.group_size) if grid else (None, None)
        return Decomposition(
            kept, self.mask, U, V, B, P, Q, self.scales, values, group_size, self.config.planes
        )

    def _rounded_factors(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """U and V as they will be stored; a V that was given is stored already.

        Raises: RangeError for a U beyond the type of that V.
        """
        if self.stats.input_factor is None:
            return round_factors(U, V)
        half = torch.float16
        if not torch.equal(V.to(half).float(), V):
            return U, V
        rounded = U.to(half).float()
        if not bool(rounded.isfinite().all()):
            raise RangeError(
                f"the factor U of these rows, up to {float(U.abs().max()):.3g}, does not fit fp16 "
                "beside the V that other rows of the weight have; rows so much larger than those "
                "cannot share it"
            )
        return rounded, V

    def _round_adapter(self) -> None:
        """P and Q as they will be stored."""
        if self.adapter is not None:
            P, Q = round_adapter(self.adapter.P, self.adapter.Q, self.config.stored_adapter)
            self.adapter, self.gradient = self.adapter._replace(P=P, Q=Q), None

    def _settle_on(self, grid: Grid) -> None:
        """Kept values on the grid of the step sizes as stored, before and after a last descent."""
        assert self.scales is not None
        self.scales = store_scale(self.scales)
        steps = expand_scales(self.scales, self.W.shape[1], grid.group_size)
        self._round_kept(steps, grid)
        self.descend(keep_gradient=False)
        self._round_kept(steps, grid)

    def _round_kept(self, steps: Tensor, grid: Grid) -> None:
        rounded = round_to_grid(self.approximation, steps, grid.values)
        self.approximation = torch.where(self.mask, rounded, self.approximation)
        self.gradient = None
