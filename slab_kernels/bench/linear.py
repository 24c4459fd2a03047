"""Times one linear: torch's dense `F.linear` beside our backends and other libraries', in one run.

Nothing is timed before its result has passed a gate (correctness.py). Weights are rotated over
copies that together exceed the caches, as decoding a model reads them (clocks.py). Every row says
over how many bytes, and how near the time is to what this machine reached in the same run
(roofline.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import activations as accuracy
from ..backends import dense_copy, dispatch
from ..backends.base import Backend, LinearProblem
from ..errors import ArgumentError
from ..format import INTEGER_RANGES, PackedLayout, PackedWeight
from ..testing import random_packed
from .clocks import FEWEST_COPIES, Call, Clock, clock_of, copied, size_of
from .correctness import gate
from .peers import PEERS, Peer, agree
from .roofline import Ceilings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Row = dict[str, Any]
Progress = Callable[[int, int], None]  # is called with the steps done and those in all


@dataclass(frozen=True)
class Case:
    """One linear y[m,n] = x[m,k] W.T and what to time on it."""

    n: int
    k: int
    tokens: Sequence[int] = (1,)
    values: Sequence[str] = ("fp16",)
    # of the activations and the dense weight: a dtype, or "fp32", "bf16", "fp16"
    dtype: torch.dtype | str = torch.float32
    device: str = "cpu"
    group_size: int | None = 128  # inputs that a scale covers; ignored for fp16 and bf16 values
    rank: int = 1  # of the sign term; 0 = none
    backends: Sequence[str] | None = None  # default: all that can run it, without the reference
    min_seconds: float = 0.5  # that each row is timed at least
    adapter_rank: int = 0  # of P Q^T; 0 = none
    peers: bool = False  # whether other libraries' kernels are timed too
    prefill: str | None = None  # whether ours have a dense copy, as `SlabLinear.prepare` takes it

    @property
    def kind(self) -> torch.dtype:
        """The dtype of the activations.

        Raises: ArgumentError for an unknown one.
        """
        if isinstance(self.dtype, str) and self.dtype in DTYPES:
            return DTYPES[self.dtype]
        if isinstance(self.dtype, torch.dtype) and self.dtype in DTYPES.values():
            return self.dtype
        raise ArgumentError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")

    def layouts(self) -> list[PackedLayout]:
        """The layouts of our weights, one for each value type.

        Raises: ValueTypeError for an unknown one.
        """
        layouts = []
        for values in self.values:
            group_size = self.group_size if values in INTEGER_RANGES else None
            layouts.append(
                PackedLayout(self.n, self.k, values, group_size, self.rank, self.adapter_rank)
            )
        return layouts

    def problem(self, layout: PackedLayout, m: int) -> LinearProblem:
        """The product of m tokens with a weight of that layout."""
        return LinearProblem.of(layout, m, self.kind, torch.device(self.device).type)

    def random_weight(self) -> Tensor:
        """The same dense weight [n, k] every time."""
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randn(self.n, self.k, generator=generator, device=self.device, dtype=self.kind)

    def inputs(self) -> list[Tensor]:
        """The same activations [m, k] every time, for each token count."""
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(m, self.k, generator=generator).to(self.device, self.kind)
            for m in self.tokens
        ]

    def facts(self) -> Row:
        """The columns that all rows share; contestants replace some of them."""
        return {
            "n": self.n,
            "k": self.k,
            "dtype": next(name for name, kind in DTYPES.items() if kind == self.kind),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "rank": 0,
            "adapter_rank": 0,
            "group_size": None,
            "prefill": "",
        }


@dataclass(frozen=True)
class Measured:
    """The rows of a case, and why peers are not among them: name -> reason."""

    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """One way to run the linear."""

    columns: Row  # those that name it
    size: int  # bytes of the weight, with its dense copy if it has one
    calls: Callable[[Tensor, int], list[Call]]  # of an input, on so many copies of the weight
    check: Callable[[Tensor], None] = lambda x: None  # raises if its result is wrong
    unable: Callable[[int], bool] = lambda m: False  # leaves out a token count
    read: Callable[[int], int] | None = None  # bytes of it that a token count reads; None: all
    foreign: bool = False  # of another library: what it raises becomes a reason, not an error

    def bytes_read(self, m: int) -> int:
        """Bytes of the weight that a call with m tokens reads."""
        return self.size if self.read is None else self.read(m)


def measure(case: Case, clock: Clock | None = None, progress: Progress | None = None) -> Measured:
    """Times, for each token count, torch's dense linear ("dense"), then every backend and value
    type, then peers; on a GPU each of them twice, from memory ("cold") and from cache ("warm").

    A row has these columns: backend, m, n, k, values, dtype, rank, adapter_rank, group_size,
    prefill ("packed", or "dense" with a dense copy), device, threads, cache ("cold" or "warm"),
    timing ("wall", "graph" or "eager"), median_us, iqr_us, calls (samples), speedup_vs_dense,
    weight_bytes and bits_per_weight (with the copy), copies, rotated_bytes, and those of
    `Ceilings.shares`.

    clock: default that of the case's device.
    progress: called before each contestant's turn at an input, with the number of turns so far,
        this one included, and of those in all.

    Raises: BenchError if a kernel of ours disagrees with the reference, BackendError if a named
    backend cannot run the case, ValueTypeError for an unknown value type, ArgumentError for an
    unknown dtype.
    """
    layouts, facts = case.layouts(), case.facts()
    clock = clock or clock_of(case.device, case.min_seconds)
    rows = _Rows(case.tokens)
    absent: dict[str, str] = {}
    done = 0
    with torch.inference_mode():
        turns = len(case.tokens) * _count(case, layouts)
        stand = _Stand(case, clock, Ceilings.measure(case.device, case.kind, clock))
        inputs = case.inputs()
        for contestant in _contestants(case, layouts, facts, absent):
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
                    absent[contestant.columns["backend"]] = f"at m={x.shape[0]}: {_said(error)}"
                    continue
                rows.add(x.shape[0], found)
            del contestant  # Its copies make room before the next one's are made.
    return Measured(rows.in_order(), absent)


class _Round(NamedTuple):
    """Calls to be timed one after another."""

    calls: list[Call]
    copies: int  # of the weight among them


class _Rows:
    """Rows by token count and by whether copies were rotated; dense comes first in each."""

    def __init__(self, tokens: Sequence[int]):
        self.rows: dict[tuple[int, bool], list[Row]] = {
            (m, rotated): [] for m in tokens for rotated in (True, False)
        }

    def add(self, m: int, found: dict[bool, Row]) -> None:
        """Each row is compared with dense of its own kind: warm with warm, cold with cold."""
        for rotated, row in found.items():
            beside = self.rows[m, rotated]
            dense = beside[0] if beside else row
            beside.append(row | {"speedup_vs_dense": dense["median_us"] / row["median_us"]})

    def in_order(self) -> list[Row]:
        return [row for rows in self.rows.values() for row in rows]


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
        rounds: dict[bool, _Round] = {}
        if not self.clock.has_warm or self.clock.is_cold(copies * contestant.bytes_read(m)):
            rounds[True] = _Round(calls, copies)
        if self.clock.has_warm:
            rounds[False] = _Round(calls[:1] * max(copies, FEWEST_COPIES), 1)
        return {
            rotated: contestant.columns | self._columns(some, contestant, m, rotated)
            for rotated, some in rounds.items()
        }

    def _columns(self, some: _Round, contestant: Contestant, m: int, rotated: bool) -> Row:
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


# Contestants. Each is made when its turn comes.


def _count(case: Case, layouts: list[PackedLayout]) -> int:
    """How many contestants there are, peers that turn out to be absent included."""
    ours = sum(len(_backends(case, layout)) for layout in layouts)
    return 1 + ours + (len(PEERS) if case.peers else 0)


def _contestants(
    case: Case, layouts: list[PackedLayout], facts: Row, absent: dict[str, str]
) -> Iterator[Contestant]:
    """Dense first, then ours, then peers; the reasons of absent peers are put into `absent`."""
    yield _dense(case, facts)
    for layout in layouts:
        packed = random_packed(layout, device=case.device)
        for backend in _backends(case, layout):
            yield _ours(case, backend, packed, facts)
    for peer in PEERS if case.peers else ():
        reason = peer.reason(case.n, case.k, case.kind, case.device)
        try:
            if not reason:
                yield _peer(case, peer, facts)
        except Exception as error:  # Another library may fail to prepare this weight.
            reason = _said(error)
        if reason:
            absent[peer.name] = reason


def _dense(case: Case, facts: Row) -> Contestant:
    W = case.random_weight()
    copies = _Copies(W, W.clone)
    product = torch.nn.functional.linear
    return Contestant(
        columns={"backend": "dense", **facts, "values": ""},
        size=W.nbytes,
        calls=lambda x, count: [partial(product, x, weight) for weight in copies.first(count)],
    )


def _ours(case: Case, backend: Backend, packed: PackedWeight, facts: Row) -> Contestant:
    layout = packed.layout
    told, mode = dense_copy.named(case.prefill), accuracy.named(None)

    def prepared() -> Any:
        return backend.with_activations(backend.prepare(packed, case.kind), (packed,), mode)

    state = dense_copy.applied(backend, prepared(), (packed,), case.kind, told)
    copy, size = backend.dense_bytes(state), size_of(state)

    def again() -> Any:
        # On a CPU a copy is prepared anew: `prepare` asks for huge pages, which a clone lacks.
        return prepared() if backend.name == "cpu" else copied(state)

    copies = _Copies(state, again)

    def dense(m: int) -> bool:
        return bool(copy) and backend.takes_dense(case.problem(layout, m))

    own = {name: getattr(layout, name) for name in ("values", "rank", "adapter_rank", "group_size")}
    return Contestant(
        columns={"backend": backend.name, **facts, **own, "prefill": "dense" if copy else "packed"},
        size=size,
        read=lambda m: copy if dense(m) else size - copy,
        calls=lambda x, count: [partial(backend.linear, x, copy) for copy in copies.first(count)],
        check=lambda x: gate(backend, x, state, packed),
        unable=lambda m: bool(backend.not_supported_reasons(case.problem(layout, m))),
    )


def _peer(case: Case, peer: Peer, facts: Row) -> Contestant:
    W = case.random_weight()
    prepared = peer.prepare(W)
    copies = _Copies(prepared.linear, lambda: peer.prepare(W).linear)
    own = {"values": peer.values, "group_size": peer.group_size}
    return Contestant(
        columns={"backend": peer.name, **facts, **own},
        size=prepared.weight_bytes,
        calls=lambda x, count: [partial(linear, x) for linear in copies.first(count)],
        check=lambda x: agree(x, prepared),
        foreign=True,
    )


class _Copies:
    """A weight and its copies, made when first asked for and kept for the next token count."""

    def __init__(self, weight: Any, another: Callable[[], Any]):
        self.held, self.another = [weight], another

    def first(self, count: int) -> list[Any]:
        while len(self.held) < count:
            self.held.append(self.another())
        return self.held[:count]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _backends(case: Case, layout: PackedLayout) -> list[Backend]:
    """The backends named by the case or the environment; by default all but the reference that run
    some token count.

    Raises: BackendError with every reason if a named one does not run every token count.
    """
    problems = [case.problem(layout, m) for m in case.tokens]
    forced = os.environ.get(dispatch.ENVIRONMENT)
    names = [forced] if forced and case.backends is None else case.backends
    if names is None:
        found = [dispatch.explain(problem) for problem in problems]
        names = [
            name
            for name in dispatch.order()
            if name != "reference" and any(not reasons[name] for reasons in found)
        ]
        return [dispatch.backend(name) for name in names]
    for name in names:
        for problem in problems:
            dispatch.select(problem, name)
    return [dispatch.backend(name) for name in names]
