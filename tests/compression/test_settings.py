"""Settings: one rule for each, and the same sentence from Python, command line and SlabConfig."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny_models
import torch

import slab_kernels
from slab_kernels import InputStats, decompose
from slab_kernels.cli import main as cli
from slab_kernels.compression.arguments import Arguments
from slab_kernels.compression.matching import Matching
from slab_kernels.compression.training import Training
from slab_kernels.errors import BudgetError, CalibrationError, MethodError, PatternError, ShapeError
from slab_kernels.methods import METHODS, LayerSettings

NAN, INF = float("nan"), float("inf")
OPTIONS = [(method, option) for method, row in METHODS.items() for option in row.options()]


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return torch.randn(16, 32), InputStats.from_inputs(torch.randn(64, 32))


def wrong(rule) -> list:
    """Values that no setting of this rule can have."""
    if rule.choices:
        return ["nosuch", 3, None, ["x"]]
    if rule.kind is bool:
        return [0, "true", None]
    beyond = [rule.low if rule.above else rule.low - 1, rule.high + 1]
    return [
        *beyond,
        NAN,
        INF,
        -INF,
        True,
        "3",
        None,
        [3],
        torch.ones(2),
        *([2.5] if rule.kind is int else []),
    ]


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_every_option_refuses_what_it_cannot_be_and_takes_the_ends_of_its_range(
    method, option, layer
):
    _, rule = METHODS[method].options()[option]
    for value in wrong(rule):
        with pytest.raises(MethodError, match=rf"^{option}="):
            decompose(*layer, method=method, **{option: value})
    assert rule.meaning and not rule.meaning.endswith(".")
    if rule.kind is not bool and not rule.choices:
        for value in (rule.high, rule.low + 1e-9 if rule.above else rule.low):
            assert (
                Arguments.of(method=method, **{option: value}).plan.usual.options[option] == value
            )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("threebasil", {"iterations": 1, "adapter_rank": 4}),
        ("threebasil", {"iterations": 5, "adapter_rank": 4}),
        ("alps", {"iterations": 2}),
        ("hassle-free", {"inner": "alps", "iterations": 2}),
        ("slab", {"rounds": 0}),
        ("slab", {"iterations": 0}),
        ("oats", {"rounds": 1}),
        ("sslc", {"rounds": 1, "pinned": 1.0}),
        ("sslc", {"pinned": 0}),
        ("slab-paper", {"iterations": 1}),
        ("slim", {"alternations": 1}),
        ("eora", {"pruner": "magnitude", "polish": 0}),
        ("sparsegpt", {"damping": 0}),
        ("slab", {"damping": 0, "relative_damping": 0, "refit_damping": 0}),
    ],
)
@pytest.mark.filterwarnings("ignore:ADMM had not settled")
def test_the_low_ends_work(method, options, layer):
    d = decompose(*layer, method=method, **options)
    assert d.dense().isfinite().all() and bool((d.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


@pytest.mark.filterwarnings("error:ADMM had not settled")
def test_the_admm_says_how_much_still_moved_when_it_is_stopped_early(layer):
    with pytest.raises(RuntimeWarning, match=r"iterations=5: \d+\.\d\d% of the kept positions"):
        decompose(*layer, method="threebasil", iterations=5)


def test_numbers_of_numpy_are_numbers():
    given = Arguments.of(
        rank=numpy.int64(2),
        rounds=numpy.int32(2),
        damping=numpy.float32(0.5),
        drift=1,
        matching=numpy.int64(3),
        samples=numpy.uint8(4),
        seed=numpy.int64(-1),
        skip=None,
    )
    plan, layer = given.plan, given.plan.usual
    assert (
        layer.options == {"rounds": 2, "damping": 0.5, "drift": 1.0}
        and type(layer.options["rounds"]) is int
    )
    assert (
        type(layer.rank) is int
        and plan.matching == Matching(epochs=3)
        and given.sampling.samples == 4
        and given.skip == ()
    )


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"pattern": 24}, PatternError, "pattern=24 is not a pattern"),
        ({"pattern": None}, PatternError, "pattern=None"),
        ({"method": ["slab"]}, MethodError, "unknown"),
        ({"values": ["fp16"]}, ValueError, "values="),
        ({"rank": True}, ShapeError, "rank=True"),
        ({"rank": 1.0}, ShapeError, "rank=1.0"),
        ({"group_size": "128", "values": "int4"}, ShapeError, "group_size='128'"),
        ({"adapter_values": 8}, ValueError, "adapter_values=8"),
        ({"matching": "yes"}, ValueError, "matching='yes' must be a number of epochs"),
        ({"matching": -1}, ValueError, "epochs=-1 of matching"),
        ({"matching": 1.5}, ValueError, "matching=1.5"),
        ({"bits": NAN}, BudgetError, "bits=nan"),
        ({"bits": -1}, BudgetError, "bits=-1"),
        ({"bits": True}, BudgetError, "bits=True"),
        ({"samples": 0}, CalibrationError, "samples=0"),
        ({"samples": 2.0}, CalibrationError, "samples=2.0"),
        ({"window": 1}, CalibrationError, "window=1"),
        ({"seed": 1 << 63}, CalibrationError, r"seed=.* from -2\*\*63 to 2\*\*63 - 1"),
        ({"seed": None}, CalibrationError, "seed=None"),
        ({"skip": 3}, ValueError, "skip=3"),
        ({"skip": ["x", 3]}, ValueError, "skip="),
    ],
)
def test_arguments_are_named_from_python_and_by_slab_config(given, error, text):
    with pytest.raises(error, match=text):
        Arguments.of(**given)
    with pytest.raises(error, match=text):
        slab_kernels.SlabConfig(**given)


def test_matching_and_training_have_rules_too():
    assert (
        Matching.of(True) == Matching()
        and Matching.of(4).epochs == 4
        and Matching.of(Matching(3)).epochs == 3
    )
    assert Matching.of(None) is Matching.of(False) is Matching.of(0) is None
    for settings, wrong in (
        (Matching(), {"epochs": 0, "rate": NAN, "target": "x"}),
        (
            Training(),
            {
                "steps": 0,
                "batch": 0,
                "window": 1,
                "samples": 1,
                "rate": -1,
                "adapter_rank": -1,
                "every": 0,
                "seed": 1 << 64,
            },
        ),
    ):
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=f"^{name}="):
                replace(settings, **{name: value})


def command(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "compress",
        str(model),
        str(out),
        "--calibration",
        str(model / "text.txt"),
        "--window",
        "16",
        "--samples",
        "2",
        *more,
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.write(folder, intermediate_size=64)
    (folder / "text.txt").write_text(tiny_models.text())
    return folder


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--method", "oats", "--option", "rounds=0"), "rounds=0"),
        (("--option", "damping=abc"), "damping='abc'"),
        (("--option", "damping=-5"), "from 0 to 10"),
        (("--option", "drift=nan"), "drift=nan"),
        (("--option", "rounds=true"), "rounds=True"),
        (("--option", "pattern=2:4"), "no option 'pattern'"),
        (("--option", "calibration=x"), "no option 'calibration'"),
        (("--bits", "nan"), "--bits nan"),
        (("--seed", str(1 << 70)), "--seed 1"),
        (
            ("--pattern", "2:5"),
            "model.layers.0.self_attn.q_proj: in_features=32 must be a multiple of 5",
        ),
        (("--pattern", "1:64"), "q_proj"),
        (("--rank", "33"), "q_proj: --rank 33"),
        (("--adapter-rank", "33", "--method", "oats"), "--adapter-rank 33"),
    ],
)
def test_the_command_line_refuses_before_any_text_is_read(
    more, word, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        "slab_kernels.compression.calibration.read_windows",
        lambda *_, **__: pytest.fail("the calibration text was read"),
    )
    assert cli.run(command(model, tmp_path / "out", *more)) == 2
    shown = capsys.readouterr().err
    assert word in shown and "report it" not in shown and not (tmp_path / "out").exists()


def test_info_lists_every_option_with_its_meaning(capsys):
    assert cli.run(["info", "--methods"]) == 0
    shown = capsys.readouterr().out
    for method, option in OPTIONS:
        default, rule = METHODS[method].options()[option]
        assert f"{option}={default}" in shown and rule.range() in shown and rule.meaning in shown


def test_one_object_holds_a_layers_settings_whoever_gives_them():
    keywords = {"method": "slab", "values": "int4", "group_size": 32, "planes": 2, "rounds": 1}
    settings = LayerSettings.from_keywords(**keywords)
    assert settings.options == {"rounds": 1}
    assert settings == Arguments.of(**keywords).plan.usual
    assert settings == LayerSettings(values="int4", group_size=32, planes=2, options={"rounds": 1})
    assert list(settings.to_dict()) == [
        "method", "pattern", "rank", "values", "group_size", "planes", "adapter_rank",
        "adapter_values",
    ]  # fmt: skip
    assert LayerSettings().to_dict()["group_size"] is None  # fp16 values have no scales
    assert settings.layout((16, 64)).planes == 2
    with pytest.raises(ShapeError, match="rank=17 must lie in 0 .. 16"):
        replace(settings, rank=17).config((16, 64))
    with pytest.raises(MethodError, match="method 'wanda' has no option 'rounds'"):
        replace(settings, method="wanda")


@pytest.mark.parametrize("given, meant", [("match", "matching"), ("planse", "planes")])
def test_a_mistyped_argument_is_answered_with_what_was_meant(given, meant):
    with pytest.raises(MethodError, match=f"no option '{given}'; did you mean '{meant}'"):
        slab_kernels.compress("never read", "never written", **{given: 1})
    with pytest.raises(MethodError, match="no option 'qqqqqq'; it has damping"):
        slab_kernels.compress("never read", "never written", qqqqqq=1)
