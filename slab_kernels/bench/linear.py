"""Times one linear: torch's dense `F.linear` beside our backends and other libraries', in one run.

Nothing is timed before its result has passed a gate (correctness.py). Weights are rotated over
copies that together exceed the caches, as decoding a model reads them (clocks.py). Every row says
over how many bytes, and how near the time is to what this machine reached in the same run
(roofline.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .case import Case, Row
from .clocks import FEWEST_COPIES, Call, Clock, clock_of
from .contestants import Contestant, contestants, count, said
from .roofline import Ceilings

Progress = Callable[[int, int], None]  # is called with the steps done and those in all
NAMING = ("backend", "values", "activations")  # columns that tell the contestants of a case apart


@dataclass(frozen=True)
class Measured:
    """The rows of a case, and why peers are not among them: name -> reason."""

    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)


def measure(
    case: Case,
    clock: Clock | None = None,
    progress: Progress | None = None,
    rounds: int = 1,
) -> Measured:
    """Times, for each token count, torch's dense linear ("dense"), then every backend, value type
    and accuracy mode, then peers; on a GPU each of them twice, from memory ("cold") and from cache
    ("warm").

    A row has these columns: backend, m, n, k, values, dtype (of the case), x_dtype (in which x is
    handed over; peers may want another, and converting is not timed), activations ("exact", or
    "int8" where x is rounded to 8-bit integers), rank, adapter_rank, group_size, prefill
    ("packed", or "dense" with a dense copy), device, threads, cache ("cold" or "warm"),
    timing ("wall", "graph" or "eager"), median_us, iqr_us, calls (samples), speedup_vs_dense,
    weight_bytes and bits_per_weight (with the copy), copies, rotated_bytes, rounds, and those of
    `Ceilings.shares`.

    clock: default that of the case's device.
    progress: called before each contestant's turn at an input, with the number of turns so far,
        this one included, and of those in all.
    rounds: how often all of this is done, of which each row is the fastest. Contestants are timed
        one after another, so on a machine that others use a slow minute falls on some of them
        alone; with several rounds each of them meets a better one.

    Raises: BenchError if a kernel of ours disagrees with the reference, BackendError if a named
    backend cannot run the case, ValueTypeError for an unknown value type, ArgumentError for an
    unknown dtype or word of activations.
    """
    layouts, facts = case.layouts(), case.facts()
    modes = case.modes
    clock = clock or clock_of(case.device, case.min_seconds)
    rows = _Rows(case.tokens, rounds)
    absent: dict[str, str] = {}
    turns = rounds * len(case.tokens) * count(case, layouts, len(modes))
    done = 0
    with torch.inference_mode():
        inputs = case.inputs()
        for _ in range(rounds):
            stand = _Stand(case, clock, Ceilings.measure(case.device, case.kind, clock))
            for contestant in contestants(case, layouts, facts, absent):
                copies = clock.copies(min(map(contestant.bytes_read, case.tokens)))
                for x in inputs:
                    done += 1
                    if progress is not None:
                        progress(done, turns)
                    if contestant.unable(x.shape[0]):
                        continue
                    try:
                        contestant.check(x)
                        found = stand.time(contestant, x, copies)
                    except Exception as error:
                        if not contestant.foreign:
                            raise
                        absent[contestant.columns["backend"]] = f"at m={x.shape[0]}: {said(error)}"
                        continue
                    rows.add(x.shape[0], found)
                del contestant  # Its copies make room before the next one's are made.
    return Measured(rows.in_order(), absent)


class _Series(NamedTuple):
    """Calls to be timed one after another."""

    calls: list[Call]
    copies: int  # of the weight among them


class _Rows:
    """The fastest row of each contestant, by token count and by whether copies were rotated; dense
    comes first in each."""

    def __init__(self, tokens: Sequence[int], rounds: int):
        self.rounds = rounds
        self.rows: dict[tuple[int, bool], dict[tuple, Row]] = {
            (m, rotated): {} for m in tokens for rotated in (True, False)
        }

    def add(self, m: int, found: dict[bool, Row]) -> None:
        for rotated, row in found.items():
            beside, name = self.rows[m, rotated], tuple(row[column] for column in NAMING)
            known = beside.get(name)
            if known is None or row["median_us"] < known["median_us"]:
                beside[name] = row

    def in_order(self) -> list[Row]:
        """Each row is compared with dense of its own kind: warm with warm, cold with cold."""
        found: list[Row] = []
        for rows in self.rows.values():
            for row in rows.values():
                dense = next(iter(rows.values()))["median_us"]
                more = {"speedup_vs_dense": dense / row["median_us"], "rounds": self.rounds}
                found.append(row | more)
        return found


@dataclass(frozen=True)
class _Stand:
    """Where contestants are timed."""

    case: Case
    clock: Clock
    ceilings: Ceilings

    def time(self, contestant: Contestant, x: Tensor, copies: int) -> dict[bool, Row]:
        """The rows of one contestant and input.

        True -> over all copies in turn, False -> over one copy, where the clock can tell them
        apart. Copies that stay in cache would be no news beside one copy.
        """
        calls, m = contestant.calls(x, copies), x.shape[0]
        series: dict[bool, _Series] = {}
        if not self.clock.has_warm or self.clock.is_cold(copies * contestant.bytes_read(m)):
            series[True] = _Series(calls, copies)
        if self.clock.has_warm:
            series[False] = _Series(calls[:1] * max(copies, FEWEST_COPIES), 1)
        return {
            rotated: contestant.columns | self._columns(some, contestant, m, rotated)
            for rotated, some in series.items()
        }

    def _columns(self, some: _Series, contestant: Contestant, m: int, rotated: bool) -> Row:
        """The columns that timing adds to a row."""
        timed, n, k = self.clock.time(some.calls), self.case.n, self.case.k
        size, read = contestant.size, contestant.bytes_read(m)
        cold = rotated and self.clock.is_cold(some.copies * read)
        return {
            "m": m,
            "cache": "cold" if cold else "warm",
            "timing": timed.timing,
            "median_us": timed.median * 1e6,
            "iqr_us": timed.iqr * 1e6,
            "calls": len(timed.samples),
            "weight_bytes": size,
            "bits_per_weight": 8 * size / (n * k),
            "copies": some.copies,
            "rotated_bytes": read * some.copies,
            **self.ceilings.shares(timed.median, read, m, n, k),
        }
