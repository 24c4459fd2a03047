"""3BASiL (arXiv 2603.01376) and, with no low-rank part, ALPS (arXiv 2406.07831): pruning by ADMM in the Gram metric.

min tr((T - S - L) G (T - S - L)^T) with S = D, D in the pattern, rank L <= r, in unit-diagonal coordinates. An iteration, in
the paper's order S, D, V, L:

    S = [(T - L) G - V + rho D] (G + rho I)^-1      D = P(S + V / rho)      V += rho (S - D)      L = truncation of T - S

Written with Y = S + V / rho, so that V = rho (Y - D) and S = (T - L) + rho [2 D - Y - (T - L)] (G + rho I)^-1: one N x K x K
product an iteration instead of two, and nothing to store but Y and D. Rows meet only in that product and in L, so the rest
runs a few rows at a time, in cache.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .solvers.finish import finish
from .solvers.masks import Pattern, select
from .solvers.metric import Metric, metric

RESTART = 5.0  # rho is divided by this when nothing moved, and the run starts again


@dataclass(frozen=True)
class Schedule:
    """How rho grows: checked every `every` iterations by the share of kept positions that moved since the last check.

    above 10 % times factors[0], above 0.5 % times factors[1], otherwise times factors[2]. 3BASiL's own are 1.1, 1.05, 1.02. Its
    start decides the result, its end does not: on a 1024 x 1024 layer, rank 16, these take 260 iterations instead of 480
    and end 0.5 % above its loss; 1.15 throughout 200, 1.5 % above; over-relaxed steps (1.6) are slower and worse.
    """

    every: int = 10
    factors: tuple[float, float, float] = (1.1, 1.1, 1.2)


SCHEDULES = {"threebasil": Schedule(), "alps": Schedule(3, (1.3, 1.2, 1.1))}
ROWS = 64  # taken together between two products: three [64, 4096] matrices of fp32 are 3 MB


@dataclass(frozen=True)
class ThreeBasilConfig(Config):
    """The Gram matrix H becomes H + diag(a diag(H) + b mean(diag H)), b and a being `damping` and
    `relative_damping`, 0.005 both in the paper. A run that ends at `iterations` warns, since one
    stopped early is worse than simpler methods. A round of `polish` solves kept values and adapter
    again for the chosen positions and, where the states of a group can be enumerated, swaps
    positions one group at a time.
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
    polish: int = setting(
        3, "rounds in the Gram metric afterwards; 0 is the published method alone", 0, 10_000
    )


class Split(NamedTuple):
    """D [N,K] in the pattern, mask [N,K] bool, P [N,r], Q [K,r] (None for r = 0), all unit-diagonal; iterations taken."""

    D: Tensor
    mask: Tensor
    P: Tensor | None
    Q: Tensor | None
    iterations: int


def threebasil(weight: Tensor, stats: InputStats, config: ThreeBasilConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T (algorithm 1); integer values are rounded afterwards, then polished."""
    space = metric(stats.gram, config.damping, config.relative_damping)
    T = weight * space.scale
    split = admm(T, space, config.parsed, config, SCHEDULES["threebasil"], config.adapter_rank)
    return finish(T, space, split.D, split.mask, split.P, split.Q, config, config.polish)


def alps(weight: Tensor, stats: InputStats, config: ThreeBasilConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S: the ADMM, then kept values by conjugate gradients on the mask (section 3.3)."""
    space = metric(stats.gram, config.damping, config.relative_damping)
    T = weight * space.scale
    split = admm(T, space, config.parsed, config, SCHEDULES["alps"])
    return finish(
        T,
        space,
        split.D,
        split.mask,
        None,
        None,
        config,
        max(1, config.polish),
        swap=config.polish > 0,
    )


def admm(
    T: Tensor,
    space: Metric,
    pattern: Pattern,
    config: ThreeBasilConfig,
    schedule: Schedule,
    rank: int = 0,
) -> Split:
    """The loop above for T [N,K] in the unit-diagonal coordinates of `space`, from L = 0, D = P(T), V = 0."""
    rho = config.rho
    while True:
        result, moved = _run(T, space, pattern, config, schedule, rank, rho)
        if moved or rho < 1e-6:
            return result
        rho /= RESTART  # so large that D did not leave its first support


def _run(
    T: Tensor,
    space: Metric,
    pattern: Pattern,
    config: ThreeBasilConfig,
    schedule: Schedule,
    rank: int,
    rho: float,
) -> tuple[Split, bool]:
    """One run; False if hardly a kept position had moved at the first check, so that rho has to be smaller."""
    rows = (
        [slice(i, i + ROWS) for i in range(0, len(T), ROWS)]
        if T.device.type == "cpu"
        else [slice(None)]
    )
    mask = torch.cat([select(T[part].abs(), pattern) for part in rows])
    checked, D = mask.clone(), T.masked_fill(~mask, 0.0)
    Y, S, product = D.clone(), torch.empty_like(T), torch.empty_like(T)
    P = Q = None
    rest, inverse, started = T, space.inverse(rho), False  # rest: T - L
    for iteration in range(1, config.iterations + 1):
        for part in rows:
            torch.add(Y[part], rest[part], out=S[part]).add_(D[part], alpha=-2).mul_(-rho)
        torch.mm(S, inverse, out=product)
        for part in rows:
            torch.add(product[part], rest[part], out=S[part])
            Y[part].sub_(D[part]).add_(S[part])
            mask[part] = select(Y[part].abs(), pattern)
            torch.mul(Y[part], mask[part], out=D[part])
        if rank:
            E = torch.sub(T, S, out=product)
            P, Q = space.truncate(E, rank)[:2] if P is None else space.follow(E, P)
            rest = torch.addmm(T, P, Q.T, alpha=-1)
        if iteration % schedule.every and iteration < config.iterations:
            continue
        share = int((mask & ~checked).sum()) / int(mask.sum())
        checked = mask.clone()
        started = started or share > 0.005
        if not started:
            return Split(D, mask, P, Q, iteration), False
        if share == 0 or (iteration >= 100 and share < config.stable):
            break
        factor = schedule.factors[0 if share > 0.1 else 1 if share > 0.005 else 2]
        Y = D + (Y - D) / factor  # V stays
        rho *= factor
        inverse = space.inverse(rho)
    else:
        warnings.warn(
            f"ADMM had not settled after iterations={config.iterations}: {share:.2%} of the kept positions still moved; allow more",
            RuntimeWarning,
            stacklevel=4,
        )
    if rank:
        P, Q, _ = space.truncate(T - D, rank)
    return Split(D, mask, P, Q, iteration), True
