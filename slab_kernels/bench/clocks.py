"""How long a call takes: wall clock on a CPU; on a GPU replays of a CUDA graph between two events.

A weight that decoding reads comes from memory, not from cache, so calls go round over copies of it
("cold"). On a GPU a sample is one replay of a graph that calls every copy once, divided by their
number: no launch of Python's is in it. The same graph over one copy gives the "warm" figure, which
is reported apart.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..format import ceil_div

Call = Callable[[], Any]

REPLAYS = 50  # samples at least, on a GPU
FEWEST_COPIES = 8  # on a GPU
# Copies together are larger than so many L2 caches, whose replacement policy is not plain LRU.
L2_MULTIPLE = 4
USUAL_L2 = 64 << 20  # where torch does not tell: an H100 has 50 MB, an RTX 4090 72 MB
CPU_ROTATED = 256 << 20  # beyond the private caches; a large shared cache may still hold it
MOST_COPIES = 1024  # of a tiny weight, which then stays in cache and is reported as warm
SLOW_SECONDS = 3.0  # after which ten calls are no longer waited for, on a CPU
MOST_CPU_COPIES = 256  # so that weights of a megabyte and more reach CPU_ROTATED


@dataclass(frozen=True)
class Timed:
    """How long calls took."""

    samples: Sequence[float]  # seconds per call
    timing: str  # how the samples were taken: "wall", "graph" or "eager"

    @property
    def median(self) -> float:
        return self._quantile(0.5)

    @property
    def iqr(self) -> float:
        """The range between the quartiles."""
        return self._quantile(0.75) - self._quantile(0.25)

    def _quantile(self, at: float) -> float:
        return torch.tensor(self.samples, dtype=torch.float64).quantile(at).item()


class Clock(Protocol):
    """What times calls on a device."""

    has_warm: bool  # whether it tells a weight in cache from one in memory

    def copies(self, size: int) -> int:
        """How many copies of a weight of `size` bytes to go round over."""

    def is_cold(self, total: int) -> bool:
        """Whether copies of `total` bytes together have to come from memory."""

    def time(self, calls: Sequence[Call]) -> Timed:
        """Times the calls, one after another, over and over."""

    def fastest(self, call: Call, times: int = 6) -> float:
        """The seconds of the fastest call of several."""


class WallClock:
    """Every call timed by itself, after one warm-up of each."""

    has_warm = False

    def __init__(self, min_seconds: float):
        self.min_seconds = min_seconds

    def copies(self, size: int) -> int:
        """How many copies of a weight of `size` bytes to go round over."""
        return max(2, min(MOST_CPU_COPIES, ceil_div(CPU_ROTATED, size)))

    def is_cold(self, total: int) -> bool:
        """Whether copies of `total` bytes together have to come from memory."""
        return total >= CPU_ROTATED

    def time(self, calls: Sequence[Call]) -> Timed:
        """It goes on for `min_seconds` at least, and then until ten calls are done or SLOW_SECONDS
        are over."""
        for call in calls:
            call()
        samples: list[float] = []
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < self.min_seconds or (
            len(samples) < 10 and spent < SLOW_SECONDS
        ):
            samples += [self._seconds(call) for call in calls]
        return Timed(samples, "wall")

    def fastest(self, call: Call, times: int = 6) -> float:
        """The seconds of the fastest call of several."""
        return min(self._seconds(call) for _ in range(times))

    def _seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Replays of a CUDA graph over all calls, each between two events.

    They are queued so that the GPU never waits for Python.
    """

    has_warm = True

    def __init__(self, device: torch.device | str, min_seconds: float, cuda: Any = None):
        self.cuda = cuda or torch.cuda
        self.device, self.min_seconds = torch.device(device), min_seconds
        properties = self.cuda.get_device_properties(self.device)
        self.l2 = getattr(properties, "L2_cache_size", 0) or USUAL_L2

    def copies(self, size: int) -> int:
        """How many copies of a weight of `size` bytes to go round over."""
        wanted = max(FEWEST_COPIES, L2_MULTIPLE * self.l2 // size + 1)
        self.cuda.empty_cache()  # What torch keeps of the last contestant's copies is free too.
        free, _ = self.cuda.mem_get_info(self.device)
        fitting = free // 2 // size  # The other half of the memory is room for outputs.
        return max(2, min(wanted, MOST_COPIES, fitting))

    def is_cold(self, total: int) -> bool:
        """Whether copies of `total` bytes together have to come from memory."""
        return total > L2_MULTIPLE * self.l2

    def time(self, calls: Sequence[Call]) -> Timed:
        """At least `min_seconds` of replays and REPLAYS of them."""
        with self.cuda.device(self.device):
            run, timing = self._captured(calls)
            # These keep the queue full when the first sample starts, and the clocks up.
            for _ in range(5):
                run()
            samples: list[float] = []
            while len(samples) < REPLAYS or sum(samples) * len(calls) < self.min_seconds:
                samples += [seconds / len(calls) for seconds in self._replays(run, REPLAYS)]
            return Timed(samples, timing)

    def fastest(self, call: Call, times: int = 6) -> float:
        """The seconds of the fastest call of several."""
        with self.cuda.device(self.device):
            return min(self._replays(call, times))

    def _replays(self, run: Call, times: int) -> list[float]:
        """The seconds that each of so many runs takes."""
        pairs = [
            (self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True))
            for _ in range(times)
        ]
        for start, end in pairs:
            start.record()
            run()
            end.record()
        self.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _captured(self, calls: Sequence[Call]) -> tuple[Call, str]:
        """A replay of all calls ("graph"); the calls themselves ("eager") if they cannot be
        captured."""

        def eager() -> None:
            for call in calls:
                call()

        # torch asks for a warm-up on a side stream: lazy initialisation and autotuning must not be
        # captured.
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for _ in range(3):
                eager()
        self.cuda.current_stream().wait_stream(side)
        self.cuda.synchronize()
        try:
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph):
                eager()
            graph.replay()
            self.cuda.synchronize()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            warnings.warn(
                f"no CUDA graph of these calls, timed one by one instead: {reason}", stacklevel=3
            )
            return eager, "eager"
        return graph.replay, "graph"


def clock_of(device: torch.device | str, min_seconds: float) -> Clock:
    """The clock for that device, which times a row for at least so many seconds."""
    if torch.device(device).type == "cuda":
        return CudaClock(device, min_seconds)
    return WallClock(min_seconds)


def tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in what a backend prepared: tuples, lists, dicts, dataclasses and modules."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, nn.Module):
        yield from state.parameters()
        yield from state.buffers()
    elif is_dataclass(state):
        for field in fields(state):
            yield from tensors(getattr(state, field.name))
    elif isinstance(state, (tuple, list, dict)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors(part)


def size_of(state: Any) -> int:
    """Bytes of all its tensors."""
    return sum(tensor.nbytes for tensor in tensors(state))


def copied(state: Any) -> Any:
    """The same in memory of its own."""
    return copy.deepcopy(state)
