"""benchmarks/on_gpu.sh without a GPU: the runner with parts made up here, and the verdicts on rows
made up here. test_on_gpu_parts.py has the parts themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from on_gpu import __main__ as script
from on_gpu import parts, runner, verdicts
from on_gpu.parts import OUT_OF_TIME, Part
from on_gpu.rows import Rows
from on_gpu.runner import DONE, FAILED, STOPPED

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"device": "a GPU", "commit": "abc1234", "versions": {}}


def part(name: str, code: str, limit: float = 30.0, least: float = 0.0, **more) -> Part:
    return Part(name, name, [sys.executable, "-c", code], limit, least, **more)


def run(tmp_path: Path, *some: Part, seconds: float = 60.0, again=False):
    """The exit code, what each part's line says, and all that was said."""
    said: list[str] = []
    summary = runner.Summary(tmp_path / "on-gpu.txt", "a GPU, commit abc1234")
    code = runner.run_all(some, summary, seconds, again, said.append)
    lines = (tmp_path / "on-gpu.txt").read_text().splitlines()
    assert lines[0] == "# a GPU, commit abc1234"
    return code, {entry.part: entry for entry in map(runner.Entry.of, lines) if entry}, said


# ---- the runner


GOOD, BAD = "print('verdict: right')", "print('verdict: wrong'); raise SystemExit(1)"


def test_a_failing_part_is_told_and_the_next_one_runs(tmp_path):
    code, entries, _ = run(tmp_path, part("one", BAD), part("two", GOOD))
    assert code == 1
    assert list(entries) == ["one", "two"]
    assert entries["one"][:2] == ("one", FAILED)
    assert entries["one"].verdict == "wrong (ended with code 1)"
    assert entries["two"][:2] == ("two", DONE) and entries["two"].verdict == "right"


def test_a_hanging_part_is_stopped_with_all_that_it_started(tmp_path):
    child = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    hangs = (
        f"import subprocess, time; print('verdict: 3 of 7', flush=True); {child}; time.sleep(60)"
    )
    start = time.monotonic()
    code, entries, _ = run(tmp_path, part("one", hangs, limit=1.0), part("two", GOOD))
    assert time.monotonic() - start < 20
    assert code == 1 and entries["one"].state == STOPPED and entries["two"].state == DONE
    assert entries["one"].verdict == "stopped at 1 s; until then: 3 of 7"


def test_a_part_that_dies_or_cannot_start_is_told(tmp_path):
    dies = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    absent = Part("two", "two", [str(tmp_path / "absent")], 5.0, 0.0)
    code, entries, _ = run(tmp_path, part("one", dies), absent)
    assert code == 1
    assert entries["one"].verdict == "so far (killed by signal 11)"
    assert entries["two"].verdict.startswith("it cannot be started")


def test_a_second_call_goes_on_where_the_first_was_stopped(tmp_path):
    later = part("later", f"raise SystemExit({OUT_OF_TIME})")
    some = (part("good", GOOD), part("bad", BAD), later)
    code, entries, _ = run(tmp_path, *some, part("last", GOOD, least=1e6))
    assert code == 1 and "last" not in entries and entries["later"].state == STOPPED
    code, entries, said = run(
        tmp_path, part("good", "raise SystemExit(7)"), part("bad", GOOD), part("later", GOOD)
    )
    assert [entries[name].state for name in ("good", "bad", "later")] == [DONE, FAILED, DONE]
    assert code == 1, "an earlier failure is still one"
    assert "== good: done by an earlier call: right" in said
    code, entries, _ = run(tmp_path, part("bad", GOOD), again=True)
    assert code == 0 and entries["bad"].state == DONE


