"""What a run tells on the way: events, and the bar or the lines that show them."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..terminal import clock, visible
from .record import LayerRecord

QUIET = 30.0  # seconds after which lines are followed by one that the work goes on


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a run; `str(event)` is one line for people.

    kind: "start", "warning", "resumed", "budget", "experts", "layer", "matching", "block" or
        "done".
    done, layers: layers that are finished, and all of them.
    elapsed: seconds since the run began.
    remaining: an estimate of the seconds still needed; None while nothing is known of it.
    """

    kind: str
    block: int = 0
    blocks: int = 0
    done: int = 0
    layers: int = 0
    layer: LayerRecord | None = None
    message: str = ""
    elapsed: float = 0.0
    remaining: float | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.message
        errors = f"calibration error {self.layer.error:.4f}"
        if self.layer.heldout_error is not None:
            errors = f"held-out error {self.layer.heldout_error:.4f}, {errors}"
        return (
            f"{self.count} {self.layer.name} {errors} "
            f"{self.layer.bits_per_weight:.3f} bits per weight {self.layer.seconds:.1f} s; "
            f"{self.times}"
        )

    @property
    def count(self) -> str:
        return f"[{self.done}/{self.layers}]"

    @property
    def times(self) -> str:
        """How long the run has taken, and about how long it will."""
        passed = f"{clock(self.elapsed)} elapsed"
        return passed if self.remaining is None else f"{passed}, about {clock(self.remaining)} left"


class Reporter:
    """Hands events on to a listener, with the time that has passed and an estimate of the rest."""

    def __init__(self, progress: Any, leads: bool = True):
        """progress: as `compress` takes it. leads: whether this process speaks for its team."""
        self._listen = listener(progress) if leads else _ignore
        if isinstance(self._listen, Lines):
            self._listen.start()
        self._began = time.perf_counter()
        self._first = 0  # layers that were finished when the clock for the estimate started
        self._first_at = self._began

    def __call__(self, event: ProgressEvent) -> None:
        now = time.perf_counter()
        if event.kind in ("start", "resumed"):
            self._first, self._first_at = event.done, now
        remaining = None
        if event.done > self._first:
            each = (now - self._first_at) / (event.done - self._first)
            remaining = each * (event.layers - event.done)
        self._listen(replace(event, elapsed=now - self._began, remaining=remaining))

    def close(self) -> None:
        if isinstance(self._listen, Bar | Lines):
            self._listen.close()


def listener(progress: Any) -> Callable[[ProgressEvent], None]:
    """What to call with events.

    progress: a function, which is called itself; True for a bar on stderr, or lines where stderr
        is no terminal; None for a bar on a terminal and nothing elsewhere; False for nothing.
        Where nothing is shown, warnings are Python's.
    """
    if callable(progress):
        return progress
    if sys.stderr.isatty() and progress is not False:
        return Bar()
    return Lines() if progress else _only_warn


def _ignore(event: ProgressEvent) -> None:
    pass


def _only_warn(event: ProgressEvent) -> None:
    """What did not go as it was asked for is said even where no progress is wanted."""
    if event.kind == "warning":
        warnings.warn(event.message.removeprefix("warning: "), RuntimeWarning, stacklevel=2)


def _say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


class Lines:
    """One line per event, and at least one every QUIET seconds between `start` and `close`."""

    def __init__(self, say: Callable[[str], None] = _say):
        self._say = say
        self._last = ProgressEvent("start")
        self._said_at = self._event_at = time.monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._remind, daemon=True).start()

    def __call__(self, event: ProgressEvent) -> None:
        self._last, self._event_at = event, time.monotonic()
        if line := str(event):
            self._said_at = self._event_at
            self._say(line)

    def _remind(self) -> None:
        while not self._closed.wait(max(0.01, self._said_at + QUIET - time.monotonic())):
            now, last = time.monotonic(), self._last
            if now - self._said_at < QUIET:
                continue
            self._said_at, waited = now, now - self._event_at
            remaining = None if last.remaining is None else max(0.0, last.remaining - waited)
            still = replace(last, elapsed=last.elapsed + waited, remaining=remaining)
            where = f"{still.count} " if still.layers else ""
            self._say(f"{where}still at work; {still.times}")

    def close(self) -> None:
        self._closed.set()


class Bar:
    """A bar on stderr under one line per layer."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("compress"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("layers"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("compress", total=None)

    def __call__(self, event: ProgressEvent) -> None:
        self._bar.start()  # does nothing the second time
        if line := str(event):
            self._bar.console.print(visible(line), highlight=False, markup=False)
        self._bar.update(self._task, completed=event.done, total=event.layers or None)

    def close(self) -> None:
        self._bar.stop()
