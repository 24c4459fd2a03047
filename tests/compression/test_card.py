"""The model card beside a compressed model: numbers of the run, base model, licence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import yaml

from slab_kernels.compression.model import compress
from slab_kernels.models.load import load
from slab_kernels.models.totals import read_totals

TOKENS = tiny_models.tokens()
QUICK = dict(method="magnitude", calibration=TOKENS, progress=False)
BASE = """---
license: llama3
license_name: "the | licence"
language: [en]
---

# A base model
"""


@pytest.fixture
def dense(tmp_path) -> Path:
    tiny_models.write(tmp_path / "base-7b")
    return tmp_path / "base-7b"


def read_card(folder: Path) -> tuple[dict, str]:
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def rows(text: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_the_numbers_are_those_of_the_record(dense, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.text())
    record = compress(
        dense, tmp_path / "out", values="int4", group_size=32, planes=2, adapter_rank=4, rounds=1,
        calibration=str(tmp_path / "text.txt"), samples=4, window=16, skip="*.q_proj",
        heldout=tiny_models.tokens(seed=7), progress=False,
    )  # fmt: skip
    front, text = read_card(tmp_path / "out")
    assert front == {
        "base_model": "base-7b",
        "base_model_relation": "quantized",
        "library_name": "slab-kernels",
        "tags": ["slab-kernels", "compressed", "2:4", "int4"],
    }
    assert text.startswith("\n# base-7b, compressed with slab_kernels\n")
    found = rows(text)
    assert found["Method"] == "slab" and found["Kept values"] == "int4"
    assert found["Group size"] == "32 inputs per scale" and found["Sign planes"] == "2"
    assert found["Adapter P Qᵀ"] == "rank 4, int8"
    assert found["Options of the method"] == "rounds=1"
    assert found["Stored bits per weight"].startswith(f"{record.bits_per_weight:.3f},")
    error = "Mean relative error of a layer's output"
    assert found[f"{error}, on held-out text"] == f"{record.mean_heldout_error:.4f}"
    assert found[f"{error}, on the calibration text"] == f"{record.mean_error:.4f}"
    assert found["Calibration"] == "text.txt, 4 windows of 16 tokens, seed 0"
    assert "`*.q_proj`" in found["Of that left dense"] and str(tmp_path) not in text

    def size(folder: Path) -> float:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        return index["metadata"]["total_size"] / 1e6

    before = sum(p.numel() * p.element_size() for p in tiny_models.model().parameters()) / 1e6
    assert found["Size"] == f"{size(tmp_path / 'out'):.2f} MB, before {before:.2f} MB"
    totals = read_totals(tmp_path / "out")
    assert found["Bits per parameter"].startswith(f"{totals.bits_per_parameter:.3f},")
    for part, amount in totals.dense.items():
        assert f"{part} {amount / 1e6:.2f} MB" in found["Of that left dense"]
    for way in ("slab_kernels.load(", "from_pretrained(", "vllm serve FOLDER", "slab-kernels eval"):
        assert way in text
    assert "came without a card" in text and "names no licence" in text
    load(tmp_path / "out")


def test_the_base_models_card_is_kept_and_its_licence_carried_over(dense, tmp_path):
    (dense / "README.md").write_text(BASE)
    (dense / "README.base.md").write_text("of a base of the base")
    (dense / "LICENSE").write_text("terms")
    compress(dense, tmp_path / "out", **QUICK)
    out = tmp_path / "out"
    front, text = read_card(out)
    assert (out / "README.base.2.md").read_text() == BASE
    assert (out / "README.base.md").read_text() == "of a base of the base"
    assert front["license"] == "llama3" and front["license_name"] == "the | licence"
    assert "language" not in front and "[README.base.2.md](README.base.2.md)" in text
    assert "The licence is that of the base model, llama3." in text


def test_a_licence_file_alone_is_named(dense, tmp_path):
    (dense / "LICENSE.txt").write_text("terms")
    (dense / "README.md").write_text("---\nlicense: [a, list]\nno colon\n---\n# text\n")
    compress(dense, tmp_path / "out", **QUICK)
    front, _ = read_card(tmp_path / "out")
    assert front["license"] == "other" and front["license_link"] == "LICENSE.txt"


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff\xfe\x00",
        b"---\nlicense: !!python/object:os.system x\n---\n",
        b"---\n" + b"[" * 50_000 + b"\n---\n",
        b"---\nlicense: " + b"x" * 10_000 + b"\n---\n",
        b"---\nlicense: mit\n",
        b"---\r\nlicense: 3\r\n---\r\n",
    ],
)
def test_a_card_that_cannot_be_read_stops_nothing(dense, tmp_path, damaged):
    (dense / "README.md").write_bytes(damaged)
    compress(dense, tmp_path / "out", **QUICK)
    assert "license" not in read_card(tmp_path / "out")[0]
    assert (tmp_path / "out" / "README.base.md").read_bytes() == damaged


def test_a_name_cannot_break_out_of_the_card(tmp_path):
    folder = tmp_path / "a | b\n---\nlicense: mit\n# <script>"
    tiny_models.write(folder)
    compress(folder, tmp_path / "out", **QUICK)
    front, text = read_card(tmp_path / "out")
    assert front["base_model"] == folder.name.replace("\n", "\\n") and "license" not in front
    assert "<script>" not in text and "\n# a \\| b\\n---" in text


def test_a_model_of_the_hub_has_its_name_there(tmp_path):
    snapshot = tmp_path / "models--someone--a--model" / "snapshots" / "0123abc"
    tiny_models.write(snapshot)
    compress(snapshot, tmp_path / "out", **QUICK)
    assert read_card(tmp_path / "out")[0]["base_model"] == "someone/a--model"


def test_a_dense_result_and_matching_are_said(dense, tmp_path):
    compress(dense, tmp_path / "half", **QUICK | {"pattern": "50%"})
    front, text = read_card(tmp_path / "half")
    assert front["library_name"] == "transformers" and "slab_kernels.load" not in text
    record = compress(dense, tmp_path / "matched", **QUICK | {"matching": 2})
    found = rows(read_card(tmp_path / "matched")[1])
    error = "Mean relative error of a layer's output before matching"
    assert found[f"{error}, on held-out text"] == f"{record.mean_heldout_error:.4f}"
    assert found["Held-out text"] == "1 of these windows, which no weight was fitted to"
    assert found["Transformer matching"].startswith("2 epochs; mean distance")


def test_a_run_that_goes_on_after_the_card_was_written_keeps_the_base_models(
    dense, tmp_path, monkeypatch
):
    """A kill between the card and config.json."""
    (dense / "README.md").write_text(BASE)
    out, path = tmp_path / "out", "slab_kernels.compression.finish.write_json"
    monkeypatch.setattr(path, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(dense, out, **QUICK)
    monkeypatch.undo()
    assert (out / "README.md").exists() and not (out / "config.json").exists()
    compress(dense, out, resume=True, **QUICK)
    compress(dense, tmp_path / "whole", **QUICK)
    for folder in (out, tmp_path / "whole"):
        assert (folder / "README.base.md").read_text() == BASE
    assert (out / "README.md").read_bytes() == (tmp_path / "whole" / "README.md").read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_token_ids_are_neither_drawn_nor_all_of_one_length(dense, tmp_path):
    ids = [row[:length] for row, length in zip(TOKENS, (16, 9, 16, 4, 16, 16), strict=True)]
    for name, calibration, said in (
        ("even", TOKENS, "token ids, 6 windows of 16 tokens"),
        ("ragged", ids, "token ids, 6 windows of at most 16 tokens, 77 in all"),
    ):
        compress(dense, tmp_path / name, **{**QUICK, "calibration": calibration})
        assert rows(read_card(tmp_path / name)[1])["Calibration"] == said


def test_the_card_of_a_mixture_does_not_send_anybody_to_vllm(dense, tmp_path, monkeypatch):
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny_models.CONFIGS, "mixtral", tiny_models._GATED | changes)
    tiny_models.write(tmp_path / "mixture", "mixtral")
    compress(tmp_path / "mixture", tmp_path / "experts", **QUICK)
    text = read_card(tmp_path / "experts")[1]
    assert "vLLM runs no packed experts and refuses this folder" in text
    assert "vllm serve" not in text and "\nslab-kernels generate FOLDER" in text
    compress(tmp_path / "mixture", tmp_path / "skipped", **QUICK, skip="*.experts")
    compress(dense, tmp_path / "plain", **QUICK)
    for name in ("skipped", "plain"):
        assert "\nvllm serve FOLDER" in read_card(tmp_path / name)[1]
