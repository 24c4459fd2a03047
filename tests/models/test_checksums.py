"""A checksum for every tensor: written by every writer, compared by every reader; and what is
loaded is a copy."""

from __future__ import annotations

import json
import shutil
import zlib
from copy import deepcopy
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.errors import ArgumentError, CheckpointError
from slab_kernels.models.folder import VERIFY, Checkpoint
from slab_kernels.models.shards import CHECKSUMS

SETTINGS = {"method": "slab-paper", "calibration": tiny_models.tokens(), "progress": False}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A packed folder fourteen linears in three files."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_models.write(folder / "dense")
    slab_kernels.compress(folder / "dense", folder / "out", **SETTINGS)
    return folder / "out"


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def flip(file: Path, position: int, bit: int = 0) -> None:
    """One bit of a file turned over."""
    with file.open("r+b") as f:
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ 1 << bit]))


def a_sign(folder: Path) -> str:
    """Turn one sign over, which every other check lets pass; returns the tensor's name."""
    name = "model.layers.1.mlp.up_proj.signs"
    entry = Checkpoint(folder).entries[name]
    flip(folder / entry.file, entry.start + 3)
    return name


def test_the_shard_holds_crc32_of_every_tensors_bytes(packed):
    for file in packed.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            table, names = json.loads(f.metadata()[CHECKSUMS]), set(f.keys())
            assert table.keys() == names and f.metadata()["format"] == "pt"
            for name in names:
                data = (
                    f.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
                assert int(table[name], 16) == zlib.crc32(data) and len(table[name]) == 8


def test_every_flipped_bit_in_data_is_refused(copy):
    """In every tensor a bit of the first, the middle and the last byte; read one by one, as load
    does."""
    checkpoint, flipped = Checkpoint(copy), 0
    for name, entry in checkpoint.entries.items():
        for offset in {0, entry.nbytes // 2, entry.nbytes - 1}:
            position, bit = entry.start + offset, (offset + flipped) % 8
            flip(copy / entry.file, position, bit)
            with pytest.raises(
                CheckpointError, match=f"tensor '{name}' in .* is damaged: its checksum is"
            ):
                Checkpoint(copy).get(name)
            flip(copy / entry.file, position, bit)
            flipped += 1
    assert flipped > 200
    Checkpoint(copy).verify()


@pytest.mark.parametrize(
    "use",
    [
        slab_kernels.load,
        AutoModelForCausalLM.from_pretrained,
        lambda folder: slab_kernels.decompress(folder, folder.parent / "dense"),
        lambda folder: Checkpoint(folder).verify(),
    ],
)
def test_every_reader_compares(copy, use):
    name = a_sign(copy)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' in .* is damaged: its checksum is"):
        use(copy)
    assert not (copy.parent / "dense").exists()


def test_comparing_can_be_left_out(copy, tmp_path, monkeypatch, capsys):
    a_sign(copy)
    text = tmp_path / "t.txt"
    text.write_text(tiny_models.text())
    assert slab_kernels.load(copy, verify=False)
    slab_kernels.decompress(copy, tmp_path / "dense", verify=False)
    assert cli.run(["eval", str(copy), "--text", str(text), "--window", "16"]) == 3
    assert "is damaged" in capsys.readouterr().err
    monkeypatch.setenv(VERIFY, "1")  # which the command sets to 0 for its process
    assert cli.run(["eval", str(copy), "--text", str(text), "--window", "16", "--no-verify"]) == 0
    monkeypatch.setenv(VERIFY, "0")
    AutoModelForCausalLM.from_pretrained(copy)


def test_another_word_for_comparing_is_refused(copy, monkeypatch, capsys):
    monkeypatch.setenv(VERIFY, "no")
    with pytest.raises(ArgumentError, match=f"{VERIFY}=no is neither 0"):
        slab_kernels.load(copy)
    assert cli.run(["inspect", str(copy)]) == 2 and VERIFY in capsys.readouterr().err


def test_folders_without_checksums_load_as_before(copy):
    """As older versions and other programs write them; the function is that of the folder with
    checksums."""
    want = slab_kernels.load(copy)(tiny_models.tokens()).logits
    for file in copy.glob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt"})
    assert all(entry.checksum is None for entry in Checkpoint(copy).entries.values())
    assert torch.equal(slab_kernels.load(copy)(tiny_models.tokens()).logits, want)


@pytest.mark.parametrize("table", ["{", "[1]", '{"a": 1, "a"}', "[" * 5000])
def test_a_damaged_table_is_named(copy, table):
    file = next(copy.glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt", CHECKSUMS: table})
    with pytest.raises(CheckpointError, match="is corrupt .its metadata cannot be read"):
        Checkpoint(copy)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("opener", [AutoModelForCausalLM.from_pretrained, slab_kernels.load])
def test_save_pretrained_writes_them_under_the_names_that_it_gives(tmp_path, opener, original):
    """GPT-NeoX's tensors are renamed on the way to the disk, or not."""
    tiny_models.write(tmp_path / "dense", "gpt_neox")
    slab_kernels.compress(tmp_path / "dense", tmp_path / "packed", **SETTINGS)
    opened = opener(tmp_path / "packed")
    opened.save_pretrained(tmp_path / "again", max_shard_size="30KB", save_original_format=original)
    again = Checkpoint(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert all(entry.checksum for entry in again.entries.values())
    again.verify()


def test_a_loaded_model_is_one_of_transformers_own(copy):
    """It can be copied, and `dequantize` of transformers makes its linears dense."""
    model, ids = slab_kernels.load(copy), tiny_models.tokens()
    before = model(ids).logits
    again = deepcopy(model)
    again.dequantize()
    assert not any(isinstance(module, slab_kernels.SlabLinear) for module in again.modules())
    torch.testing.assert_close(again(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids).logits, before)


def test_a_loaded_model_does_not_change_with_its_files(copy):
    """Rewritten in place, then cut off: a mapped model would follow the first and die of the
    second."""
    ids = tiny_models.tokens()
    models = [slab_kernels.load(copy), AutoModelForCausalLM.from_pretrained(copy)]
    before = [model(ids).logits for model in models]
    for file in copy.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert all(
        torch.equal(model(ids).logits, want) for model, want in zip(models, before, strict=True)
    )
    for file in copy.glob("*.safetensors"):
        file.write_bytes(b"")
    assert all(
        torch.equal(model(ids).logits, want) for model, want in zip(models, before, strict=True)
    )


def test_a_shard_that_changes_while_it_is_read_is_named(copy):
    checkpoint = Checkpoint(copy)
    file = copy / checkpoint.entries["model.norm.weight"].file
    save_file({name: t + 1 for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="was changed while it was being read; start again"):
        checkpoint.get("model.norm.weight")
