"""Folders on disk.

Every defect has its sentence, every write is whole or absent, every resume is the same run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import slab_kernels
from slab_kernels.compression.model import compress
from slab_kernels.errors import ArchitectureError, CheckpointError, ShapeError
from slab_kernels.format import PackedLayout
from slab_kernels.models.decompress import decompress
from slab_kernels.models.folder import INDEX_NAME, PROGRESS_NAME, Checkpoint, write_index
from slab_kernels.models.load import load
from slab_kernels.models.output import LOCK_NAME, OutputFolder
from slab_kernels.models.packed import read_packed
from slab_kernels.models.packed_config import read_layouts
from slab_kernels.models.shards import read_header, write_json, write_shard
from slab_kernels.models.skeleton import folder_skeleton
from slab_kernels.models.source import FolderSource, open_source
from slab_kernels.testing import random_packed

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
]


def write(path: Path, tensors: dict[str, torch.Tensor]):
    return write_shard(
        path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_safetensors_reads_what_we_write(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    table = write(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys() == table.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    assert all(table[n].nbytes == t.numel() * t.element_size() for n, t in tensors.items())
    before = path.read_bytes()
    write(path, dict(reversed(tensors.items())))
    assert path.read_bytes() == before


def test_we_read_what_safetensors_writes(tmp_path):
    save_file(
        {"a": torch.ones(3, 2), "b": torch.zeros(0)},
        tmp_path / "x.safetensors",
        metadata={"format": "pt"},
    )
    table = read_header(tmp_path / "x.safetensors")
    assert (table["a"].dtype, table["a"].shape, table["a"].nbytes) == (torch.float32, (3, 2), 24)


def raw(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype="F32", shape=(2,), start=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x01\x02", "in a file of 2"),
        (raw({}, b"", length=1 << 62), "a header of 4611686018427387904 bytes"),
        (raw(b"{nonsense", b""), "its header is not usable JSON: Expecting property name"),
        (raw(b"[" * 100_000, b""), "its header is not usable JSON: maximum recursion"),
        (raw("{}".encode("utf-8-sig"), b""), "its header is not usable JSON: Unexpected UTF-8 BOM"),
        (raw("{}".encode("utf-16"), b""), "its header is not usable JSON: 'utf-8' codec"),
        (raw(b'{"a": 1, "a": 1}', b""), "its header is not usable JSON: a name stands in it twice"),
        (
            raw(rb'{"__metadata__": {"a": "\ud800"}}', b""),
            "its header is not usable JSON: 'utf-8' codec",
        ),
        (raw(b'{"a": NaN}', b""), "its header is not usable JSON: NaN is no JSON"),
        (raw(b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b""), "tensor 'a' is described by"),
        (raw({"a": entry(dtype=[])}, b"x" * 8), "tensor 'a' is described by"),
        (raw({"a": entry(dtype={})}, b"x" * 8), "tensor 'a' is described by"),
        (raw({"a": entry(shape=(True, 2))}, b"x" * 8), "tensor 'a' is described by"),
        (raw({"a": entry(start=False)}, b"x" * 8), "tensor 'a' is described by"),
        (raw(b"[1]", b""), "not a JSON object"),
        (raw({"a": 7}, b""), "tensor 'a' is described by 7"),
        (raw({"a": {"dtype": "F32", "shape": [2]}}, b""), "tensor 'a' is described by"),
        (raw({"a": entry(shape=(-2,))}, b"x" * 8), "tensor 'a' is described by"),
        (raw({"a": entry(dtype="F6_E2M3", end=2)}, b"xx"), "has dtype 'F6_E2M3', expected one of"),
        (raw({"a": entry(shape=(3,))}, b"x" * 8), r"tensor 'a' of F32\[3\] takes 8 bytes"),
        (
            raw({"a": entry(), "b": entry(start=4, end=12)}, b"x" * 12),
            "overlap or leave a gap at byte 8",
        ),
        (raw({"a": entry(start=4, end=12)}, b"x" * 12), "overlap or leave a gap at byte 0"),
        (raw({"a": entry()}, b"x" * 7), "tensors take 8 bytes and the file holds 7"),
        (raw({"a": entry()}, b"x" * 9), "tensors take 8 bytes and the file holds 9"),
    ],
)
def test_a_corrupt_shard_is_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "model.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards and an index."""
    tables = [
        write(tmp_path / "a.safetensors", {"x": torch.ones(2)}),
        write(tmp_path / "b.safetensors", {"y": torch.ones(3)}),
    ]
    write_index(tmp_path, tables)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    return tmp_path


