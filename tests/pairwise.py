"""Grids in which any two choices meet, instead of every combination of all of them.

A fault nearly always shows as soon as two particular settings come together: a value type and a
tail, a number of tokens and a rank. A full grid of six settings costs thousands of products; the
smallest set of cases that holds every pair of their values costs some fifty. `pytest --full` (make
test-all) runs the full grids.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def pairwise(choices: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Cases, each one value of every choice in order, such that any two values of two choices meet
    in some case.

    Each case begins with a pair that has not met. The other choices, those with most values first,
    take the value that adds most new pairs, and among equals the one used least. The result depends
    on the arguments alone.
    """
    values = [list(some) for some in choices.values()]
    if len(values) < 2:
        return [(value,) for some in values for value in some]
    order = sorted(range(len(values)), key=lambda place: -len(values[place]))
    options = {place: [(place, at) for at in range(len(values[place]))] for place in order}
    missing = {  # A dictionary, because a set has no first element.
        frozenset(pair): None
        for one, other in itertools.combinations(order, 2)
        for pair in itertools.product(options[one], options[other])
    }
    used = dict.fromkeys(itertools.chain.from_iterable(options.values()), 0)
    cases = []
    while missing:
        case = list(next(iter(missing)))
        for place in order:
            if place not in dict(case):
                new = {
                    option: sum(frozenset((option, other)) in missing for other in case)
                    for option in options[place]
                }
                case.append(max(new, key=lambda option: (new[option], -used[option])))
        for pair in itertools.combinations(case, 2):
            missing.pop(frozenset(pair), None)
        for option in case:
            used[option] += 1
        cases.append(tuple(values[place][at] for place, at in sorted(case)))
    return cases


def subset(
    cases: Iterable[Any],
    settings: Callable[[Any], Sequence[Any]] = lambda case: case,
    each: Callable[[Any], Any] = lambda case: None,
    together: int = 2,
) -> list[Any]:
    """Some of these cases that together hold every pair of settings that any of them holds, in
    their order; with together=1, every setting.

    For grids whose combinations are not all possible. `settings` says what a case consists of,
    hashable and always as many. `each` names something else of a case, hashable: every value of it
    is in some case, whatever it meets there.
    """
    cases = list(cases)
    pairs = [
        {each(case), *itertools.combinations(enumerate(settings(case)), together)} for case in cases
    ]
    missing = set().union(*pairs)
    # The case with most that is missing goes next, the earlier of equals. What a case had at most
    # only falls, so one that still has it is it.
    most = [(-len(some), at) for at, some in enumerate(pairs)]
    heapq.heapify(most)
    chosen = []
    while missing:
        _, at = most[0]
        now = (-len(pairs[at] & missing), at)
        if now != most[0]:
            heapq.heapreplace(most, now)
            continue
        heapq.heappop(most)
        missing -= pairs[at]
        chosen.append(at)
    return [cases[at] for at in sorted(chosen)]


def grid(**choices: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by all pairs of these choices; by all combinations under `pytest --full`.

    A name with commas, given as `grid(**{"dtype, values": [...]})`, is one choice of several
    arguments.
    """
    return pytest.mark.grid(choices)


def label(value: Any) -> str:
    """A value in the name of a test: float16, 33x260."""
    if isinstance(value, tuple):
        return "x".join(map(label, value))
    return str(value).removeprefix("torch.")


def grid_of(
    names: str,
    cases: Sequence[Sequence[Any]],
    ids: Callable[[Any], str] = label,
    few: Sequence[Sequence[Any]] | None = None,
) -> pytest.MarkDecorator:
    """Parametrises a test by `few` of these cases, if not given by a `subset`; by all of them under
    `pytest --full`.
    """
    return pytest.mark.grid(names, cases, ids, few)


def parametrise(metafunc: pytest.Metafunc, full: bool) -> None:
    """Gives a test that carries `grid` or `grid_of` its parameters; conftest.py calls it for every
    test.
    """
    for mark in metafunc.definition.iter_markers("grid"):
        ids = label
        if len(mark.args) == 4:
            joined, cases, ids, few = mark.args
            rows = list(cases) if full else subset(cases) if few is None else list(few)
        else:
            (choices,) = mark.args
            joined = ", ".join(choices)
            several = ["," in name for name in choices]
            cases = itertools.product(*choices.values()) if full else pairwise(choices)
            rows = [_flat(case, several) for case in cases]
        metafunc.parametrize(
            [name.strip() for name in joined.split(",")],
            rows,
            ids=["-".join(map(ids, row)) for row in rows],
        )


def _flat(case: Sequence[Any], several: Sequence[bool]) -> tuple[Any, ...]:
    """The arguments of a case, in which a choice of several arguments is a tuple."""
    parts = (value if split else (value,) for value, split in zip(case, several, strict=True))
    return tuple(itertools.chain.from_iterable(parts))
