"""The machine and the commit that results belong to.

    python -m on_gpu.machine

prints them as JSON, with the reason why there is nothing to measure, if there is one: a process of
its own, since a broken driver may hang whoever asks. Torch, numpy and Triton are enough for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slab_kernels.backends.cuda.launch import CudaDevice

ROOT = Path(__file__).resolve().parents[2]
# What decides results: a change of it is another commit to the runner, whether git knows or not.
SOURCES = (
    "csrc/**/*",
    "slab_kernels/**/*.py",
    "slab_kernels/**/*.json",
    "benchmarks/on_gpu/*.py",
    "benchmarks/on_gpu/*.cu",
)


def reason() -> str | None:
    """Why nothing can be measured here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}; set PYTHON to an interpreter that has it"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no CUDA device; run this on a machine with an "
            "NVIDIA GPU"
        )
    if torch.version.hip is not None:
        return "this is no NVIDIA GPU; the kernels are CUDA's"
    return None


def here() -> tuple[str, CudaDevice]:
    """The current device as torch names it, and where its launches go."""
    import torch

    from slab_kernels.backends import cuda

    index = torch.cuda.current_device()
    return f"cuda:{index}", cuda.device_of(index)


def revision() -> str:
    """The commit, by git or the variable ON_GPU_COMMIT; where neither knows it or the tree differs
    from it, also a sum of the sources."""
    from slab_kernels.bench import machine

    known = os.environ.get("ON_GPU_COMMIT") or machine.commit()
    if known != "unknown" and not known.endswith("-dirty"):
        return known
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"{known}-{digest.hexdigest()[:8]}"


def head() -> dict[str, Any]:
    """What every result file says first: device, driver, versions and commit."""
    import torch

    from slab_kernels.bench import machine

    found = machine.versions()
    wanted = ("slab_kernels", "python", "torch", "triton")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": _driver(),
        "commit": revision(),
        "versions": {name: found[name] for name in wanted} | {"cuda": torch.version.cuda},
    }


def title(found: dict[str, Any]) -> str:
    """A head in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['device']}, driver {found['driver']}, {versions}, commit {found['commit']}"


def stem(found: dict[str, Any]) -> str:
    """Device and commit as a part of file names."""
    text = f"{found['device']}-{found['commit']}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def _driver() -> str:
    """The driver's version by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


if __name__ == "__main__":
    why = reason()
    print(json.dumps({"reason": why} if why else head()))