def test_a_folder_is_read_tensor_by_tensor(folder):
    checkpoint = Checkpoint(folder)
    assert {n: e.file for n, e in checkpoint.entries.items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }
    assert torch.equal(checkpoint.get("y"), torch.ones(3))
    assert json.loads((folder / INDEX_NAME).read_text())["metadata"]["total_size"] == 20


def change_index(folder: Path, **weight_map: str | None):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] = {
        n: f for n, f in (index["weight_map"] | weight_map).items() if f is not None
    }
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json$"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (
            lambda f: (f / "config.json").write_text("[" * 100_000),
            "is not valid JSON .maximum recursion",
        ),
        (
            lambda f: (f / INDEX_NAME).write_text('{"a":' * 100_000),
            "is not valid JSON .maximum recursion",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "holds list instead of a JSON object"),
        (lambda f: (f / "b.safetensors").unlink(), "lacks the shard .b.safetensors"),
        (lambda f: (f / "b.safetensors").write_bytes(b"junk" * 9), "b.safetensors is corrupt"),
        (lambda f: (f / INDEX_NAME).write_text('{"weight_map": {}}'), "has no weight_map"),
        (lambda f: change_index(f, y="../b.safetensors"), "names the shard '../b.safetensors'"),
        (lambda f: change_index(f, y="b.bin"), "names the shard 'b.bin'"),
        (
            lambda f: change_index(f, z="b.safetensors"),
            "places tensor 'z' in b.safetensors, which does not hold it",
        ),
        (
            lambda f: change_index(f, y=None, q="b.safetensors"),
            "holds tensor 'y', which .* does not place there",
        ),
        (
            lambda f: write(f / "b.safetensors", {"x": torch.ones(2), "y": torch.ones(3)}),
            "lies in both a.safetensors and b",
        ),
        (lambda f: (f / INDEX_NAME).unlink(), "holds 2 safetensors files but no"),
    ],
)
def test_a_damaged_folder_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"the model folder .* does not exist"):
        open_source(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors and no"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"PyTorch \.bin weights, which can run code when read; convert them"
    ):
        Checkpoint(tmp_path)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError,
        match="nobody/nothing is no folder here and cannot be fetched from the Hugging Face hub",
    ):
        open_source("nobody/nothing")


# a dense model as source


def test_a_source_finds_names_with_and_without_the_prefix(tmp_path):
    model = tiny_models.write(tmp_path)
    save_file(
        model.model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )  # no "model." in front
    source = FolderSource(tmp_path)
    assert "model.embed_tokens.weight" in source.names and "lm_head.weight" not in source.names
    assert torch.equal(source.get("model.norm.weight"), model.model.norm.weight)


def rewrite(folder: Path, **tensors: torch.Tensor | None):
    kept = load_file(folder / "model.safetensors") | {
        n.replace("__", "."): t for n, t in tensors.items()
    }
    save_file(
        {n: t for n, t in kept.items() if t is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model__norm__weight": None},
            r"lacks the tensor 'model\.norm\.weight' that LlamaForCausalLM needs",
        ),
        ({"model__norm__weight": torch.ones(31)}, r"has shape \[31\], the config asks for \[32\]"),
        (
            {"model__norm__weight": torch.ones(32, dtype=torch.int8)},
            "is torch.int8; only fp16, bf16, fp32 and fp64",
        ),
        ({"norm__weight": torch.ones(32)}, "are both 'model.norm.weight' of the model"),
    ],
)
def test_a_source_that_does_not_fit_its_config(tmp_path, tensors, message):
    tiny_models.write(tmp_path)
    rewrite(tmp_path, **tensors)
    with pytest.raises(CheckpointError, match=message):
        FolderSource(tmp_path)


