"""`slab-kernels tune` without a GPU: what is timed, what wins, what is written, on weights and a
clock that say how long a configuration takes. The real weight runs in Triton's interpreter, in a
process of its own.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slab_kernels.backends.triton import configs, row_files, rows
from slab_kernels.backends.triton.row_files import read
from slab_kernels.backends.triton.rows import Row, TileConfig, TritonDevice
from slab_kernels.bench import clocks
from slab_kernels.bench import tune as tuning
from slab_kernels.bench.tune import Problem, candidates, merged, problems, run, save, tune
from slab_kernels.cli import console
from slab_kernels.cli import main as cli
from slab_kernels.errors import BackendError, BenchError, ConfigError
from slab_kernels.format import PackedLayout

A100 = TritonDevice("NVIDIA A100-SXM4-80GB", 108, 166912, 80)
LAYOUT = PackedLayout(4096, 4096, "int4", 128, 1)
DECODING = Problem(LAYOUT, torch.bfloat16, (1, 16), 0, 16)
PREFILL = Problem(LAYOUT, torch.bfloat16, (128,), 64, 256)
SLOW, FAST = 20e-6, 10e-6


class TritonError(Exception):
    """By name what Triton raises for a program that does not fit."""


class FakeWeight:
    """Takes `seconds(config, m)`, gives wrong results for `wrong` and raises `errors[config]`;
    notes what was asked."""

    def __init__(self, seconds=lambda config, m: SLOW, wrong=(), errors=(), streamed=False):
        self.seconds, self.wrong, self.errors, self.log = seconds, wrong, dict(errors), []
        self.streamed = streamed

    def check(self, config: TileConfig, m: int) -> None:
        self.log.append(("check", config, m))
        if config in self.errors:
            raise self.errors[config]
        if config in self.wrong:
            raise BenchError("disagrees with the reference; nothing was timed")

    def calls(self, config: TileConfig, m: int) -> list:
        self.log.append(("time", config, m))
        return [lambda: self.seconds(config, m)]

    def timed(self) -> list[TileConfig]:
        return [config for what, config, _ in self.log if what == "time"]


class FakeClock:
    """What the calls say, with an interquartile range of `noise` of it."""

    def __init__(self, noise: float = 0.01):
        self.noise = noise

    def time(self, calls) -> clocks.Timed:
        seconds = calls[0]()
        return clocks.Timed(
            [seconds * (1 + self.noise * (i / 50 - 1)) for i in range(101)], "graph"
        )


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The user's folder, not there yet; no shipped rows, nothing remembered before or after."""
    monkeypatch.setenv(row_files.ENVIRONMENT, str(tmp_path / "user"))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    configs.forget()
    yield tmp_path / "user"
    configs.forget()


def file(folder: Path) -> Path:
    return folder / configs.file_name(A100.name)


def others(problem: Problem) -> list[TileConfig]:
    """Its candidates without the default."""
    default = replace(
        configs.choose(problem.sizes, problem.tokens[-1], 16, A100, own=False), reason=""
    )
    return [
        config
        for config in candidates(problem.sizes, problem.tokens[-1], 16, A100)
        if config != default
    ]


def prefers(best: TileConfig, gain: float = 0.5, m: int | None = None):
    """Seconds by which `best` takes `gain` less, at that token count or at all."""
    return lambda config, at: SLOW * (1 - gain) if config == best and at == (m or at) else SLOW


# What is timed


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 512, 2048])
@pytest.mark.parametrize("n, k", [(4096, 4096), (28672, 8192), (64, 32)])
def test_candidates_are_few_and_differ(n, k, M, bits, folder):
    sizes = rows.TritonSizes(k, (n,), "int4", 128, 1, 0)
    found = candidates(sizes, M, bits, A100)
    programs = [
        (replace(config, fill=0), configs.splits(sizes, M, config, A100)) for config in found
    ]
    assert 10 <= len(found) <= 50 and len(set(programs)) == len(programs)
    assert any(config.rebuild for config in found) == (M > 64 and bits == 16), (
        "never for decoding, nor in fp32: torch may use TF32"
    )
    assert all(
        row_files.row_from(row_files.row_to(Row(config, above=64 if config.rebuild else 0))).config
        == config
        for config in found
    )
    if (n, k) == (4096, 4096) and M <= 64:
        assert len({shares for _, shares in programs}) > 2, "K is split in several ways"


