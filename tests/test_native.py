"""The compiled library: whether it has what Python calls, and what is said where it has not."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from slab_kernels import native
from slab_kernels.backends import dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.errors import BackendError
from slab_kernels.format import PackedLayout
from slab_kernels.methods import decompose
from slab_kernels.methods.inputs import InputStats

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = LinearProblem.of(PackedLayout(64, 32, "fp16", None, 1), 1, torch.float32, "cpu")
needs_library = pytest.mark.skipif(not native.LIBRARY.exists(), reason="it was not built")


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(native, "_WARNED", set())


def defined() -> dict[str, str]:
    """Function -> the names of its arguments, from the C++ sources."""
    found = {}
    for source in (ROOT / "csrc").glob("*bindings.cpp"):
        text = source.read_text(encoding="utf-8").replace("\\\n", " ")
        words = dict(re.findall(r'#define (\w+)\s+((?:"[^"]*"\s*)+)', text))
        for name, content in words.items():
            text = re.sub(rf"\b{name}\b", content, text)
        for body in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text):
            schema = "".join(re.findall(r'"([^"]*)"', body))
            name, arguments = re.match(r"(\w+)\((.*)\) -> ", schema).groups()
            found[name] = " ".join(one.split()[-1] for one in arguments.split(",") if one.strip())
    return found


def test_the_functions_that_python_calls_are_those_of_the_sources():
    """Whoever changes one in csrc changes FUNCTIONS too, by which an old library is known."""
    sources = defined()
    assert {name: sources[name] for name in native.FUNCTIONS} == native.FUNCTIONS
    called: set[str] = set()
    for file in (ROOT / "slab_kernels").rglob("*.py"):
        names = re.findall(r"ops\.slab_kernels\.(\w+)", file.read_text(encoding="utf-8"))
        called |= {name for name in names if "cpu" in name}
    assert called == native.FUNCTIONS.keys()


@needs_library
def test_the_library_that_is_here_has_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.missing_library() is None


OLD = {
    "without a function": (
        {**native.FUNCTIONS, "newer_cpu": "x"},
        "which have no newer_cpu",
    ),
    "with other arguments": (
        native.FUNCTIONS | {"dequantize_cpu": "prepared rows columns"},
        r"whose dequantize_cpu takes \(prepared out_features in_features\) and not "
        r"\(prepared rows columns\)",
    ),
}


@needs_library
@pytest.mark.parametrize("functions, words", OLD.values(), ids=OLD)
def test_a_library_of_other_sources_is_passed_over_with_one_warning(functions, words, monkeypatch):
    W, stats = torch.randn(8, 32), InputStats.from_inputs(torch.randn(64, 32))
    with monkeypatch.context() as patch:
        patch.setattr(native, "missing_library", lambda: "it was not built")
        wanted = decompose(W, stats)
    monkeypatch.setattr(native, "FUNCTIONS", functions)
    command = "python setup.py build_ext --inplace"
    said = f"built from other sources, {words}; build it anew by {command} in .*; torch code runs"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert dispatch.select(PROBLEM).name == "reference"
        found = decompose(W, stats)
        assert dispatch.select(PROBLEM).name == "reference"
    assert len(caught) == 1
    assert torch.equal(found.dense(), wanted.dense())
    (reason,) = dispatch.explain(PROBLEM)["cpu"]
    assert re.search(words, reason) and command in reason
    with pytest.raises(BackendError, match="built from other sources"):
        dispatch.select(PROBLEM, "cpu")


def test_a_library_that_does_not_load_is_passed_over_with_one_warning(monkeypatch, tmp_path):
    def broken():
        raise OSError("_C.so: invalid ELF header")

    (tmp_path / "_C.so").write_text("no library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(native, "_load_once", broken)
    with pytest.warns(RuntimeWarning, match="cannot be used: _C.so: invalid ELF header") as caught:
        for _ in range(2):
            assert "invalid ELF header" in native.missing_library()
    assert len(caught) == 1


def test_a_library_that_was_not_built_is_a_reason_without_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_C.so")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "was not built" in native.missing_library()


def test_outside_of_a_checkout_the_package_is_installed_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "slab_kernels" / "_C.so")
    assert native._rebuilding().startswith("install the package anew by pip install")
