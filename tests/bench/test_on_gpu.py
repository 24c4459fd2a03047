"""benchmarks/on_gpu.sh without a GPU: the runner with parts made up here, the verdicts on rows made
up here, and the parts' own code on a device whose launches compute nothing.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import plan_rows
import pytest
import torch
from on_gpu import (
    causes,
    correct,
    decode,
    kernels,
    parts,
    plans,
    pytests,
    runner,
    sanitized,
    sweep,
    verdicts,
    weights,
)
from on_gpu.parts import OUT_OF_TIME, Part
from on_gpu.rows import Rows
from on_gpu.runner import DONE, FAILED, STOPPED

from slab_kernels.backends.cuda.gpus import gpu_named
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.bench.clocks import Timed

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"device": "a GPU", "commit": "abc1234", "versions": {}}


def part(name: str, code: str, limit: float = 30.0, least: float = 0.0) -> Part:
    return Part(name, name, [sys.executable, "-c", code], limit, least)


def run(tmp_path: Path, *some: Part, seconds: float = 60.0, again=lambda part: False):
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
    code, entries, _ = run(tmp_path, part("bad", GOOD), again=lambda part: True)
    assert code == 0 and entries["bad"].state == DONE


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
    assert names[:7] == ["kernels", "cuda", "triton", "causes", "decode", "sweep", "tests"]
    assert names[7:] == ["memcheck-rings", "racecheck-rings", "memcheck-small", "racecheck-small"]
    assert all(each.least < each.limit for each in some)
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


# ---- parts, on a device that computes nothing


class NoDevice:
    """Launches are noted; results keep what the memory held."""

    def __init__(self):
        self.launched: list[tuple[str, bool]] = []
        self.device = CudaDevice(gpu_named("H200"), self.queue)

    def queue(self, name, grid, block, shared_bytes, params, dependent) -> None:
        self.launched.append((name, dependent))


class NoClock:
    """Says that every call took a microsecond, after having made each once."""

    has_warm = True

    def copies(self, size: int) -> int:
        return 2

    def is_cold(self, total: int) -> bool:
        return True

    def time(self, calls) -> Timed:
        for call in calls:
            call()
        return Timed([1e-6] * 3, "graph")

    def fastest(self, call, times: int = 6) -> float:
        return 1e-3


@pytest.fixture
def stand(monkeypatch):
    monkeypatch.setattr(causes, "K_BLOCKS", (2, 9))
    monkeypatch.setattr(causes, "WARP_SHAPES", ((64, 2048),))
    monkeypatch.setattr(causes, "CHAIN_SHAPE", (128, 128))
    monkeypatch.setattr(causes, "VALUES", ("int4",))
    return causes.Stand(NoDevice().device, NoClock(), "cpu")


def test_the_pieces_of_a_launch_are_timed_apart(tmp_path, stand, monkeypatch):
    rows = Rows(tmp_path / "causes.json", HEAD)
    causes.measure(stand, rows)
    points = [row["point"] for row in rows.rows]
    assert {point: points.count(point) for point in points} == {
        "overlap": 4,
        "warps": 3,
        "loop": 4,
        "start": 1,
        "prefetch": 2,
    }
    assert all(row["measured_us"] == 1.0 for row in rows.rows)
    assert all(row["predicted_us"] > 0 for row in rows.rows if row["point"] != "prefetch")
    assert [row["warps"] for row in rows.rows if row["point"] == "warps"] == [4, 8, 16]
    warm, cold = (row for row in rows.rows if row["point"] == "loop" and row["k_blocks"] == 9)
    assert warm["predicted_us"] <= cold["predicted_us"], "a weight in cache meets fewer bounds"
    assert len({row["case"] for row in rows.rows}) == len(rows.rows)
    assert verdicts.causes(rows.rows).good
    monkeypatch.setattr(causes, "POINTS", [None])
    with pytest.raises(AttributeError):  # What was not measured is begun.
        causes.measure(stand, Rows(tmp_path / "causes.json", HEAD))
    monkeypatch.setattr(causes, "POINTS", (causes.start, causes.loop))
    causes.measure(stand._replace(clock=None), Rows(tmp_path / "causes.json", HEAD))


def test_a_chain_is_launched_with_and_without_overlap():
    for overlaps in (True, False):
        made = NoDevice()
        stand = causes.Stand(made.device, NoClock(), "cpu")
        state = stand.weight(128, 128, "int4")
        each = stand if overlaps else stand.in_turn()
        for call in causes.chain(each, [state, state], stand.tokens(1, 128)):
            call()
        assert [dependent for _, dependent in made.launched] == [overlaps] * 2


def test_the_sweep_writes_what_fit_plans_reads_and_goes_on(tmp_path, stand, monkeypatch):
    monkeypatch.setattr(sweep, "layers", lambda name: ((128, 2048),))
    monkeypatch.setattr(sweep, "VALUES", ("int4", "fp16"))
    file = tmp_path / "plans-a-gpu.csv"
    rows, whole = sweep.write(file, stand, 0.0)
    assert len(rows) == 1 and not whole
    rows, whole = sweep.write(file, stand, 60.0)
    assert whole and len(rows) == 2 * 3 * sweep.MOST
    written = list(csv.DictReader(file.open()))
    assert [row["measured_us"] for row in written] == ["1.0"] * len(rows)
    assert tuple(written[0]) == plan_rows.COLUMNS
    assert len({sweep._key(row) for row in written}) == len(rows), "no plan is timed twice"
    assert len(plan_rows.fused(file)) == len(rows)


def test_the_decode_table_is_measured_in_units(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "layers", lambda name: ((64, 128),))
    monkeypatch.setattr(decode, "BACKENDS", ("reference", "cuda"))
    monkeypatch.setattr(decode, "VALUES", ("int4",))
    rows = Rows(tmp_path / "linear.json", HEAD)
    decode.measure(rows, NoClock(), "cpu", gpu_named("H200"))
    assert {row["case"] for row in rows.rows} == {"64x128 int4 reference", "64x128 others"}
    assert list(rows.more["failed"]) == ["64x128 int4 cuda"], "no CUDA device here"
    found = [row for row in rows.rows if row["backend"] == "reference" and row["cache"] == "cold"]
    assert [row["m"] for row in found] == [1, 4, 16]
    assert decode.predicted(found[0], gpu_named("H200")) > 0
    before = list(rows.rows)
    again = Rows(tmp_path / "linear.json", HEAD)
    decode.measure(again, None, "cpu", gpu_named("H200"))
    assert again.rows == before and list(again.more["failed"]) == ["64x128 int4 cuda"]


def test_wrong_results_of_a_device_are_found():
    """Nothing is computed, so nothing is right; the kernels that were launched are told."""
    weight = weights.Weight("fp16", "int4", 128, 1, 1, 260, (70,), 4)
    torch.use_deterministic_algorithms(True, warn_only=True)  # Outputs begin as NaN.
    try:
        row = correct.cuda_outcome(weight, NoDevice().device, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert row["wrong"][0] == "chosen, M=1: 70 of 70 entries are not finite"
    few = {"narrow_fp16_int4_one", "wide_fp16_int4_one_t16", "adapter_fp16_t16"}
    assert few <= set(row["kernels"]) and set(row["may_use"]) == few
    wrong = set(row["wrong"])
    for way in ("narrow 1x16 warps, 1 splits, M=4", "wide 2x1 warps, 2 splits, M=16"):
        assert any(fault.startswith(f"{way}: ") for fault in wrong)
    assert len({fault.split(", M=")[0] for fault in wrong}) == row["ways"] > 30


@pytest.mark.parametrize(
    "weight, loop",
    [
        (weights.Weight("fp16", "int4", 128, 1, 1, 260, (70,)), "narrow"),
        (weights.Weight("bf16", "fp16", None, 2, 1, 388, (20, 24)), "narrow"),
    ],
    ids=str,
)
def test_results_of_the_emulated_device_are_right(monkeypatch, weight, loop):
    """The kernels' PTX, interpreted; a few tiles of one loop."""
    emulation = pytest.importorskip("emulation")
    device = NoDevice().device

    def linear_on(device):
        def linear(x, state, bias=None):
            launched = emulation.Launched()
            y = emulation.run(x, state, bias, device.gpu, launched=launched)
            for name in launched.kernels:
                device.queue(name, None, None, 0, None, True)
            return y

        return linear

    every = plans.every
    monkeypatch.setattr(
        plans, "every", lambda *some: [plan for plan in every(*some) if plan.tile.loop == loop][::9]
    )
    monkeypatch.setattr(plans, "linear_on", linear_on)
    monkeypatch.setattr(correct, "TOKENS", (1, 2))
    row = correct.cuda_outcome(weight, device, "cpu")
    assert not row["wrong"] and row["ways"] > 2
    assert any(name.startswith(loop) for name in row["kernels"])


