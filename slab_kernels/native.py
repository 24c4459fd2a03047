"""The compiled library of csrc/, `_C.so`: where it lies, whether it can be used, and loading it.

It is loaded on first use, never at import, and registers operations in `torch.ops.slab_kernels`:
those of the CPU backend and those of the solvers. SLAB_KERNELS_CPU_ISA=scalar|avx2|avx512|
avx512_bf16|avx512_amx forces the instruction set of both.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from pathlib import Path

import torch

from .errors import BackendError

LIBRARY = Path(__file__).parent / "_C.so"
ENVIRONMENT = "SLAB_KERNELS_CPU_ISA"  # forces an instruction set
# The functions that Python calls, and the names of their arguments.
FUNCTIONS = {
    "cpu_isa": "",
    "cpu_runnable": "",
    "prepare_cpu": "values metadata signs scales U V P Q out_features in_features value_type "
    "group_size planes",
    "linear_cpu": "x prepared bias out_features in_features",
    "linear_cpu_frozen": "x prepared bias out_features in_features",
    "dequantize_cpu": "prepared out_features in_features",
    "cpu_int8": "rank tokens",
    "linear_cpu_int8": "x prepared bias out_features in_features",
    "linear_cpu_int8_frozen": "x prepared bias out_features in_features",
    "linear_cpu_int8_parts": "x prepared bias out_features in_features",
    "descend_cpu": "error gradient kept target magnitude scales gram groups start end planes "
    "scale_inputs lowest highest passes",
    "sweep_cpu": "remaining fixed kept scales likely magnitude factor groups fractions weight "
    "start end planes scale_inputs lowest highest",
}
_LOADING = threading.Lock()  # functools.cache alone lets two threads in at once
_WARNED: set[str] = set()  # what was said of a library that is there and cannot be used


def missing_library() -> str | None:
    """Why the native library cannot be used here and what to do about it, or None.

    Of a library that is there and cannot be used a RuntimeWarning says so too, once in a process:
    whoever built one does not expect the reference to run.

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
        reason = f"the native library {LIBRARY.name} cannot be used: {error}"
        if reason not in _WARNED:
            _WARNED.add(reason)
            message = f"{reason}; torch code runs in its place, which is much slower"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return reason
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

    Raises: OSError or RuntimeError if the library is missing, does not load, or was built from
        other sources than this package has, BackendError if SLAB_KERNELS_CPU_ISA names an
        instruction set that is unknown or cannot run here.
    """
    with _LOADING:
        _load_once()
    if difference := _difference():
        raise RuntimeError(f"it was built from other sources, {difference}; {_rebuilding()}")
    forced = os.environ.get(ENVIRONMENT)
    if forced and forced not in _runnable():
        raise BackendError(
            f"{ENVIRONMENT}={forced} is not an instruction set that this build runs on this "
            f"machine; choose one of {', '.join(_runnable())}, or unset it"
        )


def _difference() -> str | None:
    """What the loaded library has otherwise than FUNCTIONS, or None."""
    for name, arguments in FUNCTIONS.items():
        function = getattr(torch.ops.slab_kernels, name, None)
        if function is None:
            return f"which have no {name}"
        found = " ".join(argument.name for argument in function.default._schema.arguments)
        if found != arguments:
            return f"whose {name} takes ({found}) and not ({arguments})"
    return None


def _rebuilding() -> str:
    """How the library is built anew, where this package is."""
    root = LIBRARY.parents[1]
    if (root / "setup.py").is_file():
        return f"build it anew by python setup.py build_ext --inplace in {root}"
    return "install the package anew by pip install --force-reinstall --no-build-isolation"


@functools.cache
def _load_once() -> None:
    torch.ops.load_library(str(LIBRARY))
