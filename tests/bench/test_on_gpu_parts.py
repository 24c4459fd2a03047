"""The parts of benchmarks/on_gpu.sh without a GPU: their own code, on a device whose launches
compute nothing, and for a few tiles on the emulated one.
"""

from __future__ import annotations

import csv
import ctypes
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import inf
from pathlib import Path
from types import SimpleNamespace

import plan_rows
import pytest
import torch
from on_gpu import (
    causes,
    correct,
    decode,
    hardware,
    kernels,
    machine,
    many,
    parts,
    plans,
    pytests,
    runner,
    sanitized,
    sweep,
    unknowns,
    verdicts,
    verdicts_many,
    weights,
)
from on_gpu.rows import Rows

from slab_kernels.backends.cuda.cost import dense_microseconds
from slab_kernels.backends.cuda.device import CudaDevice
from slab_kernels.backends.cuda.gpus import gpu_named
from slab_kernels.backends.cuda.layout import INT4
from slab_kernels.backends.cuda.plan import takes_dense
from slab_kernels.backends.cuda.tiles import CudaSizes
from slab_kernels.backends.triton import sparse
from slab_kernels.bench.clocks import Timed
from slab_kernels.errors import BenchError
from slab_kernels.format import ceil_div
from slab_kernels.report import measurements

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"device": "a GPU", "commit": "abc1234", "versions": {}}


class NoDevice:
    """Launches are noted; results keep what the memory held."""

    def __init__(self):
        self.launched: list[tuple[str, bool]] = []
        self.device = CudaDevice(gpu_named("H200"), self.queue, lambda *_: bytes(128))

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
    assert causes.measure(stand, rows, inf)
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
        causes.measure(stand, Rows(tmp_path / "causes.json", HEAD), inf)
    monkeypatch.setattr(causes, "POINTS", (causes.start, causes.loop))
    assert causes.measure(stand._replace(clock=None), Rows(tmp_path / "causes.json", HEAD), inf)
    assert not causes.measure(stand, Rows(tmp_path / "none.json", HEAD), -inf)


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
    rows, whole = sweep.write(file, stand, -inf)
    assert len(rows) == 1 and not whole
    rows, whole = sweep.write(file, stand, inf)
    assert whole and len(rows) == 2 * 3 * sweep.MOST
    written = list(csv.DictReader(file.open()))
    assert [row["measured_us"] for row in written] == ["1.0"] * len(rows)
    assert tuple(written[0]) == plan_rows.COLUMNS
    assert len({sweep._key(row) for row in written}) == len(rows), "no plan is timed twice"
    assert len(plan_rows.fused(file)) == len(rows)


def test_a_copy_is_predicted_where_it_is_used():
    """Not from the first such number of tokens on: sparse kernels may win again."""
    gpu, sizes = gpu_named("H100"), CudaSizes(4096, (14336,), INT4, 4, 0, 0)
    used = {m: takes_dense(sizes, m, gpu) for m in (64, 300, 500)}
    assert used == {64: False, 300: True, 500: False}
    row = {"k": 4096, "n": 14336, "values": "int4", "group_size": None, "rank": 0}
    for m, copied in used.items():
        kept = decode.predicted({**row, "m": m, "prefill": "dense"}, gpu)
        packed = decode.predicted({**row, "m": m}, gpu)
        dense = dense_microseconds(14336, 4096, m, gpu)
        assert kept == (dense if copied else packed) != (packed if copied else dense)


def test_the_decode_table_is_measured_in_units(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "layers", lambda name: ((64, 128),))
    monkeypatch.setattr(decode, "BACKENDS", ("reference", "cuda"))
    monkeypatch.setattr(decode, "VALUES", ("int4",))
    rows = Rows(tmp_path / "linear.json", HEAD)
    assert decode.measure(rows, NoClock(), "cpu", gpu_named("H200"), inf)
    assert {row["case"] for row in rows.rows} == {"64x128 int4 reference", "64x128 others"}
    assert list(rows.more["failed"]) == ["64x128 int4 cuda"], "no CUDA device here"
    found = [row for row in rows.rows if row["backend"] == "reference" and row["cache"] == "cold"]
    assert [row["m"] for row in found] == [1, 4, 16]
    assert decode.predicted(found[0], gpu_named("H200")) > 0
    before = list(rows.rows)
    again = Rows(tmp_path / "linear.json", HEAD)
    assert decode.measure(again, None, "cpu", gpu_named("H200"), inf)
    assert again.rows == before and list(again.more["failed"]) == ["64x128 int4 cuda"]


