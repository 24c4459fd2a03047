"""Which files of a folder are the model: those that transformers reads, wherever there are several
sets of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.errors import CheckpointError
from slab_kernels.models.folder import INDEX_NAME, Checkpoint
from slab_kernels.models.source import FolderSource

NORM = "model.norm.weight"


def rewrite(file: Path, value: float, to: Path | None = None) -> None:
    """The last norm of a shard filled with `value`, in a copy `to` or in place."""
    tensors = load_file(file)
    tensors[NORM] = torch.full_like(tensors[NORM], value)
    save_file(tensors, to or file, {"format": "pt"})


@pytest.fixture
def dense(tmp_path) -> Path:
    """One file with the norm 1, a second with 2, and an index and a variant of the second."""
    folder = tmp_path / "dense"
    tiny_models.write(folder)
    one = folder / "model.safetensors"
    rewrite(one, 2, folder / "model-00001-of-00001.safetensors")
    rewrite(one, 3, folder / "model.fp16.safetensors")
    rewrite(one, 1)
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(one), "model-00001-of-00001.safetensors"),
    }
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def name_weights(folder: Path, name) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


@pytest.mark.parametrize(
    ("named", "removed", "want"),
    [
        (None, None, 1),
        (None, "model.safetensors", 2),
        ("model.fp16.safetensors", None, 3),
        (INDEX_NAME, None, 2),
    ],
)
def test_the_choice_is_that_of_transformers(dense, named, removed, want):
    if removed:
        (dense / removed).unlink()
    if named:
        name_weights(dense, named)
    source = FolderSource(dense)
    theirs = AutoModelForCausalLM.from_pretrained(dense).state_dict()[NORM]
    assert torch.equal(source.get(NORM), torch.full((32,), float(want))) and torch.equal(
        theirs, source.get(NORM)
    )


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", 7, ["a"], "sub/model.safetensors"]
)
def test_weights_named_elsewhere_are_refused(dense, name):
    name_weights(dense, name)
    with pytest.raises(CheckpointError, match="names the weights .* in the same folder"):
        Checkpoint(dense)


def test_a_variant_alone_is_no_model(dense):
    for name in (INDEX_NAME, "model.safetensors", "model-00001-of-00001.safetensors"):
        (dense / name).unlink()
    with pytest.raises(
        CheckpointError, match=r"rename 'model\.fp16\.safetensors' if it is the whole model"
    ):
        Checkpoint(dense)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(dense)


@pytest.fixture
def packed(dense, tmp_path) -> Path:
    name_weights(dense, "model.safetensors")  # not a file of what is written
    slab_kernels.compress(
        dense,
        tmp_path / "packed",
        method="magnitude",
        calibration=tiny_models.tokens(),
        progress=False,
    )
    return tmp_path / "packed"


def test_packed_and_decompressed_folders_name_their_own_files(packed, tmp_path):
    slab_kernels.decompress(packed, tmp_path / "d")
    for folder in (packed, tmp_path / "d"):
        assert "transformers_weights" not in json.loads((folder / "config.json").read_text())
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(folder).state_dict()[NORM], torch.ones(32)
        )


def test_a_variant_of_a_packed_folder_is_checked_itself(packed):
    """The checks before loading look at the files that transformers was told to read."""
    slab_kernels.load(packed).save_pretrained(packed, variant="b")
    rewrite(packed / "model.b.safetensors", 5)
    assert (
        float(AutoModelForCausalLM.from_pretrained(packed, variant="b").state_dict()[NORM][0]) == 5
    )
    tensors = load_file(packed / "model.b.safetensors")
    del tensors["model.layers.0.mlp.up_proj.metadata"]
    save_file(tensors, packed / "model.b.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks tensor 'model\.layers\.0\.mlp\.up_proj\.metadata'"
    ):
        AutoModelForCausalLM.from_pretrained(packed, variant="b")
    AutoModelForCausalLM.from_pretrained(packed)


def test_engines_that_would_read_other_files_can_tell(packed):
    Checkpoint(packed).refuse_other_weights()
    (packed / "stray.safetensors").write_bytes(
        (packed / Checkpoint(packed).entries[NORM].file).read_bytes()
    )
    Checkpoint(
        packed
    ).refuse_other_weights()  # the index does not list it, and such engines follow the index
    shutil.copy(packed / "stray.safetensors", packed / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="two sets of weights"):
        Checkpoint(packed).refuse_other_weights()  # they look for this name first
    (packed / "consolidated.safetensors").unlink()
    slab_kernels.load(packed).save_pretrained(packed)  # one file beside the shards and their index
    with pytest.raises(CheckpointError, match="two sets of weights"):
        Checkpoint(packed).refuse_other_weights()
    (packed / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match="two sets of weights"):
        Checkpoint(packed).refuse_other_weights()
