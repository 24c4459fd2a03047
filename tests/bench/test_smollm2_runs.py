"""benchmarks/smollm2_runs.py: what is kept and what is made again; and the texts that read it."""

from __future__ import annotations

import json
import shutil

import figure_runs
import figure_tables
import pytest
import smollm2_runs
from figure_tables import rounded

from slab_kernels.evaluate.decoding import PARTS

SPLIT = dict.fromkeys(PARTS, 0.2)
SPENT = {"wall_seconds": 300.0, "cpu_seconds": 540.0, "peak_bytes": 2.2e9}


def timed(batch: int, step: float) -> dict:
    return {
        "batch": batch, "prompt_tokens": 40, "tokens": 63, "prompt_seconds": 0.25,
        "seconds_per_step": step, "tokens_per_second": batch / step, "split": SPLIT,
    }  # fmt: skip


def speed(step: float) -> dict:
    return {
        "stored": "dense", "bits_per_weight": 16.0, "bytes": 1, "dtype": "float32",
        "decoding": [timed(1, step), timed(8, 2 * step)],
    }  # fmt: skip


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The parts whose process was asked for; what these print is made up."""
    asked = []

    def run(words):
        known = ("compress", "generate", "eval", "--solve", "--decode")
        asked.append(next(word for word in known if word in words))
        if asked[-1] == "compress":
            (tmp_path / "dense-balanced").mkdir()
            (tmp_path / "dense-balanced" / "slab_run.json").touch()
        sizes = {"out_features": 4096, "in_features": 4096, "values": "int4", "planes": 2}
        return SPENT | sizes | {
            "bits_per_weight": 4.26, "bytes": 85e6, "mean_error": 0.06, "mean_heldout_error": 0.07,
            "results": [speed(0.05), speed(0.04)], "seconds": 44.4,
            "text": "Paris <b>, of course. " * 20, "tokens": smollm2_runs.TOKENS,
            "kl": 0.102 if words[-1] == "int8" else 0.1, "exact": 0.2, "int8": 0.205,
        }  # fmt: skip

    monkeypatch.setattr(smollm2_runs, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return asked


@pytest.fixture
def runs(monkeypatch, tmp_path, calls):
    """Runs the script with some options; returns the content of its file."""
    monkeypatch.setattr(figure_tables, "RESULTS", tmp_path)
    figure_tables.read.cache_clear()

    def start(*options: str) -> dict:
        out = tmp_path / figure_runs.RUNS
        command = ["x", str(tmp_path / "dense"), "--threads", "2", "--out", str(out)]
        monkeypatch.setattr("sys.argv", [*command, *options])
        assert smollm2_runs.main() == 0
        figure_tables.read.cache_clear()
        return json.loads(out.read_text(encoding="utf-8"))

    yield start
    figure_tables.read.cache_clear()


def test_what_is_there_is_not_made_again(runs, calls, tmp_path):
    found = runs("--only", "layer")
    assert calls == ["--solve"] and found["layer"]["seconds"] == 44.4 and "chat" not in found
    found = runs()
    answers = 2 * len(smollm2_runs.QUESTIONS)
    rounded_x = ["eval", "eval", "--decode"]
    assert calls == ["--solve", "compress", "generate", *["generate"] * answers, *rounded_x]
    assert found["compress"]["threads"] == 2 and found["compress"]["calibration"] == "stdlib"
    calls.clear()
    runs()
    assert not calls
    runs("--only", "chat", "--again")
    assert calls == ["generate"]
    shutil.rmtree(tmp_path / "dense-balanced")  # lost, so the chat needs it anew
    runs("--only", "chat", "--again")
    assert calls[1:] == ["compress", "generate"]


def test_a_folder_with_something_else_is_left_alone(runs, calls, tmp_path):
    (tmp_path / "dense-balanced").mkdir()
    (tmp_path / "dense-balanced" / "mine.txt").touch()
    with pytest.raises(SystemExit, match="no compressed model"):
        runs("--only", "compress")
    assert (tmp_path / "dense-balanced" / "mine.txt").exists() and not calls


def test_a_failed_process_ends_the_script(capfd):
    with pytest.raises(SystemExit) as ended:
        smollm2_runs.run(["-c", "print('no chat template'); raise SystemExit(2)"])
    assert "no chat template" in str(ended.value)
    assert smollm2_runs.run(["-c", "print('{\"a\": 1}')"])["a"] == 1


def test_nothing_is_claimed_before_it_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(figure_tables, "RESULTS", tmp_path)
    texts = {name: region() for name, region in figure_runs.RUN_REGIONS.items()}
    for name in ("smollm2-times", "smollm2-speeds", "smollm2-activations"):
        assert texts[name] == figure_runs.NOT_YET
    assert texts["smollm2-steps"] == texts["smollm2-answers"] == ""


def test_texts_and_tables_of_the_runs(runs):
    runs()
    texts = {name: region() for name, region in figure_runs.RUN_REGIONS.items()}
    times = " ".join(texts["smollm2-times"].split())
    assert "took 5.0 minutes on 2 threads of" in times and "9.0 minutes of CPU time" in times
    assert "2.2 GB" in times and "took 44 s in `decompose`" in times
    assert "| 1 | 20.0 | 25.0 | 1.25× | 0.25 | 0.25 |" in texts["smollm2-speeds"]
    assert "| 8 | 80.0 | 100.0 | 1.25× |" in texts["smollm2-speeds"]
    shares = [f"{rounded(ms, 1)} ms, 20 %" for ms in (10, 8, 20, 16)]
    assert f"| output head | {' | '.join(shares)} |" in texts["smollm2-steps"]
    assert "| all | 50.0 ms | 40.0 ms | 100.0 ms | 80.0 ms |" in texts["smollm2-steps"]
    text = " ".join(texts["smollm2-activations"].split())
    assert "from 0.1000 to 0.1020, by 2.0 %" in text and "64 tokens of WikiText" in text
    assert "from 0.2000 to 0.2050, by 2.5 %" in text and "2,560 of them are read one by one" in text
    quoted = texts["smollm2-answers"].partition("\n\n")[2].splitlines()
    assert all(line.startswith(">") and len(line) <= 100 for line in quoted)
    assert "Paris &lt;b>" in texts["smollm2-answers"] and "…" in quoted[-1]