def test_every_default_but_rebuilding_is_among_the_candidates_or_beside_them(folder):
    result = tune(DECODING, weight := FakeWeight(), FakeClock(), A100)
    default = configs.choose(DECODING.sizes, 16, 16, A100)
    assert weight.timed()[0] == default and result.default is default, (
        "first: it must be right, and is what others are held to"
    )
    assert (
        sum(
            replace(config, reason="") == replace(default, reason="")
            for config in set(weight.timed())
        )
        == 1
    )


def test_everything_is_checked_before_it_is_timed_and_decoding_at_16_tokens_too(folder):
    one = replace(DECODING, tokens=(1,))
    weight = FakeWeight()
    tune(one, weight, FakeClock(), A100)
    for config in weight.timed():
        mine = [(what, m) for what, other, m in weight.log if other is config]
        assert mine[:3] == [("check", 1), ("check", 16), ("time", 1)]


def test_problems_group_token_counts_by_regime(folder):
    found = problems([LAYOUT], [512, 1, 16, 16, 64, 10**6], torch.bfloat16, A100)
    assert (found[0].tokens, found[0].above, found[0].up_to) == ((1, 16), 0, 16)
    assert [p.tokens for p in found] == [(1, 16), (64,), (512, 10**6)]
    assert found[-1].up_to is None
    assert all(p.above < m and (p.up_to is None or m <= p.up_to) for p in found for m in p.tokens)
    with pytest.raises(BackendError, match="rank=99 of the sign term is above"):
        problems([replace(LAYOUT, rank=99)], [1], torch.bfloat16, A100)
    with pytest.raises(BackendError, match="compute capability"):
        problems([LAYOUT], [1], torch.bfloat16, A100._replace(capability=75))


# What wins


def test_the_fastest_wins(folder):
    best = others(DECODING)[5]
    result = tune(DECODING, FakeWeight(prefers(best)), FakeClock(), A100)
    assert (
        result.tuned
        and result.best == best
        and [t.median for t in result.times] == pytest.approx([FAST] * 2)
    )
    assert "10.0 and 10.0 us at m=1,16, the default 20.0 and 20.0 us" in result.row.config.reason


def test_a_wrong_candidate_is_never_timed(folder):
    wrong, second = others(PREFILL)[:2]
    seconds = lambda config, m: {wrong: FAST / 2, second: FAST}.get(config, SLOW)  # noqa: E731
    weight = FakeWeight(seconds, wrong=[wrong])
    result = tune(PREFILL, weight, FakeClock(), A100)
    assert result.best == second and wrong not in weight.timed()
    (reason,) = result.skipped.values()
    assert reason == "disagrees with the reference"


def test_what_triton_cannot_compile_is_left_out_with_its_words(folder):
    big = others(PREFILL)[0]
    error = TritonError(
        "out of resource: shared memory,\nRequired: 300000, Hardware limit: 166912."
    )
    result = tune(PREFILL, FakeWeight(errors={big: error}), FakeClock(), A100)
    (entry,) = result.skipped.items()
    assert (
        entry[0].startswith(big.describe())
        and entry[1]
        == "TritonError: out of resource: shared memory, Required: 300000, Hardware limit: 166912."
    )


def test_a_program_that_breaks_tritons_compiler_is_left_out(folder):
    result = tune(
        PREFILL,
        FakeWeight(errors={others(PREFILL)[0]: RuntimeError("PassManager::run failed")}),
        FakeClock(),
        A100,
    )
    assert list(result.skipped.values()) == ["RuntimeError: PassManager::run failed"]


