"""Importing costs nothing: no heavy package, no other file, no compiler, no device query."""

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
    "rich",
)
PROBE = """
import builtins, io, json, os, subprocess, sys
before = set(sys.modules)
seen = []
LOUD = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen", "socket.connect"
}
def note(event, arguments):
    first = arguments[0] if arguments else None
    if event == "open" and isinstance(first, (str, bytes)):
        # Python's byte code is first written under a longer name.
        if not str(first).endswith(".py") and ".pyc" not in str(first):
            seen.append(str(first))
    elif event in LOUD:
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
