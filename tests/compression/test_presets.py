"""Presets: what a name stands for, what contradicts it, and where it is told afterwards."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models

import slab_kernels
from slab_kernels import compress
from slab_kernels.cli import main as cli
from slab_kernels.compression import presets
from slab_kernels.compression.arguments import Arguments
from slab_kernels.errors import ArgumentError, BudgetError, SlabError
from slab_kernels.evaluate.inspect import inspect

FOUR = ("values", "planes", "embeddings", "head")


def settings(**given) -> tuple:
    found = Arguments.of(**given).to_dict()
    return tuple(found[name] for name in FOUR)


@pytest.mark.parametrize(
    ("name", "values", "planes"),
    [("small", "int4", 1), ("balanced", "int4", 2), ("exact", "fp16", 2)],
)
def test_a_preset_is_its_four_settings(name, values, planes):
    preset = presets.PRESETS[name]
    assert (preset.values, preset.planes) == (values, planes) and preset.meaning
    assert settings(preset=name) == tuple(preset.settings().values())
    assert settings(preset=name, **preset.settings()) == settings(preset=name)
    given = Arguments.of(preset=name, adapter_rank=4, group_size=32, rank=2, matching=3)
    assert (given.preset, given.plan.usual.adapter_rank) == (name, 4)
    # The name is that of the settings, however they were given.
    assert Arguments.of(**preset.settings()).to_dict()["preset"] == name


def test_without_a_name_every_setting_that_is_not_given_is_that_of_balanced():
    balanced = presets.PRESETS["balanced"].settings()
    assert settings() == settings(preset="balanced") == tuple(balanced.values())
    assert Arguments.of().preset == "balanced"
    assert settings(values="fp16") == tuple((balanced | {"values": "fp16"}).values())
    assert settings(planes=3)[:2] == ("int4", 3) and Arguments.of(planes=3).preset is None
    assert settings(embeddings="int8", head=True)[2:] == ("int8", True)
    # Two planes are nothing without a sign term, and nobody asked for them.
    assert settings(rank=0)[:2] == ("int4", 1) and Arguments.of(rank=0).preset is None


@pytest.mark.parametrize(
    "other", [{"method": "wanda"}, {"method": "slab-paper"}, {"pattern": "4:8"}, {"bits": 4.2}]
)
def test_what_takes_no_preset_begins_plain(other, monkeypatch):
    every = {name: replace(p, embeddings="int8", head=True) for name, p in presets.PRESETS.items()}
    monkeypatch.setattr(presets, "PRESETS", every)
    assert settings(**other) == ("fp16", 1, "dense", False)
    assert Arguments.of(**other).preset is None
    assert settings() == ("int4", 2, "int8", True)
    with pytest.raises((ArgumentError, BudgetError), match="preset='small'.*leave one out"):
        Arguments.of(preset="small", **other)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"preset": "tiny"}, "preset='tiny' is unknown; choose one of small, balanced, exact"),
        ({"preset": 3}, "preset=3 is unknown"),
        ({"preset": ["small"]}, "preset=.'small'. is unknown"),
        (
            {"preset": "small", "values": "int8"},
            "preset='small' means values='int4', and values='int8' contradicts it; leave one out",
        ),
        ({"preset": "small", "planes": 2}, "preset='small' means planes=1, and planes=2"),
        ({"preset": "exact", "embeddings": "int8"}, "means embeddings='dense'"),
        ({"preset": "exact", "head": True}, "means head=False, and head=True contradicts it"),
        ({"preset": "small", "method": "oats"}, "means method='slab', and method='oats'"),
        ({"preset": "small", "pattern": "50%"}, "means pattern='2:4', and pattern='50%'"),
        ({"preset": "small", "bits": 3.6}, "bits=3.6 chooses values and planes layer by layer"),
        ({"preset": "exact", "rank": 0}, "preset='exact' .* rank=0 has no sign term"),
        ({"embeddings": "fp8"}, "embeddings='fp8' is unknown; choose one of dense, int8"),
        ({"embeddings": 8}, "embeddings=8 is unknown"),
        ({"head": 1}, "head=1 must be True or False: whether the output head is packed"),
        ({"head": "yes"}, "head='yes' must be True or False"),
    ],
)
def test_contradictions_are_one_sentence_with_both_values(given, text):
    for make in (Arguments.of, slab_kernels.SlabConfig):
        with pytest.raises(SlabError, match=text) as caught:
            make(**given)
        assert caught.value.exit_code == 2 and isinstance(caught.value, ValueError)


def test_the_record_the_card_and_inspect_name_it(tmp_path, capsys):
    tiny_models.write(tmp_path / "dense", hidden_size=32, intermediate_size=96)
    tokens = tiny_models.tokens()
    record = compress(
        tmp_path / "dense", tmp_path / "out", preset="small", calibration=tokens, rounds=0,
        progress=False,
    )  # fmt: skip
    stored = json.loads((tmp_path / "out" / "slab_run.json").read_text())["settings"]
    for found in (record.settings, stored):
        assert found["preset"] == "small" and found["group_size"] == "auto"
        assert {name: found[name] for name in FOUR} == presets.PRESETS["small"].settings()
    assert {layer.group_size for layer in record.layers} == {32}
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {module["group_size"] for module in modules["modules"].values()} == {32}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Preset | small: " in card and "| Group size | 32 inputs per scale |" in card
    assert inspect(tmp_path / "out")["preset"] == "small"
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "padded" not in shown and "packed, preset small, " in shown and "planes 1" in shown
    slab_kernels.load(tmp_path / "out")


def test_padding_is_named_once_by_the_run_and_by_inspect(tmp_path, capsys):
    tiny_models.write(tmp_path / "dense", hidden_size=32, intermediate_size=40)
    said: list[str] = []
    record = compress(
        tmp_path / "dense", tmp_path / "out", calibration=tiny_models.tokens(), rounds=0,
        progress=lambda event: said.append(str(event)) if event.kind == "warning" else None,
    )  # fmt: skip
    warnings = [line for line in said if "padded" in line]
    layers = [layer for layer in record.layers if layer.shape[1] == 40]
    found = inspect(tmp_path / "out")
    (padding,) = found["padding"]
    assert (padding["layers"], padding["in_features"], padding["padded_in_features"]) == (
        len(layers), 40, 64,
    )  # fmt: skip
    # Two planes of signs, int4 values, metadata and one scale of 16 bits: 24 inputs of 64 too many.
    # A row of V in fp16, for 32 outputs, is padded too.
    of_an_input = 2 + 1 + 1 + 16 / 64 + 16 / 32
    assert padding["bits_per_weight"] == pytest.approx(of_an_input * 24 / 40)
    assert layers[0].group_size == 64 and len(warnings) == 1
    shown = f"{len(layers)} layers with K=40 to 64 for groups of 64, "
    assert f"inputs are padded, {shown}{padding['bits_per_weight']:.3f} bits" in warnings[0]
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    assert f"padded inputs: {shown}" in capsys.readouterr().out
    by_layer = {layer["name"]: layer["padded_in_features"] for layer in found["layers"]}
    assert by_layer[layers[0].name] == 64 and set(by_layer.values()) == {32, 64}


def test_the_command_line_takes_and_refuses_them(tmp_path, capsys):
    tiny_models.write(tmp_path / "dense", hidden_size=32, intermediate_size=64)
    (tmp_path / "text.txt").write_text(tiny_models.text())
    command = [
        *("compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--calibration"),
        *(str(tmp_path / "text.txt"), "--window", "16", "--samples", "2", "--option", "rounds=0"),
    ]
    for more, text in (
        (["--preset", "small", "--values", "int8"], "--preset 'small' means --values 'int4'"),
        (["--preset", "small", "--bits", "4"], "leave one out"),
        (["--preset", "exact", "--head"], "means --no-head, and --head contradicts it"),
        (["--group-size", "48"], "must be one of 32, 64, 128, 'auto' or 0 (one scale per row)"),
        (["--group-size", "wide"], "--group-size wide must be 32, 64, 128"),
        (["--embeddings", "int4"], "choose one of dense, int8"),
    ):
        assert cli.run([*command, *more]) == 2
        assert text in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.run([*command, "--preset", "small", "--group-size", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert (found["preset"], found["group_size"], found["planes"]) == ("small", None, 1)
