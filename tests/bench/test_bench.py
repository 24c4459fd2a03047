"""Layer timing: what a row says, how samples are taken, ceilings, other libraries' kernels, and
that wrong results are never timed.

No GPU is needed: the CUDA clock runs against a fake `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_ins import cuda_here

from slab_kernels import reference
from slab_kernels.backends import activations as accuracy
from slab_kernels.backends import cpu, dispatch
from slab_kernels.bench import case as one
from slab_kernels.bench import (
    clocks,
    contestants,
    correctness,
    linear,
    machine,
    peer,
    peers,
    roofline,
)
from slab_kernels.bench.layer_shapes import MODELS, layers
from slab_kernels.bench.random_weight import random_weight
from slab_kernels.cli import main as cli
from slab_kernels.errors import ArgumentError, BackendError, BenchError, ValueTypeError
from slab_kernels.format import PackedLayout, unpack
from slab_kernels.report import measurements, speed, style, tables
from slab_kernels.report.results import Report
from slab_kernels.report.write import pictures
from slab_kernels.testing import oracle, random_packed

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_linear.py"
spec = importlib.util.spec_from_file_location("bench_linear", SCRIPT)
bench_linear = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_linear)


class FakeClock:
    """Says how long a call takes instead of measuring it: 1 ms, from cache 0.5 ms; every fourth
    byte is too many for the cache."""

    def __init__(self, has_warm: bool = True, cache: int = 4096):
        self.has_warm, self.cache, self.seen = has_warm, cache, []

    def copies(self, size: int) -> int:
        return 8

    def is_cold(self, total: int) -> bool:
        return total > self.cache

    def time(self, calls):
        self.seen.append(calls)
        calls[0]()
        one = all(call is calls[0] for call in calls)
        return clocks.Timed([0.5e-3 if one else 1e-3] * 50, "graph")

    def fastest(self, call, times: int = 6) -> float:
        return 1e-3


@pytest.fixture
def ceilings(monkeypatch):
    """A machine of 100 GB/s and 1 TFLOP/s."""
    monkeypatch.setattr(roofline.Ceilings, "measure", classmethod(lambda cls, *_: cls(1e11, 1e12)))


def measured(clock, *arguments, **settings) -> linear.Measured:
    return linear.measure(one.Case(*arguments, **settings), clock)


def layer_rows(*arguments, **settings) -> list[one.Row]:
    """The rows of a case, by the device's own clock."""
    return linear.measure(one.Case(*arguments, **settings)).rows


# Rows


def test_rows_of_a_real_run():
    rows = layer_rows(48, 40, (1, 3), ("fp16", "int4"), backends=("reference",), min_seconds=0.0)
    assert [(r["m"], r["backend"], r["values"]) for r in rows] == [
        (m, *what)
        for m in (1, 3)
        for what in (("dense", ""), ("reference", "fp16"), ("reference", "int4"))
    ]
    for row in rows:
        assert set(bench_linear.COLUMNS) - {"model"} <= set(row)
        assert row["cache"] == "warm" and row["timing"] == "wall", (
            "a few kilobytes never leave the cache"
        )
        assert (
            row["copies"] == clocks.MOST_CPU_COPIES
            and row["rotated_bytes"] == row["copies"] * row["weight_bytes"]
        )
        assert row["bits_per_weight"] == pytest.approx(8 * row["weight_bytes"] / (48 * 40))
        assert (
            row["roofline"] == max(row["bandwidth_share"], row["matrix_share"]) > 0
            and row["calls"] >= 10
        )
    assert all(r["speedup_vs_dense"] == 1 for r in rows if r["backend"] == "dense")