def test_tensors_that_the_model_does_not_have_are_listed(tmp_path):
    tiny_models.write(tmp_path)
    rewrite(tmp_path, extra__thing=torch.ones(2))
    assert FolderSource(tmp_path).ignored == ["extra.thing"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "slab_kernels"}},
            r"compressed already \(quant_method 'slab_kernels'\)",
        ),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "no-such-model"}, "transformers cannot use"),
        (
            {"hidden_size": 1 << 45},
            r"config\.json has hidden_size=35184372088832, expected an integer from 1 to",
        ),
        ({"hidden_size": "32"}, r"transformers cannot use .*config\.json: .*hidden_size"),
        ({"hidden_size": -4}, r"config\.json"),
        ({"hidden_size": 0}, r"config\.json has hidden_size=0"),
        (
            {"hidden_size": 1 << 20, "vocab_size": 1 << 30},
            r"config\.json asks for an embedding of 1073741824x1048576",
        ),
        ({"vocab_size": 1 << 62}, r"config\.json has vocab_size="),
        ({"num_attention_heads": 0}, r"transformers cannot use .*config\.json"),
        ({"num_hidden_layers": 1 << 31}, r"config\.json has num_hidden_layers="),
        ({"head_dim": 1 << 30}, r"config\.json has head_dim="),
        ({"max_position_embeddings": -1}, r"config\.json has max_position_embeddings=-1"),
        ({"dtype": "load"}, r"transformers cannot use .*config\.json"),
        (
            {"hidden_act": "no-such-function"},
            r"transformers cannot use .*config\.json: KeyError 'no-such-function'",
        ),
    ],
)
def test_a_config_that_is_no_dense_model(tmp_path, config, message):
    tiny_models.write(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        FolderSource(tmp_path)


def test_a_config_of_no_language_model_is_an_architecture_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ArchitectureError, match="no causal language model for 'vit'"):
        folder_skeleton(tmp_path)


