"""3BASiL (arXiv 2603.01376) and, with no low-rank part, ALPS (arXiv 2406.07831): pruning by ADMM.

min tr((T - S - L) G (T - S - L)^T) with S = D, D in the pattern, rank L <= r, in the unit-diagonal
coordinates of the Gram metric. An iteration, in the paper's order S, D, V, L (algorithm 1):

    S = [(T - L) G - V + rho D] (G + rho I)^-1
    D = the part of S + V / rho that the pattern keeps
    V += rho (S - D)
    L = truncation of T - S

Written with Y = S + V / rho, so that V = rho (Y - D), the first line becomes

    S = (T - L) + rho [2 D - Y - (T - L)] (G + rho I)^-1

which takes one N x K x K product an iteration instead of two, and nothing needs to be stored but Y
and D. Rows meet only in that product and in L, so the rest runs a few rows at a time, in cache.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .inputs import InputStats
from .solvers.finish import PolishedConfig, Split, finish
from .solvers.masks import Pattern, select
from .solvers.metric import Metric, metric

RESTART = 5.0  # rho is divided by this when nothing moved, and the run starts again
LEAST_RHO = 1e-6  # below this, no run starts again
ROWS = 64  # taken together between two products: three [64, 4096] matrices of fp32 are 3 MB
SOME, MANY = 0.005, 0.1  # shares of kept positions that tell the phases of a run apart
SETTLING = 100  # iterations before a run may end because few positions move


@dataclass(frozen=True)
class Schedule:
    """How the penalty rho grows, by the share of kept positions that moved since the last check.

    every: iterations between two checks.
    factors: by which rho grows where more than 10 % moved, more than 0.5 %, or fewer.

    3BASiL's own factors are 1.1, 1.05, 1.02. The start of a schedule decides the result, its end
    does not: on a 1024 x 1024 layer, rank 16, these take 260 iterations instead of 480 and end
    0.5 % above its loss; 1.15 throughout takes 200 and ends 1.5 % above; over-relaxed steps (1.6)
    are slower and worse.
    """

    every: int = 10
    factors: tuple[float, float, float] = (1.1, 1.1, 1.2)

    def growth(self, moved: float) -> float:
        """The factor by which rho grows after the share `moved` of kept positions moved."""
        if moved > MANY:
            return self.factors[0]
        return self.factors[1] if moved > SOME else self.factors[2]


SCHEDULES = {"threebasil": Schedule(), "alps": Schedule(3, (1.3, 1.2, 1.1))}


@dataclass(frozen=True)
class ThreeBasilConfig(PolishedConfig):
    """The settings of `threebasil` and `alps`.

    The Gram matrix H becomes H + diag(a diag(H) + b mean(diag H)), b and a being `damping` and
    `relative_damping`, 0.005 both in the paper. A run that ends at `iterations` warns, since one
    stopped early is worse than simpler methods.
    """

    damping: float = setting(
        0.005, "share of the mean diagonal of the Gram matrix added to it", 0, 10
    )
    relative_damping: float = setting(0.005, "share of each diagonal entry added to it", 0, 10)
    rho: float = setting(0.1, "penalty of the ADMM to start with", 0, 1_000_000, above=True)
    stable: float = setting(
        3e-4, "share of kept positions that move between two checks at which it stops", 0, 1
    )
    iterations: int = setting(2000, "of the ADMM at most", 1, 1_000_000)


def threebasil(weight: Tensor, stats: InputStats, config: ThreeBasilConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T.

    Integer values are rounded after the ADMM, then polished.
    """
    space = metric(stats.matrix, config.damping, config.relative_damping)
    T = weight * space.scale
    split = admm(T, space, config, SCHEDULES["threebasil"], config.adapter_rank)
    return finish(T, space, split, config, config.polish)


