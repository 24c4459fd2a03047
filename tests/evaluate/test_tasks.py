"""`eval --tasks`: the lm-evaluation-harness on a packed model, with a task made here."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import tiny_models

import slab_kernels
from slab_kernels.cli import main as cli

TASK = """
task: next_letter
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("tasks")
    tiny_models.write(top / "dense")
    slab_kernels.compress(
        top / "dense", top / "packed", progress=False, calibration=tiny_models.tokens()
    )
    return top / "packed"


def test_without_the_package_a_sentence_says_so(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.run(["eval", str(folder), "--tasks", "arc_easy"]) == 4
    assert "pip install lm-eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [(["--limit", "3"], "--tasks"), (["--tasks", ","], "names no task")]
)
def test_options_that_make_no_sense(folder, capsys, options, message):
    assert cli.run(["eval", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_task_of_ones_own(folder, tmp_path, capsys, monkeypatch):
    """Scores equal what the model's own logits say."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"text": tiny_models.text(3, seed), "answer": seed % 2} for seed in range(12)]
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
    )
    (tmp_path / "next_letter.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    assert (
        cli.run(
            ["eval", str(folder), "--tasks", "next_letter", "--task-files", str(tmp_path), "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)["tasks"]["next_letter"]
    model, tokenizer = slab_kernels.load(folder), tiny_models.tokenizer()
    letters = tokenizer.convert_tokens_to_ids([" ", "a", "b"])
    right = 0
    for document in documents:
        ids = tokenizer(document["text"], return_tensors="pt").input_ids
        import torch

        with torch.no_grad():
            spaced = model(torch.cat([ids, torch.tensor([[letters[0]]])], 1)).logits[0, -1]
        right += int(spaced[letters[2]] > spaced[letters[1]]) == document["answer"]
    assert found["acc"] == pytest.approx(right / len(documents))
    assert (
        cli.run(["eval", str(folder), "--tasks", "no_such_task", "--task-files", str(tmp_path)])
        == 2
    )
    assert "no_such_task" in capsys.readouterr().err
