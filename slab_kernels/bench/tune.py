"""Times configurations of the Triton kernels on this GPU and keeps those that beat the defaults.

Where the backend prepares a weight as a stream (backends/triton/stream.py), the kernel that decodes
from it has no tiles to choose; what is tuned is whether so many tokens rebuild the weight. Tiles
are tuned for fp32 activations, and on GPUs that take no streams.

A candidate is compared with the reference before it is timed. It replaces the default only if it is
faster by more than the noise, in a second measurement of just the two. Rows go to the user's file
for this device after every problem, merged with what is there and in one step, so that an
interruption loses nothing that was found.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.base import LinearProblem
from ..backends.triton import BACKEND, State, bits_of, configs, device_of, launch, stream
from ..backends.triton.launch import TritonState
from ..backends.triton.rows import DECODE, Row, TileConfig, TritonDevice
from ..errors import ArgumentError, BackendError, BenchError
from ..format import PackedLayout
from ..testing import random_packed
from .clocks import Call, CudaClock, Timed, copied, size_of
from .correctness import gate
from .tune_problems import Problem, candidates
from .tune_rows import check_writable, merged, present, save


class Timer(Protocol):
    """What tuning needs of a clock."""

    def time(self, calls: Sequence[Call]) -> Timed: ...


class Tunable(Protocol):
    """What tuning needs of a weight: `Weight`, or what does the same."""

    streamed: bool  # whether it is prepared as a stream

    def check(self, config: TileConfig, m: int) -> None: ...

    def calls(self, config: TileConfig, m: int) -> list[Call]: ...


@dataclass(frozen=True)
class Result:
    """What a problem's candidates took.

    The times are one for each of the problem's token counts, as measured last.
    """

    problem: Problem
    default: TileConfig
    default_times: list[Timed]
    best: TileConfig  # the default itself where nothing was faster by more than the noise
    times: list[Timed]
    timed: int  # candidates
    streamed: bool = False  # as of Tunable
    skipped: dict[str, str] = field(default_factory=dict)  # candidate -> why it was not timed

    @property
    def tuned(self) -> bool:
        """Whether the default was beaten."""
        return self.best is not self.default

    def described(self, config: TileConfig) -> str:
        """How such a weight runs by a configuration, in words."""
        return _described(config, self.problem, self.streamed)

    @property
    def row(self) -> Row:
        """The best configuration as a row, with the times as its reason."""
        took, before = (
            " and ".join(f"{t.median * 1e6:.1f}" for t in times)
            for times in (self.times, self.default_times)
        )
        today, tokens = datetime.date.today().isoformat(), ",".join(map(str, self.problem.tokens))
        reason = f"tuned {today}: {took} us at m={tokens}, the default {before} us"
        return self.problem.row(replace(self.best, reason=reason))

    def to_dict(self) -> dict[str, Any]:
        """One entry of "results" for --json: medians and quartile ranges in microseconds."""
        problem, config = self.problem, asdict(self.best)
        del config["reason"]
        return {
            "n": problem.layout.out_features,
            "k": problem.layout.in_features,
            "values": problem.layout.values,
            "rank": problem.layout.rank,
            "tokens": list(problem.tokens),
            "above": problem.above,
            "up_to": problem.up_to,
            "tuned": self.tuned,
            "config": config,
            "default": self.described(self.default),
            "median_us": [t.median * 1e6 for t in self.times],
            "iqr_us": [t.iqr * 1e6 for t in self.times],
            "default_median_us": [t.median * 1e6 for t in self.default_times],
            "default_iqr_us": [t.iqr * 1e6 for t in self.default_times],
            "timing": self.times[0].timing,
            "candidates": self.timed,
            "skipped": self.skipped,
        }


class Weight:
    """A random weight on the GPU with copies that caches do not hold, run by any configuration."""

    def __init__(
        self,
        problem: Problem,
        device: TritonDevice,
        where: torch.device | str,
        copies: Callable[[int], int],
    ):
        self.device, self.dtype = device, problem.dtype
        self.packed = random_packed(problem.layout).to(where)
        self.state: State = BACKEND.prepare(self.packed, problem.dtype)
        self.streamed = not isinstance(self.state, TritonState)
        self.sizes = problem.sizes
        more = copies(size_of(self.state)) - 1
        self.copies = [self.state, *(copied(self.state) for _ in range(more))]
        self.inputs: dict[int, Tensor] = {}

    def run(self, config: TileConfig, x: Tensor, state: State) -> Tensor:
        """x [m, K] -> [m, N] as `config` says."""
        if not isinstance(state, TritonState):
            if config.rebuild:
                return stream.rebuilt(x, state, None)
            return stream.decoded(x, state, None, self.device.multiprocessors)
        if config.rebuild:
            return torch.nn.functional.linear(x, launch.dense(state, x.dtype))
        shares = configs.splits(self.sizes, x.shape[0], config, self.device)
        return launch.linear(x, state, None, config, shares, configs.z_splits(self.sizes))

    def x(self, m: int) -> Tensor:
        """The same m x K activations every time."""
        if m not in self.inputs:
            x = torch.randn(m, self.sizes.K, generator=torch.Generator().manual_seed(m))
            self.inputs[m] = x.to(self.packed.values.device, self.dtype)
        return self.inputs[m]

    def check(self, config: TileConfig, m: int) -> None:
        """Raises: BenchError if the result is wrong, or that of a decoded token depends on the
        tokens beside it."""
        configured = _Configured(self, config)
        self.poison(config, m)
        gate(configured, self.x(m), self.state, self.packed)
        if 1 < m <= DECODE:
            together = configured.linear(self.x(m), self.state)[0]
            alone = configured.linear(self.x(m)[:1], self.state)[0]
            if not torch.equal(together, alone):
                raise BenchError("a token's result depends on the tokens beside it")

    def poison(self, config: TileConfig, m: int) -> None:
        """Leaves NaN where `run` is about to allocate.

        torch gives out the same blocks again, which may hold the last right result.
        """
        N, K, where = self.sizes.N, self.sizes.K, self.packed.values.device
        single = config.rebuild or self.streamed
        shares = 1 if single else configs.splits(self.sizes, m, config, self.device)
        blocks = [torch.full((m, N), math.nan, dtype=self.dtype, device=where)]
        if shares > 1:
            blocks.append(torch.full((shares, m, N), math.nan, device=where))
        if config.rebuild:
            rows = min(N, stream.REBUILT_ROWS) if self.streamed else N
            blocks.append(torch.full((rows, K), math.nan, dtype=self.dtype, device=where))
        del blocks  # They go all at once, or they would be one block.

    def calls(self, config: TileConfig, m: int) -> list[Call]:
        """One call on each copy."""
        return [partial(self.run, config, self.x(m), state) for state in self.copies]


@dataclass(frozen=True)
class _Configured:
    """A weight run by one configuration, as the gate wants a backend."""

    weight: Weight
    config: TileConfig
    name: str = "triton"

    def linear(self, x: Tensor, state: State) -> Tensor:
        return self.weight.run(self.config, x, state)


def problems(
    layouts: Iterable[PackedLayout],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: TritonDevice,
) -> list[Problem]:
    """Every layout at the token counts; those of one regime together, so that one row serves them.

    Raises: BackendError for what the kernels refuse.
    """
    found = []
    regimes: dict[tuple[int, int | None], list[int]] = {}
    for m in sorted(set(tokens)):
        regimes.setdefault(configs.regime(m, device.name), []).append(m)
    for layout in layouts:
        asked = LinearProblem.of(layout, max(tokens), dtype, "cuda")
        capability = device.capability // 10, device.capability % 10
        if reasons := BACKEND.refusals(asked, capability):
            raise BackendError(
                f"backend 'triton' cannot run {asked.describe()}: {'; '.join(reasons)}"
            )
        found += [Problem(layout, dtype, tuple(ms), *regime) for regime, ms in regimes.items()]
    return found


def gpu(where: str, seconds: float) -> tuple[TritonDevice, CudaClock, Callable[[Problem], Tunable]]:
    """The device, its clock, and what makes weights on it.

    Raises: BackendError without a CUDA device or without Triton, ArgumentError for an unknown
    device.
    """
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
    torch.cuda.set_device(index)  # Triton launches on torch's current device.
    device, clock = device_of(index), CudaClock(f"cuda:{index}", seconds)
    return device, clock, lambda problem: Weight(problem, device, clock.device, clock.copies)


def run(
    todo: Sequence[Problem],
    device: TritonDevice,
    clock: Timer,
    make: Callable[[Problem], Tunable],
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Tunes every problem and writes its row, or removes the one that no longer beats the default.

    make: makes the weight of a problem. say: takes a line for the user.
    progress: called with the problems done and those in all.

    Raises: ConfigError, before anything is timed, if the file there is not usable or cannot be
    written; BenchError if the default itself is wrong.
    """
    path = folder / configs.file_name(device.name)
    check_writable(path)
    results: list[Result] = []
    weight, held = None, None
    with torch.inference_mode():
        for number, problem in enumerate(todo, 1):
            if weight is None or held != problem.layout:
                weight = None  # The last one makes room before the next is made.
                weight, held = make(problem), problem.layout
            say(f"[{number}/{len(todo)}] {problem}")
            result = tune(problem, weight, clock, device, _own(problem, path, device))
            for config, reason in result.skipped.items():
                say(f"  left out: {config}: {reason}")
            say(f"  {_verdict(result)}")
            rows = present(path)
            changed = merged(rows, problem, result.row if result.tuned else None)
            if changed != rows:
                save(path, changed, device)
            results.append(result)
            if progress is not None:
                progress(number, len(todo))
    return results