def alps(weight: Tensor, stats: InputStats, config: ThreeBasilConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S: the ADMM, then kept values by conjugate gradients.

    ALPS, section 3.3, solves for the kept values once on the mask that the ADMM found.
    """
    space = metric(stats.matrix, config.damping, config.relative_damping)
    T = weight * space.scale
    split = admm(T, space, config, SCHEDULES["alps"])
    return finish(T, space, split, config, max(1, config.polish), swap=config.polish > 0)


def admm(
    T: Tensor, space: Metric, config: ThreeBasilConfig, schedule: Schedule, rank: int = 0
) -> Split:
    """The loop above for T [N,K] in the unit-diagonal coordinates of `space`, from L = 0, V = 0.

    D begins as the part of T that the pattern keeps. Warns with a RuntimeWarning where positions
    still move after `config.iterations`.
    """
    rho = config.rho
    while True:
        run = _Run(T, space, config.parsed, rank, rho)
        if _settle(run, config, schedule) or rho < LEAST_RHO:
            return run.split()
        rho /= RESTART  # it was so large that D did not leave its first support


def _settle(run: _Run, config: ThreeBasilConfig, schedule: Schedule) -> bool:
    """Iterate until positions stay. False if few moved at the first check: rho is too large."""
    moved = 1.0
    for iteration in range(1, config.iterations + 1):
        run.iterate()
        if iteration % schedule.every and iteration < config.iterations:
            continue
        moved = run.moved()
        run.started = run.started or moved > SOME
        if not run.started:
            return False
        if moved == 0 or (iteration >= SETTLING and moved < config.stable):
            return True
        run.penalise(schedule.growth(moved))
    warnings.warn(
        f"ADMM had not settled after iterations={config.iterations}: {moved:.2%} of the kept "
        "positions still moved; allow more",
        RuntimeWarning,
        stacklevel=4,
    )
    return True


class _Run:
    """One run of the ADMM: Y, D, `mask` and L = P Q^T as of the last iteration."""

    def __init__(self, T: Tensor, space: Metric, pattern: Pattern, rank: int, rho: float):
        self.T, self.space, self.pattern, self.rank, self.rho = T, space, pattern, rank, rho
        self.rows = [slice(None)]
        if T.device.type == "cpu":
            self.rows = [slice(i, i + ROWS) for i in range(0, len(T), ROWS)]
        self.mask = torch.cat([select(T[part].abs(), pattern) for part in self.rows])
        self.checked = self.mask.clone()  # the mask at the last check
        self.started = False  # whether positions have moved at all
        self.D = T.masked_fill(~self.mask, 0.0)
        self.Y, self.S, self.product = self.D.clone(), torch.empty_like(T), torch.empty_like(T)
        self.P: Tensor | None = None
        self.Q: Tensor | None = None
        self.without_adapter = T  # T - L
        self.inverse = space.inverse(rho)

    def iterate(self) -> None:
        """S, D, V and L, once each."""
        T, Y, D, S, product = self.T, self.Y, self.D, self.S, self.product
        rest = self.without_adapter
        for part in self.rows:
            torch.add(Y[part], rest[part], out=S[part]).add_(D[part], alpha=-2).mul_(-self.rho)
        torch.mm(S, self.inverse, out=product)
        for part in self.rows:
            torch.add(product[part], rest[part], out=S[part])
            Y[part].sub_(D[part]).add_(S[part])
            self.mask[part] = select(Y[part].abs(), self.pattern)
            torch.mul(Y[part], self.mask[part], out=D[part])
        if self.rank:
            E = torch.sub(T, S, out=product)
            if self.P is None:
                self.P, self.Q, _ = self.space.truncate(E, self.rank)
            else:
                self.P, self.Q = self.space.follow(E, self.P)
            self.without_adapter = torch.addmm(T, self.P, self.Q.T, alpha=-1)

    def moved(self) -> float:
        """The share of kept positions that are new since the last call."""
        share = int((self.mask & ~self.checked).sum()) / int(self.mask.sum())
        self.checked = self.mask.clone()
        return share

    def penalise(self, growth: float) -> None:
        """Multiply rho by `growth`; V stays."""
        self.Y = self.D + (self.Y - self.D) / growth
        self.rho *= growth
        self.inverse = self.space.inverse(self.rho)

    def split(self) -> Split:
        """S = D, and the best P Q^T for it where the run has started."""
        if self.rank and self.started:
            self.P, self.Q, _ = self.space.truncate(self.T - self.D, self.rank)
        return Split(self.D, self.mask, self.P, self.Q)
