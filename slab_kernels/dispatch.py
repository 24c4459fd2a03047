"""Which backend runs a problem: an ordered list and a list of reasons.

The first backend without a reason against it wins. An explicit choice (argument or SLAB_KERNELS_BACKEND) never falls
back silently: it runs or it raises with every reason.
"""

from __future__ import annotations

import importlib
import os

from .backends.base import Backend, BackendError, LinearProblem

ORDER = ("cuda", "cpu", "triton", "reference")  # fastest first on each device; the reference runs everything
ENVIRONMENT = "SLAB_KERNELS_BACKEND"


def backend(name: str) -> Backend:
    """The backend of that name. Raises BackendError with the known names."""
    if name not in ORDER:
        raise BackendError(f"backend {name!r} is unknown; known backends: {', '.join(ORDER)}")
    return importlib.import_module(f".backends.{name}", __package__).BACKEND


def explain(problem: LinearProblem) -> dict[str, list[str]]:
    """Backend name -> reasons against it, in order; the first empty list is the one chosen."""
    return {name: backend(name).not_supported_reasons(problem) for name in ORDER}


def select(problem: LinearProblem, name: str | None = None) -> Backend:
    """The backend for this problem, or the forced one.

    Raises: BackendError if the forced one is unknown or cannot run it, or if none can (all reasons listed).
    """
    forced = name or os.environ.get(ENVIRONMENT)
    if forced:
        chosen = backend(forced)
        if reasons := chosen.not_supported_reasons(problem):
            raise BackendError(f"backend {forced!r} cannot run {problem.describe()}: {'; '.join(reasons)}")
        return chosen
    found = explain(problem)
    for able, reasons in found.items():
        if not reasons:
            return backend(able)
    against = "; ".join(f"{other}: {', '.join(reasons)}" for other, reasons in found.items())
    raise BackendError(f"no backend runs {problem.describe()}: {against}")