@pytest.mark.parametrize(
    "first, code",
    [(part("one", BAD), 1), (part("one", GOOD, least=1e6), 3), (part("one", GOOD), 0)],
    ids=["failed", "not begun", "done"],
)
def test_a_part_is_not_begun_without_the_one_that_it_needs(tmp_path, first, code):
    some = (first, part("two", GOOD, needs="one"), part("three", GOOD))
    found, entries, said = run(tmp_path, *some)
    assert found == code and entries["three"].state == DONE
    assert ("two" in entries) == (code == 0)
    assert ("== two: not begun, it needs the part one, which is not done" in said) == (code != 0)


def test_a_part_of_every_call_is_run_again_and_decides_about_those_that_need_it(tmp_path):
    run(tmp_path, part("one", GOOD, every_call=True))
    some = part("one", BAD, every_call=True), part("two", GOOD, needs="one")
    code, entries, _ = run(tmp_path, *some)
    assert code == 1 and entries["one"].state == FAILED and "two" not in entries


def test_a_part_that_is_named_brings_the_one_that_it_needs(tmp_path):
    every = parts.parts(tmp_path, "")
    for names, chosen in (
        (["decode"], ["kernels", "decode"]),
        (["triton"], ["triton"]),
        ([], [each.name for each in every]),
    ):
        assert [each.name for each in script.choice(every, names)] == chosen


def test_a_part_is_told_its_limit_and_whether_it_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    tells = "from on_gpu.parts import *; print('verdict:', seconds_here(), begins_anew())"
    for again in (False, True):
        _, entries, _ = run(tmp_path, part("one", tells, limit=20.0), again=again)
        assert entries["one"].verdict == f"10.0 {again}"


def test_what_is_not_begun_for_lack_of_time_is_no_failure(tmp_path):
    code, entries, said = run(tmp_path, part("one", GOOD, least=20.0), seconds=10.0)
    assert code == 3 and not entries and "not begun" in said[-1]


def test_an_earlier_summary_may_lie_in_another_folder(tmp_path):
    (tmp_path / "results").mkdir()
    run(tmp_path / "results", part("one", GOOD))
    summary = runner.Summary(tmp_path / "on-gpu.txt", "again", (tmp_path / "results",))
    assert summary.finished("one")
    assert "one\tdone" in (tmp_path / "on-gpu.txt").read_text()


def test_a_torn_line_of_the_summary_is_no_entry(tmp_path):
    (tmp_path / "on-gpu.txt").write_text("# a GPU\none\tdone\t3 s\tright\ntwo\tdo")
    summary = runner.Summary(tmp_path / "on-gpu.txt", "a GPU")
    assert summary.finished("one") and not summary.finished("two")


def test_the_parts_are_in_order_of_worth_and_fit_a_call(tmp_path):
    some = parts.parts(tmp_path, "a-gpu-abc1234")
    names = [each.name for each in some]
    many = ["hardware", "unknowns", "kernels", "right", "many", "sweep-many"]
    few = ["cuda", "triton", "causes", "decode", "sweep", "tests"]
    assert names[:12] == many + few
    tools = [f"{tool}-{case}" for case in ("rings", "small") for tool in ("memcheck", "racecheck")]
    assert names[12:] == [*tools, "memcheck-many", "racecheck-many", "synccheck-many"]
    # A machine that has no cache compiles within a part of its limit, and then the checks of many
    # tokens fit the same call.
    assert sum(each.limit for each in some[:2]) + sum(each.least for each in some[2:6]) < 300
    assert all(each.least < each.limit for each in some)
    alone = {"kernels", "triton", "hardware", "unknowns"}
    assert {each.name for each in some if each.needs != "kernels"} == alone
    assert [each.name for each in some if each.every_call] == ["kernels"]
    files = {argument for each in some for argument in each.command if "a-gpu-abc1234" in argument}
    assert len(files) < 8, "with the summary no more than a lent machine gives back"


def test_without_a_gpu_it_refuses_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh"],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": "/"},
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "finds no CUDA device" in done.stderr


