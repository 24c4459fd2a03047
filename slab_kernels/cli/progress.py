"""How far a long piece of work is: a bar on a terminal, elsewhere a line every half minute.

Both stand on stderr, so that the result on stdout stays as it is.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import NamedTuple

from ..terminal import clock, visible
from .console import say

FIRST_LINE = 10.0  # seconds until the first line; shorter work needs none
NEXT_LINE = 30.0  # seconds from one line to the next


class _Step(NamedTuple):
    """How many steps were done at a time of the monotonic clock."""

    done: int
    at: float


class Progress:
    """Counts the steps of one piece of work. An instance is the callback `progress(done, total)`
    that the library's long functions take, and works before the first step is known.

        with Progress("eval", "windows") as progress:
            perplexity(model, tokenizer, text, progress=progress)

    what: the name of the work. unit: what its steps are, in the plural.
    """

    def __init__(self, what: str, unit: str):
        self.what, self.unit = what, unit
        self.total: int | None = None
        self.began = time.monotonic()
        self.first: _Step | None = None
        self.last: _Step | None = None
        self._over = threading.Event()
        self._bar = _Bar(what, unit) if sys.stderr.isatty() else None

    def __call__(self, done: int, total: int) -> None:
        """Notes that `done` of `total` steps are done."""
        self.total = total
        self.last = _Step(done, time.monotonic())
        self.first = self.first or self.last
        if self._bar:
            self._bar.update(done, total)

    def say(self, message: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar:
            self._bar.say(message)
        else:
            say(message)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        else:
            threading.Thread(target=self._say_regularly, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._bar:
            self._bar.stop()

    def _say_regularly(self) -> None:
        wait = FIRST_LINE
        while not self._over.wait(wait):
            say(str(self))
            wait = NEXT_LINE

    def seconds_left(self) -> float | None:
        """The remaining steps at the pace of those between the first call and the last.

        None as long as that pace is unknown.
        """
        if self.first is None or self.last is None or self.total is None:
            return None
        steps = self.last.done - self.first.done
        if steps <= 0:
            return None
        pace = (self.last.at - self.first.at) / steps
        since = time.monotonic() - self.last.at
        return max(0.0, (self.total - self.last.done) * pace - since)

    def __str__(self) -> str:
        parts = [f"{self.what}: "]
        if self.last is not None:
            parts.append(f"{self.last.done} of {self.total} {self.unit}, ")
        parts.append(f"{clock(time.monotonic() - self.began)} elapsed")
        left = self.seconds_left()
        if left is not None:
            parts.append(f", about {clock(left)} left")
        return "".join(parts)


class _Bar:
    """rich's progress bar on stderr, gone when the work is over."""

    def __init__(self, what: str, unit: str):
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
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(visible(what), total=None)

    def start(self) -> None:
        self.bar.start()

    def stop(self) -> None:
        self.bar.stop()

    def update(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)

    def say(self, message: str) -> None:
        self.bar.console.print(visible(message), highlight=False, markup=False)
