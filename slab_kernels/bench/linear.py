"""Times one linear: torch's dense `F.linear` beside our backends and other libraries', same run, after a correctness gate.

Weights are rotated over copies that together exceed the caches, as decoding a model reads them (`timing`); every row says
over how many bytes, and how near the time is to what this machine reached in the same run (`roofline`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import dispatch
from ..backends.base import Backend, LinearProblem
from ..errors import ArgumentError, BenchError
from ..format import INTEGER_RANGES, PackedLayout, PackedWeight, unpack
from ..testing import ROUNDOFF, error_bound, random_packed
from . import clocks as timing
from .peers import PEERS, Peer, agree
from .roofline import Ceilings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATE_ROWS = 256  # output rows compared with the reference before anything is timed
CPU_TOKENS = (1, 4, 16, 64)
GPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One linear y[m,n] = x[m,k] W.T and what to time on it; the arguments of `layer_rows`."""

    n: int
    k: int
    tokens: Sequence[int] = (1,)
    values: Sequence[str] = ("fp16",)
    dtype: torch.dtype | str = (
        torch.float32
    )  # of activations and dense weight; or "fp32", "bf16", "fp16"
    device: str = "cpu"
    group_size: int | None = 128  # inputs a scale; ignored for fp16 and bf16 values
    rank: int = 1  # of the sign term; 0 = none
    backends: Sequence[str] | None = None  # default: all that can run it, the reference left out
    min_seconds: float = 0.5  # each row is timed at least this long
    adapter_rank: int = 0  # of P Q^T; 0 = none
    peers: bool = False  # other libraries' kernels too

    @property
    def kind(self) -> torch.dtype:
        if self.dtype not in DTYPES and self.dtype not in DTYPES.values():
            raise ArgumentError(
                f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}"
            )
        return DTYPES.get(self.dtype, self.dtype)

    def layouts(self) -> list[PackedLayout]:
        """Of our weights, one for each value type. Raises ValueTypeError for an unknown one."""
        group = {True: self.group_size, False: None}
        return [
            PackedLayout(
                self.n, self.k, v, group[v in INTEGER_RANGES], self.rank, self.adapter_rank
            )
            for v in self.values
        ]

    def facts(self) -> Row:
        """The columns that all rows share."""
        name = next(name for name, kind in DTYPES.items() if kind == self.kind)
        where = {"dtype": name, "device": str(self.device), "threads": torch.get_num_threads()}
        return {"n": self.n, "k": self.k, **where, "rank": 0, "adapter_rank": 0, "group_size": None}


@dataclass(frozen=True)
class Measured:
    """The rows of a case, and why peers are not among them: name -> reason."""

    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """One way to run the linear: the columns that name it, the weight's bytes, and calls on the copies of its weight."""

    columns: Row
    size: int
    calls: Callable[[Tensor, int], list[timing.Call]]  # of an input, on so many copies
    check: Callable[[Tensor], None] = lambda x: None  # raises if its result is wrong
    unable: Callable[[int], bool] = lambda m: False  # leaves out a token count
    foreign: bool = False  # not ours: what it raises becomes a reason, not an error


def layer_rows(*arguments: Any, **settings: Any) -> list[Row]:
    """The rows of `Case(*arguments, **settings)`: for each m torch's dense linear ("dense"), then every backend and value
    type, then peers; on a GPU each of them twice, from memory ("cold") and from cache ("warm").

    Returns one dict a row: backend, m, n, k, values, dtype, rank, adapter_rank, group_size, device, threads, cache ("cold"
    or "warm"), timing ("wall", "graph" or "eager"), median_us, iqr_us, calls (samples), speedup_vs_dense, weight_bytes,
    bits_per_weight, copies, rotated_bytes, and of `Ceilings.shares`: gbytes_per_s (weight bytes as that backend holds them
    over the median), bandwidth_share and matrix_share (of what this run measured), tflops, roofline (the larger of the
    two), bound ("bytes" or "matrix", whichever it is).

    Raises: BenchError if a kernel of ours disagrees with the reference, BackendError if a named backend cannot run it,
    ValueTypeError for an unknown value type, ValueError for an unknown dtype.
    """
    return measure(Case(*arguments, **settings)).rows


