"""The arguments of `compress`, checked and brought to one plain form before anything is read."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..text.source import Sampling
from .budget import check_bits
from .plan import Plan

OF_THE_PLAN = (
    "method",
    "pattern",
    "rank",
    "values",
    "group_size",
    "planes",
    "adapter_rank",
    "adapter_values",
    "matching",
)


@dataclass(frozen=True)
class Arguments:
    """What is to be done with a model, whatever the model and the text.

    skip: fnmatch patterns of module names.
    """

    plan: Plan
    bits: float | None
    sampling: Sampling
    skip: tuple[str, ...]

    @classmethod
    def of(
        cls,
        *,
        bits: float | None = None,
        samples: int = 128,
        window: int = 2048,
        seed: int = 0,
        skip: Any = (),
        **others: Any,
    ) -> Arguments:
        """From the keywords of `compress`; what is no argument is an option of the method.

        Raises: MethodError, FormatError, CalibrationError, BudgetError or another ValueError, in
            one sentence.
        """
        given = {name: others.pop(name) for name in OF_THE_PLAN if name in others}
        plan = Plan(**given, options=others)
        bits = None if bits is None else check_bits(bits, plan)
        return cls(plan, bits, Sampling(samples, window, seed), _patterns(skip))


def _patterns(skip: Any) -> tuple[str, ...]:
    patterns = () if skip is None else (skip,) if isinstance(skip, str) else skip
    several = isinstance(patterns, tuple | list | set | frozenset)
    if not several or not all(isinstance(p, str) for p in patterns):
        raise ArgumentError(
            f"skip={reprlib.repr(skip)} must be a pattern of module names such as '*.down_proj', "
            "or a list of them"
        )
    return tuple(sorted(patterns) if isinstance(patterns, set | frozenset) else patterns)
