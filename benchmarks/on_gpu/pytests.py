"""Runs the tests that need a GPU, and keeps the outcome of each.

    python -m on_gpu.pytests FILE

Those that compute-sanitizer runs are left out, since it has parts of its own. What has an outcome
of the same commit is not run again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from on_gpu import machine, verdicts
from on_gpu.parts import begins_anew, exit_code, seconds_here
from on_gpu.rows import RESULTS, Row, Rows

WORKERS = 8  # They share the GPU; most of their time is Python's and Triton's compiler's.
ROWS_AT_ONCE = 20  # Each writing is of the whole file.
WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# What `pytest -v` prints of a test: alone, and of a worker of pytest-xdist.
ALONE = re.compile(rf"^(tests/.*?) ({WORDS})\b.*\[ *\d+%\]$")
WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({WORDS}) (tests/.*?)\s*$")
STARTS = re.compile(r"^(tests/.*::.*\S) $")  # A worker begins a test, which may hang.
SELECTED = re.compile(r"(\d+) selected|^\d+ workers \[(\d+) items?\]")
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/.*?) - (.*)$")


def command() -> list[str]:
    several = importlib.util.find_spec("xdist") is not None
    return [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-k", "not sanitizer"),
        *("-p", "no:cacheprovider", "tests/backends"),
        *(["-n", str(WORKERS), "--dist", "worksteal"] if several else []),
    ]


def outcomes(lines: Iterable[str]) -> Iterator[Row | int]:
    """A row for each line that tells a test's outcome or why it failed, and the number of tests
    when a line tells that."""
    for line in lines:
        if found := ALONE.match(line):
            yield {"case": found[1], "outcome": found[2].lower()}
        elif found := WORKER.match(line):
            yield {"case": found[2], "outcome": found[1].lower()}
        elif found := REASON.match(line):
            yield {"case": found[1], "outcome": "failed", "reason": found[2]}
        elif found := STARTS.match(line):
            yield {"case": found[1], "outcome": verdicts.STARTED}
        elif found := SELECTED.search(line):
            yield int(found[1] or found[2])


def run(rows: Rows, seconds: float, pytest: Sequence[str], folder: Path) -> int | None:
    """Runs the tests into `rows`; pytest's exit code, None if they were stopped.

    pytest: the command. folder: where it runs.
    """
    process = subprocess.Popen(
        pytest,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # The workers hold the pipe open, too.

    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop)
    timer.start()
    assert process.stdout is not None
    fresh: dict[str, Row] = {}
    try:
        for found in outcomes(_echoed(process.stdout)):
            if isinstance(found, int):
                rows.save(selected=found)
            else:
                fresh[found["case"]] = found
            if len(fresh) == ROWS_AT_ONCE:
                rows.add(*fresh.values())
                fresh.clear()
        code = process.wait()
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
        rows.add(*fresh.values())
    return None if stopped.is_set() else code


def _echoed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="")
        yield line.rstrip("\n")


def main(file: str) -> int:
    rows = Rows(Path(file), machine.head(), (RESULTS,))
    if begins_anew():
        rows.forget()
    done = [row["case"] for row in rows.rows if row["outcome"] != verdicts.STARTED]
    more = [argument for case in done for argument in ("--deselect", case)]
    code = run(rows, seconds_here(), [*command(), *more], machine.ROOT)
    verdict = verdicts.tests(rows.rows, rows.more.get("selected"), len(done))
    verdict.say()
    return exit_code(code is not None, verdict.good and code == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
