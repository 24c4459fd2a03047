"""Times configurations of the Triton kernels on this GPU, ahead of time, and keeps those that beat the shipped ones.

A candidate is compared with the reference before it is timed. It replaces the default only if it is faster by more than the
noise, in a second measurement of just the two. Rows go to the user's file for this device after every problem, merged with
what is there and in one step, so that an interruption loses nothing that was found.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.base import LinearProblem
from ..backends.triton import BACKEND, bits_of, configs, device_of, launch
from ..backends.triton.configs import DECODE, Config, Device, Row, Sizes
from ..errors import ArgumentError, BackendError, ConfigError
from ..format import PackedLayout
from ..testing import random_packed
from . import clocks as timing
from . import linear as bench
from . import machine

# block_n, block_k, warps, stages: about the defaults, in every direction.
FEW_TOKENS = (
    (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 64, 4, 4), (64, 256, 8, 3), (32, 128, 4, 4), (32, 128, 2, 4),
    (32, 256, 4, 3), (16, 256, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3),
)  # fmt: skip
# The same after block_m.
MANY_TOKENS = (
    (64, 64, 128, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3), (128, 128, 32, 8, 4), (128, 256, 32, 8, 3), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3), (256, 128, 32, 8, 4),
)  # fmt: skip
FILLS = (0, 1, 2, 4)  # programs a multiprocessor; those that split K alike are timed once
SPLIT_UP_TO = 256  # tokens: more fill any GPU without splitting K
SIXTEEN_BITS = ("fp16", "bf16")  # stored values become the activations' type: one row serves both


@dataclass(frozen=True)
class Problem:
    """A linear y[m,N] = x[m,K] W.T at token counts that one row serves: more than `above`, at most `up_to` (None: any)."""

    layout: PackedLayout
    dtype: torch.dtype  # of the activations
    tokens: tuple[int, ...]  # those timed, ascending
    above: int
    up_to: int | None

    @property
    def sizes(self) -> Sizes:
        layout = self.layout
        stored = launch.held_as(layout.values, self.dtype)
        adapter = -(-layout.adapter_rank // 16) * 16
        return Sizes(
            layout.in_features,
            (layout.out_features,),
            stored,
            layout.group_size or 0,
            layout.rank,
            adapter,
        )

    def row(self, config: Config) -> Row:
        """`config` as a row for this problem."""
        bits, values = bits_of(self.dtype), self.sizes.values
        served = SIXTEEN_BITS if bits == 16 and values in SIXTEEN_BITS else (values,)
        return Row(
            config,
            self.up_to,
            bits,
            served,
            self.layout.rank,
            self.layout.out_features,
            self.layout.in_features,
            above=self.above,
        )

    def __str__(self) -> str:
        layout = self.layout
        return f"{layout.out_features}×{layout.in_features} {layout.values} m={','.join(map(str, self.tokens))}"


@dataclass(frozen=True)
class Result:
    """What a problem's candidates took. `times` and `default_times`: one for each of its token counts, measured last."""

    problem: Problem
    default: Config
    default_times: list[timing.Timed]
    best: Config  # the default itself where nothing was faster by more than the noise
    times: list[timing.Timed]
    timed: int  # candidates
    skipped: dict[str, str] = field(default_factory=dict)  # candidate -> why it was not timed

    @property
    def tuned(self) -> bool:
        return self.best is not self.default

    @property
    def row(self) -> Row:
        took, before = (
            " and ".join(f"{t.median * 1e6:.1f}" for t in times)
            for times in (self.times, self.default_times)
        )
        at = f" at m={','.join(map(str, self.problem.tokens))}"
        reason = (
            f"tuned {datetime.date.today().isoformat()}: {took} us{at}, the default {before} us"
        )
        return self.problem.row(replace(self.best, reason=reason))

    def to_dict(self) -> dict[str, Any]:
        """For --json: one entry of "results"; seconds as microseconds, medians and quartile ranges."""
        problem, config = self.problem, asdict(self.best)
        del config["reason"]
        micro = lambda times, name: [getattr(t, name) * 1e6 for t in times]  # noqa: E731
        return {
            "n": problem.layout.out_features, "k": problem.layout.in_features, "values": problem.layout.values,
            "rank": problem.layout.rank, "tokens": list(problem.tokens), "above": problem.above, "up_to": problem.up_to,
            "tuned": self.tuned, "config": config, "default": self.default.describe(),
            "median_us": micro(self.times, "median"), "iqr_us": micro(self.times, "iqr"),
            "default_median_us": micro(self.default_times, "median"), "default_iqr_us": micro(self.default_times, "iqr"),
            "timing": self.times[0].timing, "candidates": self.timed, "skipped": self.skipped,
        }  # fmt: skip


