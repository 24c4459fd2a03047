"""Who is timed on a linear: torch's dense one, our backends, other libraries' kernels.

Each contestant is made when its turn comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import dense_copy, dispatch
from ..backends.base import Backend
from ..format import PackedLayout, PackedWeight
from . import peers
from .case import Case, Row, name_of
from .clocks import Call, copied, size_of
from .correctness import gate
from .peer import Peer, agree
from .random_weight import random_weight


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


def count(case: Case, layouts: list[PackedLayout], modes: int) -> int:
    """How many contestants there are, with peers that turn out to be absent and modes that turn
    out to be the same."""
    ours = sum(len(_backends(case, layout)) for layout in layouts)
    return 1 + modes * ours + (len(peers.on(case.device)) if case.peers else 0)


def contestants(
    case: Case, layouts: list[PackedLayout], facts: Row, absent: dict[str, str]
) -> Iterator[Contestant]:
    """Dense first, then ours, then peers; the reasons of absent peers are put into `absent`."""
    yield _dense(case, facts)
    for layout in layouts:
        packed = random_weight(layout, device=case.device)
        for backend in _backends(case, layout):
            yield from _ours(case, backend, packed, facts)
    for peer in peers.on(case.device) if case.peers else ():
        reason = peer.reason(case.n, case.k, case.kind, case.device)
        try:
            if not reason:
                yield _peer(case, peer, facts)
        except Exception as error:  # Another library may fail to prepare this weight.
            reason = said(error)
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


def _ours(case: Case, backend: Backend, packed: PackedWeight, facts: Row) -> Iterator[Contestant]:
    """One contestant for each accuracy mode that the backend has for this weight."""
    layout = packed.layout
    told = dense_copy.named(case.prefill)
    state = dense_copy.applied(
        backend, backend.prepare(packed, case.kind), (packed,), case.kind, told
    )
    copy, size = backend.dense_bytes(state), size_of(state)

    def again() -> Any:
        # On a CPU a copy is prepared anew: `prepare` asks for huge pages, which a clone lacks.
        return backend.prepare(packed, case.kind) if backend.name == "cpu" else copied(state)

    copies = _Copies(state, again)  # for every mode: all of them read the same prepared tensors

    def dense(m: int) -> bool:
        return bool(copy) and backend.takes_dense(case.problem(layout, m))

    own = {name: getattr(layout, name) for name in ("values", "rank", "adapter_rank", "group_size")}
    own |= {"backend": backend.name, "prefill": "dense" if copy else "packed"}
    seen: set[str] = set()
    for mode in case.modes:
        turned = partial(backend.with_activations, parts=(packed,), told=mode)
        first = turned(state)
        if (found := backend.activations(first)) in seen:
            continue
        seen.add(found)

        def calls(x: Tensor, count: int, turned: Callable[..., Any] = turned) -> list[Call]:
            return [partial(backend.linear, x, turned(copy)) for copy in copies.first(count)]

        yield Contestant(
            columns={**facts, **own, "activations": found},
            size=size,
            read=lambda m: copy if dense(m) else size - copy,
            calls=calls,
            check=partial(_check, backend, first, packed),
            unable=lambda m: bool(backend.not_supported_reasons(case.problem(layout, m))),
        )


def _check(backend: Backend, state: Any, packed: PackedWeight, x: Tensor) -> None:
    gate(backend, x, state, packed, backend.activations(state))


def _peer(case: Case, peer: Peer, facts: Row) -> Contestant:
    W, fed = case.random_weight(), peer.fed or case.kind
    prepared = peer.prepare(W)
    another = prepared.another or (lambda: peer.prepare(W).bind)
    copies = _Copies(prepared.bind, another)
    own = {"values": peer.values, "group_size": peer.group_size}
    own |= {"activations": peer.activations, "x_dtype": name_of(fed)}
    return Contestant(
        columns={"backend": peer.name, **facts, **own},
        size=prepared.weight_bytes,
        calls=lambda x, count: [bind(x.to(fed)) for bind in copies.first(count)],
        check=lambda x: agree(x.to(fed), prepared, peer.activations),
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


def said(error: Exception) -> str:
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
