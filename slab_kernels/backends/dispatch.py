"""Which backend runs a problem: an ordered list and a list of reasons.

The first backend without a reason against it wins. An explicit choice (argument or
SLAB_KERNELS_BACKEND) never falls back silently: it runs or it raises with every reason.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .. import plugins
from ..errors import BackendError, UnknownBackendError
from ..format import PackedWeight
from . import activations as accuracy
from . import dense_copy
from .base import Backend, LinearProblem, preparing

# The built-in backends, on each device the fastest first; the reference runs everything.
ORDER = ("cuda", "cpu", "triton", "reference")
ENVIRONMENT = "SLAB_KERNELS_BACKEND"
_WARNED: set[str] = set()  # what was said of packages that cannot be used


def added() -> dict[str, Backend]:
    """The backends of other packages by name, the most wanted first (`Backend.priority`).

    They come from the entry-point group `slab_kernels.backends`, whose objects are instances of
    Backend. Warns, once in a process, of a package that cannot be used.
    """
    found = plugins.load(plugins.BACKENDS, Backend, frozenset(ORDER))
    for plugin in found:
        if plugin.problem is not None and plugin.problem not in _WARNED:
            _WARNED.add(plugin.problem)
            warnings.warn(plugin.problem, RuntimeWarning, stacklevel=2)
    able = [plugin.value for plugin in found if plugin.problem is None]
    return {b.name: b for b in sorted(able, key=lambda b: b.priority, reverse=True)}


def order() -> tuple[str, ...]:
    """The names of all backends in the order in which they are asked.

    Those of other packages stand between the built-in ones and the reference, one with a
    `priority` above 0 before the built-in ones.
    """
    others = added()
    first = [name for name, backend in others.items() if backend.priority > 0]
    last = [name for name in others if name not in first]
    return (*first, *ORDER[:-1], *last, ORDER[-1])


def backend(name: str) -> Backend:
    """The backend of that name.

    Raises: UnknownBackendError with the known names; BackendError with the reason why another
        package's is none.
    """
    if name in ORDER:
        return importlib.import_module(f".{name}", __package__).BACKEND
    for plugin in plugins.load(plugins.BACKENDS, Backend, frozenset(ORDER)):
        if plugin.name == name and plugin.problem is None:
            return plugin.value
        if plugin.name == name:
            raise BackendError(f"backend {name!r} is not usable: {plugin.problem}")
    origin = f" ({ENVIRONMENT} names it)" if os.environ.get(ENVIRONMENT) == name else ""
    known = ", ".join(order())
    raise UnknownBackendError(f"backend {name!r} is unknown{origin}; known backends: {known}")


def explain(problem: LinearProblem) -> dict[str, list[str]]:
    """Backend name -> reasons against it, in order; the first empty list is the one chosen.

    Raises: BackendError if SLAB_KERNELS_CPU_ISA names an instruction set that is unknown or cannot
        run here.
    """
    return {name: backend(name).not_supported_reasons(problem) for name in order()}


def select(problem: LinearProblem, name: str | None = None) -> Backend:
    """The backend for this problem, or the forced one.

    Raises: BackendError if the forced one is unknown or cannot run it, or if none can (all reasons
        listed).
    """
    forced = name or os.environ.get(ENVIRONMENT)
    if forced:
        chosen = backend(forced)
        if reasons := chosen.not_supported_reasons(problem):
            raise BackendError(
                f"backend {forced!r} cannot run {problem.describe()}: {'; '.join(reasons)}"
            )
        return chosen
    found = explain(problem)
    for able, reasons in found.items():
        if not reasons:
            return backend(able)
    against = "; ".join(f"{other}: {', '.join(reasons)}" for other, reasons in found.items())
    raise BackendError(f"no backend runs {problem.describe()}: {against}")


def prepare_fused(
    parts: Sequence[PackedWeight],
    dtype: torch.dtype,
    before: Sequence[tuple[Backend, Any]] = (),
    prefill: str = "packed",
    room: bool | None = None,
    activations: str | None = None,
) -> tuple[Backend, Any]:
    """A backend that runs every part for activations of `dtype`, and its state for `linear_fused`.

    before: states of these parts for the same activations, and whose they are. One that is the
        backend's own is used, or one that it adopts.
    prefill: one of dense_copy.PREFILLS. room: as `dense_copy.applied` takes it.
    activations: as `activations.named` takes it.

    Raises: BackendError if a forced backend cannot run one of them, or keeps no dense copy that is
        wanted; RangeError for numbers that a backend cannot hold; ArgumentError for an unknown
        word.
    """
    told = accuracy.named(activations)
    problems = [LinearProblem.of(part.layout, 1, dtype, part.values.device.type) for part in parts]
    names = order()
    chosen = max(map(select, problems), key=lambda backend: names.index(backend.name))
    with preparing(parts[0].values.device):
        adopted = (
            state if owner is chosen else chosen.adopt(state, dtype) for owner, state in before
        )
        state = next((state for state in adopted if state is not None), None)
        if state is None:
            state = chosen.prepare_fused(parts, dtype)
        state = dense_copy.applied(chosen, state, parts, dtype, prefill, room)
        return chosen, chosen.with_activations(state, parts, told)
