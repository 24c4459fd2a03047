"""All the ways to prune a group of n:m: which positions go, and to which of the two levels next to their optimum.

24 for 2:4, however many levels there are (with one plane the two are -1 and +1), and 6 where pruned entries are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from .masks import Pattern

LIMIT = 32  # states that are enumerated: 2:4 has 24, 1:4 has 32; 4:8 has 1120 and is chosen position by position


@dataclass(frozen=True)
class GroupStates:
    """For each of C choices of pruned positions and T = 2^p of their levels, in the order choice * T + level.

    pruned [C,p], kept [C,n]: ascending positions.  upper [T,p] bool: the higher of the two levels.
    mask [C*T,m] bool: kept.  takes_upper [C*T,m] bool: pruned, to the higher level.
    """

    pruned: Tensor
    kept: Tensor
    upper: Tensor
    mask: Tensor
    takes_upper: Tensor

    @property
    def count(self) -> int:
        return self.mask.shape[0]


def enumerable(pattern: Pattern, planes: int = 1) -> bool:
    """Whether the states of a group are few enough to try them all; planes=0: pruned entries are zero."""
    if not pattern.structured:
        return False
    gone = pattern.group - pattern.keep
    return comb(pattern.group, gone) * (2**gone if planes else 1) <= LIMIT


@lru_cache(maxsize=32)
def group_states(pattern: Pattern, planes: int, device: torch.device) -> GroupStates:
    """The states of one group of `pattern`; planes=0 leaves one level, for pruned entries that are zero."""
    m, gone = pattern.group, pattern.group - pattern.keep
    choices = list(combinations(range(m), gone))
    kept = [[i for i in range(m) if i not in choice] for choice in choices]
    upper = list(product((True, False), repeat=gone)) if planes else [(False,) * gone]
    states = [dict(zip(choice, higher, strict=True)) for choice in choices for higher in upper]
    mask = [[i not in state for i in range(m)] for state in states]
    takes_upper = [[state.get(i, False) for i in range(m)] for state in states]
    # The device is named, since the caller may have set another as torch's default.
    parts = (torch.tensor(p, device=device) for p in (choices, kept, upper, mask, takes_upper))
    return GroupStates(*parts)