def problems(
    layouts: Iterable[PackedLayout], tokens: Sequence[int], dtype: torch.dtype, device: Device
) -> list[Problem]:
    """Token counts of one regime together, so that one row serves them. Raises: BackendError for what the kernels refuse."""
    found = []
    regimes: dict[tuple[int, int | None], list[int]] = {}
    for m in sorted(set(tokens)):
        regimes.setdefault(configs.regime(m, device.name), []).append(m)
    for layout in layouts:
        asked = LinearProblem.of(layout, max(tokens), dtype, "cuda")
        if reasons := BACKEND.refusals(asked, divmod(device.capability, 10)):
            raise BackendError(
                f"backend 'triton' cannot run {asked.describe()}: {'; '.join(reasons)}"
            )
        found += [Problem(layout, dtype, tuple(ms), *regime) for regime, ms in regimes.items()]
    return found


def candidates(sizes: Sizes, M: int, bits: int, device: Device) -> list[Config]:
    """Configurations worth timing at M tokens of `bits`-bit activations; each another program or another split of K."""
    if M <= 64:
        block_m = 16 if M <= 16 else 32 if M <= 32 else 64
        tiles = [(block_m, *tile) for tile in FEW_TOKENS]
    else:
        tiles = MANY_TOKENS
    if bits == 32:  # an input takes twice the room
        tiles = dict.fromkeys((m, n, max(32, k // 2), *rest) for m, n, k, *rest in tiles)
    found: dict[tuple, Config] = {}
    for tile, fill in itertools.product(tiles, FILLS if M <= SPLIT_UP_TO else FILLS[:1]):
        config = Config(*tile, fill=fill)
        found.setdefault((tile, configs.splits(sizes, M, config, device)), config)
    rebuilt = (
        [Config(rebuild=True)] if bits == 16 and M > 64 else []
    )  # fp32: torch's matmul may use TF32
    return [*found.values(), *rebuilt]


class Weight:
    """A random weight on the GPU with copies that caches do not hold, run by any configuration."""

    def __init__(
        self,
        problem: Problem,
        device: Device,
        where: torch.device | str,
        copies: Callable[[int], int],
    ):
        self.device, self.dtype = device, problem.dtype
        self.packed = random_packed(problem.layout).to(where)
        self.state = launch.prepare((self.packed,), problem.dtype)
        self.sizes = launch.sizes_of(self.state)
        self.copies = [self.state]
        self.copies += [
            timing.copied(self.state) for _ in range(copies(timing.size_of(self.state)) - 1)
        ]
        self.inputs: dict[int, Tensor] = {}

    def linear(self, config: Config, x: Tensor, state: Any) -> Tensor:
        if config.rebuild:
            return torch.nn.functional.linear(x, launch.dense(state, x.dtype))
        shares = configs.splits(self.sizes, x.shape[0], config, self.device)
        return launch.linear(x, state, None, config, shares, configs.z_splits(self.sizes))

    def x(self, m: int) -> Tensor:
        """The same m x K activations every time."""
        if m not in self.inputs:
            x = torch.randn(m, self.sizes.K, generator=torch.Generator().manual_seed(m))
            self.inputs[m] = x.to(self.state.values.device, self.dtype)
        return self.inputs[m]

    def check(self, config: Config, m: int) -> None:
        """Raises: BenchError if the result is wrong, or that of a decoded token depends on the tokens beside it."""
        run = _Named("triton", partial(self.linear, config))
        self.poison(config, m)
        bench.gate(run, self.x(m), self.state, self.packed)
        if 1 < m <= DECODE:
            together, alone = (run.linear(x, self.state)[0] for x in (self.x(m), self.x(m)[:1]))
            if not torch.equal(together, alone):
                raise bench.BenchError("a token's result depends on the tokens beside it")

    def poison(self, config: Config, m: int) -> None:
        """NaN where `linear` is about to allocate: torch gives out the same blocks again, with the last right result in them."""
        shares = 1 if config.rebuild else configs.splits(self.sizes, m, config, self.device)
        shapes = [
            (m, self.sizes.N),
            *([(shares, m, self.sizes.N)] if shares > 1 else []),
            *([(self.sizes.N, self.sizes.K)] if config.rebuild else []),
        ]
        where = self.state.values.device
        blocks = [
            torch.full(
                s, math.nan, dtype=torch.float32 if len(s) == 3 else self.dtype, device=where
            )
            for s in shapes
        ]
        del blocks  # all at once, or they would be one block

    def calls(self, config: Config, m: int) -> list[timing.Call]:
        return [partial(self.linear, config, self.x(m), state) for state in self.copies]


@dataclass(frozen=True)
class _Named:
    """What `bench.gate` wants of a backend."""

    name: str
    linear: Callable[[Tensor, Any], Tensor]


def gpu(where: str, seconds: float) -> tuple[Device, Any, Callable[[Problem], Weight]]:
    """The device, its clock, and what makes weights on it. Raises: BackendError without a CUDA device or without Triton."""
    try:
        kind = torch.device("cuda" if where == "auto" else where)
    except RuntimeError as error:
        raise ArgumentError(f"device={where!r} is unknown; use 'cuda' or 'cuda:1'") from error
    missing = f"{where} is none" if kind.type != "cuda" else BACKEND.missing("cuda")
    if not missing and (kind.index or 0) >= torch.cuda.device_count():
        missing = f"torch sees {torch.cuda.device_count()} of them, so there is no {where}"
    if missing:
        raise BackendError(f"tune times kernels on a CUDA device: {missing}")
    index = torch.cuda.current_device() if kind.index is None else kind.index
    torch.cuda.set_device(index)  # Triton launches on torch's current device
    device, clock = device_of(index), timing.CudaClock(f"cuda:{index}", seconds)
    return device, clock, lambda problem: Weight(problem, device, clock.device, clock.copies)


def run(
    todo: Sequence[Problem], device: Device, clock: Any, make: Callable[[Problem], Any], folder: Path,
    say: Callable[[str], None] = lambda line: None, progress: Callable[[int, int], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Tunes every problem and writes its row, or removes the one that no longer beats the default.

    make: `Weight` of a problem, or what does the same. say: takes a line of progress.
    progress: called with the problems done and those in all.

    Raises: ConfigError if the file there is not usable, before anything is timed, or cannot be written; BenchError if the
    default itself is wrong.
    """
    path = folder / configs.file_name(device.name)
    _prepare(path)
    results, weight, held = [], None, None
    with torch.inference_mode():
        for number, problem in enumerate(todo, 1):
            if held != problem.layout:
                weight = None  # makes room before the next one is made
                weight, held = make(problem), problem.layout
            say(f"[{number}/{len(todo)}] {problem}")
            fits = lambda row, p=problem: row.fits(p.sizes, p.tokens[-1], bits_of(p.dtype), device)  # noqa: E731
            own = next((row.config for row in _present(path) if fits(row)), None)
            result = tune(problem, weight, clock, device, own)
            for config, reason in result.skipped.items():
                say(f"  left out: {config}: {reason}")
            say(f"  {_verdict(result)}")
            present = _present(path)
            if (rows := merged(present, problem, result.row if result.tuned else None)) != present:
                save(path, rows, device)
            results.append(result)
            if progress is not None:
                progress(number, len(todo))
    return results


def tune(
    problem: Problem, weight: Any, clock: Any, device: Device, own: Config | None = None
) -> Result:
    """The fastest right candidate for a problem; `own` is one more. Raises: whatever the default's run raises."""
    M, bits = problem.tokens[-1], bits_of(problem.dtype)
    default = configs.choose(problem.sizes, M, bits, device, own=False)
    others = [
        *([replace(own, reason="")] if own else []),
        *candidates(problem.sizes, M, bits, device),
    ]
    same = replace(default, reason="")
    skipped: dict[str, str] = {}
    times = {default: _timed(problem, weight, clock, default)}
    for config in dict.fromkeys(config for config in others if config != same):
        try:
            times[config] = _timed(problem, weight, clock, config)
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            shares = configs.splits(problem.sizes, M, config, device)
            skipped[f"{config.describe()}, K in {shares}" if shares > 1 else config.describe()] = (
                reason
            )
    best = min(times, key=lambda config: _ratio(times[config], times[default]))
    if best is not default:  # the least of many is partly luck: once more, just these two
        again = {
            config: [clock.time(weight.calls(config, m)) for m in problem.tokens]
            for config in (default, best)
        }
        times |= again
        if not faster(again[best], again[default]):
            best = default
    return Result(problem, default, times[default], best, times[best], len(times), skipped)


def _timed(problem: Problem, weight: Any, clock: Any, config: Config) -> list[timing.Timed]:
    decode = (
        [DECODE] if problem.above < DECODE else []
    )  # tokens beside one another, whatever is timed
    for m in sorted({*problem.tokens, *decode}):  # all of them, before the first is timed
        weight.check(config, m)
    return [clock.time(weight.calls(config, m)) for m in problem.tokens]


def _ratio(new: list[timing.Timed], old: list[timing.Timed]) -> float:
    """The geometric mean over token counts of new time over old."""
    return math.exp(
        sum(math.log(n.median / o.median) for n, o in zip(new, old, strict=True)) / len(new)
    )


def faster(new: list[timing.Timed], old: list[timing.Timed]) -> bool:
    """Whether `new` gains more than the noise (the larger interquartile range) over all token counts, and loses that at none."""
    gains = [(o.median - n.median) / o.median for n, o in zip(new, old, strict=True)]
    noise = [max(n.iqr, o.iqr) / o.median for n, o in zip(new, old, strict=True)]
    return sum(gains) > sum(noise) and all(
        gain >= -least for gain, least in zip(gains, noise, strict=True)
    )


def _reason(error: Exception) -> str | None:
    """Why a candidate is left out; None for an error that must stop us: after some of them the GPU answers nothing."""
    if isinstance(error, bench.BenchError):
        return str(error).removesuffix("; nothing was timed")
    ancestors = {
        kind.__name__ for kind in type(error).__mro__
    }  # by name: importing Triton's would need Triton
    compiling = "TritonError" in ancestors or "PassManager::run failed" in str(
        error
    )  # what MLIR says is a plain RuntimeError
    return " ".join(f"{type(error).__name__}: {error}".split()) if compiling else None


def _verdict(result: Result) -> str:
    if not result.tuned:
        return f"the default stays, nothing of {result.timed} candidates is faster by more than the noise"
    return f"{_ratio(result.times, result.default_times) - 1:+.1%} by {result.best.describe()}"


# The user's file


def _present(path: Path) -> list[Row]:
    return configs.read(path) if os.path.lexists(path) else []


def _prepare(path: Path) -> None:
    """Everything that can fail before hours of timing does so now."""
    if str(path).startswith("~"):
        raise ConfigError(f"there is no home folder for {path}; give a folder with --out")
    _present(path)
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {path.parent}: {error.strerror}; choose another folder with --out"
        ) from error


def merged(present: Iterable[Row], problem: Problem, row: Row | None) -> list[Row]:
    """The rows with `row` in place of any for the same problem (None: without it); the others keep their order.

    The first row that fits is taken, so a row goes before the first that is for more: no N and K, higher ranks, more tokens.
    """
    key = replace(problem.row(Config()), config=None)
    kept = [
        other for other in present if replace(other, config=None, shared=0, capability=0) != key
    ]
    order = lambda r: (
        r.N is None,
        r.K is None,
        math.inf if r.rank is None else r.rank,
        r.tokens or math.inf,
        -r.above,
    )
    if row is None:
        return kept
    at = next((i for i, other in enumerate(kept) if order(other) >= order(row)), len(kept))
    return [*kept[:at], row, *kept[at:]]


def save(path: Path, rows: Iterable[Row], device: Device) -> None:
    """Writes a file of rows in one step: after an interruption or on a full disk the old one is there, whole.

    Raises: ConfigError if it cannot be written.
    """
    versions = {
        name: version
        for name, version in machine.versions().items()
        if name in ("slab_kernels", "torch", "triton")
    }
    head = json.dumps({"format": configs.FORMAT, "device": device.name, "versions": versions})
    lines = ",\n".join("  " + json.dumps(configs.row_to(row)) for row in rows)
    target = Path(os.path.realpath(path))  # a link stays one
    fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        private = lambda name, flags: os.open(name, flags, 0o600)  # noqa: E731
        with open(fresh, "w", encoding="utf-8", opener=private) as f:
            f.write(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
            f.flush()
            os.fsync(f.fileno())
        os.replace(fresh, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"cannot write {path}: {error.strerror or error}; rows written before are still there; make room or choose another"
                " folder with --out"
            ) from error
        raise
    configs.forget()


# The table on the screen

COLUMNS = ("problem", "default us", "best us", "change", "configuration")


def table(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """One row of COLUMNS a problem."""
    micro = lambda times: " ".join(f"{t.median * 1e6:.1f}" for t in times)  # noqa: E731
    return [
        (str(r.problem), micro(r.default_times), micro(r.times), f"{_ratio(r.times, r.default_times) - 1:+.1%}" if r.tuned else "–",
         r.best.describe() if r.tuned else "the default")
        for r in results
    ]  # fmt: skip
