"""The Gram metric, tr(E H E^T), prepared once for every layer that reads the same input.

Solvers work in unit-diagonal coordinates: T = W diag(d), G = diag(1/d) H diag(1/d) with d = sqrt(diag H). Loss, pattern and
rank are the same there, and one step length suits every input; results are divided by d at the end.

Everything comes from Cholesky factors. An eigendecomposition G = Q diag(lambda) Q^T would make (G + rho I)^-1 cheap for every
rho too, but on two cores a 2048 x 2048 one took 2.0 s against 0.4 s for factor and inverse, and it grows alike; rho changes
every ten iterations at most, and any F with F F^T = G whitens (see `truncate`).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CalibrationError
from .lowrank import truncated_svd

MORE_DAMPING = 10.0  # factor tried when the damped matrix is not positive definite
TRIES = 8


def once_per_gram(function: Callable) -> Callable:
    """Remember the result for the Gram matrix seen last: q, k and v of a block ask for the same in turn.

    The result goes when another matrix comes or when the matrix itself is freed.
    """
    last: list = []

    @wraps(function)
    def cached(gram: Tensor, *arguments, **named):
        key = (0 if gram.is_inference() else gram._version, arguments, named)
        if last and last[0]() is gram and last[1] == key:
            return last[2]
        last.clear()
        last[:] = [
            weakref.ref(gram, lambda _: last.clear()),
            key,
            function(gram, *arguments, **named),
        ]
        return last[2]

    return cached


class Damped(NamedTuple):
    """alive [K,K] fp32: undamped, with life in dead inputs.  matrix, lower [K,K] fp64: damped, and its Cholesky factor.
    added: fraction of the mean diagonal that was added, more than asked for where the matrix was not positive definite.
    """

    alive: Tensor
    matrix: Tensor
    lower: Tensor
    added: float


def damped_cholesky(gram: Tensor, damping: float, relative_damping: float) -> Damped:
    """Damp a mean Gram matrix [K,K] and factorise it in fp64.

    Adds `damping` times the mean diagonal plus `relative_damping` times each diagonal entry. Inputs that were always
    zero count as independent inputs of 1e-3 of the mean energy, so their weights are approximated like any other and
    an input that wakes up later does little harm. Where the matrix is not positive definite, ten times more damping is
    tried, up to eight times, with a RuntimeWarning that says how much it took.

    Raises: CalibrationError when nothing helps.
    """
    diagonal = gram.diagonal().double()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, 1.0)
    floor = torch.where(diagonal <= 0, 1e-3 * mean, 0.0)
    alive = gram.float() + torch.diag(floor).to(gram.device, torch.float32)
    added = damping
    for _ in range(TRIES):
        damped = alive.double()
        damped.diagonal().add_(added * mean + relative_damping * diagonal)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool((lower.diagonal() ** 2 > 1e-12 * damped.diagonal()).all()):
            if added > damping:
                warnings.warn(
                    f"a Gram matrix [{len(gram)}, {len(gram)}] was not positive definite with damping={damping:g}; "
                    f"{added:g} of its mean diagonal was added",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return Damped(alive, damped, lower, added)
        added = max(added * MORE_DAMPING, 1e-8)
    raise CalibrationError(
        f"the Gram matrix [{len(gram)}, {len(gram)}] is not positive definite even with {added:.3g} of its mean "
        "diagonal added; it cannot have come from real inputs"
    )


@dataclass(frozen=True)
class Metric:
    """gram [K,K] fp32: G, unit diagonal, damped.  lower [K,K] fp32: its Cholesky factor F, G = F F^T.  scale [K]: d."""

    gram: Tensor
    lower: Tensor
    scale: Tensor

    def loss(self, E: Tensor) -> float:
        """tr(E G E^T) of E [N,K] in unit-diagonal coordinates."""
        return float((E @ self.lower).square().sum(dtype=torch.float64))

    def inverse(self, rho: float) -> Tensor:
        """(G + rho I)^-1 [K,K] fp32."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(rho)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            lower = torch.linalg.cholesky(shifted.double()).float()
        return torch.cholesky_inverse(lower)

    def truncate(
        self, E: Tensor, rank: int, start: Tensor | None = None, iterations: int = 4
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best rank-`rank` part of E [N,K] in the metric: P [N,r], Q [K,r] with tr((E - P Q^T) G (E - P Q^T)^T) least.

        SVD of E F, its input side multiplied by F^-1 (EoRA, arXiv 2410.21271, equations 4-6, for any F F^T = G). The third
        result is a basis to start the next call from, which then needs fewer `iterations`.
        """
        P, right = truncated_svd(E, rank, iterations, metric=self.lower, start=start)
        Q = torch.linalg.solve_triangular(self.lower.T, right[:, :rank], upper=True)
        return P, Q, right

    def follow(self, E: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """One subspace iteration from basis [N,r]: P [N,r] orthonormal and Q = E^T P [K,r].

        Where P spans the left singular vectors of E F, P Q^T = P P^T E is what `truncate` gives, with no F to divide by; E that
        changes little from call to call is followed in half the time (4096 x 4096, rank 64: 0.09 s instead of 0.2).
        """
        P = torch.linalg.qr(E @ (self.gram @ (E.T @ basis))).Q
        return P, E.T @ P


@once_per_gram
def metric(gram: Tensor, damping: float = 0.005, relative_damping: float = 0.005) -> Metric:
    """The metric of a mean Gram matrix [K,K]; see `damped_cholesky` for what is added to it and what is raised.

    3BASiL's damping (arXiv 2603.01376): H + diag(a diag(H) + b mean(diag H)), a = b = 0.005.
    """
    damped = damped_cholesky(gram, damping, relative_damping)
    scale = damped.matrix.diagonal().sqrt()
    unit = (damped.matrix / scale[:, None] / scale).float()
    return Metric(unit, (damped.lower / scale[:, None]).float(), scale.float())
