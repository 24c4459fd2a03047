"""Methods and backends of other packages, found by their entry points."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_models
import torch

import slab_kernels
from slab_kernels import plugins
from slab_kernels.backends import dispatch
from slab_kernels.backends.base import LinearProblem
from slab_kernels.cli import main as cli
from slab_kernels.errors import BackendError, MethodError
from slab_kernels.format.layout import PackedLayout
from slab_kernels.methods import METHODS, Method, all_methods, find_method
from slab_kernels.testing import random_packed

TOKENS = tiny_models.tokens()
HALVED = """
    from dataclasses import dataclass
    from slab_kernels.methods import Config, Method
    from slab_kernels.methods.magnitude import magnitude
    from slab_kernels.settings import setting

    @dataclass(frozen=True)
    class HalvedConfig(Config):
        factor: float = setting(0.5, "what kept values are multiplied by", 0, 1)

    def halved(weight, stats, config):
        return magnitude(weight * config.factor, stats, config)

    METHOD = Method("halved", halved, HalvedConfig, "none", "magnitude, then half of it")
    SLAB = Method("slab", halved, HalvedConfig, "none", "takes a name that is not free")
    NUMBER = 3
"""
BACKEND = """
    import torch
    from slab_kernels.backends.base import Backend

    class Unpacking(Backend):
        name = "unpacking"

        def refusals(self, problem, capability=None):
            return [] if problem.device == "cpu" else ["it runs on a CPU only"]

        def prepare(self, packed, dtype=None):
            return packed.dense()

        def linear(self, x, state, bias=None):
            return torch.nn.functional.linear(x, state.to(x.dtype), bias)

    class First(Unpacking):
        name, priority = "first", 1

    UNPACKING, FIRST = Unpacking(), First()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution on the path, as pip would: install(name, code, group, {entry: object})."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name: str, code: str, group: str, entries: dict[str, str]) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{entry} = {module}:{value}" for entry, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        made.append(module)
        plugins.load.cache_clear()

    yield make
    plugins.load.cache_clear()
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def dense(tmp_path) -> Path:
    tiny_models.write(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_method_of_another_package_decomposes_and_compresses(install, dense, tmp_path, capsys):
    install("half-size", HALVED, plugins.METHODS, {"halved": "METHOD"})
    weight = torch.randn(8, 16)
    plain = slab_kernels.decompose(weight, method="magnitude")
    assert torch.equal(slab_kernels.decompose(weight, method="halved").S, plain.S / 2)
    assert torch.equal(slab_kernels.decompose(weight, method="halved", factor=1.0).S, plain.S)
    with pytest.raises(MethodError, match=r"^factor=2"):
        slab_kernels.decompose(weight, method="halved", factor=2)
    with pytest.raises(
        MethodError, match="has no option 'facto'; did you mean 'factor'. it has factor"
    ):
        slab_kernels.SlabConfig(method="halved", facto=1)
    record = slab_kernels.compress(
        dense, tmp_path / "out", method="halved", factor=0.25, calibration=TOKENS, progress=False
    )
    assert record.settings["options"] == {"factor": "0.25"}
    assert {layer.method for layer in record.layers} == {"halved"}
    assert "| Method | halved |" in (tmp_path / "out" / "README.md").read_text()
    assert isinstance(find_method("halved"), Method) and "halved" not in METHODS
    assert list(all_methods()) == [*METHODS, "halved"]
    assert cli.run(["info", "--methods"]) == 0
    shown = capsys.readouterr().out
    assert "halved: magnitude, then half of it, from half-size 1.2" in shown
    assert "factor=0.5" in shown and "what kept values are multiplied by" in shown


def test_a_package_that_cannot_be_used_is_named_and_stops_no_other(install, capsys):
    install("half-size", HALVED, plugins.METHODS, {"halved": "METHOD", "slab": "SLAB"})
    install("broken-pack", "raise OSError('no\\nsuch disk')", plugins.METHODS, {"worse": "METHOD"})
    install("wrong-pack", HALVED, plugins.METHODS, {"number": "NUMBER", "other": "METHOD"})
    assert find_method("halved").name == "halved"
    assert find_method("slab") is METHODS["slab"]
    for name, package, reason in (
        ("worse", "broken-pack 1.2", "failed with OSError: no; update or uninstall"),
        ("number", "wrong-pack 1.2", "wrong_pack:NUMBER is a int, no Method"),
        ("other", "wrong-pack 1.2", "wrong_pack:METHOD has another name, 'halved'"),
    ):
        with pytest.raises(MethodError) as error:
            slab_kernels.decompose(torch.randn(8, 16), method=name)
        assert package in str(error.value) and reason in str(error.value)
    with pytest.raises(
        MethodError, match=r"'magic' is unknown; choose one of slab, .*halved; .*no;"
    ):
        find_method("magic")
    assert cli.run(["info", "--methods", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = {row["method"]: row["origin"] for row in json.loads(out)["methods"]}
    assert rows["slab"] == "slab_kernels" and rows["halved"] == "half-size 1.2"
    assert "half-size 1.2 cannot add the entry point 'slab'" in err
    assert "the name is one of slab_kernels' own" in err and err.count("cannot add") == 4


def test_a_backend_of_another_package_stands_before_the_reference(install):
    install("unpack-all", BACKEND, plugins.BACKENDS, {"unpacking": "UNPACKING"})
    assert dispatch.order() == ("cuda", "cpu", "triton", "unpacking", "reference")
    packed = random_packed(PackedLayout(8, 64, "int4", 32, 1, 0))
    problem = LinearProblem.of(packed.layout, 1, torch.float64, "cpu")
    chosen = dispatch.select(problem)
    assert list(dispatch.explain(problem)) == list(dispatch.order())
    assert chosen.name == "unpacking" or not dispatch.explain(problem)[chosen.name]
    forced = dispatch.select(problem, "unpacking")
    x = torch.randn(3, 64, dtype=torch.float64)
    want = x @ packed.dense().double().T
    torch.testing.assert_close(forced.linear(x, forced.prepare(packed)), want)
    with pytest.raises(BackendError, match="it runs on a CPU only"):
        dispatch.select(LinearProblem.of(packed.layout, 1, torch.float32, "cuda"), "unpacking")


def test_a_backend_with_a_priority_is_asked_first_and_runs_a_layer(install, monkeypatch, capsys):
    install("unpack-all", BACKEND, plugins.BACKENDS, {"unpacking": "UNPACKING", "first": "FIRST"})
    assert dispatch.order() == ("first", "cuda", "cpu", "triton", "unpacking", "reference")
    packed = random_packed(PackedLayout(8, 64, "int4", 32, 1, 0))
    layer = slab_kernels.SlabLinear.from_packed(packed)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ packed.dense().T)
    assert layer.backend == "first"
    assert cli.run(["explain", "--device", "cpu", "--dtype", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == "first"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "unpacking")
    assert dispatch.select(LinearProblem.of(packed.layout, 1, torch.float32, "cpu")).name == (
        "unpacking"
    )


@pytest.mark.filterwarnings("ignore:unpack-all 1.2 cannot add the entry point .cpu.")
def test_a_backend_that_cannot_be_used_is_named_and_the_others_run(install):
    install("unpack-all", BACKEND, plugins.BACKENDS, {"unpacking": "MISSING", "cpu": "UNPACKING"})
    problem = LinearProblem.of(PackedLayout(8, 64, "int4", 32, 1, 0), 1, torch.float32, "cpu")
    with pytest.warns(
        RuntimeWarning, match="unpack-all 1.2 cannot add the entry point 'unpacking'"
    ):
        assert dispatch.order() == dispatch.ORDER
    assert dispatch.select(problem).name in dispatch.ORDER
    with pytest.raises(BackendError, match=r"'unpacking' is not usable: unpack-all 1.2 cannot"):
        dispatch.select(problem, "unpacking")
