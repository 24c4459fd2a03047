"""The left-to-right sweep of SparseGPT and GPTQ, with levels for pruned entries.

Columns are fixed from left to right. With U the upper Cholesky factor of the inverse Gram matrix,
U^T U = H^-1, the error of column j is pushed onto the columns to its right:

    e = (w_j - fixed_j) / U_jj        w_k -= U_jk e   for k > j

(GPTQ, arXiv 2210.17323, algorithm 1; SparseGPT, arXiv 2301.00774, algorithm 1). What lies beyond a
block of 128 columns is updated once per block. A kept entry takes its updated weight, rounded where
there is a grid; a pruned one takes the nearest level of its magnitude, or zero where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import compiled
from .levels import nearest, neighbours
from .masks import Pattern, top_of_groups, top_of_rows
from .metric import damped_cholesky, once_per_gram
from .quantize import SEARCH, Grid, group_scale, round_to_grid
from .states import enumerable, group_states

BLOCK = 128  # columns between two updates of everything to the right (SparseGPT, section 3.3)


@dataclass(frozen=True)
class Curvature:
    """A damped Gram matrix and what the sweep needs of its inverse.

    gram [K,K] fp32: undamped, but dead inputs have a little energy.
    factor [K,K] fp32: upper triangular U with U^T U = (gram + damping)^-1.
    """

    gram: Tensor
    factor: Tensor

    @property
    def conditional_scale(self) -> Tensor:
        """[K] 1 / U_jj: the root of the loss per squared error in column j when all columns to its
        right adapt."""
        return 1 / self.factor.diagonal()


@once_per_gram
def curvature(gram: Tensor, damping: float = 0.01, relative_damping: float = 0.0) -> Curvature:
    """Damp and factorise a mean Gram matrix [K,K] in fp64: see `damped_cholesky`."""
    damped = damped_cholesky(gram, damping, relative_damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(damped.lower), upper=True)
    return Curvature(damped.alive, upper.float().contiguous())


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
    *,
    joint: bool = True,
    planes: int = 1,
) -> Swept:
    """Prune W [N,K] to `pattern` in the metric of `curve`.

    magnitude: [N,K] >= 0. Pruned entries become a level of `planes` signs times it, or 0 for None.
    mask: [N,K] bool. Unstructured patterns keep as many entries of a row in each block as it does.
        Step sizes are searched on it. For n:m it serves the step sizes alone and may be None.
    grid: rounds kept entries. A scale's inputs are a whole number of groups of `pattern`.
    joint: choose all positions and levels of a group by their exact common cost, all columns to the
        right being free, where the states of a group can be enumerated (24 for 2:4). Otherwise, and
        for False, an entry costs what pruning it alone would, which is SparseGPT's rule.
    """
    N, K = W.shape
    U = curve.factor
    levels = _PrunedLevels(magnitude, planes)
    kept_values = _KeptValues(W, curve, pattern, mask, grid, levels)
    rule: _Rule
    if joint and enumerable(pattern, levels.planes):
        rule = _JointRule(U, pattern, levels, kept_values)
    else:
        rule = _SingleRule(U, pattern, levels, mask)
    group = pattern.group or 1
    unit = grid.group_size if grid and grid.group_size else group
    width = max(unit, BLOCK // unit * unit)
    searched = mask is not None or grid is None or grid.group_size is None
    if joint and searched and compiled.usable(W, pattern, levels.planes, width):
        scales = torch.stack(kept_values.scales, 1) if kept_values.scales else None
        return _sweep_compiled(W, curve, magnitude, mask, grid, levels.planes, scales, width)
    chosen_at_once = group if pattern.structured else width
    # A column of W is contiguous here, which halves the time of the inner loop.
    remaining = W.T.clone(memory_format=torch.contiguous_format)
    fixed = torch.empty_like(remaining)
    kept = torch.empty(K, N, dtype=torch.bool, device=W.device)
    for start in range(0, K, width):
        end = min(K, start + width)
        error = torch.empty_like(remaining[start:end])
        for a in range(start, end, group):
            b = a + group
            kept_values.reach(a, remaining[:end])
            if (a - start) % chosen_at_once == 0:
                columns = slice(a, min(a + chosen_at_once, end))
                kept[columns] = rule.choose_positions(columns, remaining[columns])
            for j in range(a, b):
                w = remaining[j]
                fixed[j] = torch.where(kept[j], kept_values.rounded(w), rule.pruned_value(j, w))
                error[j - start] = (w - fixed[j]) / U[j, j]
                remaining[j + 1 : b].addr_(U[j, j + 1 : b], error[j - start], alpha=-1)
            pushed = error[a - start : b - start]
            remaining[b:end].addmm_(U[a:b, b:end].T, pushed, alpha=-1)
        remaining[end:].addmm_(U[start:end, end:].T, error, alpha=-1)
    scales = torch.stack(kept_values.scales, 1) if grid else None
    return Swept(fixed.T.contiguous(), kept.T.contiguous(), scales)


def _sweep_compiled(
    W: Tensor,
    curve: Curvature,
    magnitude: Tensor | None,
    mask: Tensor | None,
    grid: Grid | None,
    planes: int,
    scales: Tensor | None,
    width: int,
) -> Swept:
    """`sweep` to 2:4 with joint costs by the compiled steps.

    scales [N,1]: where one scale per row was searched already.
    """
    (N, K), U = W.shape, curve.factor.contiguous()
    groups, weight = compiled.sweep_groups(U), curve.conditional_scale**2
    remaining = W.clone(memory_format=torch.contiguous_format)
    fixed = torch.empty_like(remaining)
    kept = torch.empty(N, K, dtype=torch.bool, device=W.device)
    numbers, fractions = compiled.grid_numbers(grid, K), None
    if grid and scales is None:
        fractions = torch.tensor(SEARCH, dtype=torch.float32, device=W.device)
        scales = W.new_empty(N, -(-K // numbers[0]))
    for rows in compiled.row_ranges(N, K):
        parts = (remaining[rows], fixed[rows], kept[rows])
        steps = None if scales is None else scales[rows]
        likely = mask[rows].contiguous() if fractions is not None and mask is not None else None
        sizes = None if magnitude is None else magnitude[rows].contiguous()
        matrices = (*parts, steps, likely, sizes, U, groups, fractions, weight)
        for start, end in compiled.column_ranges(K, width):
            pushed = torch.ops.slab_kernels.sweep_cpu(*matrices, start, end, planes, *numbers)
            if end < K:
                remaining[rows, end:].addmm_(pushed, U[start:end, end:], alpha=-1)
    return Swept(fixed, kept, scales)


class _PrunedLevels:
    """What a pruned entry may become: a level of `planes` signs times its magnitude, or zero.

    Columns are indices or slices of the K inputs; weights w are [N] or [columns,N].
    """

    def __init__(self, magnitude: Tensor | None, planes: int):
        self.magnitude = None if magnitude is None else magnitude.T.contiguous()
        self.planes = 0 if magnitude is None else planes

    def nearest(self, columns: int | slice, w: Tensor) -> Tensor:
        """The level nearest to each entry of w."""
        if self.magnitude is None:
            return torch.zeros_like(w)
        return nearest(w, self.magnitude[columns], self.planes) * self.magnitude[columns]

    def neighbours(self, columns: slice, w: Tensor) -> tuple[Tensor, Tensor]:
        """The two levels between which each entry of w lies, the lower one first."""
        if self.magnitude is None:
            return torch.zeros_like(w), torch.zeros_like(w)
        below, above = neighbours(w, self.magnitude[columns], self.planes)
        return below * self.magnitude[columns], above * self.magnitude[columns]


class _KeptValues:
    """What a kept entry becomes: itself, or the nearest point of a grid.

    The step sizes of a scale's inputs are searched when the sweep reaches the first of them, on the
    weights as they are by then. One scale per row is searched before the sweep begins.
    """

    def __init__(
        self,
        W: Tensor,
        curve: Curvature,
        pattern: Pattern,
        mask: Tensor | None,
        grid: Grid | None,
        levels: _PrunedLevels,
    ):
        self.pattern, self.mask, self.grid, self.levels = pattern, mask, grid, levels
        self.weight = curve.conditional_scale**2  # [K] the cost of a squared error in each column
        self.scales: list[Tensor] = []  # [N] each
        if grid and grid.group_size is None:
            likely = W != 0 if mask is None else mask
            self.scales.append(group_scale(W, likely, grid.values, weight=self.weight)[:, 0])

    def reach(self, column: int, remaining: Tensor) -> None:
        """Search the step sizes of the scale that begins at `column`, if one does.

        remaining [columns,N]: the updated weights up to the end of the block.
        """
        size = self.grid.group_size if self.grid else None
        if not self.grid or not size or column % size:
            return
        columns = slice(column, min(column + size, len(remaining)))
        w = remaining[columns]
        likely = self._likely(columns, w)
        scale = group_scale(w.T, likely, self.grid.values, weight=self.weight[columns])
        self.scales.append(scale[:, 0])

    def _likely(self, columns: slice, w: Tensor) -> Tensor:
        """[N,columns] bool: the entries that are likely to be kept."""
        if self.mask is not None:
            return self.mask[:, columns]
        miss = (w - self.levels.nearest(columns, w)).abs().T
        return top_of_groups(
            miss.unflatten(1, (-1, self.pattern.group)), self.pattern.keep
        ).flatten(1)

    def rounded(self, w: Tensor) -> Tensor:
        """w [...,N] as stored with the step sizes searched last."""
        return round_to_grid(w, self.scales[-1], self.grid.values) if self.grid else w


class _Rule(Protocol):
    """Which entries of some columns are kept, and what the others become."""

    def choose_positions(self, columns: slice, w: Tensor) -> Tensor:
        """[columns,N] bool: what is kept of the updated weights w [columns,N]."""

    def pruned_value(self, column: int, w: Tensor) -> Tensor:
        """[N]: what the updated weights w [N] of a column become where they are pruned."""


class _SingleRule:
    """Every entry costs what pruning it alone would: (w - level)^2 / [H^-1]_jj.

    H is what is left of it when the sweep reaches column j, so that [H^-1]_jj = U_jj^2.
    """

    def __init__(self, U: Tensor, pattern: Pattern, levels: _PrunedLevels, mask: Tensor | None):
        self.diagonal, self.pattern, self.levels, self.mask = U.diagonal(), pattern, levels, mask

    def choose_positions(self, columns: slice, w: Tensor) -> Tensor:
        miss = w - self.levels.nearest(columns, w)
        cost = ((miss / self.diagonal[columns, None]) ** 2).T
        if self.pattern.structured:
            return top_of_groups(cost, self.pattern.keep).T
        assert self.mask is not None, "an unstructured pattern needs the mask"
        return top_of_rows(cost, self.mask[:, columns].sum(1, keepdim=True)).T

    def pruned_value(self, column: int, w: Tensor) -> Tensor:
        return self.levels.nearest(column, w)


class _JointRule:
    """A group takes the cheapest of its states: delta^T C^-1 delta over the entries that are fixed.

    C is the group's block of H^-1 of what is left of H, restricted to those entries. Kept entries
    are free without a grid and cost nothing; with one they are fixed too, at their nearest points.
    """

    def __init__(
        self, U: Tensor, pattern: Pattern, levels: _PrunedLevels, kept_values: _KeptValues
    ):
        self.levels, self.kept_values = levels, kept_values
        self.states = group_states(pattern, levels.planes, U.device)
        self.group = m = pattern.group
        groups = len(U) // m
        diagonal = U.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        covariance = diagonal.transpose(1, 2) @ diagonal  # [K/m,m,m] blocks of H^-1
        pruned = self.states.pruned
        among_pruned = covariance[:, pruned[:, :, None], pruned[:, None, :]]
        self.inverse_of_pruned = torch.linalg.inv(among_pruned)  # [K/m,C,p,p]
        self.inverse = torch.linalg.inv(covariance)  # [K/m,m,m]
        self.values: Tensor  # [m,N] what the entries of the current group become where pruned

    def choose_positions(self, columns: slice, w: Tensor) -> Tensor:
        below, above = self.levels.neighbours(columns, w)
        state = self._cheapest(columns.start // self.group, w, below, above)
        self.values = torch.where(self.states.takes_upper.T[:, state], above, below)
        return self.states.mask.T[:, state]

    def pruned_value(self, column: int, w: Tensor) -> Tensor:
        return self.values[column % self.group]

    def _cheapest(self, group: int, w: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """[N] index of the cheapest state; w, below, above [m,N]."""
        states = self.states
        if self.kept_values.grid is None:
            pruned = states.pruned
            upper = states.upper[None, :, :, None]
            level = torch.where(upper, above[pruned][:, None], below[pruned][:, None])
            delta = w[pruned][:, None] - level  # [C,T,p,N]
            cost = torch.einsum("cpq,ctqn->ctpn", self.inverse_of_pruned[group], delta)
            return cost.mul_(delta).sum(2).flatten(0, 1).argmin(0)
        rounding = w - self.kept_values.rounded(w)
        level = torch.where(states.takes_upper[:, :, None], above, below)
        delta = torch.where(states.mask[:, :, None], rounding, w - level)  # [C*T,m,N]
        return (self.inverse[group] @ delta).mul_(delta).sum(1).argmin(0)