def test_other_errors_stop_everything(folder):
    """After an illegal access no call on this GPU means anything."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(
            [DECODING],
            A100,
            FakeClock(),
            lambda p: FakeWeight(errors={others(DECODING)[0]: error}),
            folder,
        )
    assert not file(folder).exists()


def test_a_wrong_default_is_an_error(folder):
    default = configs.choose(DECODING.sizes, 16, 16, A100)
    with pytest.raises(BenchError):
        tune(DECODING, FakeWeight(wrong=[default]), FakeClock(), A100)


@pytest.mark.parametrize(
    ("gain", "noise", "tuned"),
    [(0.05, 0.01, True), (0.05, 0.2, False), (0.0, 0.0, False), (0.001, 0.0, True)],
)
def test_noise_keeps_the_default(gain, noise, tuned, folder):
    result = tune(DECODING, FakeWeight(prefers(others(DECODING)[3], gain)), FakeClock(noise), A100)
    assert result.tuned is tuned and (result.best is result.default) is not tuned


def test_a_lucky_first_time_does_not_win(folder):
    """Measured again, the winner is no faster."""
    best, seen = others(PREFILL)[2], []

    def seconds(config, m):
        seen.append(config)
        return FAST if config == best and seen.count(best) == 1 else SLOW

    result = tune(PREFILL, FakeWeight(seconds), FakeClock(), A100)
    assert seen.count(best) == 2 and not result.tuned and result.times == result.default_times


def test_one_row_for_decoding_must_not_lose_at_any_token_count(folder):
    first, second = others(DECODING)[:2]
    times = {(first, 16): SLOW * 0.2, (first, 1): SLOW * 1.5, (second, 1): SLOW * 0.9}

    def seconds(config, m):
        return times.get((config, m), SLOW)

    assert not tune(DECODING, FakeWeight(seconds), FakeClock(), A100).tuned, (
        "much faster at 16, slower at 1"
    )
    assert tune(DECODING, FakeWeight(prefers(second, 0.1, m=1)), FakeClock(), A100).best == second


def test_the_users_present_row_is_a_candidate(folder):
    own = TileConfig(16, 256, 32, 8, 2, 1, reason="by hand")
    assert replace(own, reason="") not in candidates(DECODING.sizes, 16, 16, A100)
    weight = FakeWeight(prefers(replace(own, reason="")))
    save_rows(folder, DECODING.row(own))
    (result,) = run([DECODING], A100, FakeClock(), lambda p: weight, folder)
    assert result.best == replace(own, reason="") and read(file(folder))[
        0
    ].config.reason.startswith("tuned ")


def test_of_a_stream_only_rebuilding_is_tuned(folder):
    """It has no tiles: decoding has one way, more tokens have two."""
    result = tune(DECODING, weight := FakeWeight(streamed=True), FakeClock(), A100)
    assert not result.tuned and set(weight.timed()) == {result.default}
    assert "sparse tensor cores" in result.to_dict()["default"]
    for m, above, up_to in ((40, 32, 64), (100, 64, 128)):
        problem = replace(PREFILL, tokens=(m,), above=above, up_to=up_to)
        rebuilds = configs.choose(problem.sizes, m, 16, A100).rebuild
        assert rebuilds is (m > 64)
        weight = FakeWeight(
            lambda config, m, slow=rebuilds: SLOW if config.rebuild is slow else FAST,
            streamed=True,
        )
        (result,) = run([problem], A100, FakeClock(), lambda p, w=weight: w, folder)
        assert result.tuned and result.best.rebuild is not rebuilds
        assert configs.choose(problem.sizes, m, 16, A100).rebuild is not rebuilds
        assert result.timed == 2 and "sparse tensor cores" in result.described(TileConfig())


# What is written


def save_rows(folder: Path, *rows: Row) -> None:
    folder.mkdir(exist_ok=True)
    save(file(folder), rows, A100)


def test_rows_written_are_those_chosen(folder):
    for problem in (DECODING, PREFILL):
        best = others(problem)[4]
        (result,) = run(
            [problem], A100, FakeClock(), lambda p, best=best: FakeWeight(prefers(best)), folder
        )
        for m in (problem.above + 1, *problem.tokens, problem.up_to):
            chosen = configs.choose(problem.sizes, m, 16, A100)
            assert chosen == result.row.config and replace(chosen, reason="") == best
        outside = configs.choose(problem.sizes, problem.up_to + 1, 16, A100)
        assert outside in [row.config for row in configs.DEFAULTS]
    content = json.loads(file(folder).read_text())
    assert (
        content["format"] == 1
        and content["device"] == A100.name
        and set(content["versions"]) == {"slab_kernels", "torch", "triton"}
    )
    assert (
        len(content["rows"]) == 2
        and {"tokens": 16, "bits": 16, "values": ["int4"], "rank": 1, "N": 4096, "K": 4096}.items()
        <= content["rows"][0].items()
    )
    assert "tuned 20" in content["rows"][0]["reason"] and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp16_and_bf16_values_share_a_row(dtype, folder):
    """Prepared values have the activations' type: what is chosen for is not what is stored."""
    problem = Problem(PackedLayout(64, 64, "fp16", rank=1), dtype, (1,), 0, 16)
    assert problem.sizes.values == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert problem.row(TileConfig()).fits(problem.sizes, 1, 16, A100) and problem.row(
        TileConfig()
    ).values == ("fp16", "bf16")
    single = replace(problem, dtype=torch.float32)
    assert single.row(TileConfig()).values == ("fp16",) and single.row(TileConfig()).fits(
        single.sizes, 1, 32, A100
    )
    widened = replace(single, layout=replace(LAYOUT, values="int3"))
    assert widened.sizes.values == "int4" and widened.row(TileConfig()).values == ("int4",)