def test_a_clock_that_fails_is_told_as_it_is(tmp_path, monkeypatch, capsys, machine_of_nothing):
    def clock_of(*_):
        raise BenchError("no clock")

    monkeypatch.setattr(decode, "clock_of", clock_of)
    with pytest.raises(BenchError, match="no clock"):
        decode.main(str(tmp_path / "linear.json"))
    assert "not measured" in capsys.readouterr().out


def test_wrong_results_of_a_device_are_found():
    """Nothing is computed, so nothing is right; the kernels that were launched are told."""
    weight = weights.Weight("fp16", "int4", 128, 1, 1, 260, (70,), 4)
    row = correct.cuda_outcome(weight, NoDevice().device, "cpu")
    assert row["wrong"][0] == "chosen, M=1: 70 of 70 entries are not finite"
    few = {"narrow_fp16_int4_one", "wide_fp16_int4_one_t16", "adapter_fp16_t16"}
    assert few <= set(row["kernels"]) and set(row["may_use"]) == few
    wrong = set(row["wrong"])
    for way in ("narrow 1x16 warps, 1 splits, M=4", "wide 2x1 warps, 2 splits, M=16"):
        assert any(fault.startswith(f"{way}: ") for fault in wrong)
    assert len({fault.split(", M=")[0] for fault in wrong}) == row["ways"] > 30


