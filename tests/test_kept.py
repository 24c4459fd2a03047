"""Kept results are made once, whoever asks, and again when anything that they were made from is
another.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kept
import pytest

HERE = Path(__file__).parent
ASK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from kept import kept
def make():
    with open(sys.argv[2] + "/made", "a") as made:
        made.write("x")
    time.sleep(0.3)
    return b"result" * 1000
assert kept("slow", ["source"], make, Path(sys.argv[2])) == b"result" * 1000
"""


@pytest.fixture
def ask(tmp_path):
    """Asks for a result of some inputs; returns it and whether it was made for that."""

    def asked(*inputs, kind="kind", result=b"text"):
        made = []
        return kept.kept(kind, inputs, lambda: made.append(1) or result, tmp_path), bool(made)

    return asked


def test_a_result_is_made_once(ask):
    assert ask("source", b"options") == (b"text", True)
    assert ask("source", b"options", result=b"other") == (b"text", False)


def test_other_inputs_are_another_result(ask):
    ask("source", "options")
    for inputs in (("sourceoptions",), ("source", "option", "s"), ("source", "options", "")):
        assert ask(*inputs) == (b"text", True)
    assert ask("source", "options", kind="other") == (b"text", True)


def test_a_damaged_file_is_made_again(ask, tmp_path):
    ask("source")
    (path,) = (path for path in (tmp_path / "kind").iterdir() if not path.suffix)
    path.write_bytes(path.read_bytes()[:-2])
    assert ask("source") == (b"text", True)
    assert ask("source") == (b"text", False)


def test_the_results_used_longest_ago_are_forgotten(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 3)
    for source in "abcde":
        ask(source)
    assert len([path for path in (tmp_path / "kind").iterdir() if not path.suffix]) == 3
    assert ask("e") == (b"text", False)


def test_what_another_process_forgets_meanwhile_is_no_error(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 1)
    ask("a")
    gone = tmp_path / "kind" / "gone"
    gone.symlink_to(tmp_path / "nowhere")  # is listed, but cannot be looked at
    assert ask("b") == (b"text", True)
    assert not gone.is_symlink()


def test_processes_that_ask_together_wait_for_one(tmp_path):
    command = [sys.executable, "-c", ASK, str(HERE), str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"
