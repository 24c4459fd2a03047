"""Lists every way to prune a group of n:m: a state says which positions go, and to which level.

An entry may go to one of the two levels next to its optimum. There are 24 states for 2:4, however
many levels there are (with one plane the two are -1 and +1), and 6 where pruned entries are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from .masks import Pattern

# The most states that are enumerated: 2:4 has 24 and 1:4 has 32; 4:8 has 1120 and is chosen
# position by position.
LIMIT = 32


@dataclass(frozen=True)
class GroupStates:
    """The states for C choices of p pruned positions and T = 2^p of their levels.

    A state's index is choice * T + level.
    pruned [C,p], kept [C,n]: ascending positions.
    upper [T,p] bool: whether the pruned entry takes the higher of its two levels.
    mask [C*T,m] bool: whether the entry is kept.
    takes_upper [C*T,m] bool: whether the entry is pruned to its higher level.
    """

    pruned: Tensor
    kept: Tensor
    upper: Tensor
    mask: Tensor
    takes_upper: Tensor


def enumerable(pattern: Pattern, planes: int = 1) -> bool:
    """Whether a group has few enough states to try them all; planes=0: pruned entries are zero."""
    if not pattern.structured:
        return False
    pruned = pattern.group - pattern.keep
    return comb(pattern.group, pruned) * (2**pruned if planes else 1) <= LIMIT


@lru_cache(maxsize=32)
def group_states(pattern: Pattern, planes: int, device: torch.device) -> GroupStates:
    """The states of one group of `pattern`; planes=0 leaves one level, zero."""
    m, count = pattern.group, pattern.group - pattern.keep
    choices = list(combinations(range(m), count))
    kept = [[i for i in range(m) if i not in choice] for choice in choices]
    upper = list(product((True, False), repeat=count)) if planes else [(False,) * count]
    states = [dict(zip(choice, higher, strict=True)) for choice in choices for higher in upper]
    mask = [[i not in state for i in range(m)] for state in states]
    takes_upper = [[state.get(i, False) for i in range(m)] for state in states]
    # The device is named, since the caller may have set another as torch's default.
    parts = (
        torch.tensor(part, device=device) for part in (choices, kept, upper, mask, takes_upper)
    )
    return GroupStates(*parts)
