"""Orders of inputs: which of them share a group of an n:m pattern.

In an order of a linear's inputs every row prunes the p = m - n entries of each group that cost
least. Where the order is free, one is sought in which that sum over rows and groups is small, in
the manner of RIA's channel permutation (ICLR 2024): one input leaves every group, and an assignment
of those that left to the groups takes them back. RIA solves each assignment exactly for magnitudes;
here it is improved by exchanges, for the cost of the format in the Gram metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config
from .levels import nearest
from .lowrank import signed_factors
from .masks import Pattern
from .quantize import grid_scales
from .sweep import curvature

CHUNK = 128  # groups that exchange inputs in one round; time is linear in the inputs thereby
EXCHANGES = 100  # passes over the pairs of groups at most; some ten are needed


def pruning_cost(W: Tensor, gram: Tensor, config: Config) -> Tensor:
    """[N,K]: what pruning an entry of W [N,K] costs more than keeping it.

    An error in column j counts 1 / [H^-1]_jj, H = gram [K,K]: what is left of it once all other
    columns adapt. A pruned entry becomes a level of |U V^T|, or zero where the rank is 0. A kept
    integer misses by a twelfth of its squared step on average.
    """
    factor = curvature(gram, damping=0.001, relative_damping=0.01).factor
    scale = factor.square().sum(0).rsqrt()
    if not config.rank:
        return (W * scale) ** 2
    U, V, mask = signed_factors(W, scale, config.parsed, 1, planes=config.planes)
    magnitude = (U @ V.T).abs()
    cost = ((W.abs() - nearest(W.abs(), magnitude, config.planes) * magnitude) * scale) ** 2
    grid = config.grid
    if grid is None:
        return cost
    step = grid_scales(W, mask, grid.values, grid.group_size, weight=scale**2)
    return cost - (step.mean(1, keepdim=True) * scale) ** 2 / 12


def order_cost(cost: Tensor, order: Tensor, pattern: Pattern) -> float:
    """The sum over rows and groups of the costs of what is pruned in this order [K]."""
    groups = cost[:, order].unflatten(1, (-1, pattern.group))
    pruned = groups.topk(pattern.group - pattern.keep, dim=-1, largest=False).values
    return float(pruned.sum(dtype=torch.float64))


def assign_groups(cost: Tensor, pattern: Pattern, rounds: int, seed: int = 0) -> Tensor:
    """[K] an order of the inputs of small `order_cost`, for costs [rows,K]; no round raises it.

    Raises: ValueError where groups of the pattern do not divide K.
    """
    drawn = torch.Generator().manual_seed(seed)
    m, pruned, K = pattern.group, pattern.group - pattern.keep, cost.shape[1]
    groups = torch.randperm(K, generator=drawn).view(-1, m)
    by_input = cost.T.contiguous()
    for _ in range(rounds):
        for part in torch.randperm(len(groups), generator=drawn).split(CHUNK):
            own, count = groups[part], torch.arange(len(part))
            place = torch.randint(m, (len(part),), generator=drawn)
            leaving = own[count, place]
            staying = own[torch.arange(m) != place[:, None]].view(-1, m - 1)
            # Of a newcomer x and what stays, a group prunes the p - 1 least of what stays, and x
            # or the next of them: only min(next, x) depends on x, (next + x - |next - x|) / 2.
            following = by_input[staying].kthvalue(pruned, dim=1).values
            newcomer = by_input[leaving]
            both = following.sum(1)[:, None] + newcomer.sum(1)
            table = (both - torch.cdist(following, newcomer, p=1.0)) / 2
            own[count, place] = leaving[exchange(table.cpu())]
            groups[part] = own
    return groups.flatten()


def exchange(table: Tensor) -> Tensor:
    """[n] a column of the cost table [n,n] for every row, so that no exchange of two pays.

    Starts from row i with column i. Pairs of rows that gain most by exchanging with each other
    exchange at once, until none gains.
    """
    found, every = torch.arange(len(table)), torch.arange(len(table))
    for _ in range(EXCHANGES):
        now = table[:, found]
        own = now.diagonal()
        change = now + now.T - own - own[:, None]
        gain, partner = change.fill_diagonal_(0).min(1)
        agree = (partner[partner] == every) & (gain < -1e-6 * own.abs())
        if not bool(agree.any()):
            break
        found = torch.where(agree, found[partner], found)
    return found