def _own(problem: Problem, path: Path, device: TritonDevice) -> TileConfig | None:
    """The configuration that the user's file has for a problem."""
    M, bits = problem.tokens[-1], bits_of(problem.dtype)
    fitting = (row.config for row in present(path) if row.fits(problem.sizes, M, bits, device))
    return next(fitting, None)


def tune(
    problem: Problem,
    weight: Tunable,
    clock: Timer,
    device: TritonDevice,
    own: TileConfig | None = None,
) -> Result:
    """The fastest right candidate for a problem.

    own: one candidate more.

    Raises: whatever the default's run raises, and what leaves the GPU unusable.
    """
    M, bits = problem.tokens[-1], bits_of(problem.dtype)
    default = configs.choose(problem.sizes, M, bits, device, own=False)
    if weight.streamed:
        both = M > DECODE and stream.decodes(M, problem.layout.rank)
        others = [TileConfig(rebuild=not default.rebuild)] if both else []
    else:
        others = candidates(problem.sizes, M, bits, device)
        if own:
            others = [replace(own, reason=""), *others]
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
            shares = 1 if weight.streamed else configs.splits(problem.sizes, M, config, device)
            split = f", K in {shares}" if shares > 1 else ""
            skipped[_described(config, problem, weight.streamed) + split] = reason
    best = min(times, key=lambda config: _ratio(times[config], times[default]))
    if best is not default:
        # The least of many is partly luck, so these two are timed once more.
        for config in (default, best):
            times[config] = [clock.time(weight.calls(config, m)) for m in problem.tokens]
        if not faster(times[best], times[default]):
            best = default
    return Result(
        problem, default, times[default], best, times[best], len(times), weight.streamed, skipped
    )