def test_one_wrong_entry_is_found_and_a_token_that_depends_on_others():
    weight = weights.Weight("fp16", "int4", 32, 2, 1, 128, (16, 40), 16)
    it = weights.problem(weight, "cpu")

    def linear(x, state, bias):
        return it.exact[: x.shape[0]].half()

    assert correct.faults(weight, it, None, linear, weights.TOKENS) == []
    faults = {}
    for name, at in (("wrong", (0, 55)), ("depends", (0, 0))):
        normal = weight._replace(integers=name == "wrong")

        def off(x, state, bias, at=at):
            y = linear(x, state, bias)
            y[at] += (x.shape[0] == 8) * (y[at].abs() * 2**-10 + 2**-12)
            return y

        faults[name] = correct.faults(normal, it, None, off, weights.TOKENS)
    assert [fault.split(":")[0] for fault in faults["wrong"]] == ["M=8"]
    assert "the first at token 0, row 55" in faults["wrong"][0]
    assert faults["depends"][0] == "M=8: a token's result depends on how many there are"


def test_the_weights_meet_every_kernel_for_few_tokens():
    names = kernels.names(weights.small())
    few = {name for name in names if correct.FEW_TOKENS.match(name)}
    kinds = {tuple(name.split("_")[:1] + name.split("_")[3:]) for name in few}
    assert {("narrow", planes) for planes in ("none", "one", "two", "three")} <= kinds
    assert {("wide", "one", "any", "t8"), ("wide", "none", "t16", "groups")} <= kinds
    assert {"adapter_fp16_t16", "adapter_bf16_t16"} <= few
    assert len(correct.triton_weights()) < 60


