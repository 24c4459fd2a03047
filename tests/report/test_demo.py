"""The demo writes its page after every method, so that an interrupted one still shows something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slab_kernels.cli.threads import CHOICES

DEMO = Path(__file__).resolve().parents[2] / "benchmarks"

# The demo with stubs for what takes minutes; the second method is killed.
STUB = """
import os, pathlib, signal, sys
sys.path.insert(0, DEMO)
import demo

def row(method, perplexity):
    return {"method": method, "bits_per_weight": 9.0, "perplexity": perplexity, "bytes": 1000,
            "continuation": f" as {method} writes", "tokens": 9, "windows": 1, "window": 9}

def dense_row(args):
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    dense = demo.Dense(pathlib.Path("."), None, "", "cpu", None)
    return dense, row("dense", 5.0) | {"bytes": 2000}

def method_row(args, method, dense, step):
    if method == "slab":
        os.kill(os.getpid(), signal.SIGKILL)
    return row(method, 6.0)

demo.dense_row, demo.method_row = dense_row, method_row
sys.argv = ["demo.py", "--out", sys.argv[1], "--methods", "wanda,slab"]
sys.exit(demo.main())
"""


@pytest.mark.slow
def test_an_interrupted_demo_leaves_a_page(tmp_path):
    command = [sys.executable, "-c", STUB.replace("DEMO", repr(str(DEMO))), str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k not in CHOICES}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "This model is 2.0× smaller" in page and "as wanda writes" in page
    assert "as dense writes" in page and "as slab writes" not in page
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [found["method"] for found in content["results"]] == ["dense", "wanda"]
    assert "demo.py --out" in content["run"]["command"] and content["run"]["date"]
    assert str(tmp_path / "out" / "report" / "report.html") in done.stderr