def test_of_several_rounds_each_row_is_the_fastest(ceilings):
    """The machine is slow while dense is timed first, and while ours is timed last."""
    seconds = iter([4e-3, 4.5e-3, 2e-3, 3e-3, 1e-3, 1.5e-3, 8e-3, 9e-3])
    clock, seen = FakeClock(has_warm=False), []
    clock.time = lambda calls: clocks.Timed([next(seconds)], "wall")
    case = one.Case(64, 32, (1, 2), backends=("reference",))
    rows = linear.measure(case, clock, lambda done, total: seen.append((done, total)), 2).rows
    assert [(r["m"], r["backend"], r["median_us"], r["speedup_vs_dense"]) for r in rows] == [
        (1, "dense", pytest.approx(1000), 1),
        (1, "reference", pytest.approx(2000), 0.5),
        (2, "dense", pytest.approx(1500), 1),
        (2, "reference", pytest.approx(3000), 0.5),
    ]
    assert {r["rounds"] for r in rows} == {2} and seen == [(n, 8) for n in range(1, 9)]


def test_cold_and_warm_are_compared_with_their_own_kind(ceilings):
    clock = FakeClock()
    rows = measured(clock, 64, 32, (1, 2), backends=("reference",)).rows
    assert [(r["m"], r["cache"], r["backend"]) for r in rows] == [
        (m, cache, backend)
        for m in (1, 2)
        for cache in ("cold", "warm")
        for backend in ("dense", "reference")
    ]
    assert all(r["speedup_vs_dense"] == 1 for r in rows), "warm against warm, cold against cold"
    assert {r["cache"]: (r["copies"], r["median_us"], r["timing"]) for r in rows} == {
        "cold": (8, pytest.approx(1000), "graph"), "warm": (1, pytest.approx(500), "graph"),
    }  # fmt: skip
    assert all(len(calls) == 8 for calls in clock.seen)
    dense = {call.args[1].data_ptr() for call in clock.seen[0]}
    ours = {
        next(clocks.tensors(call.args[1])).data_ptr() for call in clock.seen[4]
    }  # after dense, two token counts
    assert len(dense) == len(ours) == 8, "each copy in memory of its own"


def test_copies_that_fit_into_cache_are_not_called_cold(ceilings):
    rows = measured(FakeClock(cache=1 << 30), 64, 32, backends=("reference",)).rows
    assert [r["cache"] for r in rows] == ["warm", "warm"]
    rows = measured(FakeClock(has_warm=False, cache=1 << 30), 64, 32, backends=("reference",)).rows
    assert [(r["cache"], r["copies"]) for r in rows] == [("warm", 8), ("warm", 8)]


def test_roofline_is_the_nearer_limit():
    ceilings = roofline.Ceilings(bandwidth=1e11, matrix=1e12)
    few = ceilings.shares(seconds=1e-3, weight_bytes=50_000_000, m=1, n=1000, k=25_000)
    assert few["gbytes_per_s"] == pytest.approx(50) and few["bandwidth_share"] == pytest.approx(0.5)
    assert few["tflops"] == pytest.approx(0.05) and few["matrix_share"] == pytest.approx(0.05)
    assert few["bound"] == "bytes" and few["roofline"] == few["bandwidth_share"]
    many = ceilings.shares(seconds=1e-3, weight_bytes=50_000_000, m=16, n=1000, k=25_000)
    assert many["bound"] == "matrix" and many["roofline"] == many["matrix_share"] == pytest.approx(
        0.8
    )


