"""Coordinate descent on tr(E H E^T), E = W - approximation, over what is discrete.

Discrete are the kept positions, the levels of pruned entries and integer values. The sweep fixes a
group while the columns to its right can still adapt, and never looks back; the descent visits every
group again, each given everything else, so that the loss can only fall. It is ours; only the
rounding of a group's kept values is Babai's nearest plane (1986).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import compiled
from .levels import nearest, neighbours
from .masks import Pattern
from .quantize import Grid, expand_scales, round_to_grid
from .states import enumerable, group_states
from .sweep import BLOCK

PASSES = 2  # of the compiled steps over the groups of a block, before the others hear of it


def descend(
    W: Tensor,
    approximation: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    pattern: Pattern,
    *,
    scales: Tensor | None = None,
    grid: Grid | None = None,
    planes: int = 1,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass over all of W: the new approximation [N,K] and kept mask [N,K].

    W, approximation, magnitude [N,K], mask [N,K] bool, gram [K,K]. Pruned entries are a level of
    `planes` signs times magnitude >= 0, or zero for planes=0. With a `grid`, kept values lie on it
    with step sizes `scales` [N,groups]. Positions move where the states of a group can be
    enumerated. gradient [N,K]: E H, which saves computing it and is kept current.
    """
    if enumerable(pattern, planes):
        return descend_groups(
            W,
            approximation,
            mask,
            magnitude,
            gram,
            pattern,
            scales=scales,
            grid=grid,
            planes=planes,
            gradient=gradient,
        )
    levels = descend_levels(
        W, approximation, mask, magnitude, gram, scales=scales, grid=grid, planes=planes
    )
    if gradient is not None:
        torch.mm(W - levels, gram, out=gradient)
    return levels, mask