def test_the_probe_needs_neither_typer_nor_rich():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('typer', 'rich', 'transformers'));"
        "from on_gpu import machine; machine.reason(); print(machine.head()['commit'])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_one_call_runs_the_parts_into_the_folder_that_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "probe", lambda: HEAD | {"driver": "580"})
    monkeypatch.setattr(script, "RESULTS", tmp_path / "nothing")
    made = [part("one", GOOD), part("two", BAD)]
    monkeypatch.setattr(script, "parts", lambda out, stem: made)
    out = tmp_path / "out"
    assert script.main(["--out", str(out)]) == 1
    written = (out / "on-gpu-a-gpu-abc1234.txt").read_text()
    assert written in capsys.readouterr().out and "one\tdone" in written
    assert script.main(["--out", str(out), "one"]) == 0
    with pytest.raises(SystemExit):
        script.main(["three"])
    assert "no part three; choose from one, two" in capsys.readouterr().err


# ---- result files


def test_rows_go_on_behind_those_of_the_same_commit_and_device(tmp_path):
    rows = Rows(tmp_path / "rows.json", HEAD)
    rows.add({"case": "a", "us": 1.0}, {"case": "a", "us": 2.0})
    rows.add({"case": "b"})
    rows.save(measured=["a"])
    again = Rows(tmp_path / "rows.json", HEAD)
    assert again.rows == rows.rows and again.has("b") and again.more == {"measured": ["a"]}
    again.add({"case": "a", "us": 3.0})
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["b", "a"] and found["device"] == "a GPU"
    assert not Rows(tmp_path / "rows.json", HEAD | {"commit": "def5678"}).rows
    again.forget("a")
    assert [row["case"] for row in again.rows] == ["b"] and again.more
    again.forget()
    assert not again.rows and not again.more
    (tmp_path / "rows.json").write_text("{")
    assert not Rows(tmp_path / "rows.json", HEAD).rows


# ---- verdicts


def cell(backend: str, us: float, dense: float, bits: float = 4.0, **other) -> dict:
    row = {"n": 28672, "k": 4096, "m": 1, "values": "int4", "cache": "cold", "backend": backend}
    speed = {"median_us": us, "speedup_vs_dense": dense / us, "bits_per_weight": bits}
    return row | speed | other


def test_the_byte_limit_has_one_goal_for_large_shapes_and_one_for_small():
    large, small = cell("cuda", 26.0, 100.0), cell("cuda", 29.0, 100.0, n=4096)
    assert verdicts.limit_share(large) == pytest.approx(100 / 26 / 4)
    verdict = verdicts.byte_limit([large, small, cell("cuda", 90.0, 100.0, m=16)])
    assert verdict.good and "0.96 at 28672x4096 int4 M=1" in verdict.text
    missed = verdicts.byte_limit([cell("cuda", 29.0, 100.0), small])
    assert not missed.good and len(missed.details) == 1
    assert "missed by 1 of 1: 28672x4096 int4 M=1 cuda 0.86" in missed.text
    assert "not measured" in verdicts.byte_limit([large]).text


def test_triton_is_compared_with_cuda_and_both_with_dense():
    rows = [cell("cuda", 20.0, 60.0), cell("triton", 22.0, 60.0)]
    assert verdicts.triton_beside_cuda(rows).good
    assert verdicts.never_slower_than_dense(rows).good
    slow = [cell("cuda", 20.0, 60.0), cell("triton", 61.0, 60.0)]
    assert not verdicts.triton_beside_cuda(slow).good
    assert "triton 0.98" in verdicts.never_slower_than_dense(slow).text
    warm = [row | {"cache": "warm"} for row in slow]
    assert "not measured" in verdicts.never_slower_than_dense(warm).text


