"""`report` given packed folders: sizes, stored bits by part, and a corner of a weight."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import tiny_models

from slab_kernels.cli import main as cli
from slab_kernels.evaluate.crop import weight_crop
from slab_kernels.evaluate.inspect import inspect


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and two packed ones."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_models.write(folder / "dense")
    (folder / "text.txt").write_text(tiny_models.text())
    for name, more in (
        ("slab", ["--adapter-rank", "2", "--values", "int4", "--group-size", "32"]),
        ("pruned", ["--pattern", "50%", "--method", "magnitude"]),
    ):
        command = ["compress", str(folder / "dense"), str(folder / name), "--device", "cpu", *more]
        text = ["--samples", "4", "--window", "32", "--calibration", str(folder / "text.txt")]
        assert cli.run([*command, *text]) == 0
    return folder


@pytest.mark.slow
def test_the_parts_of_a_layer_add_up(folders):
    for layer in inspect(folders / "slab")["layers"]:
        names = {"values", "metadata", "signs", "scales", "factors", "adapters"}
        assert set(layer["parts"]) == names
        assert sum(layer["parts"].values()) == pytest.approx(layer["bits_per_weight"])
    (first, *_) = inspect(folders / "dense")["layers"]
    assert first["parts"] == {"values": 32.0}


@pytest.mark.slow
def test_the_parts_of_a_weight_add_up(folders):
    found = weight_crop(folders / "slab", folders / "dense", size=16)
    parts = {
        name: np.frombuffer(base64.b64decode(text), np.int8).reshape(found["shape"]).astype(float)
        for name, text in found["parts"].items()
    }
    assert list(parts) == ["weight", "sparse", "signs", "adapter", "left"]
    assert found["shape"] == [16, 16]
    explained = parts["sparse"] + parts["signs"] + parts["adapter"] + parts["left"]
    assert np.abs(parts["weight"] - explained).max() <= 3  # each was rounded to a level
    assert max(np.abs(part).max() for part in parts.values()) == 127
    groups = (parts["signs"] != 0).reshape(16, 4, 4).sum(-1)
    assert groups.max() <= 2, "signs stand for the two of four that S has not kept"


@pytest.mark.slow
def test_a_run_folder_brings_its_sizes(folders, tmp_path, capsys):
    command = ["report", str(folders / "slab"), "--out", str(tmp_path / "page"), "--json"]
    assert cli.run(command) == 0
    (slab,) = json.loads(capsys.readouterr().out)["results"]
    assert slab["bytes"] == inspect(folders / "slab")["bytes"] and len(slab["parts"]) == 14
    assert slab["crop"] is None
    assert cli.run([*command, "--dense", str(folders / "dense")]) == 0
    found = json.loads(capsys.readouterr().out)
    dense, slab = found["results"]
    assert dense["bytes"] == inspect(folders / "dense")["bytes"]
    assert slab["crop"]["layer"].startswith("model.layers.")
    assert "smaller (" in found["headline"] and "embeddings included" in found["headline"]
    stems = {path.rpartition("/")[2] for path in found["written"]}
    assert {"bits-by-layer.png", "heat-maps.png", "report.html"} <= stems


@pytest.mark.slow
def test_a_pruned_folder_has_no_corner(folders, tmp_path, capsys):
    out, dense = str(tmp_path / "page"), str(folders / "dense")
    command = ["report", str(folders / "pruned"), "--dense", dense, "--out", out, "--no-plots"]
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"][1]["crop"] is None and "as large as" in found["headline"]


@pytest.mark.slow
def test_a_damaged_folder_is_shown_by_its_record(folders, tmp_path, capsys):
    """The record is whole, the weights are gone."""
    (tmp_path / "run").mkdir()
    for name in ("config.json", "slab_run.json"):
        (tmp_path / "run" / name).write_bytes((folders / "slab" / name).read_bytes())
    command = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "page"), "--no-plots"]
    assert cli.run([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert "is not shown in full" in shown.err
    assert json.loads(shown.out)["results"][0]["bytes"] is None
    assert cli.run([*command, "--dense", str(tmp_path / "nowhere")]) == 3
    assert "nowhere" in capsys.readouterr().err
