"""Going on with an interrupted run: what it finished, read and searched is compared and kept."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from slab_kernels.compression import budget
from slab_kernels.compression.model import compress
from slab_kernels.errors import CheckpointError
from slab_kernels.models.folder import PROGRESS_NAME, Checkpoint

TOKENS = tiny_models.tokens()
QUICK = dict(method="magnitude", calibration=TOKENS)
BLOCKS = 3


class Killed(BaseException):
    pass


def killer(kind: str, count: int = 1):
    """A listener that stops the run at its `count`-th event of a kind."""
    seen = []

    def see(event):
        seen.append(event.kind)
        if event.kind == kind and seen.count(kind) == count:
            raise Killed

    return see


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "m"
    tiny_models.write(folder, num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    compress(dense, out, progress=False, **QUICK)
    return out


@pytest.fixture
def interrupted(dense, tmp_path):
    """Two of three blocks are done."""
    with pytest.raises(Killed):
        compress(dense, tmp_path / "out", progress=killer("block", 2), **QUICK)
    return tmp_path / "out"


def same_bytes(out, finished) -> bool:
    files = {p.name for p in finished.iterdir()}
    return files == {p.name for p in out.iterdir()} and all(
        (out / name).read_bytes() == (finished / name).read_bytes()
        for name in files - {"slab_run.json"}
    )


def resume(dense, out, **changes):
    return compress(dense, out, **{"progress": False, "resume": True} | QUICK | changes)


def flip(path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("block", [1, 2])
def test_a_finished_shard_with_a_flipped_bit_is_made_again(dense, interrupted, finished, block):
    flip(interrupted / f"model-0000{block}-of-00004.safetensors", 0.9)
    resume(dense, interrupted)
    assert same_bytes(interrupted, finished)


def swapped(state):
    state["blocks"].reverse()


def without_a_layer(state):
    state["blocks"][0]["layers"].pop()


def other_error(state):
    state["blocks"][0]["layers"][0]["error"] = 0.0


def of_another_type(key, value):
    def change(state):
        state[key] = value

    return change


DAMAGES = {
    "swapped": swapped,
    "layer": without_a_layer,
    "error": other_error,
    **{
        f"{key}={value}": of_another_type(key, value)
        for key in ("settings", "blocks", "inputs", "search", "sha256")
        for value in (7, None, [3])
    },
}


def test_a_damaged_progress_file_is_named(dense, interrupted):
    path = interrupted / PROGRESS_NAME
    whole = path.read_text()
    for change in DAMAGES.values():
        state = json.loads(whole)
        change(state)
        path.write_text(json.dumps(state))
        with pytest.raises(
            CheckpointError, match=r"slab_progress\.json is damaged; use an empty folder"
        ):
            resume(dense, interrupted)
    for text in ("", "[]", "7", whole[:-30]):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"slab_progress\.json"):
            resume(dense, interrupted)
    path.write_text(whole)
    resume(dense, interrupted)


def test_finished_blocks_of_another_model_are_refused(dense, interrupted):
    """A file that fits itself, as another version could have written it, and not the model."""
    from slab_kernels.models.output import _digest

    path = interrupted / PROGRESS_NAME
    for change in (swapped, without_a_layer):
        state = json.loads(path.read_text())
        del state["sha256"]
        change(state)
        path.write_text(json.dumps({**state, "sha256": _digest(state)}))
        with pytest.raises(CheckpointError, match="use an empty folder"):
            resume(dense, interrupted)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"],
)
def test_a_model_that_changed_between_the_runs(dense, interrupted, tmp_path, monkeypatch, name):
    """In a finished block, in one that no run has read for its work yet, and outside the blocks."""
    monkeypatch.setattr(
        Checkpoint, "fingerprint", lambda self: "the ends of the shards are the same"
    )
    state = json.loads((interrupted / PROGRESS_NAME).read_text())
    shutil.rmtree(interrupted)
    assert len(state["inputs"]) == len(load_file(dense / "model.safetensors"))
    with pytest.raises(Killed):
        compress(dense, interrupted, progress=killer("block", 2), **QUICK)
    shutil.copytree(dense, tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / "model.safetensors")
    tensors[name][3, 5] += 1
    save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=f"tensor '{name}' of .* is not what it was when this run began"
    ):
        resume(tmp_path / "changed", interrupted)
    assert not (interrupted / "config.json").exists()
    resume(dense, interrupted)


def test_a_finished_folder_is_compared_with_what_was_written(dense, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    assert resume(dense, tmp_path / "out").shards.keys() == {
        p.name for p in finished.glob("*.safetensors")
    }
    flip(tmp_path / "out" / "model-00004-of-00004.safetensors", 0.9)
    with pytest.raises(
        CheckpointError,
        match=r"model-00004-of-00004\.safetensors is not what the finished run wrote",
    ):
        resume(dense, tmp_path / "out")


@pytest.mark.parametrize(("kind", "count", "left"), [("layer", 3, False), ("block", 1, True)])
def test_a_run_that_finished_no_block_leaves_nothing(dense, tmp_path, kind, count, left):
    with pytest.raises(Killed):
        compress(dense, tmp_path / "out", progress=killer(kind, count), **QUICK)
    assert (tmp_path / "out").exists() == (tmp_path / "out" / PROGRESS_NAME).exists() == left


@pytest.mark.slow
def test_a_search_is_kept_and_gone_on_with(dense, tmp_path, monkeypatch):
    measured, real = [], budget.Measurement._layer
    monkeypatch.setattr(
        budget.Measurement,
        "_layer",
        lambda self, *rest: measured.append(1) or real(self, *rest),
    )
    settings = dict(calibration=TOKENS, bits=5.0, group_size=32, rounds=0)
    compress(dense, tmp_path / "want", progress=False, **settings)
    assert len(measured) == 7 * BLOCKS
    for kind, count, more in (
        ("budget", 4, 4),
        ("budget", 6, 6),
        ("layer", 2, 7 * BLOCKS - 10),
        ("block", 1, 0),
        ("none", 1, 0),
    ):
        measured.clear()
        more_settings = {"progress": killer(kind, count), "resume": True, **settings}
        with contextlib.nullcontext() if kind == "none" else pytest.raises(Killed):
            record = compress(dense, tmp_path / "out", **more_settings)
        assert len(measured) == more, kind
    assert same_bytes(tmp_path / "out", tmp_path / "want")
    measured.clear()
    assert (
        compress(dense, tmp_path / "out", progress=False, resume=True, **settings).layers
        == record.layers
        and not measured
    )
