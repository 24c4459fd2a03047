"""The scripts in examples/ run, each in this process, and print what they promise."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny_models

import slab_kernels
from slab_kernels.methods import METHODS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def module(name: str):
    """examples/NAME.py as a module that nobody else sees."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.slow
def test_own_mlp(capsys):
    module("own_mlp").main()
    error, *layers = capsys.readouterr().out.splitlines()
    before, after = (float(number) for number in re.findall(r"\d+\.\d+", error))
    assert before < 0.05 and after < 0.1
    assert len(layers) == 2 and all("bits per weight instead of 32" in line for line in layers)


@pytest.mark.slow
def test_compress_and_serve(tmp_path, capsys):
    dense, out = tmp_path / "dense", tmp_path / "with space"
    tiny_models.write(dense)
    arguments = [
        str(dense),
        "--out",
        str(out),
        "--samples",
        "2",
        "--window",
        "16",
        "--prompt",
        "def",
    ]
    module("compress_and_serve").main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert "bits per weight" in lines[0]
    assert shlex.split(lines[-1]) == ["vllm", "serve", str(out), "--dtype", "bfloat16"]
    assert slab_kernels.check(slab_kernels.load(out))


@pytest.mark.slow
def test_new_method(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["new_method.py"])
    example = module("new_method")
    try:
        example.main()
        wanda, own = capsys.readouterr().out.splitlines()
        lost = [float(re.search(r"\d\.\d+", line)[0]) for line in (wanda, own)]
        assert wanda.startswith("wanda ") and own.startswith("wanda-signs ")
        assert lost[1] < lost[0]
    finally:
        METHODS.pop(example.METHOD.name, None)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_tested(path):
    assert f"test_{path.stem}" in globals()
