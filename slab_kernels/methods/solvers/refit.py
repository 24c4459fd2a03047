"""Least squares: min tr(E H E^T), E = W - approximation, over what the latter depends on linearly.

Preconditioned conjugate gradients (Hestenes and Stiefel 1952) serve kept values, step sizes, U, V
and P alike: a part says how its unknowns make up [N,K] (`expand`), the adjoint of that (`collect`)
and a preconditioner. An iteration takes one N x K x K product, whatever the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from .quantize import expand_scales

TINY = torch.finfo(torch.float32).tiny


def gram_loss(E: Tensor, gram: Tensor) -> Tensor:
    """tr(E H E^T), a scalar, for E [N,K] and H [K,K]."""
    return ((E @ gram) * E).sum()


class Part(Protocol):
    """Unknowns that a weight [N,K] depends on linearly.

    by_row: whether unknowns of different rows are independent, so that each takes its own step.
    """

    by_row: bool

    def expand(self, x: Tensor) -> Tensor:
        """[N,K]: what the unknowns x make of the weight."""

    def collect(self, R: Tensor) -> Tensor:
        """The adjoint of `expand` for R [N,K], of the shape of the unknowns."""

    def precondition(self, gradient: Tensor) -> Tensor:
        """An approximate inverse of `collect(expand(.) @ H)`, for a gradient in the unknowns."""


class KeptValues:
    """Free values on `mask` [N,K]: unknowns [N,K], zero elsewhere.

    Preconditioned with the diagonal [K] of H.
    """

    by_row = True

    def __init__(self, mask: Tensor, diagonal: Tensor):
        self.mask, self.inverse = mask.to(diagonal.dtype), 1 / diagonal

    def expand(self, x: Tensor) -> Tensor:
        return x

    def collect(self, R: Tensor) -> Tensor:
        return R * self.mask

    def precondition(self, gradient: Tensor) -> Tensor:
        return gradient * self.inverse


class StepSizes:
    """Step sizes of integer values q [N,K] (zero on pruned positions); unknowns [N, groups]."""

    by_row = True

    def __init__(self, q: Tensor, group_size: int | None, diagonal: Tensor):
        self.q, self.size = q, group_size or q.shape[1]
        curvature = self._sum_of_groups(q * q * diagonal)
        self.curvature = curvature + 1e-6 * curvature.mean() + 1e-30

    def _sum_of_groups(self, x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % self.size))
        return padded.unflatten(1, (-1, self.size)).sum(-1)

    def expand(self, x: Tensor) -> Tensor:
        return self.q * expand_scales(x, self.q.shape[1], self.size)

    def collect(self, R: Tensor) -> Tensor:
        return self._sum_of_groups(R * self.q)

    def precondition(self, gradient: Tensor) -> Tensor:
        return gradient / self.curvature


class InputFactor:
    """V [K,R] of (U V^T) * level, with U [N,R] fixed; level [N,K] is zero on kept positions.

    Preconditioned with the R x R block of every input.
    """

    by_row = False

    def __init__(self, U: Tensor, level: Tensor, diagonal: Tensor):
        self.U, self.level = U, level
        self.inverse = _inverse_blocks((level * level).T, U, diagonal[:, None, None])

    def expand(self, x: Tensor) -> Tensor:
        return (self.U @ x.T) * self.level

    def collect(self, R: Tensor) -> Tensor:
        return (R * self.level).T @ self.U

    def precondition(self, gradient: Tensor) -> Tensor:
        return (self.inverse @ gradient[..., None])[..., 0]


class OutputFactor:
    """U [N,R] of (U V^T) * level, with V [K,R] fixed: the same, row by row."""

    by_row = True

    def __init__(self, V: Tensor, level: Tensor, diagonal: Tensor):
        self.V, self.level = V, level
        self.inverse = _inverse_blocks(level * level * diagonal, V, 1.0)

    def expand(self, x: Tensor) -> Tensor:
        return (x @ self.V.T) * self.level

    def collect(self, R: Tensor) -> Tensor:
        return (R * self.level) @ self.V

    def precondition(self, gradient: Tensor) -> Tensor:
        return (self.inverse @ gradient[..., None])[..., 0]


class AdapterOutput:
    """P [N,R'] of P Q^T, with Q [K,R'] fixed: one block, Q^T H Q, preconditions every row."""

    by_row = True

    def __init__(self, Q: Tensor, gram: Tensor):
        self.Q = Q
        block = Q.T @ gram @ Q
        block.diagonal().add_(1e-6 * block.diagonal().mean() + 1e-30)
        self.inverse = torch.linalg.inv(block)

    def expand(self, x: Tensor) -> Tensor:
        return x @ self.Q.T

    def collect(self, R: Tensor) -> Tensor:
        return R @ self.Q

    def precondition(self, gradient: Tensor) -> Tensor:
        return gradient @ self.inverse


def _inverse_blocks(weight: Tensor, F: Tensor, factor: Tensor | float) -> Tensor:
    """[rows,R,R]: inverses of factor * F^T diag(weight_row) F, with a ridge of 1e-6.

    weight [rows,k], F [k,R].
    """
    R = F.shape[1]
    blocks = factor * (weight @ (F[:, :, None] * F[:, None, :]).flatten(1)).unflatten(1, (R, R))
    ridge = 1e-6 * blocks.diagonal(dim1=1, dim2=2).mean(-1)
    ridge = ridge + 1e-6 * ridge.mean() + 1e-30
    return torch.linalg.inv(
        blocks + ridge[:, None, None] * torch.eye(R, device=F.device, dtype=F.dtype)
    )


def conjugate_gradients(
    residual: Tensor,
    gram: Tensor,
    parts: Sequence[Part],
    start: Sequence[Tensor],
    iterations: int,
    tolerance: float = 0.0,
    *,
    gradient: Tensor | None = None,
) -> list[Tensor]:
    """Minimise tr(E H E^T) over the unknowns of `parts`, jointly; `residual` [N,K] is E at `start`.

    Returns the unknowns at the end: after `iterations`, or when the preconditioned gradient has
    fallen by `tolerance`. The loss never increases: a row (or everything, where a part couples the
    rows) whose search direction has no curvature left stays where it is.
    gradient [N,K]: E H at `start`, which saves computing it; it becomes that of the result.
    """
    x = [t.clone() for t in start]
    rows = all(part.by_row for part in parts)
    EH = residual @ gram if gradient is None else gradient
    left = [part.collect(EH) for part in parts]
    z = [part.precondition(r) for part, r in zip(parts, left, strict=True)]
    direction = [t.clone() for t in z]
    rz = first = _dot(left, z, rows)
    made, DH = torch.empty_like(EH), torch.empty_like(EH)
    for _ in range(iterations):
        torch.mm(_expand(parts, direction, made), gram, out=DH)
        applied = [part.collect(DH) for part in parts]
        curvature = _dot(direction, applied, rows)
        alpha = torch.where(curvature > 0, rz / curvature.clamp_min(TINY), 0.0)
        for t, d in zip(x, direction, strict=True):
            t.addcmul_(alpha, d)
        for r, a in zip(left, applied, strict=True):
            r.addcmul_(alpha, a, value=-1)
        if gradient is not None:
            gradient.addcmul_(alpha, DH, value=-1)
        z = [part.precondition(r) for part, r in zip(parts, left, strict=True)]
        next_rz = _dot(left, z, rows)
        if tolerance and bool(next_rz.sum() <= tolerance**2 * first.sum()):
            break
        beta = torch.where(rz > 0, next_rz / rz.clamp_min(TINY), 0.0)
        direction = [d.mul_(beta).add_(t) for t, d in zip(z, direction, strict=True)]
        rz = next_rz
    return x


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """[N]: the inner products of the rows of a and b [N,k], the same whatever the threads."""
    return torch.einsum("ij,ij->i", a, b)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor], rows: bool) -> Tensor:
    """The inner product of two sets of unknowns: [N,1] row by row, or one number."""
    dots = [row_dot(s, t) for s, t in zip(a, b, strict=True)]
    if rows:
        return reduce(torch.add, dots)[:, None]
    return reduce(torch.add, (dot.sum() for dot in dots))


def _expand(parts: Sequence[Part], x: Sequence[Tensor], out: Tensor) -> Tensor:
    """[N,K]: what the unknowns of all parts make up together."""
    if len(parts) == 1:
        return parts[0].expand(x[0])
    torch.add(parts[0].expand(x[0]), parts[1].expand(x[1]), out=out)
    for part, t in zip(parts[2:], x[2:], strict=True):
        out.add_(part.expand(t))
    return out