def test_ceilings_count_bytes_and_operations(monkeypatch):
    monkeypatch.setattr(roofline, "CPU_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "SIDES", (8, 16))
    found = roofline.Ceilings.measure("cpu", torch.float32, FakeClock())
    assert found == roofline.Ceilings((1 << 20) / 1e-3, 2 * 16**3 / 1e-3)


def test_adapter_without_sign_term(ceilings):
    rows = measured(FakeClock(), 64, 32, backends=("reference",), rank=0, adapter_rank=4).rows
    ours = [r for r in rows if r["backend"] == "reference"]
    assert ours and all((r["rank"], r["adapter_rank"]) == (0, 4) for r in ours)
    layout = PackedLayout(64, 32, "fp16", rank=0, adapter_rank=4)
    assert ours[0]["weight_bytes"] == clocks.size_of(random_packed(layout))


def test_quantiles():
    timed = clocks.Timed([4.0, 1.0, 2.0, 3.0, 100.0], "wall")
    assert timed.median == 3.0 and timed.iqr == 2.0


# The gate


@pytest.fixture
def wrong(monkeypatch):
    """A reference backend that gets one output wrong."""
    backend = dispatch.backend("reference")
    right = type(backend).linear

    def linear(x, state, bias=None):
        y = right(backend, x, state, bias).clone()
        y[-1, -1] += 1.0
        return y

    monkeypatch.setattr(backend, "linear", linear)


def test_a_wrong_kernel_is_not_timed(wrong, ceilings, tmp_path, capsys):
    clock = FakeClock()
    with pytest.raises(BenchError, match="disagrees with the reference"):
        measured(clock, 64, 32, backends=("reference",))
    assert len(clock.seen) == 2, "only dense was"
    with pytest.raises(BenchError):
        bench_linear.main([*SMALL, "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
    assert (
        cli.run(
            [
                "bench",
                "--shape",
                "64x32",
                "--backend",
                "reference",
                "--device",
                "cpu",
                "--seconds",
                "0",
                "--json",
            ]
        )
        == 1
    )
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "BenchError"


@pytest.mark.parametrize("values", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("ranks", [(0, 0), (1, 0), (2, 3), (0, 5)])
def test_the_gate_lets_right_kernels_pass(values, ranks):
    packed = random_packed(PackedLayout(300, 70, values, 32 if values != "fp16" else None, *ranks))
    backend = dispatch.backend("reference")
    for dtype in one.DTYPES.values():
        correctness.gate(
            backend, torch.randn(5, 70).to(dtype), backend.prepare(packed, dtype), packed
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [64, 4096])
def test_tolerance_for_tensor_cores(dtype, K):
    """Products of rounded numbers pass; two swapped inputs do not."""
    packed = random_packed(PackedLayout(64, K, "fp16", rank=1))
    x = torch.randn(16, K).to(dtype)
    d = unpack(packed)
    exact = reference.linear(x.double(), packed)
    _, size = oracle(x, packed)
    bound = correctness.tolerance(size, exact, dtype, K, rounds=True)
    vx = (
        (x.float() * d.V[:, 0].to(dtype).float()).to(dtype).float()
    )  # as csrc/cuda does: v and v·x rounded
    y = (x.float() @ d.S.to(dtype).float().T + (vx @ d.B.float().T) * d.U[:, 0].float()).to(dtype)
    assert bool(((y.double() - exact).abs() <= bound).all())
    swapped = reference.linear(x[:, [1, 0, *range(2, K)]].double(), packed)
    assert bool(((swapped - exact).abs() > bound).any())
    assert bool((bound > correctness.tolerance(size, exact, dtype, K, rounds=False)).all())
    assert bound.median() < 0.05 * exact.std(), (
        "a few per cent of the result, for 64 inputs and for 4096"
    )


def test_nan_does_not_pass_the_gate(monkeypatch):
    backend = dispatch.backend("reference")
    packed = random_packed(PackedLayout(300, 64, "fp16", rank=1))
    state = backend.prepare(packed, torch.float32)
    right = backend.linear(x := torch.randn(2, 64), state)
    right[0, 3] = float("nan")  # outside the rows that are compared
    monkeypatch.setattr(backend, "linear", lambda *_: right)
    with pytest.raises(BenchError):
        correctness.gate(backend, x, state, packed)


def test_backends_that_cannot_run_it(ceilings, monkeypatch):
    backend = dispatch.backend("cpu")
    monkeypatch.setattr(dispatch, "ORDER", ("cpu", "reference"))
    only_one = lambda problem: [] if problem.M == 1 else ["one token only"]  # noqa: E731
    monkeypatch.setattr(backend, "not_supported_reasons", only_one)
    for name in ("prepare", "linear", "with_activations", "activations"):
        monkeypatch.setattr(backend, name, getattr(dispatch.backend("reference"), name))
    rows = measured(FakeClock(), 64, 32, (1, 2)).rows
    assert {(r["backend"], r["m"]) for r in rows} == {("dense", 1), ("dense", 2), ("cpu", 1)}
    with pytest.raises(BackendError, match="one token only"):
        measured(FakeClock(), 64, 32, (1, 2), backends=("cpu",))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="fp32, bf16, fp16"):
        layer_rows(64, 32, dtype="fp8")
    with pytest.raises(ValueTypeError):
        layer_rows(64, 32, values=("int5",))


# The GPU's clock, on a fake torch.cuda


class FakeCuda:
    """Counts time in calls: an event notes how many calls were run, or replayed, before it; a call
    takes a millisecond."""

    def __init__(self, l2: int = 1 << 20, free: int = 1 << 40, captures: bool = True):
        self.properties, self.free, self.captures = (
            types.SimpleNamespace(L2_cache_size=l2),
            free,
            captures,
        )
        self.done, self.capturing, self.replays, self.log = 0, None, 0, []

    def call(self) -> None:
        if self.capturing is not None:
            self.capturing.calls += 1
        else:
            self.done += 1

    def get_device_properties(self, device):
        return self.properties

    def mem_get_info(self, device):
        return self.free, self.free

    def empty_cache(self):
        pass

    def device(self, device):
        return contextlib.nullcontext()

    def synchronize(self):
        self.log.append("synchronize")

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    def current_stream(self):
        return self.Stream()

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("side")
        yield

    def CUDAGraph(self):
        graph = types.SimpleNamespace(calls=0)

        def replay():
            self.replays += 1
            self.done += graph.calls

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.log.append("capture")
        self.capturing = graph
        yield
        self.capturing = None

    def Event(self, enable_timing: bool):
        event = types.SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.done)
        event.elapsed_time = lambda end: float(end.at - event.at)  # milliseconds
        return event


def test_a_sample_is_a_replay_over_the_calls_in_it():
    cuda = FakeCuda()
    timed = clocks.CudaClock("cuda", 0.0, cuda).time([cuda.call] * 8)
    assert timed.timing == "graph" and len(timed.samples) == clocks.REPLAYS
    assert timed.median == pytest.approx(1e-3), "eight calls of a millisecond, divided by eight"
    assert cuda.replays == 1 + 5 + clocks.REPLAYS
    assert cuda.log[:3] == ["wait", "side", "wait"] and cuda.log.index("side") < cuda.log.index(
        "capture"
    )
    longer = clocks.CudaClock("cuda", 1.0, FakeCuda())
    assert len(longer.time([longer.cuda.call] * 8).samples) == 150, (
        "whole rounds of 50 until a second is reached"
    )


def test_calls_that_cannot_be_captured_are_timed_one_by_one():
    cuda = FakeCuda(captures=False)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing"):
        timed = clocks.CudaClock("cuda", 0.0, cuda).time([cuda.call] * 8)
    assert (
        timed.timing == "eager"
        and timed.median == pytest.approx(1e-3)
        and len(timed.samples) == clocks.REPLAYS
    )


def test_copies_exceed_the_cache_fourfold_and_are_eight_at_least():
    clock = clocks.CudaClock("cuda", 0.0, FakeCuda(l2=50 << 20))
    for size in (1 << 20, 30 << 20, 500 << 20):
        copies = clock.copies(size)
        assert (
            copies >= clocks.FEWEST_COPIES
            and copies * size > 4 * (50 << 20)
            and clock.is_cold(copies * size)
        )
    assert not clock.is_cold(clock.copies(4096) * 4096), (
        "a tiny weight stays in cache, however often it is copied"
    )
    assert clocks.CudaClock("cuda", 0.0, FakeCuda(free=1 << 30)).copies(100 << 20) == 5, (
        "half of the free memory"
    )
    assert clocks.CudaClock("cuda", 0.0, FakeCuda(l2=0)).l2 == clocks.USUAL_L2


def test_fastest_is_one_call():
    cuda = FakeCuda()
    assert (
        clocks.CudaClock("cuda", 0.0, cuda).fastest(cuda.call) == pytest.approx(1e-3)
        and cuda.done == 6
    )


def test_wall_clock_goes_round_the_copies():
    seen = []
    timed = clocks.WallClock(0.0).time([lambda i=i: seen.append(i) for i in range(3)])
    assert seen[:6] == [0, 1, 2, 0, 1, 2] and len(timed.samples) == 12 and timed.timing == "wall"
    assert clocks.WallClock(0.0).copies(clocks.CPU_ROTATED) == 2


def test_slow_calls_are_not_waited_for_ten_times(monkeypatch):
    """Every call takes four seconds, by a clock that stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 4.0

    assert clocks.WallClock(0.3).time([call, call]).samples == [4.0, 4.0]
    assert clocks.WallClock(9.0).time([call, call]).samples == [4.0] * 4


def test_sizes_and_copies_of_whatever_a_backend_prepares():
    state = (
        torch.zeros(4),
        {"a": torch.zeros(2, dtype=torch.float16)},
        torch.nn.Linear(3, 1),
        None,
        7,
        torch.float16,
    )
    assert clocks.size_of(state) == 16 + 4 + 12 + 4
    copy = clocks.copied(state)
    assert copy[0].data_ptr() != state[0].data_ptr() and copy[5] is torch.float16


# Other libraries' kernels (each by itself in test_peers.py)


def test_peers_are_timed_or_left_out_with_a_reason(ceilings, monkeypatch):
    given = []

    def prepare(factor):
        def linear(x):
            given.append(x.dtype)
            return factor * x @ W.T

        W = torch.randn(64, 32)
        return lambda dense: peer.Prepared(peer.directly(linear), 100, W)

    def broken(W):
        raise RuntimeError("no kernel\nfor you")

    made = {
        "right": prepare(1.0),
        "wrong": prepare(1.5),
        "broken": broken,
        "nan": prepare(float("nan")),
    }
    common = {"device": "cpu", "dtypes": (), "fed": torch.float32, "activations": "int8"}
    fakes = [
        peer.Peer(name, (), "int4", 128, (1, 1), function, **common)
        for name, function in made.items()
    ]
    lacking = {**common, "missing": lambda: "not here"}
    fakes.append(peer.Peer("elsewhere", (), "int4", 128, (1, 1), broken, **lacking))
    fakes.append(peer.Peer("of a GPU", (), "int4", 128, (1, 1), broken))
    monkeypatch.setattr(peers, "PEERS", fakes)
    settings = {"backends": ("reference",), "peers": True, "dtype": "bf16"}
    found = measured(FakeClock(cache=0), 64, 32, **settings)
    assert {r["backend"] for r in found.rows} == {"dense", "reference", "right"}
    right = next(r for r in found.rows if r["backend"] == "right")
    assert (right["dtype"], right["x_dtype"], right["activations"]) == ("bf16", "fp32", "int8")
    assert set(given) == {torch.float32}, "x is converted before the call that is timed"
    assert "of a GPU" not in found.absent
    assert right["bits_per_weight"] == pytest.approx(800 / (64 * 32)) and right["group_size"] == 128
    assert (
        found.absent["broken"] == "RuntimeError: no kernel for you"
        and found.absent["elsewhere"] == "not here"
    )
    assert "disagrees" in found.absent["wrong"] and "disagrees" in found.absent["nan"]
    assert measured(FakeClock(), 64, 32, backends=("reference",)).absent == {}


def test_each_accuracy_mode_has_a_row_of_its_own(ceilings):
    settings = {"values": ("fp16", "int4"), "backends": ("cpu",), "dtype": "bf16"}
    found = measured(FakeClock(), 64, 256, activations=("exact", "int8", "exact"), **settings)
    ours = [(r["values"], r["activations"]) for r in found.rows if r["backend"] == "cpu"]
    once = [("fp16", "exact"), ("int4", "exact"), ("int4", "int8")]
    assert ours == once * 2, "cold and warm; 16-bit values have one product for both words"
    rounded = next(r for r in found.rows if r["activations"] == "int8")
    assert style.png(speed.speed_by_tokens(found.rows, style.LIGHT))
    assert tables.bench_table([rounded])[0][3] == "bf16 as int8"
    plain = {**rounded, "activations": "exact", "cache": "warm"}
    assert tables.cold([{**rounded, "cache": "cold"}, plain])[-1] is plain


def test_the_environment_says_the_mode_and_unknown_words_are_refused(ceilings, monkeypatch):
    monkeypatch.setenv(accuracy.ENVIRONMENT, "int8")
    assert one.Case(8, 8).modes == ["int8"]
    assert one.Case(8, 8, activations=("exact", None)).modes == ["exact", "int8"]
    with pytest.raises(ArgumentError, match="'half' is unknown; use one of exact, int8"):
        measured(FakeClock(), 64, 256, activations=("half",))


@pytest.fixture
def few():
    """The product for few tokens, which not every instruction set would choose."""
    cpu.load_library()
    torch.ops.slab_kernels.cpu_use_few(1 << 30)
    yield
    torch.ops.slab_kernels.cpu_use_few(-1)


def test_the_gate_holds_int8_activations_to_a_bound_of_their_own(few):
    backend, packed = dispatch.backend("cpu"), random_packed(PackedLayout(64, 256, "int4", 128))
    state = backend.with_activations(backend.prepare(packed, torch.float32), (packed,), "int8")
    x = torch.randn(5, 256)
    correctness.gate(backend, x, state, packed, "int8")
    with pytest.raises(BenchError):
        correctness.gate(backend, x, state, packed)

    class Wrong:
        name = "wrong"

        def linear(self, x, state):
            y = backend.linear(x, state)
            y[-1, -1] += 0.5 * y.square().mean().sqrt()
            return y

    with pytest.raises(BenchError, match="wrong"):
        correctness.gate(Wrong(), x, state, packed, "int8")


# Layer tables

DESIGN = {
    "llama-2-7b": {(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)},
    "llama-3-8b": {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)},
    "llama-2-70b": {(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)},
    "llama-3-70b": {(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)},
}
# model -> blocks and billions of parameters without embeddings, both as Qwen publishes them
QWEN = {
    "0.5b": (24, 0.36),
    "1.5b": (28, 1.31),
    "3b": (36, 2.77),
    "7b": (28, 6.53),
    "14b": (48, 13.1),
    "32b": (64, 31.0),
    "72b": (80, 70.0),
}


def test_fused_shapes_are_those_of_the_design():
    assert {name: set(layers(name)) for name in DESIGN} == DESIGN


@pytest.mark.parametrize("size", QWEN)
def test_sizes_of_qwen_add_up(size):
    """Attention and MLP weights of all blocks: the published number, up to its rounding (biases and
    norms are below 0.1 %)."""
    blocks, billions = QWEN[size]
    total = blocks * sum(n * k for n, k in MODELS[f"qwen2.5-{size}"].fused()) / 1e9
    assert total == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_separate_hold_the_same_weights(name):
    model = MODELS[name]
    q, kv, o = (
        (model.attention, model.hidden),
        (model.kv, model.hidden),
        (model.hidden, model.attention),
    )
    up, down = (model.ffn, model.hidden), (model.hidden, model.ffn)
    assert set(layers(name, fused=False)) == {q, kv, o, up, down}
    assert sum(n * k for n, k in (q, kv, kv, o, up, up, down)) == sum(
        n * k for n, k in layers(name)
    )


def test_unknown_model_lists_the_known():
    with pytest.raises(ValueError, match=r"llama-2-7b.*qwen2\.5-72b"):
        layers("gpt-5")


# The script and what a person sees

SMALL = [
    "--device",
    "cpu",
    "--shapes",
    "64x32",
    "--m",
    "1",
    "2",
    "--values",
    "fp16",
    "--dtype",
    "fp32",
    "--backends",
    "reference",
    "--seconds",
    "0",
]


def test_script_writes_table_record_and_picture(ceilings, tmp_path, capsys):
    assert (
        bench_linear.main([*SMALL, "--rank", "0", "--adapter-rank", "4", "--out", str(tmp_path)])
        == 0
    )
    shown = capsys.readouterr()
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".csv", ".json", ".png"} and sorted(shown.out.split()) == sorted(
        map(str, files.values())
    )
    assert (
        f"64x32-r0-a4-t{torch.get_num_threads()}-" in files[".csv"].name and "without" in shown.err
    )
    record = json.loads(files[".json"].read_text())
    assert (
        record["commit"]
        and record["peers"] == peers.versions()
        and record["machine"]["versions"]["torch"]
        and record["absent"]["onnxruntime-128"]
    )
    with files[".csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    timed = [row["backend"] for row in table]
    assert timed == [row["backend"] for row in record["rows"]]
    assert [name for name in timed if "torch" not in name] == ["dense", "reference"] * 2
    assert tuple(table[0]) == bench_linear.COLUMNS and table[1]["adapter_rank"] == "4"
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    assert len(measurements.read([files[".json"]]).bench) == len(timed)


def test_script_takes_a_name_and_several_modes(ceilings, tmp_path, capsys):
    command = [*SMALL, "--name", "mine", "--activations", "exact", "int8", "--no-peers"]
    assert bench_linear.main([*command, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine.csv", "mine.json", "mine.png"}
    rows = json.loads((tmp_path / "mine.json").read_text())["rows"]
    assert [row["activations"] for row in rows] == ["exact"] * 4, "the reference has one mode"


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    said: list[list[str]] = []

    def run(command, **_):
        said.append(command)
        return types.SimpleNamespace(stdout="abc1234-dirty\n")

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.commit() == "unknown" and not said, "git would name a repository further up"
    (tmp_path / ".git").touch()  # as in a worktree
    assert machine.commit() == "abc1234-dirty" and said


def test_the_processor_is_named_with_its_family_and_model(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPUINFO", file)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    assert machine.processor() == "riscv64", "there is no such file"
    core = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    file.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    assert machine.processor() == "AMD EPYC (family 25, model 17)"
    file.write_text("processor\t: 0\n\nHardware\t: BCM2835\n")
    assert machine.processor() == "BCM2835"


def test_script_leaves_nothing_half_written(tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError("no")

    path = tmp_path / "x.csv"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError):
        bench_linear.write(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"] and path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--shapes", "64"],
        ["--shapes", "0x4"],
        ["--m", "0"],
        ["--models", "gpt-5"],
        ["--dtype", "fp8"],
        ["--activations", "half"],
        ["--name", "results/mine"],
    ],
)
def test_script_refuses_bad_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_linear.parse(["--device", "cpu", *wrong])
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_script_defaults():
    args = bench_linear.parse(["--device", "cpu"])
    assert tuple(args.m) == (1, 4, 16, 64) and args.chosen == [] and args.peers
    assert bench_linear.DEFAULTS["cuda"][1] == (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
    args = bench_linear.parse(["--device", "cpu", "--models", "llama-2-7b", "llama-3-8b"])
    assert (
        bench_linear.shapes(args)[4096, 4096] == "llama-2-7b llama-3-8b"
        and len(bench_linear.shapes(args)) == 7
    )


def test_command_line(capsys):
    command = [
        "bench",
        "--shape",
        "64x32",
        "--dtype",
        "fp32",
        "--backend",
        "reference",
        "--device",
        "cpu",
        "--seconds",
        "0",
    ]
    assert cli.run([*command, "--rank", "0", "--adapter-rank", "3", "--peers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][1]["adapter_rank"] == 3 and set(found["absent"]) <= {
        of_a_cpu.name for of_a_cpu in peers.on("cpu")
    }
    assert cli.run([*command, "--adapter-rank", "3"]) == 0
    out = capsys.readouterr().out
    assert (
        "roofline" in out
        and "fp16 + adapter 3" in out
        and ("of bytes" in out or "of matrix" in out)
    )
    for bad in (["--shape", "64"], ["--shape", "64x32x2"], ["--layers", "gpt-5"], ["--rank", "-1"]):
        assert cli.run(["bench", *bad, "--device", "cpu", "--json"]) == 2


def test_pictures_show_weights_from_memory():
    def row(backend, cache, m=1):
        return {
            "n": 4,
            "k": 4,
            "m": m,
            "dtype": "fp16",
            "backend": backend,
            "values": "",
            "cache": cache,
            "median_us": 1.0,
            "speedup_vs_dense": 1.0,
            "gbytes_per_s": 1.0,
            "roofline": 0.5,
            "bound": "bytes",
        }

    both = [row("dense", "cold"), row("dense", "warm"), row("cuda", "warm")]
    assert tables.cold(both) == [both[0], both[2]]
    assert [cells[4] for cells in tables.bench_table(both)] == ["memory", "cache", "cache"]
    assert tables.bench_table(both)[0][-1] == "50% of bytes"
    many = [row(backend, "cold", m) for m in range(1, 20) for backend in ("dense", "cuda")]
    (drawn,) = pictures(Report(bench=tuple(many)))
    fig = drawn.draw(style.LIGHT)
    assert [text.get_text() for text in fig.legends[0].texts] == ["dense", "cuda, "]


def test_rows_with_a_dense_copy_name_its_memory_and_what_is_read(monkeypatch):
    monkeypatch.setattr(contestants, "gate", lambda *given: None)  # allows a CPU no rounded weight
    with cuda_here(monkeypatch):
        case = one.Case(40, 96, tokens=(1, 64), dtype="fp16", backends=["cuda"], min_seconds=0.01)
        plain = linear.measure(case).rows
        rows = linear.measure(replace(case, prefill="dense")).rows
    before, few, many = (
        next(row for row in found if row["backend"] == "cuda" and row["m"] == m)
        for found, m in ((plain, 1), (rows, 1), (rows, 64))
    )
    copy = 2 * 40 * 96
    assert (before["prefill"], few["prefill"], many["prefill"]) == ("packed", "dense", "dense")
    assert few["weight_bytes"] == many["weight_bytes"] == before["weight_bytes"] + copy
    assert few["rotated_bytes"] == few["copies"] * before["weight_bytes"]
    assert many["rotated_bytes"] == many["copies"] * copy


@pytest.mark.parametrize("values", ["int4", "fp16"])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_weight_that_is_timed_has_a_sign_term_like_a_real_one(values, rank):
    layout = PackedLayout(96, 250, values, 128 if values == "int4" else None, rank)
    packed = random_weight(layout)
    parts = unpack(packed)
    kept = parts.S[parts.S != 0].float().square().mean().sqrt()
    pruned = (parts.U.float() @ parts.V.float().T).abs()
    assert (pruned.mean() / kept).item() == pytest.approx(0.31, rel=0.1)
    assert pruned.max() < 2 * pruned.mean() and bool((packed.V[250:] == 0).all())
    again = random_weight(layout)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in packed.tensors().items())
    assert random_weight(PackedLayout(8, 8, "fp16", None, 0)).U is None
