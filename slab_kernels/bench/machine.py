"""What this machine is and which backends work on it: for `slab-kernels info` and every report."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..backends.base import LinearProblem
    from ..errors import SlabError

CPUINFO = Path("/proc/cpuinfo")  # Linux
CHECKOUT = Path(__file__).resolve().parents[2]  # unless the package is installed elsewhere

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "triton",
    "typer",
    "rich",
    "matplotlib",
    "datasets",
)
# Environment variable -> what it does.
VARIABLES = {
    "SLAB_KERNELS_BACKEND": "force a backend; raises with every reason if it cannot run",
    "SLAB_KERNELS_PREFILL": (
        "dense copies of packed weights for many tokens: packed (none), dense or auto"
    ),
    "SLAB_KERNELS_CPU_ISA": (
        "force the CPU kernels' instruction set: scalar, avx2, avx512, avx512_bf16 or avx512_amx"
    ),
    "SLAB_KERNELS_CPU_ACTIVATIONS": (
        "how x enters products with integer values on a CPU: int8 (default) or exact"
    ),
    "SLAB_KERNELS_NATIVE": (
        "at installation: 0 never builds the native library, 1 fails if it cannot be built"
    ),
    "SLAB_KERNELS_CUDA": (
        "at installation: 0 never compiles the CUDA kernels, 1 fails if nvcc cannot"
    ),
    "SLAB_KERNELS_CACHE": (
        "where CUDA kernels compiled at run time are kept; default ~/.cache/slab_kernels"
    ),
    "SLAB_KERNELS_CONFIGS": (
        "where tune writes the Triton kernels' rows and where they are read; "
        "default ~/.config/slab_kernels"
    ),
    "SLAB_KERNELS_VERIFY": "0: what is read is not compared with its checksums",
    "SLAB_KERNELS_DEBUG": "1: the command line shows tracebacks",
    "OMP_NUM_THREADS": "threads of torch and of the CPU kernels",
}


def versions() -> dict[str, str | None]:
    """Package -> installed version, None where absent."""
    from .. import __version__

    found: dict[str, str | None] = {
        "slab_kernels": __version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """The commit of the checkout that this package is in, with -dirty where files differ from it.

    "unknown" where the package is in none, or git cannot tell.
    """
    if not (CHECKOUT / ".git").exists():  # Another project's may be further up.
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=CHECKOUT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The name of the CPU as the system gives it, with its family and model where it gives them.

    A virtual machine often has a name like "AMD EPYC", which stands for several generations.
    """
    fields: dict[str, str] = {}
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:  # of the first core
        field, _, text = line.partition(":")
        fields.setdefault(field.strip(), text.strip())
    name = fields.get("model name") or fields.get("Hardware")
    if name and {"cpu family", "model"} <= fields.keys():
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name or platform.processor() or platform.machine()


def cpu_kernels() -> str | None:
    """The instruction set that our CPU kernels use here, of those that they could use.

    None without the native library.
    """
    import torch

    from .. import native
    from ..errors import BackendError

    try:
        if native.missing_library():
            return None
    except BackendError as error:
        return str(error)
    return f"{torch.ops.slab_kernels.cpu_isa()} of {', '.join(native.runnable())}"


def devices() -> list[dict[str, Any]]:
    """CPU first, then every CUDA device that torch sees."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": processor(),
            "machine": platform.machine(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "kernels": cpu_kernels(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def backends() -> dict[str, dict[str, list[str]]]:
    """Backend -> device -> reasons why it cannot run a plain 4096x4096 decode there.

    No reasons mean that it works.
    """
    from ..backends import dispatch
    from ..errors import BackendError

    table: dict[str, dict[str, list[str]]] = {name: {} for name in dispatch.order()}
    for kind, problem in _decodes().items():
        try:
            found = dispatch.explain(problem)
            if forced := os.environ.get(dispatch.ENVIRONMENT):
                dispatch.backend(forced)
        except BackendError as error:  # A variable names what does not exist, so nothing runs.
            found = {name: [str(error)] for name in dispatch.order()}
        for name, reasons in found.items():
            table[name][kind] = reasons
    return table


def _decodes() -> dict[str, LinearProblem]:
    """Kind of device that is here -> a plain 4096x4096 decode there; every backend takes bf16."""
    import torch

    from ..backends.base import LinearProblem

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {kind: LinearProblem(1, 4096, 4096, dtype=torch.bfloat16, device=kind) for kind in kinds}


def wrong_variables() -> list[SlabError]:
    """Why no model runs here: environment variables that force what there is not, as errors.

    A backend that is forced has to run on one kind of device that is here.
    """
    from .. import native
    from ..backends import activations, dense_copy, dispatch
    from ..errors import SlabError

    def forced_backend() -> None:
        refusals = []
        for problem in _decodes().values():
            try:
                dispatch.select(problem)
                return
            except SlabError as error:
                refusals.append(error)
        raise refusals[0]

    found: list[SlabError] = []
    words = (lambda: dense_copy.named(None), lambda: activations.named(None))
    for ask in (forced_backend, native.missing_library, *words):
        try:
            ask()
        except SlabError as error:
            if str(error) not in map(str, found):
                found.append(error)
    return found


def dense_copies() -> dict[str, Any]:
    """What an option for many tokens costs here: {"prefill", "bits_per_weight", "auto_bytes"}.

    prefill: the word of the environment, or what is wrong with it. auto_bytes: device -> what all
    copies may take there now if that word is "auto".
    """
    import torch

    from ..backends import dense_copy
    from ..errors import ArgumentError

    try:
        word = dense_copy.named(None)
    except ArgumentError as error:
        word = str(error)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    room = {str(gpu): int(dense_copy.AUTO_SHARE * dense_copy.free(gpu)) for gpu in gpus}
    return {"prefill": word, "bits_per_weight": dense_copy.BITS, "auto_bytes": room}


def activations() -> str:
    """The accuracy mode of a CPU by the environment, or what is wrong with the word there."""
    from ..backends import activations as accuracy
    from ..errors import ArgumentError

    try:
        return accuracy.named(None)
    except ArgumentError as error:
        return str(error)


def cuda_kernels() -> str:
    """Which CUDA kernels this installation was compiled with."""
    from ..backends.cuda.compile import IMAGES

    found = sorted(path.name.split(".")[1] for path in IMAGES.glob("*.*.*"))
    if found:
        return f"ahead of time: {', '.join(found)}"
    return "none ahead of time; a CUDA torch compiles them on first use"


def information() -> dict[str, Any]:
    """Everything `info` prints."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": devices(),
        "backends": backends(),
        "cuda_kernels": cuda_kernels(),
        "dense_copies": dense_copies(),
        "cpu_activations": activations(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def one_line() -> str:
    """Device and versions in one line; a figure in a table or report means nothing without it."""
    parts = []
    for device in devices():
        if device["device"] == "cpu":
            kernels = device["kernels"] or "absent"
            parts.append(
                f"{device['name']}, {device['cores']} cores, {device['threads']} threads, "
                f"kernels {kernels}"
            )
        else:
            parts.append(f"{device['name']} ({device['memory_gib']} GiB)")
    found = versions()
    parts += [
        f"{name} {found[name]}"
        for name in ("slab_kernels", "torch", "transformers", "python")
        if found[name]
    ]
    return " · ".join(parts)
