"""Least squares in the Gram metric, min tr(E H E^T) with E = W - approximation, over any linear part of it.

One conjugate gradient serves kept values, step sizes, U and V: a part says how its unknowns make up [N,K] (`expand`),
the adjoint (`collect`) and a preconditioner. One N x K x K product an iteration, whatever the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .quantize import expand_scales

TINY = torch.finfo(torch.float32).tiny


def gram_loss(E: Tensor, gram: Tensor) -> Tensor:
    """tr(E H E^T), a scalar, for E [N,K] and H [K,K]."""
    return ((E @ gram) * E).sum()


class Part(Protocol):
    by_row: (
        bool  # unknowns of different rows are independent, so every row takes its own step length
    )

    def expand(self, x: Tensor) -> Tensor: ...
    def collect(self, R: Tensor) -> Tensor: ...
    def precondition(self, g: Tensor) -> Tensor: ...


class KeptValues:
    """Free values on `mask` [N,K]; unknowns [N,K], zero elsewhere. Preconditioned with the diagonal [K] of H."""

    by_row = True

    def __init__(self, mask: Tensor, diagonal: Tensor):
        self.mask, self.inverse = mask.to(diagonal.dtype), 1 / diagonal

    def expand(self, x):
        return x

    def collect(self, R):
        return R * self.mask

    def precondition(self, g):
        return g * self.inverse


class StepSizes:
    """Step sizes of integer values q [N,K] (zero on pruned positions); unknowns [N, groups]."""

    by_row = True

    def __init__(self, q: Tensor, group_size: int | None, diagonal: Tensor):
        self.q, self.size = q, group_size or q.shape[1]
        self.curvature = self._sum(q * q * diagonal)
        self.curvature = self.curvature + 1e-6 * self.curvature.mean() + 1e-30

    def _sum(self, x: Tensor) -> Tensor:
        return (
            torch.nn.functional.pad(x, (0, -x.shape[1] % self.size))
            .unflatten(1, (-1, self.size))
            .sum(-1)
        )

    def expand(self, x):
        return self.q * expand_scales(x, self.q.shape[1], self.size)

    def collect(self, R):
        return self._sum(R * self.q)

    def precondition(self, g):
        return g / self.curvature


class InputFactor:
    """V [K,R] of (U V^T) * sign, with U [N,R] fixed; sign [N,K] is zero on kept positions. R x R block preconditioner."""

    by_row = False

    def __init__(self, U: Tensor, sign: Tensor, diagonal: Tensor):
        self.U, self.sign = U, sign
        self.inverse = _inverse_blocks((sign * sign).T, U, diagonal[:, None, None])

    def expand(self, x):
        return (self.U @ x.T) * self.sign

    def collect(self, R):
        return (R * self.sign).T @ self.U

    def precondition(self, g):
        return (self.inverse @ g[..., None])[..., 0]


class OutputFactor:
    """U [N,R] of (U V^T) * sign, with V [K,R] fixed: the same, row by row."""

    by_row = True

    def __init__(self, V: Tensor, sign: Tensor, diagonal: Tensor):
        self.V, self.sign = V, sign
        self.inverse = _inverse_blocks(sign * sign * diagonal, V, 1.0)

    def expand(self, x):
        return (x @ self.V.T) * self.sign

    def collect(self, R):
        return (R * self.sign) @ self.V

    def precondition(self, g):
        return (self.inverse @ g[..., None])[..., 0]


class AdapterOutput:
    """P [N,R'] of P Q^T, with Q [K,R'] fixed: one block, Q^T H Q, for every row."""

    by_row = True

    def __init__(self, Q: Tensor, gram: Tensor):
        self.Q = Q
        block = Q.T @ gram @ Q
        block.diagonal().add_(1e-6 * block.diagonal().mean() + 1e-30)
        self.inverse = torch.linalg.inv(block)

    def expand(self, x):
        return x @ self.Q.T

    def collect(self, R):
        return R @ self.Q

    def precondition(self, g):
        return g @ self.inverse


def _inverse_blocks(weight: Tensor, F: Tensor, factor: Tensor | float) -> Tensor:
    """[rows,R,R]: inverse of factor * F^T diag(weight_row) F, weight [rows,k], F [k,R], with a 1e-6 ridge."""
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
) -> tuple[Tensor, list[Tensor]]:
    """Minimise tr(E H E^T) over the unknowns of `parts`, jointly; `residual` [N,K] is E at `start`.

    Returns E and the unknowns at the end. Stops after `iterations`, or when the preconditioned gradient has fallen by
    `tolerance`. The loss never increases: a row (or everything, where a part couples the rows) whose search direction
    has no curvature left stays where it is.
    """
    x = [t.clone() for t in start]
    rows = all(part.by_row for part in parts)

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        total = sum(torch.einsum("ij,ij->i", p, q) if rows else torch.vdot(p.flatten(), q.flatten())
                    for p, q in zip(a, b, strict=True))  # fmt: skip
        return total[:, None] if rows else total

    EH = residual @ gram
    g = [part.collect(EH) for part in parts]
    del EH
    z = [part.precondition(t) for part, t in zip(parts, g, strict=True)]
    direction = [t.clone() for t in z]
    energy = first = dot(g, z)
    for _ in range(iterations):
        DH = _expand(parts, direction) @ gram
        back = [part.collect(DH) for part in parts]
        bend = dot(direction, back)
        step = torch.where(bend > 0, energy / bend.clamp_min(TINY), 0.0)
        for t, d in zip(x, direction, strict=True):
            t.addcmul_(step, d)
        for t, b in zip(g, back, strict=True):
            t.addcmul_(step, b, value=-1)
        z = [part.precondition(t) for part, t in zip(parts, g, strict=True)]
        new = dot(g, z)
        if tolerance and bool(new.sum() <= tolerance**2 * first.sum()):
            break
        turn = torch.where(energy > 0, new / energy.clamp_min(TINY), 0.0)
        direction = [torch.addcmul(t, turn, d) for t, d in zip(z, direction, strict=True)]
        energy = new
    moved = [a - b for a, b in zip(x, start, strict=True)]
    return residual - _expand(parts, moved), x


def _expand(parts: Sequence[Part], x: Sequence[Tensor]) -> Tensor:
    return sum(
        (part.expand(t) for part, t in zip(parts[1:], x[1:], strict=True)), parts[0].expand(x[0])
    )