def test_a_row_for_the_same_problem_is_replaced_and_others_keep_their_order(folder):
    general = Row(TileConfig(16, 128, 64, 8, reason="general"), 16)
    higher = replace(DECODING.row(TileConfig(reason="higher")), rank=4)
    other = replace(DECODING.row(TileConfig(reason="other")), N=1024)
    old, new = (
        DECODING.row(TileConfig(16, 32, 128, reason="old")),
        DECODING.row(TileConfig(16, 16, 256, reason="new")),
    )
    for present in (
        [general, higher, other, old],
        [other, old, higher, general],
        [old, general],
        [general],
        [],
    ):
        rows = merged(present, DECODING, new)
        assert [row for row in rows if row is not new] == [row for row in present if row is not old]
        assert next(row for row in rows if row.fits(DECODING.sizes, 1, 16, A100)) is new
        assert merged(rows, DECODING, None) == [row for row in present if row is not old]
    assert merged([replace(old, shared=50_000)], DECODING, new) == [new], (
        "the same problem, whatever it is said to take"
    )


def test_a_row_that_no_longer_wins_is_removed(folder):
    keep = Row(TileConfig(16, 128, 64, 8, reason="mine"), 16, N=7)
    save_rows(folder, keep, DECODING.row(others(DECODING)[0]))
    (result,) = run([DECODING], A100, FakeClock(), lambda p: FakeWeight(), folder)
    assert not result.tuned and read(file(folder)) == [keep]


