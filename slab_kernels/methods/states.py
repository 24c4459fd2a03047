"""All the ways to prune a group of n:m: which positions go and with which signs. 24 for 2:4 with signs, 6 without."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from .masks import Pattern

LIMIT = (
    32  # states that are enumerated; 2:4 has 24, 1:4 has 32, 4:8 has 1120 and is chosen position by position
)


@dataclass(frozen=True)
class GroupStates:
    """For each of C choices of pruned positions and T = 2^p signs, in the order choice * T + sign.

    pruned [C,p], kept [C,n]: ascending positions.  signs [T,p].  mask [C*T,m] bool (kept).  sign [C*T,m]: 0 where kept.
    """

    pruned: Tensor
    kept: Tensor
    signs: Tensor
    mask: Tensor
    sign: Tensor

    @property
    def count(self) -> int:
        return self.mask.shape[0]


def enumerable(pattern: Pattern, signed: bool = True) -> bool:
    """Whether the states of a group are few enough to try them all."""
    if not pattern.structured:
        return False
    gone = pattern.group - pattern.keep
    return comb(pattern.group, gone) * (2**gone if signed else 1) <= LIMIT


@lru_cache(maxsize=32)
def group_states(pattern: Pattern, signed: bool, device: torch.device) -> GroupStates:
    """The states of one group of `pattern`; signed=False leaves only +1, for pruned entries that are zero."""
    m, gone = pattern.group, pattern.group - pattern.keep
    choices = list(combinations(range(m), gone))
    kept = [[i for i in range(m) if i not in choice] for choice in choices]
    signs = list(product((1.0, -1.0), repeat=gone)) if signed else [(1.0,) * gone]
    sign = torch.zeros(len(choices) * len(signs), m)
    for row, (choice, values) in enumerate(product(choices, signs)):
        sign[row, list(choice)] = torch.tensor(values)
    parts = torch.tensor(choices), torch.tensor(kept), torch.tensor(signs), sign == 0, sign
    return GroupStates(*(t.to(device) for t in parts))
