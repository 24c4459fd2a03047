"""`eval --tasks`: the lm-evaluation-harness on a packed model, with a task made here."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.cli import models
from slab_kernels.errors import ArgumentError
from slab_kernels.evaluate.lm_eval import TaskRun

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
    ("options", "message"),
    [
        (["--limit", "3"], "for --tasks, which is not given: --limit"),
        (
            ["--num_fewshot", "2", "--apply_chat_template", "--batch_size", "4"],
            "--num-fewshot and --apply-chat-template and --batch-size",
        ),
        (["--output_path", "x", "--include_path", "y"], "--task-files and --output-path"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "a", "--limit", "0"], "--limit 0.0 must be"),
        (["--tasks", "a", "--limit", "2.5"], "a whole number of documents"),
        (["--tasks", "a", "--batch-size", "many"], "--batch-size 'many' must be a number"),
        (["--tasks", "a", "--batch-size", "0"], "from 1 on, or auto"),
        (["--tasks", "a", "--num-fewshot", "-1"], "num-fewshot"),
    ],
)
def test_options_that_make_no_sense(folder, capsys, options, message):
    assert cli.run(["eval", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_settings_are_plain_numbers_and_paths():
    given = TaskRun(("a",), limit=3.0, batch_size="16", output_path="~/x")
    assert (given.limit, given.batch_size) == (3, 16) and type(given.limit) is int
    assert given.output_path == Path("~/x").expanduser()
    assert TaskRun(("a",), limit=0.25).limit == 0.25
    assert TaskRun(("a",), batch_size="auto:4").batch_size == "auto:4"
    with pytest.raises(ArgumentError, match="no task is named"):
        TaskRun(())


with_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Documents, and two tasks that ask for the letter behind each, the second with examples."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"text": tiny_models.text(3, seed), "answer": seed % 2} for seed in range(12)]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    for split in ("data", "examples"):
        (tmp_path / f"{split}.jsonl").write_text(lines)
    (tmp_path / "next_letter.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    shown = TASK.replace("{{test: {data}}}", "{{test: {data}, train: {examples}}}")
    shown = shown.replace("next_letter", "shown_letters") + "training_split: train\n"
    (tmp_path / "shown.yaml").write_text(
        shown.format(data=tmp_path / "data.jsonl", examples=tmp_path / "examples.jsonl")
    )
    return documents


@with_lm_eval
def test_a_task_of_ones_own(folder, task, tmp_path, capsys):
    """Scores equal what the model's own logits say."""
    command = ["eval", str(folder), "--task-files", str(tmp_path), "--tasks"]
    assert cli.run([*command, "next_letter", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = answer["tasks"]["next_letter"]
    model, tokenizer = slab_kernels.load(folder), tiny_models.tokenizer()
    letters = tokenizer.convert_tokens_to_ids([" ", "a", "b"])
    right = 0
    for document in task:
        ids = tokenizer(document["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            spaced = model(torch.cat([ids, torch.tensor([[letters[0]]])], 1)).logits[0, -1]
        right += int(spaced[letters[2]] > spaced[letters[1]]) == document["answer"]
    assert found["acc"] == pytest.approx(right / len(task)) and found["acc_stderr"] >= 0
    assert answer["results_file"] is None


@with_lm_eval
def test_a_pasted_command_writes_the_harness_own_results(folder, task, tmp_path, capsys):
    out = tmp_path / "results"
    pasted = (
        f"--tasks next_letter,shown_letters --num_fewshot 2 --batch_size 3 --limit 5 "
        f"--include_path {tmp_path} --output_path {out}"
    )
    assert cli.run(["eval", str(folder), *pasted.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (file,) = out.glob("*/results_*.json")
    assert found["results_file"] == str(file)
    written = json.loads(file.read_text())
    for name in ("next_letter", "shown_letters"):
        assert written["results"][name]["acc,none"] == found["tasks"][name]["acc"]
        assert written["n-samples"][name]["effective"] == 5
        assert written["n-shot"][name] == 2
    config = written["config"]
    assert (config["model"], config["limit"], config["batch_size"]) == ("hf", 5, 3)
    assert config["model_args"] == f"pretrained={folder}"
    assert written["model_name"] == str(folder) and written["chat_template"] is None
    assert cli.run(["eval", str(folder), *pasted.split(), "--output-path", f"{out}/a.json"]) == 0
    assert (
        len(list(out.glob("a_*.json"))) == 1 and "results of lm-eval: " in capsys.readouterr().out
    )


@with_lm_eval
def test_questions_in_the_chat_template(folder, task, tmp_path, capsys):
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(chat)
    given = ["--tasks", "shown_letters", "--task-files", str(tmp_path), "--num-fewshot", "1"]
    out = tmp_path / "results"
    options = [*given, "--apply-chat-template", "--output-path", str(out)]
    assert cli.run(["eval", str(chat), *options]) == 0
    (file,) = out.glob("*/results_*.json")
    assert json.loads(file.read_text())["chat_template"] == tokenizer.chat_template
    capsys.readouterr()
    assert cli.run(["eval", str(folder), *options]) == 2
    assert "--apply-chat-template needs a chat template" in capsys.readouterr().err


@with_lm_eval
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tasks", "next_letter,no_such_task"], 2, "'no_such_task' is unknown to lm-eval and to"),
        (["--tasks", "next_letter", "--output-path", "{file}/x"], 3, "is a file; choose another"),
        (["--tasks", "next_letter", "--task-files", "{file}"], 2, "is not a folder of task files"),
    ],
)
def test_what_cannot_run_is_said_before_the_model_is_loaded(
    folder, task, tmp_path, capsys, monkeypatch, options, code, message
):
    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "open_model", load)
    (tmp_path / "file").write_text("")
    options = [option.format(file=tmp_path / "file") for option in options]
    assert cli.run(["eval", str(folder), "--task-files", str(tmp_path), *options]) == code
    assert message in capsys.readouterr().err