def test_nothing_is_written_where_every_default_stays(folder):
    run([DECODING], A100, FakeClock(), lambda p: FakeWeight(), folder)
    assert not file(folder).exists()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(where, error, folder, monkeypatch):
    save_rows(folder, DECODING.row(TileConfig(reason="old")))
    before = file(folder).read_bytes()

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(ConfigError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        save(file(folder), [PREFILL.row(TileConfig(reason="new"))], A100)
    assert file(folder).read_bytes() == before and os.listdir(folder) == [file(folder).name]
    if isinstance(error, OSError):
        assert (
            str(file(folder)) in str(raised.value)
            and "--out" in str(raised.value)
            and "\n" not in str(raised.value)
        )
        assert console.exit_code(raised.value) == console.NO_SPACE


def test_an_interruption_keeps_what_was_found_before(folder):
    best = others(DECODING)[1]

    def make(problem):
        if problem.layout != LAYOUT:
            raise KeyboardInterrupt
        return FakeWeight(prefers(best))

    with pytest.raises(KeyboardInterrupt):
        run(
            [DECODING, replace(PREFILL, layout=replace(LAYOUT, values="int8"))],
            A100,
            FakeClock(),
            make,
            folder,
        )
    (row,) = read(file(folder))
    assert replace(row.config, reason="") == best


def test_rows_that_somebody_else_wrote_meanwhile_are_kept(folder):
    mine, theirs = others(DECODING)[1], PREFILL.row(TileConfig(reason="theirs"))

    def make(problem):
        save_rows(folder, theirs)
        return FakeWeight(prefers(mine))

    run([DECODING], A100, FakeClock(), make, folder)
    assert theirs in read(file(folder)) and len(read(file(folder))) == 2


def test_a_linked_file_stays_a_link(folder, tmp_path):
    folder.mkdir()
    file(folder).symlink_to(tmp_path / "dotfiles.json")
    (tmp_path / "dotfiles.json").write_text('{"format": 1, "rows": []}')
    save(file(folder), [DECODING.row(TileConfig())], A100)
    assert file(folder).is_symlink() and len(read(tmp_path / "dotfiles.json")) == 1


@pytest.mark.parametrize(
    "content",
    [b'{"format": 0, "rows": []}', b"half a fi", b'{"format": 1, "rows": [{"block_n": 3}]}'],
)
def test_an_unusable_file_is_an_error_before_anything_is_timed(content, folder):
    folder.mkdir()
    file(folder).write_bytes(content)
    made = []
    with pytest.raises(
        ConfigError, match="correct it, or delete it and run slab-kernels tune again"
    ):
        run([DECODING], A100, FakeClock(), made.append, folder)
    assert not made and file(folder).read_bytes() == content


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_timed(
    folder, tmp_path, monkeypatch
):
    (tmp_path / "taken").write_text("")
    made = []
    with pytest.raises(ConfigError, match="cannot write to .*taken"):
        run([DECODING], A100, FakeClock(), made.append, tmp_path / "taken")
    monkeypatch.setattr(
        os, "access", lambda *_: False
    )  # simulated, because root may write everywhere
    with pytest.raises(
        ConfigError, match="Permission denied; choose another folder with --out"
    ) as raised:
        run([DECODING], A100, FakeClock(), made.append, folder)
    assert not made and console.exit_code(raised.value) == console.NO_SPACE


def test_one_weight_at_a_time(folder):
    second = replace(LAYOUT, values="int8")
    made = []
    todo = problems([LAYOUT, second], [1, 64], torch.bfloat16, A100)
    run(todo, A100, FakeClock(), lambda p: made.append(p.layout) or FakeWeight(), folder)
    assert made == [LAYOUT, second]


# The command


@pytest.fixture
def gpu(folder, monkeypatch):
    """A GPU on which one candidate of every problem is twice as fast."""

    def make(problem):
        return FakeWeight(
            lambda config, m: FAST if config.block_n == 32 or config.rebuild else SLOW
        )

    monkeypatch.setattr(tuning, "gpu", lambda where, seconds: (A100, FakeClock(), make))


SMALL = ("tune", "--shape", "4096x4096", "--m", "1", "--m", "64", "--values", "int4")


def test_the_command_prints_one_object_and_writes_the_rows(gpu, folder, capsys):
    assert cli.run([*SMALL, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.out.count("\n") == 1 and "[1/2] 4096×4096 int4 m=1" in shown.err
    assert (
        found["file"] == str(file(folder))
        and found["rows"] == json.loads(file(folder).read_text())["rows"]
    )
    first = found["results"][0]
    assert (
        first["tuned"]
        and first["tokens"] == [1]
        and first["median_us"] == [pytest.approx(10)]
        and first["config"]["block_n"] == 32
    )


def test_the_command_prints_a_table(gpu, folder, tmp_path, capsys):
    assert cli.run([*SMALL, "--out", str(tmp_path / "elsewhere")]) == 0
    shown = capsys.readouterr()
    assert (
        "-50.0%" in shown.out
        and "2 of 2 defaults beaten" in shown.out
        and file(tmp_path / "elsewhere").exists()
    )
    assert (
        f"{row_files.ENVIRONMENT}={tmp_path / 'elsewhere'}" in shown.out
        and not file(folder).exists()
    )


def test_a_models_linears_fused_and_separate(gpu, capsys):
    assert (
        cli.run(["tune", "--model", "qwen2.5-0.5b", "--m", "1", "--values", "int8", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["results"]
    assert {(r["n"], r["k"]) for r in found} == {
        (896, 896),
        (128, 896),
        (4864, 896),
        (896, 4864),
        (1152, 896),
        (9728, 896),
    }


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--device", "cpu"), 4, "tune times kernels on a CUDA device: cpu is none"),
        (("--device", "tpu9"), 2, "--device 'tpu9' is unknown"),
        (("--shape", "4096"), 2, "11008x4096"),
        (("--values", "int5"), 2, "fp16, bf16, int8, int4, int3"),
        (("--dtype", "fp8"), 2, "fp32, bf16, fp16"),
        (("--model", "gpt-9"), 2, "llama-3-8b"),
        (("--m", "0"), 2, "--m"),
    ],
)
def test_what_the_command_refuses(more, code, words, folder, capsys):
    for as_json in ((), ("--json",)):
        assert cli.run(["tune", *more, *as_json]) == code
        shown = capsys.readouterr()
        said = json.loads(shown.out)["error"]["message"] if as_json else shown.err
        assert words in said and said.strip().count("\n") == 0
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:3"])
def test_without_a_gpu_one_sentence_and_exit_code_4(device, folder, capsys):
    assert cli.run(["tune", "--device", device, "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "BackendError" and error["message"].startswith(
        "tune times kernels on a CUDA device: "
    )


def test_a_bad_file_ends_the_command_with_exit_code_3(gpu, folder, capsys):
    folder.mkdir()
    file(folder).write_text("[")
    assert cli.run([*SMALL, "--json"]) == 3
    assert str(file(folder)) in json.loads(capsys.readouterr().out)["error"]["message"]


def test_importing_it_loads_no_triton():
    code = (
        "import sys, slab_kernels.bench.tune; print([m for m in sys.modules if m.split('.')[0] == "
        "'triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The real weight

INTERPRETED = """
import json, torch
from slab_kernels.bench import clocks, correctness
from slab_kernels.bench import tune as tuning
from slab_kernels.errors import BenchError
from slab_kernels.backends.triton import configs, device_of, launch
from slab_kernels.backends.triton.rows import TileConfig
from slab_kernels.format import PackedLayout

class Clock:
    def time(self, calls):
        return clocks.Timed([clocks.WallClock(0.0)._seconds(call) for call in calls], "wall")

plain = correctness.tolerance  # the gate takes CPU tensors for fp32 sums of exact products
correctness.tolerance = lambda *arguments, rounds: plain(*arguments, rounds=True)
device, seen = device_of(None), {}
problem = tuning.Problem(PackedLayout(40, 256, "int8", 64, 1, 4), torch.float16, (3,), 0, 16)
few = [TileConfig(16, 16, 64, fill=0), TileConfig(16, 32, 64, fill=4)]
tuning.candidates = lambda *_: few
weight = tuning.Weight(problem, device, "cpu", lambda size: 2)
seen["sizes"] = weight.sizes == problem.sizes and len(weight.copies) == 2
seen["splits"] = configs.splits(weight.sizes, 3, few[1], device)
with torch.inference_mode():
    result = tuning.tune(problem, weight, Clock(), device)
    seen["timed"], seen["skipped"] = result.timed, result.skipped
    weight.check(TileConfig(rebuild=True), 100)
    right = launch.linear
    def lazy(*arguments):  # what was left in memory by the last run is not a result
        return arguments[0].new_empty(arguments[0].shape[0], 40)
    def beside(x, *arguments):
        return right(x, *arguments) * (1 + 2.0**-10 * (x.shape[0] > 1))
    for name, wrong in (("lazy", lazy), ("beside", beside)):
        weight.check(few[0], 16)
        launch.linear = wrong
        try:
            weight.check(few[0], 16)
            seen[name] = ""
        except BenchError as error:
            seen[name] = str(error)
        launch.linear = right
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_real_weight_in_the_interpreter(folder):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["sizes"] and found["splits"] == 2 and found["timed"] == 3 and found["skipped"] == {}
    )
    assert "disagrees with the reference" in found["lazy"]
    assert "disagrees" in found["beside"] or "depends on the tokens beside it" in found["beside"]
