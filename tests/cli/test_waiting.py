"""Threads that wait let others have the core, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from slab_kernels.cli.main import TIMED
from slab_kernels.cli.threads import CHOICES, PASSIVE, wait_passively

AT_TORCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch:", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
sys.argv = ["slab-kernels", *sys.argv[1:]]
from slab_kernels.cli.main import main
main()
"""


def at_torch(*arguments: str, **variables: str) -> str:
    """The policy that the environment names when torch is about to load."""
    environment = {k: v for k, v in os.environ.items() if k not in CHOICES} | variables
    command = [sys.executable, "-c", AT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("torch:")]
    return line


@pytest.mark.slow
def test_commands_wait_passively():
    explain = ("explain", "--shape", "64x32", "--device", "cpu")
    assert at_torch(*explain) == "torch: PASSIVE 0"
    assert at_torch(*explain, OMP_WAIT_POLICY="ACTIVE") == "torch: ACTIVE None"
    assert at_torch(*explain, GOMP_SPINCOUNT="1000") == "torch: None None"


@pytest.mark.slow
def test_what_is_timed_is_timed_as_other_programs_run_it():
    assert TIMED == ("bench", "tune")
    bench = ("bench", "--shape", "64x32", "--seconds", "0", "--device", "cpu")
    assert at_torch(*bench) == "torch: None None"


def test_openmp_takes_it():
    """What torch's own OpenMP library says of itself when it is loaded, if it says anything."""
    environment = {k: v for k, v in os.environ.items() if k not in CHOICES}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    command = [sys.executable, "-m", "slab_kernels", "explain", "--shape", "64x32"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this torch's OpenMP does not show its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.parametrize("name", CHOICES)
def test_any_choice_of_the_user_stays(name):
    chosen = {name: "7"}
    wait_passively(chosen)
    assert chosen == {name: "7"}
    nothing: dict[str, str] = {}
    wait_passively(nothing)
    assert nothing == PASSIVE
