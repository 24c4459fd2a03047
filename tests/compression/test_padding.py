"""Calibration on batches with padding, chats and fields: what enters, and what is recorded."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import nn

from slab_kernels.cli import main as cli
from slab_kernels.compression import matching, plan
from slab_kernels.compression.model import compress
from slab_kernels.errors import CalibrationError
from slab_kernels.methods.inputs import InputStats

NAME = "model.layers.1.mlp.down_proj"
QUICK = dict(method="sparsegpt", pattern="2:4", progress=False)


def rows(count: int = 9) -> list[torch.Tensor]:
    draw = random.Random(count)
    return [tiny_models.tokens(1, draw.randint(3, 14), n)[0] for n in range(count)]


def batch(texts: list[torch.Tensor], side: str, filler: int = 7) -> dict[str, torch.Tensor]:
    width = max(map(len, texts)) + 2
    ids = torch.full((len(texts), width), filler)
    mask = torch.zeros_like(ids)
    for n, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(len(text))
        ids[n, place], mask[n, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def masked_inputs(model: nn.Module, given: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """[tokens, K] fp64: what a linear reads of real tokens in transformers' own masked forward.

    Positions are those of `generate`.
    """
    seen: list[torch.Tensor] = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    mask = given["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        model(**given, position_ids=positions, use_cache=False)
    handle.remove()
    return seen[0].reshape(*mask.shape, -1)[mask.bool()]


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def distance(found: torch.Tensor | None, want: torch.Tensor) -> float:
    assert found is not None
    return float((found - want).norm() / want.norm())


@pytest.fixture
def seen(monkeypatch) -> list[InputStats]:
    """The statistics that the method gets, layer after layer."""
    found: list[InputStats] = []
    real = plan.decompose_layer

    def watched(weight, stats, settings):
        found.append(replace(stats))
        return real(weight, stats, settings)

    monkeypatch.setattr(plan, "decompose_layer", watched)
    monkeypatch.setattr("slab_kernels.compression.job.native_products", lambda device: None)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", NAME), ("mistral", NAME), ("opt", "model.decoder.layers.1.fc2")],
)
def test_statistics_are_those_of_real_tokens_in_the_masked_forward(architecture, name, side, seen):
    """Gram matrices, also of windows that judge, and held-out errors, against fp64 sums."""
    texts = rows()
    fitted, judging = batch([*texts[:7], texts[8]], side), batch(texts[7:8], side)
    heldout = batch(rows(5), side)
    dense, model = tiny_models.model(architecture), tiny_models.model(architecture)
    result = compress(model, **QUICK, calibration=batch(texts, side), heldout=heldout)
    assert distance(seen[-1].gram, gram(masked_inputs(result, fitted, name))) < 1e-5
    assert distance(seen[-1].held_back, gram(masked_inputs(result, judging, name))) < 1e-5
    assert seen[-1].tokens == sum(map(len, texts)) - len(texts[7])
    layer, x = result.slab_record.layers[-1], masked_inputs(result, heldout, name)
    weight = dense.get_submodule(name).weight.detach().double()
    stored = result.get_submodule(name).packed().dense().double()
    want = (x @ (weight - stored).T).norm() / (x @ weight.T).norm()
    assert layer.name == name and layer.heldout_error == pytest.approx(float(want), rel=1e-4)


def test_neither_the_side_nor_what_stands_there_changes_anything():
    """Nor in matching, whose targets are outputs at real tokens only."""
    texts, records = rows(), []
    forms = [
        batch(texts, "left"),
        batch(texts, "right", filler=90),
        [batch(texts[:5], "left", 3), batch(texts[5:], "right")],
        [text.tolist() for text in texts],
    ]
    settings = QUICK | {"method": "magnitude", "matching": matching.Matching(epochs=2)}
    for form in forms:
        model = compress(tiny_models.model(), **settings, calibration=form)
        record = model.slab_record.to_dict()
        layers = [(layer["error"], layer["heldout_error"]) for layer in record["layers"]]
        matched = [(m["before"], m["after"]) for m in record["matching"]]
        records.append((record["texts"], record["tokens"], layers, matched))
    assert all(record == records[0] for record in records[1:])
    facts = records[0][0]["calibration"]
    assert facts["tokens"] == records[0][1] == sum(map(len, texts))
    assert facts["kind"] == "token ids" and len(facts["sha256"]) == 64


def test_windows_of_many_lengths_pass_every_part_of_a_run():
    """The head, int8 rows, orders of channels, drift, a dense target, and a search for bits."""
    given = dict(calibration=batch(rows(), "left"), heldout=rows(3), progress=False, rounds=1)
    whole = dict(embeddings="int8", head=True, permute=True, planes=1, values="int4")
    target = matching.Matching(epochs=1, target="dense")
    model = tiny_models.model(tie_word_embeddings=False)
    record = compress(model, **given, **whole, matching=target).slab_record
    assert record.layers[-1].name == "lm_head" and record.layers[-1].heldout_error > 0
    assert all(match.after <= match.before for match in record.matching)
    assert record.texts["heldout"]["tokens"] == sum(map(len, rows(3)))
    searched = compress(tiny_models.model(), **given, bits=14.0).slab_record
    assert searched.bits_per_weight <= 14.0 and len(searched.settings["layers"]) == 14


def test_a_chat_by_its_field_from_the_command_line(tmp_path, capsys):
    folder, chats, out = tmp_path / "m", tmp_path / "chats.jsonl", tmp_path / "out"
    tiny_models.write(folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    talk = [[{"role": "user", "content": tiny_models.text(20, n)}] for n in range(9)]
    chats.write_text("\n".join(json.dumps({"id": n, "talk": t}) for n, t in enumerate(talk)))
    small = ["--method", "magnitude", "--samples", "4", "--window", "16"]
    command = ["compress", str(folder), str(out), "--calibration", str(chats), *small]
    assert cli.run([*command, "--field", "messages"]) == 2
    assert "line 1 of" in (shown := capsys.readouterr().err)
    assert "has no field 'messages'; it has id, talk" in shown and not out.exists()
    assert cli.run([*command, "--field", "talk"]) == 0
    record = json.loads((out / "slab_run.json").read_text())
    facts, sha256 = record["texts"]["calibration"], record["settings"]["calibration_sha256"]
    # 20 words, and what the template writes around them, are enough for four windows.
    assert facts | {"rows": 0} == {
        "kind": "chats", "file": str(chats), "field": "talk", "rows": 0, "windows": 4,
        "tokens": 64, "sha256": sha256,
    }  # fmt: skip
    capsys.readouterr()
    read = ["--text", str(chats), "--field", "talk"]
    assert cli.run(["eval", str(out), *read, "--max-tokens", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 40
    few = ["--steps", "1", "--samples", "4", "--window", "16", "--adapter-rank", "2"]
    assert cli.run(["train", str(out), str(tmp_path / "trained"), *read, *few]) == 0


def test_training_takes_windows_of_many_lengths(tmp_path):
    from slab_kernels.compression.training import Training, train

    tiny_models.write(tmp_path / "m")
    compress(tmp_path / "m", tmp_path / "out", **QUICK, calibration=rows(3))
    settings, found = Training(steps=3, batch=4, adapter_rank=2), []
    for name, form in (("a", batch(rows(), "left")), ("b", rows())):
        found.append(train(tmp_path / "out", tmp_path / name, form, settings))
    assert found[0] == found[1] and found[0]["after"] != found[0]["before"]
    with pytest.raises(CalibrationError, match="a window of a single token"):
        train(tmp_path / "out", tmp_path / "c", [[3, 4], [5]], settings)