def _timed(problem: Problem, weight: Tunable, clock: Timer, config: TileConfig) -> list[Timed]:
    """The times of a configuration at each token count, all of which are checked first.

    For decoding the check includes DECODE tokens, so that tokens stand beside one another.
    """
    decode = [DECODE] if problem.above < DECODE else []
    for m in sorted({*problem.tokens, *decode}):
        weight.check(config, m)
    return [clock.time(weight.calls(config, m)) for m in problem.tokens]


def _ratio(new: list[Timed], old: list[Timed]) -> float:
    """The geometric mean over token counts of new time over old."""
    logarithms = [math.log(n.median / o.median) for n, o in zip(new, old, strict=True)]
    return math.exp(sum(logarithms) / len(logarithms))


def faster(new: list[Timed], old: list[Timed]) -> bool:
    """Whether `new` gains more than the noise over all token counts, and loses that at none.

    The noise is the larger interquartile range.
    """
    gains = [(o.median - n.median) / o.median for n, o in zip(new, old, strict=True)]
    noise = [max(n.iqr, o.iqr) / o.median for n, o in zip(new, old, strict=True)]
    lost = any(gain < -least for gain, least in zip(gains, noise, strict=True))
    return sum(gains) > sum(noise) and not lost


def _reason(error: Exception) -> str | None:
    """Why a candidate is left out.

    None for an error that must stop everything: after some of them the GPU answers nothing.
    """
    if isinstance(error, BenchError):
        return str(error).removesuffix("; nothing was timed")
    # The classes are compared by name, since importing Triton's would need Triton. What MLIR says
    # is a plain RuntimeError.
    ancestors = {kind.__name__ for kind in type(error).__mro__}
    compiling = "TritonError" in ancestors or "PassManager::run failed" in str(error)
    return " ".join(f"{type(error).__name__}: {error}".split()) if compiling else None


def _verdict(result: Result) -> str:
    if not result.tuned:
        if result.timed == 1:
            return "the default stays, there is nothing to choose"
        candidates = f"nothing of {result.timed} candidates is faster by more than the noise"
        return f"the default stays, {candidates}"
    return f"{_change(result)} by {result.described(result.best)}"


def _described(config: TileConfig, problem: Problem, streamed: bool) -> str:
    """How a problem runs by a configuration, in words."""
    if streamed and not config.rebuild:
        return stream.describe(problem.tokens[-1], problem.layout.rank)
    return config.describe()


def _change(result: Result) -> str:
    return f"{_ratio(result.times, result.default_times) - 1:+.1%}"


# The table that `slab-kernels tune` prints.

COLUMNS = ("problem", "default us", "best us", "change", "configuration")


def table(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """One row of COLUMNS per problem."""
    found: list[tuple[str, ...]] = []
    for result in results:
        before, best = (
            " ".join(f"{t.median * 1e6:.1f}" for t in times)
            for times in (result.default_times, result.times)
        )
        change = ("–", "the default")
        if result.tuned:
            change = (_change(result), result.described(result.best))
        found.append((str(result.problem), before, best, *change))
    return found