def test_the_decode_table_tells_goals_peers_and_predictions():
    rows = [
        cell("cuda", 20.0, 80.0, predicted_us=19.0),
        cell("cuda", 8.0, 28.0, n=4096, predicted_us=9.0),
        cell("triton", 21.0, 80.0),
        cell("marlin", 30.0, 80.0),
    ]
    verdict = verdicts.decode(rows, {})
    assert verdict.good and "\n" not in verdict.text
    assert "1.50 to 1.50 times marlin's speed" in verdict.text
    assert "measured over predicted 0.89 to 1.05" in verdict.text
    failed = verdicts.decode(rows, {"4096x4096 int4 triton": "CudaError: no"})
    assert not failed.good and "not measured: 4096x4096 int4 triton" in failed.text
    assert "NOT MEASURED 4096x4096 int4 triton: CudaError: no" in failed.details


def test_wrong_results_fallbacks_and_kernels_that_never_ran_are_named():
    right = {"case": "cuda a", "ways": 9, "wrong": [], "kernels": ["narrow_a"]}
    right["may_use"] = right["kernels"]
    assert verdicts.correctness([right]).good
    wrong = right | {"case": "cuda b", "wrong": ["M=3: 1 of 9 entries"], "may_use": ["wide_b"]}
    fell = right | {"case": "c", "warned": ["fell"]}
    verdict = verdicts.correctness([right, wrong, fell])
    assert not verdict.good
    assert list(verdict.details) == [
        "WRONG cuda b: M=3: 1 of 9 entries",
        "WARNED c: fell",
        "NEVER RAN wide_b",
    ]
    assert "2 of 3 weights are right, run in 27 ways" in verdict.text
    assert not verdicts.correctness([]).good


def test_pieces_of_a_launch_are_told_beside_their_predictions():
    loop = [
        {"point": "loop", "values": "int4", "cache": "warm", "k_blocks": blocks}
        | {"measured_us": 2.0 + 0.05 * blocks, "predicted_us": 3.0 + 0.04 * blocks}
        for blocks in (8, 16, 32)
    ]
    place = {"n": 4096, "k": 4096, "values": "int4", "cache": "cold", "predicted_us": 5.0}
    rows = [
        *loop,
        {"point": "start", "values": "int4", "measured_us": 2.2, "predicted_us": 2.1},
        {"point": "warps", "warps": 16, "measured_us": 5.5} | place,
        {"point": "overlap", "how": "overlapping", "measured_us": 5.0} | place,
        {"point": "overlap", "how": "in turn", "measured_us": 6.1} | place,
        {"point": "prefetch", "how": "with a prefetch", "measured_us": 7.0} | place,
    ]
    text = verdicts.causes(rows).text
    assert "int4 in cache 2.00 us + 50.0 ns a K block (3.00 us + 40.0 ns)" in text
    assert "int4 launch of a tiny weight 2.20 us (2.10)" in text
    assert "4096x4096 int4: 16 warps 5.50 us (5.00)" in text
    assert "4096x4096 int4 cold: overlapping 5.00 us (5.00), in turn 6.10 us (5.00)" in text
    assert "int4 behind another kernel with a prefetch 7.00 us" in text


def test_what_the_models_choice_costs():
    row = {"n": "4096", "k": "4096", "values": "int4", "m": "1"}
    rows = [
        row | {"predicted_us": "5", "measured_us": "6"},
        row | {"predicted_us": "6", "measured_us": "5"},
    ]
    verdict = verdicts.plans(rows, True)
    assert verdict.good and "takes 1.200 times the best one's time" in verdict.text
    assert "time ran out" in verdicts.plans(rows, False).text


def test_outcomes_of_tests_are_counted():
    rows = [{"case": "tests/a.py::b", "outcome": "failed"}, {"case": "c", "outcome": "passed"}]
    assert verdicts.tests(rows, 2).text == "1 failed, 1 passed: b"
    assert verdicts.tests(rows[1:], 3).text == "1 passed, 2 not run"
    assert verdicts.tests(rows[1:], 1).good and not verdicts.tests([], 0).good
