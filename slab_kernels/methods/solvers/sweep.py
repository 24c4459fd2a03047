"""The left-to-right sweep of SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323), for pruned entries of +-l.

Columns are fixed from left to right; the error of each is pushed onto the columns to its right through the Cholesky
factor of the inverse Gram matrix, in blocks of 128. A kept entry takes its updated weight (rounded, if there is a
grid), a pruned one the nearer of +-l, where l = 0 is plain pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from .levels import nearest, neighbours
from .masks import Pattern, top_of_groups, top_of_rows
from .metric import damped_cholesky, once_per_gram
from .quantize import group_scale, round_to_grid
from .states import enumerable, group_states

BLOCK = 128  # columns between two updates of everything to the right (SparseGPT, section 3.3)


@dataclass(frozen=True)
class Curvature:
    """A damped Gram matrix and what the sweep needs of its inverse.

    gram [K,K] fp32, undamped but with dead inputs given a little energy.  factor [K,K] fp32: upper triangular U with
    U^T U = (gram + damping)^-1.  damping: fraction of the mean diagonal really added, more than asked for where the
    matrix was not positive definite.
    """

    gram: Tensor
    factor: Tensor
    damping: float

    @property
    def conditional_scale(self) -> Tensor:
        """[K] 1 / U_jj: the root of the loss per squared error in column j when every column to its right adapts."""
        return 1 / self.factor.diagonal()


@once_per_gram
def curvature(gram: Tensor, damping: float = 0.01, relative_damping: float = 0.0) -> Curvature:
    """Damp and factorise a mean Gram matrix [K,K] in fp64: see `damped_cholesky`."""
    damped = damped_cholesky(gram, damping, relative_damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(damped.lower), upper=True)
    return Curvature(damped.alive, upper.float(), damped.added)


@dataclass(frozen=True)
class Grid:
    """Integer values for kept entries: type and inputs a scale (None: one scale a row)."""

    values: str
    group_size: int | None


class Swept(NamedTuple):
    """approximation [N,K], kept mask [N,K] bool, and scales [N,groups] if there was a grid."""

    approximation: Tensor
    mask: Tensor
    scales: Tensor | None


def sweep(
    W: Tensor,
    curve: Curvature,
    pattern: Pattern,
    magnitude: Tensor | None = None,
    mask: Tensor | None = None,
    grid: Grid | None = None,
    joint: bool = True,
    planes: int = 1,
) -> Swept:
    """Prune W [N,K] to `pattern` in the metric of `curve`; pruned entries become a level of `planes` signs times
    magnitude [N,K] >= 0 (None: 0).

    mask: for unstructured patterns, how many each row keeps in each block (and the tentative choice that scales are
        searched on); ignored for n:m except for the scales.
    joint: choose the positions and signs of a group by their exact common cost, with all columns to the right free
        (24 states for 2:4); False is SparseGPT's rule, column by column, (|w| - l)^2 / U_jj^2.
    """
    N, K = W.shape
    m = pattern.group or 1
    planes = planes if magnitude is not None else 0
    joint = joint and enumerable(pattern, planes)
    size = (grid.group_size or K) if grid else 1
    step = lcm(m, size) if grid and grid.group_size else m
    block = max(step, BLOCK // step * step)
    U = curve.factor
    left = (
        W.T.contiguous()
    )  # [K,N]: a column of W is contiguous, which halves the time of the inner loop
    low = None if magnitude is None else magnitude.T.contiguous()
    result, kept = torch.empty_like(left), torch.empty(K, N, dtype=torch.bool, device=W.device)
    costs = _costs(U, pattern, planes) if joint else None
    scales = []
    weight = curve.conditional_scale**2  # a rounding error in column j costs this much
    if grid and grid.group_size is None:
        scales.append(
            group_scale(W, mask if mask is not None else W != 0, grid.values, weight=weight)[:, 0]
        )
    for start in range(0, K, block):
        end = min(K, start + block)
        work, error, Ub = (
            left[start:end].clone(),
            torch.empty(end - start, N).to(W),
            U[start:end, start:end],
        )
        if not pattern.structured:
            score = _score(work, low[start:end] if low is not None else None, Ub.diagonal(), planes)
            kept[start:end] = top_of_rows(score.T, mask[:, start:end].sum(1, keepdim=True)).T
        for a in range(0, end - start, m):
            b = a + m
            here = slice(start + a, start + b)
            fill = low[here] if low is not None else None
            if grid and grid.group_size and (start + a) % size == 0:
                stop = min(end - start, a + size)
                likely = _likely(work[a:stop], low, mask, pattern, start + a, start + stop, planes)
                scale = group_scale(
                    work[a:stop].T, likely, grid.values, weight=weight[start + a : start + stop]
                )
                scales.append(scale[:, 0])
            s = scales[-1] if grid else None
            if joint:
                state, below, above = _best_state(
                    work[a:b], fill, costs, (start + a) // m, grid, s, planes
                )
                kept[here] = costs.states.mask.T[:, state]
                signed = (
                    None
                    if fill is None
                    else torch.where(costs.states.takes_upper.T[:, state], above, below)
                )
            else:
                if pattern.structured:
                    score = _score(work[a:b], fill, Ub.diagonal()[a:b], planes)
                    kept[here] = top_of_groups(score.T, pattern.keep).T
                signed = None
            for j in range(a, b):
                w = work[j]
                stay = w if grid is None else round_to_grid(w, s, grid.values)
                if signed is not None:
                    gone = signed[j - a]
                elif fill is not None:
                    gone = nearest(w, fill[j - a], planes) * fill[j - a]
                else:
                    gone = torch.zeros_like(w)
                result[start + j] = torch.where(kept[start + j], stay, gone)
                error[j] = (w - result[start + j]) / Ub[j, j]
                if j + 1 < b:
                    work[j + 1 : b].addr_(Ub[j, j + 1 : b], error[j], alpha=-1)
            work[b:].addmm_(Ub[a:b, b:].T, error[a:b], alpha=-1)
        left[end:].addmm_(U[start:end, end:].T, error, alpha=-1)
    return Swept(
        result.T.contiguous(), kept.T.contiguous(), torch.stack(scales, 1) if grid else None
    )


def _miss(w: Tensor, fill: Tensor | None, planes: int) -> Tensor:
    """What pruning each entry alone leaves: w, or w less its nearest level."""
    return w if fill is None else w - nearest(w, fill, planes) * fill


def _score(w: Tensor, fill: Tensor | None, diagonal: Tensor, planes: int) -> Tensor:
    """[k,N] cost of pruning each entry alone: (w - c l)^2 / [H^-1]_jj of what is left of H."""
    miss = _miss(w, fill, planes)
    return (miss / diagonal[:, None]) ** 2


def _likely(work, low, mask, pattern, start, end, planes) -> Tensor:
    """[N, end-start] bool: the entries of columns start..end likely to be kept, for the search of their step size."""
    if mask is not None:
        return mask[:, start:end]
    miss = _miss(work, None if low is None else low[start:end], planes).abs()
    return top_of_groups(miss.T.unflatten(1, (-1, pattern.group)), pattern.keep).flatten(1)


@dataclass(frozen=True)
class _Costs:
    states: object
    pruned: Tensor  # [K/m, C, p, p]: inverse of the pruned block of [H^-1] of what is left of H
    whole: Tensor  # [K/m, m, m]: inverse of the whole group's block


def _costs(U: Tensor, pattern: Pattern, planes: int) -> _Costs:
    m, K = pattern.group, U.shape[0]
    states = group_states(pattern, planes, U.device)
    diagonal = U.view(K // m, m, K // m, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverse = (
        diagonal.transpose(1, 2) @ diagonal
    )  # [H^-1] restricted to the group, everything to the left being fixed
    p = states.pruned
    return _Costs(
        states,
        torch.linalg.inv(inverse[:, p[:, :, None], p[:, None, :]]),
        torch.linalg.inv(inverse),
    )


def _best_state(
    w: Tensor,
    fill: Tensor | None,
    costs: _Costs,
    group: int,
    grid: Grid | None,
    s: Tensor | None,
    planes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N] index of the cheapest state of one group: delta^T C^-1 delta over the entries that are fixed; w, fill [m,N].

    Kept entries are free without a grid (they cost nothing); with one they are fixed too, at their nearest points.
    Beside the index, what the two levels of every entry come to, [m,N] each.
    """
    states = costs.states
    C, T = states.pruned.shape[0], states.upper.shape[0]
    below = above = torch.zeros_like(w)
    if fill is not None:
        below, above = (level * fill for level in neighbours(w, fill, planes))
    if grid is None:
        p = states.pruned
        gone = torch.where(
            states.upper[None, :, :, None], above[p][:, None], below[p][:, None]
        )  # [C,T,p,N]
        delta = w[p][:, None] - gone
        cost = torch.einsum("cpq,ctqn->ctpn", costs.pruned[group], delta).mul_(delta).sum(2)
    else:
        rounded = w - round_to_grid(w, s, grid.values)
        gone = torch.where(states.takes_upper[:, :, None], above, below)
        delta = torch.where(states.mask[:, :, None], rounded, w - gone)  # [C*T,m,N]
        cost = (costs.whole[group] @ delta).mul_(delta).sum(1)
    return cost.view(C * T, -1).argmin(0), below, above
