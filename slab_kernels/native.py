"""The compiled library of csrc/, `_C.so`: where it lies, whether it can be used, and loading it.

It is loaded on first use, never at import, and registers operations in `torch.ops.slab_kernels`:
those of the CPU backend and those of the solvers. SLAB_KERNELS_CPU_ISA=scalar|avx2|avx512|
avx512_bf16 forces the instruction set of both.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import torch

from .errors import BackendError

LIBRARY = Path(__file__).parent / "_C.so"
ENVIRONMENT = "SLAB_KERNELS_CPU_ISA"  # forces an instruction set
_LOADING = threading.Lock()  # functools.cache alone lets two threads in at once


def missing_library() -> str | None:
    """Why the native library cannot be used here and what to do about it, or None.

    Raises: BackendError if SLAB_KERNELS_CPU_ISA names what cannot run here: a forced choice is
        never passed over.
    """
    if not LIBRARY.exists():
        return (
            f"the native library {LIBRARY.name} was not built; install a C++17 compiler (g++ or "
            "clang++) and run pip install --no-build-isolation -e . where torch is installed"
        )
    try:
        load_library()
    except BackendError:
        raise
    except (OSError, RuntimeError) as error:
        return f"the native library {LIBRARY.name} does not load: {error}"
    return None


def runnable() -> list[str]:
    """Instruction sets that this build can run on this machine, the best first."""
    load_library()
    return _runnable()


def _runnable() -> list[str]:
    """What `runnable` returns; the library has to be loaded already."""
    return torch.ops.slab_kernels.cpu_runnable().split(", ")


def load_library() -> None:
    """Load the library, once, whichever thread comes first.

    Raises: OSError or RuntimeError if the library is missing or does not load, BackendError if
        SLAB_KERNELS_CPU_ISA names an instruction set that is unknown or cannot run here.
    """
    with _LOADING:
        _load_once()
    forced = os.environ.get(ENVIRONMENT)
    if forced and forced not in _runnable():
        raise BackendError(
            f"{ENVIRONMENT}={forced} is not an instruction set that this build runs on this "
            f"machine; choose one of {', '.join(_runnable())}, or unset it"
        )


@functools.cache
def _load_once() -> None:
    torch.ops.load_library(str(LIBRARY))
