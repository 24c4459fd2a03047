"""config.json, index, record and headers of any content end in one named error, soon, before
anything large is built."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.compression.record import RunRecord, layer_from_dict
from slab_kernels.errors import BackendError, CheckpointError, FormatError
from slab_kernels.evaluate.inspect import inspect
from slab_kernels.evaluate.running import running
from slab_kernels.models.folder import INDEX_NAME, RECORD_NAME, Checkpoint
from slab_kernels.models.packed import check_finite
from slab_kernels.models.shards import MAX_DEPTH, read_json
from slab_kernels.models.source import FolderSource

HUGE = 10**400
MODULE = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny_models.write(folder / "dense")
    slab_kernels.compress(
        folder / "dense",
        folder / "out",
        method="magnitude",
        calibration=tiny_models.tokens(),
        progress=False,
    )
    return folder / "out"


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def change(file: Path, *path, value) -> None:
    """Set one entry of a JSON file, reached by keys and positions."""
    content = json.loads(file.read_text())
    entry = content
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    file.write_text(json.dumps(content))


def refused_by_all(folder: Path, out: Path) -> None:
    for use in (slab_kernels.load, inspect, lambda f: slab_kernels.decompress(f, out)):
        with pytest.raises((CheckpointError, FormatError)) as caught:
            use(folder)
        assert len(str(caught.value)) < 1000
    assert not out.exists()


@pytest.mark.parametrize(
    "value", ["2", [1], {"a": 1}, HUGE, -1, True, None, 1.5, "x" * 10**6, [[[[[[[[1]]]]]]]] * 99]
)
@pytest.mark.parametrize("key", ["out_features", "in_features", "values", "factors"])
def test_a_malformed_module(copy, tmp_path, key, value):
    change(copy / "config.json", "quantization_config", "modules", MODULE, key, value=value)
    refused_by_all(copy, tmp_path / "d")


@pytest.mark.parametrize("key", ["group_size", "rank", "adapter_rank", "planes", "adapter_values"])
def test_a_malformed_setting_of_a_module(copy, tmp_path, key):
    for value in ("2", [1], {"a": 1}, HUGE, -1):
        change(copy / "config.json", "quantization_config", "modules", MODULE, key, value=value)
        refused_by_all(copy, tmp_path / "d")


@pytest.mark.parametrize(
    "value",
    ["packed", 7, [], [1], {}, {MODULE: 7}, {MODULE: []}, {MODULE: {}}, {MODULE: None}, None],
)
def test_malformed_modules(copy, tmp_path, value):
    change(copy / "config.json", "quantization_config", "modules", value=value)
    refused_by_all(copy, tmp_path / "d")


@pytest.mark.parametrize("value", ["2", 0, True, HUGE, [2], None, 2.0])
def test_a_malformed_format_version(copy, tmp_path, value):
    change(copy / "config.json", "quantization_config", "format_version", value=value)
    refused_by_all(copy, tmp_path / "d")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "in the format 7, which is not read"),
        ("gptq", "in the format 'gptq', which is not read"),
        ([1], r"in the format \[1\], which is not read"),
        (
            {"quant_method": ["slab_kernels"]},
            r"in the format \['slab_kernels'\], which is not read",
        ),
        ({"quant_method": "gptq", "modules": [1]}, "bits=None, and one of 2, 4, 8 can be read"),
    ],
)
def test_another_quantization_is_told_and_not_loaded(copy, value, words):
    (copy / RECORD_NAME).unlink()
    change(copy / "config.json", "quantization_config", value=value)
    with pytest.raises(CheckpointError, match=words):
        inspect(copy)
    with pytest.raises(CheckpointError, match="was not written by slab_kernels"):
        slab_kernels.load(copy)


def test_a_config_that_lost_its_entry_is_told(copy, tmp_path, capsys):
    """Its tensors show that the folder is packed, so it is neither read as dense nor called so."""
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    words = r"holds packed layers .*config.json has lost the entry quantization_config"
    out = tmp_path / "out"
    for use in (inspect, slab_kernels.load, lambda folder: slab_kernels.decompress(folder, out)):
        with pytest.raises(CheckpointError, match=words):
            use(copy)
    for command in (["inspect", str(copy)], ["compress", str(copy), str(out)]):
        assert cli.run(command) == 3 and "has lost the entry" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers",), "many"),
        (("layers",), []),
        (("layers",), {"a": 1}),
        (("layers", 0), 7),
        (("layers", 0), {"name": "x"}),
        (("layers", 0, "name"), ["x"]),
        (("layers", 0, "shape"), "4x4"),
        (("layers", 0, "shape"), [0, 4]),
        (("layers", 0, "shape"), [4, 4, 4]),
        (("layers", 0, "error"), "small"),
        (("layers", 0, "error"), HUGE),
        (("layers", 0, "rank"), HUGE),
        (("layers", 0, "bits_per_weight"), None),
        (("layers", 0, "group"), [1]),
        (("layers", 0, "block"), True),
        (("settings",), []),
        (("matching",), {"a": 1}),
        (("matching",), [7]),
        (("model",), {}),
        (("ignored_tensors",), [1]),
    ],
)
def test_a_malformed_record(copy, path, value, capsys):
    change(copy / RECORD_NAME, *path, value=value)
    with pytest.raises(CheckpointError, match=r"slab_run\.json"):
        inspect(copy)
    assert cli.run(["inspect", str(copy)]) == 3 and "slab_run.json" in capsys.readouterr().err


def test_a_record_is_read_as_it_was_written(packed):
    content = json.loads((packed / RECORD_NAME).read_text())
    record = RunRecord.from_dict(
        content | {"later": 1, "layers": [layer | {"later": [2]} for layer in content["layers"]]}
    )
    assert json.loads(json.dumps(record.to_dict())) == content
    with pytest.raises(CheckpointError, match="lacks 'block' in a LayerRecord"):
        layer_from_dict({"name": "x"})


@pytest.mark.parametrize("file", ["config.json", RECORD_NAME, INDEX_NAME])
@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "7",
        "{",
        '"text"',
        "null",
        deep(MAX_DEPTH + 1),
        deep(900),
        deep(100_000),
        "\xff",
        "{'a': 1}",
    ],
)
def test_files_that_are_no_json_object(copy, file, content):
    (copy / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=file):
        inspect(copy)


def test_a_sparse_file_is_not_read(copy):
    with (copy / "config.json").open("r+b") as f:
        f.truncate(8 << 30)
    with pytest.raises(CheckpointError, match=r"config\.json is larger than 64 MiB"):
        Checkpoint(copy)
    assert read_json(copy / RECORD_NAME)


@pytest.mark.parametrize("count", [1 << 40, HUGE])
def test_a_table_of_labels_is_not_made_before_its_size_is_seen(copy, count):
    change(copy / "config.json", "num_labels", value=count)
    with pytest.raises(CheckpointError, match="has num_labels=.*, which no model has"):
        slab_kernels.load(copy)


@pytest.mark.parametrize(
    "use",
    [
        slab_kernels.load,
        lambda f: slab_kernels.decompress(f, f / "d"),
        lambda f: FolderSource(f.parent / "dense"),
    ],
)
def test_far_more_blocks_than_the_files_hold_are_refused_before_they_are_built(copy, tmp_path, use):
    tiny_models.write(tmp_path / "dense")
    for folder in (copy, tmp_path / "dense"):
        change(folder / "config.json", "num_hidden_layers", value=4000)
    began = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=r"has num_hidden_layers=4000, and the files hold 2 blocks"
    ):
        use(copy)
    assert time.perf_counter() - began < 5


def test_transformers_neither_builds_far_more_blocks_nor_reads_a_huge_generation_config(copy):
    """from_pretrained sees the first before it builds the model, the second before it reads it."""
    (copy / "generation_config.json").write_text("{}")
    with (copy / "generation_config.json").open("r+b") as f:
        f.truncate(8 << 30)
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match="generation_config.json is larger than 64 MiB"):
        AutoModelForCausalLM.from_pretrained(copy)
    change(copy / "config.json", "num_hidden_layers", value=4000)
    with pytest.raises(CheckpointError, match="has num_hidden_layers=4000, and .* 2 blocks"):
        AutoModelForCausalLM.from_pretrained(copy)
    assert time.perf_counter() - began < 5


def test_a_shard_of_a_name_too_long_for_any_file(copy):
    index = json.loads((copy / INDEX_NAME).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "x" * 300 + ".safetensors")
    (copy / INDEX_NAME).write_text(json.dumps(index))
    for opener in (slab_kernels.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="x{255}"):
            opener(copy)


def test_a_model_that_does_not_run_is_the_folder_s_fault(copy, capsys):
    tiny_models.tokenizer().save_pretrained(copy)
    change(copy / "config.json", "return_dict", value=False)
    (copy / "text.txt").write_text(tiny_models.text(40))
    arguments = [str(copy), "--text", str(copy / "text.txt")]
    assert cli.run(["eval", *arguments, "--window", "16"]) == 3
    assert f"the model of {copy} does not run: AttributeError" in capsys.readouterr().err
    assert cli.run(["eval", *arguments, "--window", "65"]) == 2  # longer than its positions


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bos_token", "another", "makes ids up to 96, but the model's vocabulary has 96"),
        ("model_max_length", {"a": 1}, "no tokenizer can be loaded"),
        (None, None, "tokenizer_config.json is larger than 256 MiB"),
    ],
)
def test_a_tokenizer_that_does_not_work_is_the_folder_s_fault(copy, capsys, key, value, said):
    tiny_models.tokenizer().save_pretrained(copy)
    if key:
        change(copy / "tokenizer_config.json", key, value=value)
    else:
        with (copy / "tokenizer_config.json").open("r+b") as f:
            f.truncate(8 << 30)
    (copy / "text.txt").write_text(tiny_models.text(40))
    for command in (
        ["eval", "--window", "16", "--text", str(copy / "text.txt")],
        ["generate", "--prompt", "another"],
    ):
        assert cli.run([command[0], str(copy), *command[1:]]) == 3
        assert said in capsys.readouterr().err


def test_only_what_a_model_itself_raises_is_named_after_its_folder():
    for error in (MemoryError(), ImportError(), OSError(), BackendError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), running(nn.Linear(1, 1)):
            raise error
    for error in (ValueError("a\nb"), KeyError("k"), RuntimeError(), AssertionError()):
        with pytest.raises(CheckpointError, match="the model of Linear does not run: "):
            with running(nn.Linear(1, 1)):
                raise error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_numbers_are_no_weights_and_may_bound_what_is_none(dtype):
    for number, buffer in (
        (math.nan, False),
        (math.nan, True),
        (math.inf, False),
        (-math.inf, False),
    ):
        with pytest.raises(CheckpointError, match="holds NaN or infinite"):
            check_finite("t", torch.tensor([0, number], dtype=dtype), buffer)
    check_finite("t", torch.tensor([0, -math.inf], dtype=dtype), buffer=True)
    check_finite("t", torch.tensor([0.0, 1.0], dtype=dtype))


def test_what_a_folder_holds_is_a_format_error_with_the_exit_code_of_a_file(copy, tmp_path, capsys):
    """An argument that breaks the format exits with 2, a folder with 3; `except FormatError`
    catches both."""
    change(copy / "config.json", "quantization_config", "modules", MODULE, "values", value="fp7")
    with pytest.raises(FormatError, match=f"'{MODULE}': values='fp7' is unknown") as caught:
        slab_kernels.load(copy)
    assert (
        isinstance(caught.value, CheckpointError)
        and type(caught.value).__name__ == "ValueTypeError"
    )
    assert (
        cli.run(["inspect", str(copy)])
        == cli.run(["decompress", str(copy), str(tmp_path / "d")])
        == 3
    )
    assert cli.run(["compress", str(copy), str(tmp_path / "d"), "--values", "fp7"]) == 2


@pytest.mark.parametrize("value", ["\x1b[31m" + "x" * 10_000, "\x1b[31m"])
def test_what_transformers_says_of_a_value_is_cut_and_spelled_out(copy, value):
    """Its messages hold the value itself, which may steer a terminal or fill it."""
    change(copy / "config.json", "hidden_act", value=value)
    with pytest.raises(CheckpointError, match="transformers cannot use") as caught:
        slab_kernels.load(copy)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


def test_check_names_what_transformers_alone_cannot_read(copy, capsys):
    """transformers wants `metadata` in the index, and says only that a key is missing."""
    weight_map = json.loads((copy / INDEX_NAME).read_text())["weight_map"]
    (copy / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    slab_kernels.load(copy)
    assert cli.run(["check", str(copy)]) == 3
    assert "cannot open it" in capsys.readouterr().err