def test_the_fingerprint_sees_weights_and_not_the_path(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_models.write(tmp_path / name, seed=seed)
    a, b, c = (FolderSource(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c


# packed folders


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny_models.write(folder / "dense")
    compress(
        folder / "dense",
        folder / "out",
        method="magnitude",
        calibration=tiny_models.tokens(),
        progress=False,
    )
    return folder / "out"


def test_a_truth_value_is_no_format_version(packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = True
    checkpoint = Checkpoint(packed)
    checkpoint.config = config
    with pytest.raises(
        CheckpointError, match="has format_version True, expected a positive integer"
    ):
        read_layouts(checkpoint)


def test_packed_tensors_of_another_layout_are_named():
    tensors = {
        f"m.{part}": t for part, t in random_packed(PackedLayout(4, 32, rank=2)).tensors().items()
    }
    with pytest.raises(
        ShapeError, match=r"m: its tensors make PackedLayout\(.*rank=2.* config\.json says .*rank=1"
    ):
        read_packed(tensors.__getitem__, "m", PackedLayout(4, 32, rank=1))


@pytest.mark.parametrize("use", [load, lambda folder: decompress(folder, folder.parent / "plain")])
def test_what_is_not_packed_is_checked_too(packed, tmp_path, use):
    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = torch.nan
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds NaN or infinite"):
        use(folder)
    assert not any(
        (tmp_path / "plain" / name).exists() for name in ("config.json", LOCK_NAME, PROGRESS_NAME)
    )


# writing


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit of file sizes stands for the full disk: the write fails half way."""
    tensors = {"x": torch.zeros(1 << 16)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write .*a\.safetensors: .* MB free\); make room"
        ) as caught:
            write(tmp_path / "a.safetensors", tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.__cause__.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_nothing_that_loads(tmp_path, monkeypatch):
    tiny_models.write(tmp_path / "dense")
    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    settings = dict(method="magnitude", calibration=tiny_models.tokens(), progress=False)
    with pytest.raises(CheckpointError, match="No space left on device"):
        compress(tmp_path / "dense", tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(
        CheckpointError,
        match=r"has no config.json; its compression was interrupted: finish it with resume=True",
    ):
        Checkpoint(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", real)
    compress(tmp_path / "dense", tmp_path / "out", resume=True, **settings)
    Checkpoint(tmp_path / "out")


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is a file; give a folder"):
        OutputFolder(tmp_path / "file", {}, resume=False)
    with pytest.raises(CheckpointError, match=r"cannot create .*; choose another folder"):
        OutputFolder(tmp_path / "file" / "below", {}, resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        OutputFolder(tmp_path, {}, resume=False)
    tmp_path.chmod(0o700)


# resume state


def test_progress_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    progress = OutputFolder(out, {"rank": 1}, resume=False)
    write(out / "a.safetensors", {"x": torch.ones(2)})
    progress.finish_block("a.safetensors", [{"name": "l"}])
    (out / "b.safetensors.partial").write_bytes(b"half a shard")
    progress.release()
    again = OutputFolder(out, {"rank": 1}, resume=True)
    assert [b["layers"] for b in again.blocks] == [[{"name": "l"}]]
    assert not list(out.glob("*.partial"))
    again.close()
    assert [p.name for p in out.iterdir()] == ["a.safetensors"]


def test_other_settings_are_refused_by_name(tmp_path):
    OutputFolder(tmp_path / "out", {"rank": 1, "seed": 0, "method": "slab"}, resume=False)
    with pytest.raises(
        CheckpointError,
        match=r"cannot resume .*: rank was 1 and is now 2; seed was 0 and is now 5; use",
    ):
        OutputFolder(tmp_path / "out", {"rank": 2, "seed": 5, "method": "slab"}, resume=True)


def test_other_settings_by_pattern_are_told_in_words(tmp_path):
    def settings(*entries):
        return {"settings_by_pattern": [list(entry) for entry in entries], "skip": []}

    down = ("mlp.down_proj", {"values": "int8", "planes": 1})
    OutputFolder(tmp_path / "a", settings(down), resume=False)
    for now, told in (
        ((), "none"),
        ((down, ("q_proj", {"rank": 2})),
         r"values=int8 and planes=1 for 'mlp\.down_proj', rank=2 for 'q_proj'"),
    ):  # fmt: skip
        message = rf"was values=int8 and planes=1 for 'mlp\.down_proj' and is now {told}; use the"
        with pytest.raises(CheckpointError, match=f"settings_by_pattern {message}"):
            OutputFolder(tmp_path / "a", settings(*now), resume=True)
    OutputFolder(tmp_path / "b", {"skip": ["*.a"]}, resume=False)
    with pytest.raises(CheckpointError, match=r"skip was \['\*\.a'\] and is now \[\]"):
        OutputFolder(tmp_path / "b", {"skip": []}, resume=True)


def test_a_folder_in_use_is_refused(tmp_path):
    OutputFolder(tmp_path / "out", {}, resume=False)
    with pytest.raises(CheckpointError, match=r"is not empty .*or pass resume=True"):
        OutputFolder(tmp_path / "out", {}, resume=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(
        CheckpointError, match=r"is not empty \(thesis\.tex\); choose an empty folder$"
    ):
        OutputFolder(tmp_path / "full", {}, resume=False)
    with pytest.raises(CheckpointError, match="but no interrupted run to resume"):
        OutputFolder(tmp_path / "full", {}, resume=True)


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])]
)
def test_a_damaged_shard_is_done_again_with_all_after_it(tmp_path, damage):
    progress = OutputFolder(tmp_path / "out", {}, resume=False)
    for name in "abc":
        write(tmp_path / "out" / f"{name}.safetensors", {"x": torch.ones(2)})
        progress.finish_block(f"{name}.safetensors", [])
    progress.release()
    damage(tmp_path / "out" / "b.safetensors")
    assert [b["file"] for b in OutputFolder(tmp_path / "out", {}, resume=True).blocks] == [
        "a.safetensors"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds list instead of a JSON object"),
        ("{}", "is damaged; use an empty folder"),
        ('{"settings": {}, "blocks": 5}', "is damaged; use an empty folder"),
        ('{"settings": {}, "blocks": null}', "is damaged; use an empty folder"),
        ('{"settings": {}, "blocks": [7]}', "is damaged; use an empty folder"),
        (
            '{"settings": {}, "blocks": [{"file": "a", "bytes": 1}]}',
            "is damaged; use an empty folder",
        ),
        ('{"settings": ["a"], "blocks": []}', "is damaged; use an empty folder"),
    ],
)
def test_a_progress_file_of_another_shape(tmp_path, content, message):
    (tmp_path / PROGRESS_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=rf"slab_progress\.json {message}"):
        OutputFolder(tmp_path, {}, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == [PROGRESS_NAME]


# two runs in one folder


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("end", [OutputFolder.close, OutputFolder.abandon, OutputFolder.release])
def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path, resume, end):
    out = tmp_path / "out"
    first = OutputFolder(out, {}, resume=False)
    write(out / "a.safetensors", {"x": torch.ones(2)})
    first.finish_block("a.safetensors", [])
    (out / "b.safetensors.partial").write_bytes(b"being written")
    with pytest.raises(
        CheckpointError, match="out is in use by another run; wait for it or use another folder"
    ):
        OutputFolder(out, {}, resume)
    assert (out / "b.safetensors.partial").exists() and (out / LOCK_NAME).exists()
    end(first)
    assert not (out / LOCK_NAME).exists()
    if end is not OutputFolder.close:
        assert len(OutputFolder(out, {}, resume=True).blocks) == 1


def test_a_failed_run_lets_go_of_its_folder_and_can_be_resumed(tmp_path):
    """The exception, still held here, keeps the first Progress alive through its traceback."""
    tiny_models.write(tmp_path / "dense")
    settings = dict(method="magnitude", calibration=tiny_models.tokens())

    def stop(event):
        if event.kind == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        compress(tmp_path / "dense", tmp_path / "out", progress=stop, **settings)
    compress(tmp_path / "dense", tmp_path / "out", progress=False, resume=True, **settings)
    compress(tmp_path / "dense", tmp_path / "again", progress=False, **settings)
    assert caught.value and not list(tmp_path.glob(f"*/{LOCK_NAME}"))


def test_a_lock_removed_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking it, the file may be removed by its holder.

    What is locked must then be the file that is there now.
    """
    first, real = OutputFolder(tmp_path, {}, resume=False), fcntl.flock

    def late(file, how):
        first.release()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = OutputFolder(tmp_path, {}, resume=True)
    monkeypatch.setattr(fcntl, "flock", real)
    with pytest.raises(CheckpointError, match="in use by another run"):
        OutputFolder(tmp_path, {}, resume=True)
    second.close()
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_runs_go_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    OutputFolder(tmp_path / "a", {}, resume=False).close()
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows: importing it fails
    OutputFolder(tmp_path / "b", {}, resume=False).close()
    assert not list(tmp_path.glob("*/*"))


HOLD = """
import sys, time
from pathlib import Path
from slab_kernels.models.output import OutputFolder
progress = OutputFolder(Path(sys.argv[1]), {}, resume=False)
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_holds_the_folder_until_it_is_killed(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(slab_kernels.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], env=env, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="in use by another run"):
            OutputFolder(tmp_path / "out", {}, resume=True)
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "out" / LOCK_NAME).exists()
    OutputFolder(tmp_path / "out", {}, resume=True).close()
    assert not list((tmp_path / "out").iterdir())