def measure(
    case: Case,
    clock: timing.WallClock | timing.CudaClock | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """`layer_rows`, and the reasons why peers are absent.

    clock: default the device's own. progress: called with the inputs timed and those in all.
    """
    layouts = case.layouts()
    facts = case.facts()  # a wrong dtype fails here
    clock = clock or timing.clock(case.device, case.min_seconds)
    rows: dict[
        tuple[int, bool], list[Row]
    ] = {}  # by tokens and whether round copies; dense first in each
    absent: dict[str, str] = {}
    with torch.inference_mode():
        ceilings = Ceilings.measure(case.device, case.kind, clock)
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(m, case.k, generator=generator).to(case.device, case.kind)
            for m in case.tokens
        ]
        contestants = 1 + sum(len(_backends(case, layout)) for layout in layouts)
        contestants += len(PEERS) if case.peers else 0
        done = 0
        for contestant in _contestants(case, layouts, facts, absent):
            copies = clock.copies(contestant.size)
            for x in inputs:
                done += 1
                if progress is not None:
                    progress(done, contestants * len(inputs))
                if contestant.unable(x.shape[0]):
                    continue
                try:
                    contestant.check(x)
                    found = _timed(case, contestant, x, copies, clock, ceilings)
                except Exception as error:
                    if not contestant.foreign:
                        raise
                    absent[contestant.columns["backend"]] = f"at m={x.shape[0]}: {_said(error)}"
                    continue
                for rotated, row in found.items():
                    beside = rows.setdefault((x.shape[0], rotated), [])
                    dense = (beside or [row])[0]
                    beside.append(row | {"speedup_vs_dense": dense["median_us"] / row["median_us"]})
            del contestant  # its copies make room before the next one's are made
    order = [(m, rotated) for m in case.tokens for rotated in (True, False)]
    return Measured([row for key in order for row in rows.get(key, [])], absent)


def _timed(
    case: Case, contestant: Contestant, x: Tensor, copies: int, clock: Any, ceilings: Ceilings
) -> dict[bool, Row]:
    """The rows of one contestant and input: True -> round its copies, False -> over one copy, where the clock can tell."""
    m, size, found = x.shape[0], contestant.size, {}
    calls = contestant.calls(x, copies)
    if not clock.has_warm or clock.is_cold(
        copies * size
    ):  # else they stay in cache: no news beside one copy
        found[True] = calls, copies
    if clock.has_warm:
        found[False] = calls[:1] * max(copies, timing.FEWEST_COPIES), 1
    for rotated, (run, count) in found.items():
        timed = clock.time(run)
        found[rotated] = contestant.columns | {
            "m": m,
            "cache": "cold" if rotated and clock.is_cold(count * size) else "warm",
            "timing": timed.timing,
            "median_us": timed.median * 1e6,
            "iqr_us": timed.iqr * 1e6,
            "calls": len(timed.samples),
            "weight_bytes": size,
            "bits_per_weight": 8 * size / (case.n * case.k),
            "copies": count,
            "rotated_bytes": size * count,
            **ceilings.shares(timed.median, size, m, case.n, case.k),
        }
    return found


def _contestants(
    case: Case, layouts: list[PackedLayout], facts: Row, absent: dict[str, str]
) -> Iterator[Contestant]:
    """Dense first; each is made when its turn comes."""
    yield _dense(case, facts)
    for layout in layouts:
        packed = random_packed(layout).to(case.device)
        for backend in _backends(case, layout):
            yield _ours(case, backend, packed, facts)
    for peer in PEERS if case.peers else ():
        reason = peer.reason(case.n, case.k, case.kind, case.device)
        try:
            if not reason:
                yield _peer(case, peer, facts)
        except Exception as error:  # another library that cannot prepare this weight
            reason = _said(error)
        if reason:
            absent[peer.name] = reason


def _dense(case: Case, facts: Row) -> Contestant:
    W = _random_weight(case)
    copies = _Copies(W, W.clone)
    return Contestant(
        {"backend": "dense", **facts, "values": ""}, W.nbytes,
        lambda x, count: [partial(torch.nn.functional.linear, x, weight) for weight in copies.first(count)],
    )  # fmt: skip


