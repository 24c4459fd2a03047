"""Settings of their own for layers whose names match a pattern."""

from __future__ import annotations

import json
import re

import pytest
import tiny_models

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.compression.by_pattern import NAMES, ByPattern
from slab_kernels.compression.model import compress
from slab_kernels.errors import ArgumentError, BudgetError, FormatError, MethodError

QUICK = dict(calibration=tiny_models.tokens(3, 16), progress=False, rounds=0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_models.write(folder)
    return folder


def layers(record) -> dict[str, tuple]:
    return {n.name: (n.values, n.planes, n.rank, n.adapter_rank) for n in record.layers}


def test_later_patterns_win_setting_by_setting():
    found = ByPattern.of(
        [
            ("proj", {"values": "int8"}),
            (r"\.0\..*down", {"values": "int3", "planes": 2}),
            ("proj", {"rank": 2}),
        ]
    )
    assert found.own("model.layers.0.mlp.down_proj") == {"values": "int3", "planes": 2, "rank": 2}
    assert found.own("model.layers.1.mlp.down_proj") == {"values": "int8", "rank": 2}
    assert found.own("lm_head") == {} and ByPattern.of(None).own("lm_head") == {}


def test_layers_are_stored_as_their_pattern_says(tmp_path):
    tiny_models.write(tmp_path / "m", tie_word_embeddings=False)
    wanted = {
        "mlp": {"values": "int8", "planes": 1},
        r"layers\.1\.mlp\.down_proj$": {"adapter_rank": 2, "adapter_values": "fp16"},
        "^lm_head$": {"values": "bf16", "rank": 2},
    }
    settings = dict(values="int4", planes=2, head=True, settings_by_pattern=wanted)
    record = compress(tmp_path / "m", tmp_path / "out", **QUICK, **settings)
    found = layers(record)
    assert found.pop("lm_head") == ("bf16", 2, 2, 0)
    assert found.pop("model.layers.1.mlp.down_proj") == ("int8", 1, 1, 2)
    for name, stored in found.items():
        assert stored == (("int8", 1, 1, 0) if ".mlp." in name else ("int4", 2, 1, 0)), name
    opened = slab_kernels.load(tmp_path / "out")
    for layer in record.layers:
        layout = opened.get_submodule(layer.name).layout
        assert (layout.values, layout.planes) == (layer.values, layer.planes)
        assert layout.rank == layer.rank
    down = opened.get_submodule("model.layers.1.mlp.down_proj").layout
    assert down.adapter_rank == 2 and down.adapter_values is None
    written = json.loads((tmp_path / "out" / "slab_run.json").read_text())["settings"]
    assert written["preset"] is None and written["layers"]["lm_head"] == wanted["^lm_head$"]
    assert written["settings_by_pattern"] == [list(pair) for pair in wanted.items()]
    assert len(written["layers"]) == 7
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Layers mlp | values=int8, planes=1 |" in card and "fp16 or int8" in card
    again = compress(tmp_path / "m", tmp_path / "out", **QUICK, **settings, resume=True)
    assert layers(again) == layers(record)


def test_the_command_line_and_transformers_take_them(dense, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    (tmp_path / "t.txt").write_text(tiny_models.text(90))
    read = ["--calibration", str(tmp_path / "t.txt"), "--samples", "2", "--window", "16"]
    command = [
        "compress",
        str(dense),
        str(tmp_path / "out"),
        *read,
        "--option",
        "rounds=0",
    ]
    first = ["--set", "down_proj|up_proj:values=int8,group_size=0", "--set", "layers.0:planes=1"]
    assert cli.run([*command, *first, "--set", "up:values=fp16"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "slab_run.json").read_text())
    for layer in record["layers"]:
        name = layer["name"]
        values = "int8" if "down" in name else "fp16" if "up" in name else "int4"
        assert layer["values"] == values and layer["planes"] == (1 if ".0." in name else 2)
        assert layer["group_size"] == (None if values != "int4" else 32)
    config = slab_kernels.SlabConfig(
        values="int4", settings_by_pattern={"down": {"values": "int8"}}, **QUICK
    )
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    found = {n: m.layout.values for n, m in model.named_modules() if hasattr(m, "layout")}
    assert {v for n, v in found.items() if "down" in n} == {"int8"} and "int4" in found.values()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"nothing": {"values": "int8"}}, ArgumentError, "'nothing' matches none of the 14 layers"),
        ({"(": {"values": "int8"}}, ArgumentError, "'\\(' is no regular expression: "),
        ({"": {"values": "int8"}}, ArgumentError, "'' must be a regular expression"),
        ({"mlp": {}}, ArgumentError, "'mlp' has {}, and must have settings"),
        ({"mlp": {"method": "wanda"}}, ArgumentError, "'method', which is none of .*: values, "),
        ({"mlp": {"values": "int5"}}, FormatError, "values='int5' for the layers 'mlp' is unknown"),
        ({"mlp": {"planes": "x"}}, FormatError, "planes='x' for the layers 'mlp' must be"),
        ({"mlp": {"planes": 4}}, MethodError, r"model.layers.0.mlp.\w+: planes=4"),
        ({"down": {"rank": 99}}, FormatError, "0.mlp.down_proj: rank=99 must lie in 0 .. 32"),
        ({"down": {"group_size": 48}}, FormatError, "down_proj: group_size=48 must be one of"),
        ("mlp:values=int8", ArgumentError, "must be a dict from a pattern"),
        ([("mlp",)], ArgumentError, "must be a dict from a pattern"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_is_written(given, error, message, dense, tmp_path):
    with pytest.raises(error, match=message):
        compress(dense, tmp_path / "out", **QUICK, settings_by_pattern=given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mlp", "must be PATTERN:NAME=VALUE"),
        (":values=int8", "must be PATTERN:NAME=VALUE"),
        ("mlp:values", "must be PATTERN:NAME=VALUE"),
        ("mlp:values=", "must be PATTERN:NAME=VALUE"),
        ("mlp:values=int8,", "must be PATTERN:NAME=VALUE"),
        ("mlp:colour=red", "--set: 'mlp' has the setting 'colour'"),
        ("mlp:values=4", "--values 4|values=4 for the layers 'mlp'"),
        ("absent:values=int8", "--set: 'absent' matches none of the 14 layers"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_an_entry(entry, message, dense, tmp_path, capsys):
    assert cli.run(["compress", str(dense), str(tmp_path / "out"), "--set", entry]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_a_budget_of_bits_chooses_itself():
    with pytest.raises(BudgetError, match="bits=4 chooses the settings of every layer"):
        compress(tiny_models.model(), bits=4, settings_by_pattern={"mlp": {"rank": 2}}, **QUICK)
    assert set(NAMES) >= {"values", "planes", "rank", "adapter_rank"}, "what a budget chooses"
