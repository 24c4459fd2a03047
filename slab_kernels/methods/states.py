"""All the ways to prune a group of n:m: which positions go and to which levels. 24 for 2:4 with signs, 6 without."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from .levels import levels
from .masks import Pattern

LIMIT = 96  # states that are enumerated: 2:4 has 24, with two planes 96; 4:8 has 1120 and is chosen position by position


@dataclass(frozen=True)
class GroupStates:
    """For each of C choices of pruned positions and T choices of their levels, in the order choice * T + level.

    pruned [C,p], kept [C,n]: ascending positions.  level [T,p].  mask [C*T,m] bool (kept).  multiple [C*T,m]: 0 where kept.
    """

    pruned: Tensor
    kept: Tensor
    level: Tensor
    mask: Tensor
    multiple: Tensor

    @property
    def count(self) -> int:
        return self.mask.shape[0]


def enumerable(pattern: Pattern, planes: int = 1) -> bool:
    """Whether the states of a group are few enough to try them all; planes=0: pruned entries are zero."""
    if not pattern.structured:
        return False
    gone = pattern.group - pattern.keep
    return comb(pattern.group, gone) * 2 ** (gone * planes) <= LIMIT


@lru_cache(maxsize=32)
def group_states(pattern: Pattern, planes: int, device: torch.device) -> GroupStates:
    """The states of one group of `pattern`; planes=0 leaves only +1, for pruned entries that are zero."""
    m, gone = pattern.group, pattern.group - pattern.keep
    choices = list(combinations(range(m), gone))
    kept = [[i for i in range(m) if i not in choice] for choice in choices]
    level = list(product(levels(planes), repeat=gone)) if planes else [(1.0,) * gone]
    multiple = torch.zeros(len(choices) * len(level), m)
    for row, (choice, values) in enumerate(product(choices, level)):
        multiple[row, list(choice)] = torch.tensor(values)
    parts = torch.tensor(choices), torch.tensor(kept), torch.tensor(level), multiple == 0, multiple
    return GroupStates(*(t.to(device) for t in parts))
