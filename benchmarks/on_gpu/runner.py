"""Runs parts one after another: each with a time limit, its verdict kept before the next begins.

Nothing here touches the GPU, so that no fault of it stops the runner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from on_gpu.parts import AGAIN, OUT_OF_TIME, SECONDS, Part

DONE, FAILED, STOPPED = "done", "failed", "out of time"
NOT_BEGUN = "not begun"  # has no line
FINISHED = (DONE, FAILED)  # A second call goes on behind these.
VERDICT = "verdict: "
GRACE = 5.0  # seconds from the request to end to the kill, and from there to giving up


class Entry(NamedTuple):
    """A line of the summary file."""

    part: str
    state: str  # DONE, FAILED or STOPPED
    seconds: float
    verdict: str

    def line(self) -> str:
        return f"{self.part}\t{self.state}\t{self.seconds:.0f} s\t{self.verdict}"

    @classmethod
    def of(cls, line: str) -> Entry | None:
        """The entry of a line; None for one that is none, such as a comment or a torn line."""
        fields = line.rstrip("\n").split("\t")
        if len(fields) != 4 or line.startswith("#"):
            return None
        part, state, seconds, verdict = fields
        return cls(part, state, float(seconds.removesuffix(" s")), verdict)


class Summary:
    """The file that has a line of verdict for each part, of which a part's last one counts.

    Results of an earlier call may lie in other folders: their lines are taken over.
    """

    def __init__(self, path: Path, title: str, elsewhere: Sequence[Path] = ()):
        self.path = path
        self.entries: dict[str, Entry] = {}
        earlier = [folder / path.name for folder in (path.parent, *elsewhere)]
        for file in earlier:
            if file.is_file():
                for line in file.read_text(encoding="utf-8").splitlines():
                    if entry := Entry.of(line):
                        self.entries[entry.part] = entry
                break
        lines = [f"# {title}", *(entry.line() for entry in self.entries.values())]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def add(self, entry: Entry) -> None:
        self.entries[entry.part] = entry
        with self.path.open("a", encoding="utf-8") as file:
            file.write(entry.line() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finished(self, part: str) -> bool:
        return part in self.entries and self.entries[part].state in FINISHED


def run_all(
    parts: Iterable[Part],
    summary: Summary,
    seconds: float,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Runs the parts that no earlier call finished, and those that every call needs.

    seconds: for all of them together. again: all parts are run, and begin anew.

    A part is not begun if time is short, or if the part that it needs is not done before it.

    Returns 0 if all parts are done, 1 if one failed or ran out of time, 3 if only time for some was
    lacking.
    """
    end = time.monotonic() + seconds
    states: dict[str, str] = {}  # of this call's parts
    for part in parts:
        if summary.finished(part.name) and not (again or part.every_call):
            entry = summary.entries[part.name]
            say(f"== {part.name}: {entry.state} by an earlier call: {entry.verdict}")
            states[part.name] = entry.state
            continue
        if part.needs and states.get(part.needs) != DONE:
            say(f"== {part.name}: not begun, it needs the part {part.needs}, which is not done")
            states[part.name] = NOT_BEGUN
            continue
        left = end - time.monotonic()
        if left < part.least:
            say(f"== {part.name}: not begun, {left:.0f} s are left and it takes {part.least:.0f}")
            states[part.name] = NOT_BEGUN
            continue
        limit = min(part.limit, left)
        say(f"== {part.name}: {part.what} (at most {limit:.0f} s)")
        entry = run(part, limit, say, again)
        summary.add(entry)
        states[part.name] = entry.state
        say(f"== {part.name}: {entry.state} after {entry.seconds:.0f} s: {entry.verdict}")
    if FAILED in states.values() or STOPPED in states.values():
        return 1
    return 3 if NOT_BEGUN in states.values() else 0


def run(part: Part, limit: float, say: Callable[[str], None], again: bool = False) -> Entry:
    """Runs one part as a process group of its own, which is killed at its limit."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            part.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, SECONDS: str(limit), AGAIN: "1" if again else ""},
        )
    except OSError as error:
        return Entry(part.name, FAILED, 0.0, f"it cannot be started: {error.strerror or error}")
    said = _Said(process, say)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        end(process)
        verdict = f"stopped at {limit:.0f} s; until then: {said.last() or 'nothing said'}"
        return Entry(part.name, STOPPED, time.monotonic() - start, verdict)
    end(process)  # what the part left running
    took, last = time.monotonic() - start, said.last()
    if process.returncode == 0:
        return Entry(part.name, DONE, took, last or "no verdict")
    if process.returncode == OUT_OF_TIME:
        return Entry(part.name, STOPPED, took, last or "no verdict")
    ended = f"ended with code {process.returncode}"
    if process.returncode < 0:
        ended = f"killed by signal {-process.returncode}"
    return Entry(part.name, FAILED, took, f"{last} ({ended})" if last else ended)


class _Said:
    """What a process prints: echoed, and the last verdict, or else the last line, kept."""

    def __init__(self, process: subprocess.Popen[str], say: Callable[[str], None]):
        self.process, self.say = process, say
        self.verdict, self.line = "", ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text := " ".join(line.split()):
                self.line = text
                if text.startswith(VERDICT):
                    self.verdict = text.removeprefix(VERDICT)
                self.say(line.rstrip())

    def last(self) -> str:
        """The verdict if there was one. A process that nobody can kill may hold the pipe open."""
        self.thread.join(GRACE)
        return self.verdict or self.line


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started, as far as the system can."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            if kind == signal.SIGTERM and not _alive(process.pid):
                return


def _alive(group: int) -> bool:
    """Whether a process of that group is left."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
