"""Which backend runs a problem: an ordered list and a list of reasons.

The first backend without a reason against it wins. An explicit choice (argument or SLAB_KERNELS_BACKEND) never falls
back silently: it runs or it raises with every reason.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import BackendError
from ..format import PackedWeight
from .base import Backend, LinearProblem

ORDER = (
    "cuda",
    "cpu",
    "triton",
    "reference",
)  # fastest first on each device; the reference runs everything
ENVIRONMENT = "SLAB_KERNELS_BACKEND"


def backend(name: str) -> Backend:
    """The backend of that name. Raises BackendError with the known names."""
    if name not in ORDER:
        origin = f" ({ENVIRONMENT} names it)" if os.environ.get(ENVIRONMENT) == name else ""
        known = ", ".join(ORDER)
        raise BackendError(f"backend {name!r} is unknown{origin}; known backends: {known}")
    return importlib.import_module(f".{name}", __package__).BACKEND


def explain(problem: LinearProblem) -> dict[str, list[str]]:
    """Backend name -> reasons against it, in order; the first empty list is the one chosen.

    Raises: BackendError if SLAB_KERNELS_CPU_ISA names an instruction set that is unknown or cannot
        run here.
    """
    return {name: backend(name).not_supported_reasons(problem) for name in ORDER}


def select(problem: LinearProblem, name: str | None = None) -> Backend:
    """The backend for this problem, or the forced one.

    Raises: BackendError if the forced one is unknown or cannot run it, or if none can (all reasons listed).
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


def prepare_fused(parts: Sequence[PackedWeight], dtype: torch.dtype) -> tuple[Backend, Any]:
    """A backend that runs every part for activations of `dtype`, and what its `linear_fused` wants, made now.

    Raises: BackendError if a forced backend cannot run one of them.
    """
    problems = [LinearProblem.of(part.layout, 1, dtype, part.values.device.type) for part in parts]
    chosen = max(map(select, problems), key=lambda backend: ORDER.index(backend.name))
    # Inside inference_mode no inference tensors may be left behind: autograd could not save them.
    with torch.inference_mode(False), torch.no_grad():
        return chosen, chosen.prepare_fused(parts, dtype)
