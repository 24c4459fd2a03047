"""Opening a packed folder imports what opening needs: no method, no compression, no bench, no page.

Each way of opening runs in a process of its own and tells what it has imported of this library.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import tiny_models

import slab_kernels

NOT_NEEDED = (
    "methods", "compression", "evaluate", "bench", "report", "cli", "testing",
    "models.save", "models.decompress", "models.output", "models.source", "models.blocks",
    "models.streams", "models.groups", "text",
)  # fmt: skip
BY_LOAD = "import slab_kernels; slab_kernels.load(folder)"
BY_TRANSFORMERS = """
import slab_kernels
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(folder)
"""
BY_VLLM = "from slab_kernels.engines import register_with_vllm; register_with_vllm()"
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("lean")
    tiny_models.write(top / "dense")
    settings = {"method": "magnitude", "calibration": tiny_models.tokens(), "progress": False}
    slab_kernels.compress(top / "dense", top / "packed", **settings)
    return top / "packed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        BY_LOAD,
        BY_TRANSFORMERS,
        pytest.param(BY_VLLM, marks=pytest.mark.skipif(not HAS_VLLM, reason="without vLLM")),
    ],
    ids=["load", "from_pretrained", "the vLLM plugin"],
)
def test_opening_imports_no_more_than_it_needs(folder, program):
    program = f"folder = {str(folder)!r}\n{program}\nimport json, sys\n"
    program += "print(json.dumps([m for m in sys.modules if m.startswith('slab_kernels.')]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = [m.removeprefix("slab_kernels.") for m in json.loads(done.stdout.splitlines()[-1])]
    assert {"format", "models.packed", "nn"} <= set(imported)
    unneeded = [m for m in imported if f"{m}.".startswith(tuple(f"{n}." for n in NOT_NEEDED))]
    assert not unneeded