def _ours(case: Case, backend: Backend, packed: PackedWeight, facts: Row) -> Contestant:
    layout = packed.layout
    state = backend.prepare(packed, case.kind)
    copies = _Copies(state, lambda: timing.copied(state))
    own = {name: getattr(layout, name) for name in ("values", "rank", "adapter_rank", "group_size")}
    return Contestant(
        {"backend": backend.name, **facts, **own}, timing.size_of(state),
        lambda x, count: [partial(backend.linear, x, copy) for copy in copies.first(count)],
        check=lambda x: gate(backend, x, state, packed),
        unable=lambda m: bool(backend.not_supported_reasons(_problem(case, layout, m))),
    )  # fmt: skip


def _peer(case: Case, peer: Peer, facts: Row) -> Contestant:
    W = _random_weight(case)
    prepared = peer.prepare(W)
    copies = _Copies(prepared.linear, lambda: peer.prepare(W).linear)
    return Contestant(
        {"backend": peer.name, **facts, "values": peer.values, "group_size": peer.group_size}, prepared.weight_bytes,
        lambda x, count: [partial(linear, x) for linear in copies.first(count)],
        check=lambda x: agree(x, prepared),
        foreign=True,
    )  # fmt: skip


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


def _random_weight(case: Case) -> Tensor:
    generator = torch.Generator(case.device).manual_seed(2)
    return torch.randn(case.n, case.k, generator=generator, device=case.device, dtype=case.kind)


def _problem(case: Case, layout: PackedLayout, m: int) -> LinearProblem:
    return LinearProblem.of(layout, m, case.kind, torch.device(case.device).type)


def _backends(case: Case, layout: PackedLayout) -> list[Backend]:
    """Those named, which have to run every token count; by default all that run one, the reference left out."""
    problems = [_problem(case, layout, m) for m in case.tokens]
    forced = os.environ.get(dispatch.ENVIRONMENT)
    names = [forced] if forced and case.backends is None else case.backends
    for name in names or ():
        for problem in problems:
            dispatch.select(problem, name)  # raises with every reason
    if names is not None:
        return [dispatch.backend(name) for name in names]
    found = [dispatch.explain(problem) for problem in problems]
    able = [
        name
        for name in dispatch.order()
        if name != "reference" and any(not reasons[name] for reasons in found)
    ]
    return [dispatch.backend(name) for name in able]


def gate(backend: Backend, x: Tensor, state: Any, packed: PackedWeight) -> None:
    """Compares the last GATE_ROWS outputs with the reference in fp64. Raises BenchError."""
    y = backend.linear(x, state)
    rows = min(GATE_ROWS, packed.out_features)
    part = packed.narrow_out(packed.out_features - rows, rows)
    exact = reference.linear(x.double(), part)
    size = x.double().abs() @ term_sizes(part).T
    allowed = tolerance(
        size, exact, x.dtype, packed.in_features, tensor_cores=x.device.type == "cuda"
    )
    if bool(((y[:, -rows:].double() - exact).abs() > allowed).any()) or not bool(
        y.isfinite().all()
    ):
        raise BenchError(
            f"backend {backend.name!r} disagrees with the reference on {packed.layout}; nothing was timed"
        )


def tolerance(
    size: Tensor, exact: Tensor, dtype: torch.dtype, K: int, tensor_cores: bool
) -> Tensor:
    """Largest difference allowed: fp32 accumulation, and on tensor cores products in the activations' type.

    There values, v and v·x are rounded to it. Of K such roundings, each at most ROUNDOFF and of either sign, 8 / sqrt(K) of
    their sum is six standard deviations and more; with few inputs it is their sum.
    """
    rounded = size * ROUNDOFF[dtype] * min(2.0, 8 / K**0.5) if tensor_cores else 0.0
    return error_bound(size, exact, dtype, K) + rounded


def term_sizes(part: PackedWeight) -> Tensor:
    """|S| + |U||V|^T on pruned positions + |P||Q|^T: terms that cancel round as what they are, and kernels sum them apart."""
    d = unpack(part)
    sizes = d.S.double().abs()
    if d.U is not None:
        sizes += (d.U.double().abs() @ d.V.double().abs().T) * d.B.abs()
    if d.P is not None:
        sizes += d.P.double().abs() @ d.Q.double().abs().T
    return sizes