def test_what_pytest_prints_becomes_rows(tmp_path):
    lines = (
        "collected 2000 items / 1990 deselected / 10 selected",
        "tests/a.py::test_b[(300, 1160)-x] PASSED                    [  3%]",
        "tests/a.py::test_c SKIPPED (no libnvrtc)                     [  6%]",
        "[gw3] [ 12%] FAILED tests/a.py::test_d[1] ",
        "FAILED tests/a.py::test_d[1] - assert 1 == 2",
        "some other line",
    )
    found = list(pytests.outcomes(lines))
    assert found[0] == 10
    assert [(row["case"], row["outcome"]) for row in found[1:]] == [
        ("tests/a.py::test_b[(300, 1160)-x]", "passed"),
        ("tests/a.py::test_c", "skipped"),
        ("tests/a.py::test_d[1]", "failed"),
        ("tests/a.py::test_d[1]", "failed"),
    ]
    text = "\n".join(lines)
    rows = Rows(tmp_path / "tests.json", HEAD)
    hangs = [sys.executable, "-c", f"import time; print({text!r}, flush=True); time.sleep(60)"]
    assert pytests.run(rows, 2.0, hangs, tmp_path) is None
    assert len(rows.rows) == 3 and rows.more["selected"] == 10
    assert rows.rows[-1]["reason"] == "assert 1 == 2"


def test_what_the_sanitizer_says_becomes_a_row():
    right = f"{sanitized.RIGHT}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
    assert verdicts.sanitizer(sanitized.result("racecheck", "small", 0, right)).good
    wrong = f"{sanitized.RIGHT}\n========= ERROR SUMMARY: 2 errors\n"
    assert not verdicts.sanitizer(sanitized.result("memcheck", "rings", 9, wrong)).good
    refused = sanitized.result("memcheck", "rings", 1, "Device not supported\n")
    assert "it said last: Device not supported" in verdicts.sanitizer(refused).text


def test_the_sanitizers_cases_fill_rings_again_and_run_every_tile():
    device = NoDevice()
    ran = list(sanitized.launches("small", device.device, "cpu"))
    assert {name for name, _ in device.launched} >= {"narrow_bf16_int4_none_groups"}
    assert len(ran) > 20
    assert all(weight.K >= 8 * 128 * 2 for weight in sanitized.CASES["rings"])