def descend_groups(
    W: Tensor,
    approximation: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    pattern: Pattern,
    *,
    scales: Tensor | None = None,
    grid: Grid | None = None,
    planes: int = 1,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass over the groups of an enumerable n:m pattern; arguments and results as of `descend`.

    Every group takes the best of its states (24 for 2:4) with its kept values at their
    least-squares optimum or, on a grid, rounded one after the other. Of the levels of a pruned
    entry the two next to the group's own optimum are tried. A group never moves to a state worse
    than its own.
    """
    m, N = pattern.group, len(W)
    width = max(m, BLOCK // m * m)
    if compiled.usable(W, pattern, planes, width):
        return _descend_compiled(
            W, approximation, mask, magnitude, gram, scales, grid, planes, gradient, width
        )
    whole_gradient = gradient
    solver = _GroupSolver(gram, pattern, grid, planes)
    target, size = W.T.contiguous(), magnitude.T.contiguous()
    steps = _step_of_every_entry(scales, grid, W)
    E = (W - approximation).T.contiguous()
    kept = mask.T.clone(memory_format=torch.contiguous_format)
    for block, gradient in _blocks(E, gram, width):
        for a in range(block.start, block.stop, m):
            group = slice(a, a + m)
            H, e, first = solver.blocks[a // m], E[group], a - block.start
            gradient_outside = gradient[first : first + m] - H @ e
            step = None if steps is None else steps[group]
            trial = solver.trials(a // m, target[group], size[group], gradient_outside, step)
            best, state = _loss(trial, H, gradient_outside).min(0)
            better = best < _loss(e, H, gradient_outside)
            chosen = trial.gather(0, state.expand(1, m, N))[0]
            change = torch.where(better, chosen - e, 0.0)
            kept[group] = torch.where(better, solver.states.mask.T[:, state], kept[group])
            E[group] += change
            gradient.addmm_(gram[block, group], change)
    if whole_gradient is not None:
        torch.mm(E.T, gram, out=whole_gradient)
    return W - E.T, kept.T.contiguous()


def _descend_compiled(
    W: Tensor,
    approximation: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    scales: Tensor | None,
    grid: Grid | None,
    planes: int,
    gradient: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """`descend_groups` for 2:4 by the compiled steps, `PASSES` of them within a block."""
    (N, K), groups = W.shape, compiled.descent_groups(gram)
    W, gram = W.contiguous(), gram.contiguous()
    E = (W - approximation).contiguous()
    kept, everywhere = mask.clone(memory_format=torch.contiguous_format), gradient is not None
    G = E @ gram if gradient is None else gradient
    numbers = compiled.grid_numbers(grid, K)
    for rows in compiled.row_ranges(N, K):
        block_of_rows = (E[rows], G[rows], kept[rows], W[rows])
        sizes = magnitude[rows].contiguous() if planes else None
        steps = scales[rows].contiguous() if scales is not None and grid else None
        matrices = (*block_of_rows, sizes, steps, gram, groups)
        for start, end in compiled.column_ranges(K, width):
            change = torch.ops.slab_kernels.descend_cpu(
                *matrices, start, end, planes, *numbers, PASSES
            )
            if everywhere and start:
                G[rows, :start].addmm_(change, gram[start:end, :start])
            if end < K:
                G[rows, end:].addmm_(change, gram[start:end, end:])
    return W - E, kept


def _blocks(E: Tensor, gram: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of `width` columns of E [K,N], each with the gradient H E of its columns [width,N].

    The caller changes E within the block and keeps that gradient current; before the next block,
    the change is carried to all other gradients.
    """
    G, K = gram @ E, len(E)
    for start in range(0, K, width):
        block = slice(start, min(start + width, K))
        before, gradient = E[block].clone(), G[block].clone()
        yield block, gradient
        G.addmm_(gram[:, block], E[block] - before)


def _loss(e: Tensor, H: Tensor, gradient_outside: Tensor) -> Tensor:
    """[...,N] loss of errors e [...,m,N] of one group, up to what the group does not change."""
    return (H @ e).add_(gradient_outside, alpha=2).mul_(e).sum(-2)


def _step_of_every_entry(scales: Tensor | None, grid: Grid | None, W: Tensor) -> Tensor | None:
    """[K,N] step sizes, or None without a grid."""
    if grid is None or scales is None:
        return None
    return expand_scales(scales, W.shape[1], grid.group_size).T.contiguous()


class _GroupSolver:
    """The least-squares optimum of a group's kept values in each of its states.

    There are C choices of p pruned and n kept positions of m, and T of their levels.
    blocks [K/m,m,m]: the groups' own parts of H.
    kept_inverse [K/m,C,n,n]: the inverse of each choice's kept part.
    kept_from_pruned [K/m,C,n,p]: how kept errors answer to pruned ones.
    """

    def __init__(self, gram: Tensor, pattern: Pattern, grid: Grid | None, planes: int):
        self.grid, self.planes = grid, planes
        self.states = group_states(pattern, planes, gram.device)
        pruned, kept, m = self.states.pruned, self.states.kept, pattern.group
        groups = len(gram) // m
        own = gram.view(groups, m, groups, m).diagonal(dim1=0, dim2=2)
        self.blocks = own.permute(2, 0, 1)
        self.inverse = torch.linalg.inv(self.blocks)
        among_kept = self.blocks[:, kept[:, :, None], kept[:, None, :]]
        self.kept_inverse = torch.linalg.inv(among_kept)
        self.kept_from_pruned = (
            self.kept_inverse @ self.blocks[:, kept[:, :, None], pruned[:, None, :]]
        )

    def trials(
        self,
        group: int,
        target: Tensor,
        magnitude: Tensor,
        gradient_outside: Tensor,
        step: Tensor | None,
    ) -> Tensor:
        """[C*T,m,N] errors of the group in all its states. All arguments are [m,N].

        gradient_outside: the gradient that the rest of the row exerts on the group.
        step: None without a grid.
        """
        pruned, kept = self.states.pruned, self.states.kept
        level: Tensor | float = 0.0
        if self.planes:
            optimum = target + self.inverse[group] @ gradient_outside
            below, above = neighbours(optimum, magnitude, self.planes)
            upper = self.states.upper[None, :, :, None]
            multiple = torch.where(upper, above[pruned][:, None], below[pruned][:, None])
            level = multiple * magnitude[pruned][:, None]
        delta = target[pruned][:, None] - level  # [C,T,p,N]
        alone = -(self.kept_inverse[group] @ gradient_outside[kept])[:, None]
        free = alone - torch.einsum("cnp,ctpx->ctnx", self.kept_from_pruned[group], delta)
        if step is not None:
            free = self._rounded(free, target[kept], step[kept], self.blocks[group])
        (m, N), C, T = target.shape, len(pruned), len(self.states.upper)
        trial = target.new_empty(C, T, m, N)
        trial.scatter_(2, pruned[:, None, :, None].expand_as(delta), delta)
        trial.scatter_(2, kept[:, None, :, None].expand_as(free), free)
        return trial.view(C * T, m, N)

    def _rounded(self, free: Tensor, target: Tensor, step: Tensor, H: Tensor) -> Tensor:
        """Errors of kept values on the grid, rounded one after the other; the later ones adapt.

        free [C,T,n,N]: the errors without a grid. target, step [C,n,N]. H [m,m].
        """
        assert self.grid is not None
        free, kept = free.clone(), self.states.kept
        for i in range(kept.shape[1]):
            wanted, w = free[:, :, i], target[:, None, i]
            got = w - round_to_grid(w - wanted, step[:, None, i], self.grid.values)
            later = kept[:, i + 1 :]
            if later.shape[1]:
                among_later = torch.linalg.inv(H[later[:, :, None], later[:, None, :]])
                shift = among_later @ H[later, kept[:, i : i + 1]][..., None]  # [C,n-i-1,1]
                free[:, :, i + 1 :] -= shift[:, None] * (got - wanted)[:, :, None]
            free[:, :, i] = got
        return free


def descend_levels(
    W: Tensor,
    approximation: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    *,
    scales: Tensor | None = None,
    grid: Grid | None = None,
    planes: int = 1,
) -> Tensor:
    """One pass over columns for any pattern: the new approximation. Arguments as of `descend`.

    Positions stay. An entry takes the best of its values given everything else: a pruned one the
    level nearest to its least-squares optimum (planes=0: zero), a kept one the optimum itself,
    rounded if there is a grid.
    """
    target, size = W.T.contiguous(), magnitude.T.contiguous()
    steps = _step_of_every_entry(scales, grid, W)
    E, kept = (W - approximation).T.contiguous(), mask.T.contiguous()
    for block, gradient in _blocks(E, gram, BLOCK):
        for j in range(block.start, block.stop):
            e, g, h = E[j], gradient[j - block.start], gram[j, j]
            optimum = target[j] - e + g / h
            stays = optimum
            if grid and steps is not None:
                stays = round_to_grid(optimum, steps[j], grid.values)
            level = torch.zeros_like(optimum)
            if planes:
                level = nearest(optimum, size[j], planes) * size[j]
            change = target[j] - torch.where(kept[j], stays, level) - e
            change = torch.where(change * (2 * g + h * change) < 0, change, 0.0)
            E[j] += change
            gradient.addr_(gram[block, j], change)
    return W - E.T