@pytest.fixture(autouse=True)
def undone():
    """What the parts tell torch for good is taken back."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def machine_of_nothing(monkeypatch, stand):
    """What the programs ask about the machine is answered as if it had that device."""
    found = NoDevice()
    monkeypatch.setattr(machine, "here", lambda: ("cpu", found.device))
    monkeypatch.setattr(machine, "head", lambda: HEAD)
    for program in (causes, decode, many):
        monkeypatch.setattr(program, "clock_of", lambda *_: NoClock())
    return found


def launched_in_no_time(name, ctas, threads, shared, params) -> None:
    """Computes nothing; every warp's clock says that it took a hundred."""
    if params.clocks:
        spans = (ctypes.c_int32 * (threads // 16)).from_address(params.clocks)
        spans[:] = [0, 100] * (threads // 32)


def test_the_program_of_each_part_says_a_verdict(tmp_path, monkeypatch, capsys, machine_of_nothing):
    some = [weights.Weight("fp16", "int4", 128, 1, 1, 200, (5,))]
    monkeypatch.setattr(correct, "small", lambda: some)
    monkeypatch.setattr(correct, "large", list)
    monkeypatch.setattr(correct, "triton_weights", lambda: some)
    monkeypatch.setattr(correct, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(kernels, "small", lambda: some)
    monkeypatch.setattr(kernels, "large", list)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    answers = {"missing": None, "capability": (9, 0), "load": None}
    for name, answer in answers.items():
        monkeypatch.setattr(kernels.driver, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(kernels, "device_of", lambda index: machine_of_nothing.device)
    nothing = hardware.Stand("cpu", launched_in_no_time, lambda *_: bytes(128))
    monkeypatch.setattr(hardware, "stand_here", lambda: nothing)
    monkeypatch.setattr(correct, "many", lambda: some)
    monkeypatch.setattr(correct, "MANY_TOKENS", (17, 70))
    monkeypatch.setattr(many, "TOKENS", (17, 64))
    monkeypatch.setattr(many, "units", lambda: [decode.Unit(32, 128, "int4", "reference")])
    few_of_many = sweep.Sweep((32, 128), (1, 0), sweep.many_candidates)
    monkeypatch.setitem(sweep.SWEEPS, "many", few_of_many)
    monkeypatch.setattr(decode, "units", lambda: [decode.Unit(32, 128, "int4", "reference")])
    monkeypatch.setattr(sweep, "layers", lambda name: ((128, 2048),))
    monkeypatch.setattr(sweep, "VALUES", ("int4",))
    monkeypatch.setattr(sanitized, "CASES", {"small": some})
    file = str(tmp_path / "rows.json")
    listed = [sys.executable, "-c", "print('tests/a.py::b PASSED [100%]')"]
    monkeypatch.setattr(pytests, "command", lambda: listed)
    once, plans_file = str(tmp_path / "hardware.json"), str(tmp_path / "plans.csv")
    programs = {
        "hardware": (hardware.main, (once,)),
        "unknowns": (unknowns.main, (once,)),
        "kernels": (kernels.main, ()),
        "right": (correct.main, ("many", file)),
        "many": (many.main, (str(tmp_path / "many.json"),)),
        "sweep-many": (sweep.main, ("many", plans_file)),
        "cuda": (correct.main, ("cuda", file)),
        "triton": (correct.main, ("triton", file)),
        "causes": (causes.main, (str(tmp_path / "causes.json"),)),
        "decode": (decode.main, (str(tmp_path / "linear.json"),)),
        "sweep": (sweep.main, ("few", plans_file)),
        "tests": (pytests.main, (str(tmp_path / "tests.json"),)),
    }
    assert list(programs) == [each.name for each in parts.parts(tmp_path, "")][: len(programs)]
    codes, said = {}, {}
    for name, (program, arguments) in programs.items():
        codes[name] = program(*arguments)
        (said[name],) = (
            line.removeprefix(runner.VERDICT)
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(runner.VERDICT)
        )
    # For nothing is computed, and Triton has no device.
    wrong = {"hardware", "right", "cuda", "triton"}
    assert codes == {name: int(name in wrong) for name in programs}
    assert said["kernels"].split(" kernels are loaded, from ")[0].isdigit()
    assert said["cuda"].startswith("0 of 1 weights are right")
    assert said["right"].startswith("0 of 1 weights are right")
    assert said["hardware"].startswith("0 of 6 are as the interpreter has them")
    assert said["unknowns"].startswith("COPY_WRITES 0.00; TABLE_WAVEFRONTS 1.00; CONSUMER_WAIT ")
    assert " of 4 cells were timed; " in said["sweep-many"]
    timed = list(csv.DictReader((tmp_path / "plans.csv").open()))
    loops = {row["loop"] for row in timed if int(row["m"]) > 16}
    assert loops == {"many", "rebuild", "prefill_one", "prefill_both", "prefill_rebuild"}
    assert len(plan_rows.fused(tmp_path / "plans.csv")) == len(timed)
    assert said["sweep"].startswith(f"{3 * sweep.MOST} plans of 3 cells were timed; ")
    assert said["tests"] == "1 passed"
    assert sanitized.main("run", "small") == 1 and "not finite" in capsys.readouterr().out
    monkeypatch.setattr(sanitized.shutil, "which", lambda place: None)
    assert sanitized.main("memcheck", "small", file) == 0
    assert len(measurements.read([tmp_path / "linear.json"]).bench) == 12, "report reads it"


@pytest.mark.parametrize(
    "weight, loop",
    [
        (weights.Weight("fp16", "int4", 128, 1, 1, 260, (70,)), "narrow"),
        (weights.Weight("bf16", "fp16", None, 2, 1, 388, (20, 24)), "narrow"),
        (weights.Weight("fp16", "int8", 64, 1, 1, 260, (40,), 4), "wide"),
        (weights.Weight("bf16", "int4", 128, 3, 1, 388, (33,)), "wide"),
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


def test_the_weights_meet_every_kernel():
    """Those for few tokens, and those for more: the loop that rebuilds and Hopper's kernels are of
    different devices."""
    named = set()
    for unit, prefix in (("linear", ""), ("prefill", "prefill_")):
        source = (ROOT / "csrc" / "cuda" / f"{unit}.cu").read_text()
        for family, name in re.findall(r"KERNEL\((\w+),\s*(\w+),\s*k", source):
            named |= {f"{prefix}{family}_{act}_{name}" for act in ("fp16", "bf16")}
    few = {name for name in named if correct.FEW_TOKENS.match(name)}
    assert len(few) > 60
    for some, pattern in (
        (weights.small(), correct.FEW_TOKENS), (weights.many(), correct.MORE_TOKENS),
    ):  # fmt: skip
        found = {
            name
            for gpu in map(gpu_named, ("H200", "A100"))
            for name in kernels.names(some, gpu)
            if pattern.match(name)
        }
        assert {name for name in named if pattern.match(name)} <= found


WAYS = (
    (weights.Weight("fp16", "int4", 128, 1, 1, 260, (70,), 4), "prefill_both"),
    (weights.Weight("bf16", "fp16", None, 0, 1, 388, (40, 24)), "prefill_one"),
    (weights.Weight("fp16", "int8", 64, 1, 1, 260, (40,)), "rebuild"),
    (weights.Weight("bf16", "int4", 32, 3, 2, 260, (33,)), "many"),
)


@pytest.mark.parametrize("weight, loop", WAYS, ids=[loop for _, loop in WAYS])
def test_plans_for_many_tokens_are_run_in_every_way(monkeypatch, weight, loop):
    """On a device that computes nothing every result is wrong, each way is named, and its kernels
    are launched."""
    monkeypatch.setattr(correct, "MANY_TOKENS", (17, 66))
    row = correct.cuda_outcome(weight, NoDevice().device, "cpu", "many")
    ways = {fault.split(", M=")[0] for fault in row["wrong"]}
    assert len(ways) == row["ways"] and "the weight rebuilt for cuBLAS" in ways
    assert any(way.startswith(loop) for way in ways)
    assert any(name.startswith(loop if loop != "many" else "planes") for name in row["kernels"])


@pytest.mark.parametrize("weight, loop", WAYS, ids=[loop for _, loop in WAYS])
def test_results_for_many_tokens_of_the_emulated_device_are_right(monkeypatch, weight, loop):
    """What is chosen, and a plan of each family, for one tile of tokens and for two."""
    emulation = pytest.importorskip("emulation")
    device = NoDevice().device

    def linear_on(device):
        def linear(x, state, bias=None):
            launched = emulation.Launched()
            y = emulation.run(x, state, bias, device.gpu, "compute_90a", launched)
            for name in launched.kernels:
                device.queue(name, None, None, 0, None, True)
            return y

        return linear

    every = plans.many

    def one_of_each(*some):
        found = {}
        for plan in every(*some):
            found.setdefault(plans.way(plan).split(" ")[0], plan)
        return [plan for family, plan in found.items() if family == loop]

    monkeypatch.setattr(plans, "many", one_of_each)
    monkeypatch.setattr(plans, "linear_on", linear_on)
    monkeypatch.setattr(correct, "MANY_TOKENS", (17, 66))
    row = correct.cuda_outcome(weight, device, "cpu", "many")
    assert not row["wrong"] and row["ways"] >= 2


def test_a_second_call_must_have_the_same_bits():
    weight = weights.Weight("fp16", "fp16", None, 1, 1, 128, (16,))
    it, calls = weights.problem(weight, "cpu", 70), []

    def linear(x, state, bias):
        y = it.exact[: x.shape[0]].half()
        calls.append(None)
        y[0, 0] += len(calls) % 2 * (x.shape[0] == 70)
        return y

    inexact = weight._replace(integers=False)
    it = it._replace(magnitude=it.magnitude * 1e6)
    assert correct.faults(inexact, it, None, linear, (17, 70)) == [
        "M=70: a second call has another result"
    ]


def test_goals_for_many_tokens():
    def row(m, speed, values="int4", rank=1, prefill="packed", **more):
        found = {"n": 4096, "k": 4096, "m": m, "values": values, "cache": "cold", "rank": rank}
        found |= {"backend": "cuda", "prefill": prefill, "speedup_vs_dense": speed}
        return found | {"median_us": 10.0, "predicted_us": 9.0} | more

    rows = [
        row(64, 1.2, "fp16"), row(64, 1.5), row(128, 1.1), row(1024, 0.95),
        row(2048, 0.995, prefill="dense"), row(1024, 1.2, "int8", 0), row(2048, 1.3, rank=0),
    ]  # fmt: skip
    assert verdicts_many.many(rows, {}).good
    missed = verdicts_many.many([*rows, row(256, 0.8)], {})
    assert not missed.good and "missed by 1 of 2: 4096x4096 int4 M=256 cuda 0.80" in missed.text
    assert "not measured" in verdicts_many.many(rows[:2], {}).text
    assert "NOT MEASURED a: b" in verdicts_many.many(rows, {"a": "b"}).details
    peer = row(64, 1.0, backend="marlin") | {"median_us": 20.0}
    assert "2.00 to 2.00 times marlin's speed" in verdicts_many.many([*rows, peer], {}).text


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_the_triton_kernels_main_loop_runs_in_every_way(dtype):
    """The loop is entered where a split has more K blocks than a program has warps."""
    chosen = [weight for weight in correct.triton_weights() if weight.dtype == dtype]
    kinds = {(values, group) for values, group in weights.VALUES if values != "int3"}
    assert {(weight.values, weight.group_size) for weight in chosen} == kinds
    looped = []
    for weight in chosen:
        pairs, k_blocks = sum(ceil_div(rows, 32) for rows in weight.rows), ceil_div(weight.K, 128)
        shape = SimpleNamespace(stream=torch.empty(pairs, k_blocks, 0), V=None, Q=None)
        found = sparse.configuration(shape, 1, gpu_named("H200").multiprocessors)
        if ceil_div(k_blocks, found.splits) > found.warps:
            looped.append((weight, found.warps))
    assert {warps for _, warps in looped} == {8, 16}
    assert {weight.planes for weight, _ in looped if weight.rank} == {1, 2, 3}
    assert max(weight.rank for weight, _ in looped) > 1
    assert {weight.values for weight, _ in looped} == {"fp16", "int8", "int4"}
    sizes = {(weight.K, weight.rows) for weight in chosen}
    assert len(sizes) == len(weights.SIZES) + 1, "each small size, and one of the large"
    assert len(correct.triton_weights()) < 30


def test_a_process_that_broke_is_followed_by_a_fresh_one(tmp_path, monkeypatch):
    made = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, *_):
            super().__init__(1)
            made.append(self)

    def outcome(weight, where):
        if weight == "dies":
            raise BrokenProcessPool("killed")
        row = {"case": f"triton {weight}", "ways": 1, "wrong": [], "pool": len(made)}
        return row | ({"broken": True} if weight == "breaks" else {})

    monkeypatch.setattr(machine, "here", lambda: ("cpu", None))
    monkeypatch.setattr(correct, "PROCESSES", 1)
    monkeypatch.setattr(correct, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(correct, "triton_outcome", outcome)
    todo = ["right", "breaks", "next", "dies", "last"]
    monkeypatch.setattr(correct, "triton_weights", lambda: todo)
    rows = Rows(tmp_path / "correct.json", HEAD)
    assert correct.run_triton(rows, inf)
    assert {row["case"]: row.get("pool") for row in rows.rows} == {
        "triton right": 1,
        "triton breaks": 1,
        "triton next": 2,
        "triton dies": None,
        "triton last": 3,
    }
    assert [row["wrong"] for row in rows.rows if row["case"] == "triton dies"] == [
        ["BrokenProcessPool: killed"]
    ]


def test_a_broken_device_ends_a_weight_on_triton(monkeypatch):
    weight = weights.Weight("fp16", "int4", 32, 2, 1, 128, (16, 40), 16)
    backend = SimpleNamespace(prepare_fused=lambda *_: None, linear_fused=None)

    def faults(*_):
        raise correct.Broken("M=1: an illegal memory access")

    monkeypatch.setattr(correct.dispatch, "backend", lambda name: backend)
    monkeypatch.setattr(correct, "faults", faults)
    row = correct.triton_outcome(weight, "cpu")
    assert row["broken"] and row["wrong"] == ["M=1: an illegal memory access"]


def test_what_pytest_prints_becomes_rows(tmp_path):
    lines = (
        "collected 2000 items / 1990 deselected / 10 selected",
        "tests/a.py::test_b[(300, 1160)-x] PASSED                    [  3%]",
        "tests/a.py::test_c SKIPPED (no libnvrtc)                     [  6%]",
        "tests/a.py::test_d[1] ",
        "tests/a.py::test_hangs ",
        "[gw3] [ 12%] FAILED tests/a.py::test_d[1] ",
        "FAILED tests/a.py::test_d[1] - assert 1 == 2",
        "some other line",
    )
    found = list(pytests.outcomes(lines))
    assert found[0] == 10
    assert [(row["case"], row["outcome"]) for row in found[1:]] == [
        ("tests/a.py::test_b[(300, 1160)-x]", "passed"),
        ("tests/a.py::test_c", "skipped"),
        ("tests/a.py::test_d[1]", "started"),
        ("tests/a.py::test_hangs", "started"),
        ("tests/a.py::test_d[1]", "failed"),
        ("tests/a.py::test_d[1]", "failed"),
    ]
    text = "\n".join(lines)
    rows = Rows(tmp_path / "tests.json", HEAD)
    hangs = [sys.executable, "-c", f"import time; print({text!r}, flush=True); time.sleep(60)"]
    assert pytests.run(rows, 2.0, hangs, tmp_path) is None
    assert rows.more["selected"] == 10
    outcomes = {row["case"]: row for row in rows.rows}
    assert outcomes["tests/a.py::test_d[1]"]["reason"] == "assert 1 == 2"
    assert outcomes["tests/a.py::test_hangs"]["outcome"] == "started"
    text = verdicts.tests(rows.rows, 10).text
    assert text == "1 failed, 1 passed, 1 skipped, 1 started, 6 not run: test_d[1], test_hangs"


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
