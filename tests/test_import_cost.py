"""Importing costs nothing: no heavy package, no file read beyond Python's own modules, no compiler,
no device query.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "matplotlib",
    "triton",
    "numpy",
    "safetensors",
    "accelerate",
    "datasets",
    "peft",
    "rich",
)
PROBE = """
import builtins, io, json, os, subprocess, sys
before = set(sys.modules)
seen = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        name = str(arguments[0])
        if not name.endswith((".py", ".pyc")) and ".pyc." not in name:  # while byte code is written
            seen.append(name)
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen",
                   "socket.connect"):
        seen.append(f"{event} {arguments[:1]}")
import typer  # what the command line stands on is not ours to measure
sys.addaudithook(note)
import MODULE
print(json.dumps({"modules": sorted(set(sys.modules) - before), "seen": seen}))
"""


def probe(module: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("MODULE", module)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "module", ["slab_kernels", "slab_kernels.cli.main", "slab_kernels.report.write"]
)
def test_import_loads_nothing_heavy_and_touches_nothing(module):
    found = probe(module)
    assert not [m for m in found["modules"] if m.split(".")[0] in HEAVY]
    assert found["seen"] == []


def test_package_import_loads_only_itself():
    assert [m for m in probe("slab_kernels")["modules"] if m.startswith("slab_kernels")] == [
        "slab_kernels",
        "slab_kernels.engines",
        "slab_kernels.errors",
    ]


@pytest.mark.parametrize(
    "module", ["slab_kernels.nn", "slab_kernels.compression.model", "slab_kernels.bench.linear"]
)
def test_torch_level_imports_leave_the_rest_alone(module):
    found = probe(module)
    heavy = {m.split(".")[0] for m in found["modules"]} & {
        "transformers",
        "matplotlib",
        "triton",
        "accelerate",
        "datasets",
    }
    assert not heavy
