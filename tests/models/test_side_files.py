"""What a model folder holds beside weights goes along, whatever its name; nothing from outside the
folder does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.errors import CheckpointError
from slab_kernels.models import folder
from slab_kernels.models.model_config import read_generation_config
from slab_kernels.models.side_files import (
    NOT_DOWNLOADED,
    copy_side_files,
    side_files,
)

SETTINGS = {"method": "magnitude", "calibration": tiny_models.tokens()}
CARRIED = (
    "tokenizer.json",
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_x.py",
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool_use.jinja",
    "original/params.json",
    "1_Pooling/config.json",
    "logo.png",
)
LEFT = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "optimizer.pt",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "config.json",
    "slab_run.json",
    "slab_progress.json",
    ".slab_lock",
    "a.json.partial",
    ".git/config",
    ".cache/x",
    ".gitattributes",
)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_file_of_an_absurd_size_is_named_and_left(tmp_path):
    fill(tmp_path / "m", "tokenizer_config.json", "a.txt")
    (tmp_path / "o").mkdir()
    os.truncate(tmp_path / "m" / "tokenizer_config.json", 8 << 30)
    skipped = copy_side_files(tmp_path / "m", tmp_path / "o")
    assert skipped == ["tokenizer_config.json (larger than 1 GiB)"]
    assert names(tmp_path / "o") == {"a.txt"}


def test_everything_but_weights_and_what_is_written_anew(tmp_path):
    fill(tmp_path / "m", *CARRIED, *LEFT)
    (tmp_path / "o").mkdir()
    assert copy_side_files(tmp_path / "m", tmp_path / "o") == []
    assert names(tmp_path / "o") == set(CARRIED)
    assert (tmp_path / "o" / "original" / "params.json").read_text() == "original/params.json"


def test_links_out_of_the_folder_are_skipped_and_named(tmp_path):
    fill(
        tmp_path, "secret.txt", "other/token.txt", "m/vocab.txt", "m/.hidden", "m/model.safetensors"
    )
    links = {
        "a.txt": "../secret.txt",
        "b": "../other",
        "c.txt": "nowhere",
        "d.txt": "vocab.txt",
        "e.txt": ".hidden",
        "f.txt": "model.safetensors",
        "g.txt": "../secret.txt",
        "sub/h.txt": "../../secret.txt",
    }
    (tmp_path / "m" / "sub").mkdir()
    for name, target in links.items():
        os.symlink(target, tmp_path / "m" / name)
    os.mkfifo(tmp_path / "m" / "pipe")
    carried, skipped = side_files(tmp_path / "m")
    assert [str(p) for p in carried] == ["d.txt", "vocab.txt"]
    out = "a link out of the folder"
    assert skipped == [
        f"a.txt ({out})",
        "b (a link to a folder)",
        "c.txt (a link to no file)",
        "e.txt (a link to no side file)",
        "f.txt (a link to no side file)",
        f"g.txt ({out})",
        "pipe (no regular file)",
        f"sub/h.txt ({out})",
    ]


def test_the_hubs_cache_is_links_to_its_own_blobs(tmp_path):
    cache = tmp_path / "models--x--y"
    fill(cache, "blobs/1234", "snapshots/abc/plain.txt", "refs/main")
    for name, target in {
        "t.json": "../../blobs/1234",
        "sub/u.json": "../../../blobs/1234",
        "v.json": "../../refs/main",
    }.items():
        (cache / "snapshots/abc" / name).parent.mkdir(exist_ok=True)
        os.symlink(target, cache / "snapshots/abc" / name)
    carried, skipped = side_files(cache / "snapshots/abc")
    assert [str(p) for p in carried] == ["plain.txt", "sub/u.json", "t.json"]
    assert skipped == ["v.json (a link out of the folder)"]


def test_another_model_below_and_the_folder_being_written_stay_behind(tmp_path):
    fill(
        tmp_path,
        "vocab.txt",
        "draft/config.json",
        "draft/model.safetensors",
        "draft/vocab.txt",
        "out/vocab.txt",
    )
    assert side_files(tmp_path, tmp_path / "out") == (
        [Path("vocab.txt")],
        ["draft (another model)"],
    )


def test_what_is_downloaded_is_what_is_carried_and_the_weights(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **how: asked.update(how) or str(tmp_path)
    )
    folder.hub_folder("someone/model")
    found = set(filter_repo_objects([*CARRIED, *LEFT], **asked))
    assert asked == {"ignore_patterns": NOT_DOWNLOADED}
    assert found == {
        *CARRIED,
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "slab_run.json",
        "slab_progress.json",
    }


def test_compress_and_decompress_carry_files_and_say_what_they_leave(tmp_path, capsys):
    dense = tiny_models.write(tmp_path / "m")
    fill(tmp_path / "m", "tekken.json", "templates/tool.jinja")
    fill(tmp_path, "secret.txt")
    os.symlink("../secret.txt", tmp_path / "m" / "notes.txt")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights |= {
        f"model.layers.{n}.mlp.up_proj.bias": dense.model.norm.weight[:1].clone() for n in range(4)
    }
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    said = []
    slab_kernels.compress(
        tmp_path / "m", tmp_path / "o", progress=lambda event: said.append(str(event)), **SETTINGS
    )
    assert any(
        "tensors that LlamaForCausalLM of config.json does not have are left out: model." in s
        and "and 1 more" in s
        for s in said
    )
    assert "warning: files are left out: notes.txt (a link out of the folder)" in said
    assert {"tekken.json", "templates/tool.jinja", "tokenizer.json"} <= names(tmp_path / "o")
    os.symlink("../secret.txt", tmp_path / "o" / "more.txt")
    assert cli.run(["decompress", str(tmp_path / "o"), str(tmp_path / "d")]) == 0
    assert "warning: left out more.txt (a link out of the folder)" in capsys.readouterr().err
    assert {"tekken.json", "templates/tool.jinja", "tokenizer.json"} <= names(tmp_path / "d")
    assert not {"notes.txt", "more.txt", "slab_run.json"} & (
        names(tmp_path / "d") | {"notes.txt"} & names(tmp_path / "o")
    )


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"max_length": "long"}',
        '{"output_hidden_states": "yes"}',
        '{"min_p": {}}',
        '{"use_cache": 0.5}',
        '{"eos_token_id": {"a": 1}}',
        '{"temperature": [1]}',
        '{"compile_config": "x"}',
        '{"watermarking_config": [1]}',
        '{"top_k": 1' + "0" * 400 + "}",
    ],
)
def test_a_generation_config_that_cannot_be_used_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


def test_a_generation_config_is_read_as_it_was_written(tmp_path):
    from transformers import GenerationConfig

    settings = {
        "eos_token_id": [1, 2],
        "do_sample": True,
        "temperature": 0.5,
        "stop_strings": ["x"],
        "cache_implementation": "static",
        "suppress_tokens": [3],
        "language": "<|en|>",
    }
    GenerationConfig(**settings).save_pretrained(tmp_path)
    found, want = (
        read_generation_config(tmp_path).to_dict(),
        GenerationConfig.from_pretrained(tmp_path).to_dict(),
    )
    assert found == want and found["eos_token_id"] == [1, 2] and found["language"] == "<|en|>"
