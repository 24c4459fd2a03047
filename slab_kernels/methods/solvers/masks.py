"""Sparsity patterns and the choice of kept positions.

Ties go to the lowest input index, on every device.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PatternError

# Up to this group size, ranks by comparison (m^2 passes over N * K / m scores) beat a sort.
LOOP_GROUP = 8


@dataclass(frozen=True)
class Pattern:
    """n:m keeps `keep` of every `group` consecutive inputs; an unstructured pattern has group 0 and
    removes the fraction `removed` of every output row."""

    keep: int = 0
    group: int = 0
    removed: float = 0.0

    @property
    def structured(self) -> bool:
        return self.group > 0

    def kept_in_row(self, in_features: int) -> int:
        """How many entries of a row of `in_features` stay."""
        if self.structured:
            return in_features // self.group * self.keep
        return in_features - round(in_features * self.removed)


def parse_pattern(text: str) -> Pattern:
    """ "2:4" keeps 2 of every 4 consecutive inputs; "60%" removes 60 % of each output row.

    Raises: PatternError.
    """
    if not isinstance(text, str):
        match = None
    elif match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        keep, group = int(match[1]), int(match[2])
        if 0 < keep < group:
            return Pattern(keep, group)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip()):
        removed = float(match[1]) / 100
        if 0 < removed < 1:
            return Pattern(removed=removed)
    raise PatternError(
        f"pattern={reprlib.repr(text)} is not a pattern: write 'n:m' with 0 < n < m to keep n of "
        "every m inputs ('2:4', '4:8'), or a percentage to remove from every row ('50%' .. '80%')"
    )


def select(score: Tensor, pattern: Pattern) -> Tensor:
    """[N,K] bool mask of the highest scores [N,K], exactly as many as the pattern keeps."""
    if pattern.structured:
        return top_of_groups(score.unflatten(1, (-1, pattern.group)), pattern.keep).flatten(1)
    keep = pattern.kept_in_row(score.shape[1])
    return top_of_rows(score, torch.full_like(score[:, :1], keep, dtype=torch.long))


def top_of_groups(score: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` highest along the last dimension of score [..., m]."""
    m = score.shape[-1]
    if m > LOOP_GROUP:
        return top_of_rows(score, torch.full_like(score[..., :1], keep, dtype=torch.long))
    mask = torch.empty_like(score, dtype=torch.bool)
    for a in range(m):
        ahead = torch.zeros_like(score[..., a], dtype=torch.int8)
        for b in range(m):
            if b != a:
                ahead += score[..., b] >= score[..., a] if b < a else score[..., b] > score[..., a]
        mask[..., a] = ahead < keep
    return mask


def top_of_rows(score: Tensor, keep: Tensor) -> Tensor:
    """Mask of the `keep` [..., 1] highest along the last dimension of score [..., K]."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    position = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter_(-1, order, position) < keep
