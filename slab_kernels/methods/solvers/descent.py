"""Coordinate descent in the Gram metric over what is discrete: kept positions, levels of the pruned, integer values.

The complement of the sweep. The sweep fixes a group while the columns to its right can still adapt, and never looks
back; this goes over all groups again, each given everything else, so that the loss can only fall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .levels import nearest, neighbours
from .masks import Pattern
from .quantize import expand_scales, round_to_grid
from .states import group_states
from .sweep import BLOCK, Grid


def descend_groups(
    W: Tensor,
    approximation: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    pattern: Pattern,
    scales: Tensor | None = None,
    grid: Grid | None = None,
    planes: int = 1,
) -> tuple[Tensor, Tensor, int]:
    """One pass over the groups of an enumerable n:m pattern: (approximation, mask, groups that changed positions).

    Pruned entries are a level of `planes` signs times `magnitude` [N,K] >= 0, or zero for planes=0; of the levels the two next
    to the group's own optimum are tried.
    Every group takes the best of its states (24 for 2:4) with its kept values at their least-squares optimum, or, on a
    grid, rounded one after the other (Babai's nearest plane); a group never moves to a worse state than it has.
    """
    N, K = W.shape
    m = pattern.group
    states = group_states(pattern, planes, W.device)
    pruned, kept, T = states.pruned, states.kept, states.upper.shape[0]
    target, low = W.T.contiguous(), magnitude.T.contiguous()
    E = (W - approximation).T.contiguous()
    G = gram @ E
    old = mask.T.contiguous()
    new_mask = old.clone()
    steps = expand_scales(scales, K, grid.group_size).T.contiguous() if grid else None
    blocks = gram.view(K // m, m, K // m, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [K/m,m,m]
    kk = torch.linalg.inv(blocks[:, kept[:, :, None], kept[:, None, :]])  # [K/m,C,n,n]
    whole = torch.linalg.inv(blocks)
    kp = kk @ blocks[:, kept[:, :, None], pruned[:, None, :]]  # [K/m,C,n,p]
    width = max(m, BLOCK // m * m)
    moved = torch.zeros((), dtype=torch.long, device=W.device)
    for start in range(0, K, width):
        end = min(K, start + width)
        before, g = E[start:end].clone(), G[start:end].clone()
        Hb = gram[start:end, start:end]
        for a in range(0, end - start, m):
            group, here = (start + a) // m, slice(start + a, start + a + m)
            H4, e = blocks[group], E[here]
            outside = (
                g[a : a + m] - H4 @ e
            )  # gradient that the rest of the row exerts on this group
            gone = 0.0
            if planes:
                below, above = neighbours(target[here] + whole[group] @ outside, low[here], planes)
                upper = states.upper[None, :, :, None]
                gone = (
                    torch.where(upper, above[pruned][:, None], below[pruned][:, None])
                    * low[here][pruned][:, None]
                )
            delta = target[here][pruned][:, None] - gone  # [C,T,p,N]
            C = pruned.shape[0]
            free = -(kk[group] @ outside[kept])[:, None] - torch.einsum(
                "cnp,ctpx->ctnx", kp[group], delta
            )
            if grid:
                free = _nearest(target[here][kept], free, steps[here][kept], H4, kept, grid)
            trial = torch.empty(C, T, m, N, dtype=W.dtype, device=W.device)
            trial.scatter_(2, pruned[:, None, :, None].expand_as(delta), delta)
            trial.scatter_(2, kept[:, None, :, None].expand_as(free), free)
            trial = trial.view(C * T, m, N)
            loss = ((H4 @ trial).add_(outside, alpha=2).mul_(trial)).sum(1)
            best, state = loss.min(0)
            now = ((H4 @ e).add_(outside, alpha=2) * e).sum(0)
            better = best < now
            change = torch.where(better, trial.gather(0, state.expand(1, m, N))[0] - e, 0.0)
            chosen = torch.where(better, states.mask.T[:, state], old[here])
            moved += (chosen != old[here]).any(0).sum()
            new_mask[here] = chosen
            E[here] += change
            g.addmm_(Hb[:, a : a + m], change)
        G.addmm_(gram[:, start:end], E[start:end] - before)
    return W - E.T, new_mask.T.contiguous(), int(moved)


def _nearest(
    target: Tensor, free: Tensor, step: Tensor, H4: Tensor, kept: Tensor, grid: Grid
) -> Tensor:
    """Errors of kept values rounded to the grid one after the other; target, step [C,n,N], free [C,T,n,N]."""
    free = free.clone()
    n = kept.shape[1]
    for i in range(n):
        wanted = free[:, :, i]
        got = target[:, None, i] - round_to_grid(
            target[:, None, i] - wanted, step[:, None, i], grid.values
        )
        rest = kept[:, i + 1 :]
        if i + 1 < n:  # the later ones move to their optimum given this one
            block = H4[rest[:, :, None], rest[:, None, :]]
            shift = torch.linalg.inv(block) @ H4[rest, kept[:, i : i + 1]][..., None]  # [C,n-i-1,1]
            free[:, :, i + 1 :] -= shift[:, None] * (got - wanted)[:, :, None]
        free[:, :, i] = got
    return free


def descend_levels(
    W: Tensor,
    approximation: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    scales: Tensor | None = None,
    grid: Grid | None = None,
    planes: int = 1,
) -> tuple[Tensor, int]:
    """One pass over columns, any pattern: (approximation, pruned entries that changed level). Positions stay.

    An entry takes the best of its values given everything else: a pruned one the nearest level to its least-squares
    optimum (planes=0: zero), a kept one the optimum itself, rounded if there is a grid. The loss never increases.
    """
    K = W.shape[1]
    target, low = W.T.contiguous(), magnitude.T.contiguous()
    E = (W - approximation).T.contiguous()
    G = gram @ E
    kept = mask.T.contiguous()
    steps = expand_scales(scales, K, grid.group_size).T.contiguous() if grid else None
    changed = torch.zeros((), dtype=torch.long, device=W.device)
    diagonal = gram.diagonal()
    for start in range(0, K, BLOCK):
        end = min(K, start + BLOCK)
        before, g = E[start:end].clone(), G[start:end].clone()
        Hb = gram[start:end, start:end]
        for a in range(end - start):
            j = start + a
            e, h = E[j], diagonal[j]
            best = target[j] - e + g[a] / h  # the optimum of the entry itself
            stay = round_to_grid(best, steps[j], grid.values) if grid else best
            gone = nearest(best, low[j], planes) * low[j] if planes else torch.zeros_like(best)
            change = target[j] - torch.where(kept[j], stay, gone) - e
            change = torch.where(change * (2 * g[a] + h * change) < 0, change, 0.0)
            changed += ((change != 0) & ~kept[j]).sum()
            E[j] += change
            g.addr_(Hb[:, a], change)
        G.addmm_(gram[:, start:end], E[start:end] - before)
    return W - E.T, int(changed)
