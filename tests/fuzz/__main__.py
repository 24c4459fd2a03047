"""`python -m tests.fuzz`: cases in worker processes, counted; exit code 1 if one ended wrong."""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
SILENT = 90  # seconds without a word, after which a worker hangs where no signal reaches it
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
TARGETS = ("load", "inspect", "from_pretrained", "decompress", "eval", "check")
RECYCLED = 4000  # cases after which a worker starts anew, so that lost memory does not add up


class Worker:
    """A process with every `step`-th case, started again behind a case that ended it."""

    def __init__(self, options: dict, start: int, stop: int, step: int):
        self.options, self.next, self.stop, self.step = options, start, stop, step
        self.running: dict | None = None
        self.begin()

    def begin(self) -> None:
        end = min(self.stop, self.next + RECYCLED * self.step)
        read, write = os.pipe()
        given = json.dumps({**self.options, "start": self.next, "stop": end, "step": self.step})
        path = filter(None, (os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent)))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)}
        as_third = f'exec "$0" "$@" 3>&{write} {write}>&-'  # where the worker writes its reports
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", as_third, sys.executable, "-m", "fuzz.worker", given],
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            pass_fds=(write,),
            env=environment,
        )
        os.close(write)
        self.pipe, self.buffer, self.heard = read, b"", time.monotonic()

    def lines(self) -> list[dict] | None:
        """What the worker said since; None once it has ended."""
        chunk = os.read(self.pipe, 1 << 16)
        if not chunk:
            return None
        self.heard = time.monotonic()
        *whole, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in whole if line]

    def ended(self) -> dict | None:
        """Go on after the process has ended; returns the case that ended it, if one did."""
        os.close(self.pipe)
        code, case = self.process.wait(), self.running
        self.running = None
        self.errors.seek(0)
        said = self.errors.read()[-2000:]
        self.errors.close()
        if case is None and code:
            raise SystemExit(f"a worker could not start:\n{said}")
        if self.next < self.stop:
            self.begin()
        return case and {
            **case,
            "outcome": "crash" if code != -9 else "hang",
            "message": f"exit status {code}: {said[-300:]}",
            "where": "",
            "fault": True,
            "seconds": SILENT,
        }


def run(options: dict, start: int, cases: int, workers: int, hear) -> None:
    """Run the cases and call `hear` with each one's result, a dict."""
    crew = [Worker(options, start + i, start + cases, workers) for i in range(min(workers, cases))]
    try:
        while crew:
            ready, _, _ = select.select([w.pipe for w in crew], [], [], 1)
            for worker in list(crew):
                if worker.pipe not in ready:
                    if time.monotonic() - worker.heard > SILENT:
                        worker.process.kill()
                    continue
                lines = worker.lines()
                if lines is None:
                    more = worker.next < worker.stop
                    result = worker.ended()
                    if result:
                        hear(result)
                    if not more:
                        crew.remove(worker)
                    continue
                for line in lines:
                    if "outcome" in line:
                        hear({**worker.running, **line})
                        worker.running = None
                    else:
                        worker.running, worker.next = line, line["case"] + worker.step
    finally:
        for worker in crew:  # some are left only where the hearing failed or was interrupted
            worker.process.kill()
            worker.process.wait()


def kind_of(result: dict) -> tuple:
    """Faults of one kind differ in names and numbers only."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/._]\S*", "*", result["message"][:160])
    return result["target"], result["outcome"], result["where"].partition(" < ")[0], message


class Tally:
    """What was heard of the cases, and its printing."""

    def __init__(self, seed: int, show: bool, log: TextIO | None):
        self.seed, self.show, self.log = seed, show, log
        self.counts: collections.Counter = collections.Counter()
        self.kinds: dict[tuple, list[dict]] = {}
        self.slowest: list[dict] = []

    def hear(self, result: dict) -> None:
        """Count a case; print it if it is the first of its kind of fault, or all are shown."""
        self.counts[result["target"], result["outcome"], result["fault"]] += 1
        self.slowest = sorted([*self.slowest, result], key=lambda r: -r["seconds"])[:5]
        if self.log:
            print(json.dumps(result), file=self.log, flush=True)
        alike = self.kinds.setdefault(kind_of(result), []) if result["fault"] else []
        alike.append(result)
        if self.show or (result["fault"] and len(alike) == 1):
            print(f"case {result['case']}: {result['target']}, {'; '.join(result['damage'])}")
            print(
                f"  {result['outcome']}: {result['message'][:400]}\n  {result['where']}", flush=True
            )

    def sum_up(self) -> None:
        """Counts by program and outcome, the slowest cases, and every kind of fault."""
        for (target, outcome, fault), count in sorted(self.counts.items()):
            print(f"  {count:7} {target:16} {'FAULT ' if fault else ''}{outcome}")
        for r in self.slowest:
            damage = "; ".join(r["damage"])[:100]
            print(f"  slow: {r['seconds']:.2f} s, case {r['case']}, {r['target']}, {damage}")
        for alike in sorted(self.kinds.values(), key=len, reverse=True):
            r = alike[0]
            print(f"  {len(alike)} faults: {r['target']}: {r['outcome']}: {r['message'][:150]}")
            print(f"      {'; '.join(r['damage'])[:150]}")
            again = f"--seed {self.seed} --start {r['case']} --cases 1 --show"
            print(f"      python -m tests.fuzz {again}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="other damage under the same numbers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--target", choices=TARGETS, help="give every case to this one")
    parser.add_argument("--show", action="store_true", help="print every case, not only faults")
    parser.add_argument("--keep", help="leave the damaged folder of the last case here")
    parser.add_argument("--log", type=argparse.FileType("a"), help="append a JSON object a case")
    given = parser.parse_args(arguments)

    from fuzz.folders import build

    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    top, began = Path(tempfile.mkdtemp(prefix="slab-fuzz-", dir=room)), time.monotonic()
    tally = Tally(given.seed, given.show, given.log)
    try:
        build(top)
        options = {"top": str(top), "seed": given.seed, "target": given.target, "keep": given.keep}
        run(options, given.start, given.cases, given.workers, tally.hear)
    finally:
        shutil.rmtree(top)
    seconds = time.monotonic() - began
    print(f"{given.cases} cases from {given.start} on, seed {given.seed}, in {seconds:.0f} s")
    tally.sum_up()
    return 1 if tally.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
