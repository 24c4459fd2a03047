"""`python -m tests.fuzz`: runs cases in worker processes and counts how they ended; exit code 1 if one ended wrong."""

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

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
SILENT = 90  # seconds without a word after which a worker is ended: its case hangs where no signal reaches it
RECYCLED = 4000  # cases after which a worker starts anew, so that memory lost by others does not add up


class Worker:
    """A process with every `step`-th case from `start` on; started again behind a case that ended it."""

    def __init__(self, options: dict, start: int, stop: int, step: int):
        self.options, self.next, self.stop, self.step = options, start, stop, step
        self.running: dict | None = None
        self.begin()

    def begin(self) -> None:
        end = min(self.stop, self.next + RECYCLED * self.step)
        read, write = os.pipe()
        given = json.dumps({**self.options, "start": self.next, "stop": end, "step": self.step})
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent))))
        command = ["/bin/sh", "-c", f'exec "$0" "$@" 3>&{write} {write}>&-', sys.executable, "-m", "fuzz.worker", given]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors, pass_fds=(write,), env=environment)
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
        """After the end of the process: the result of the case that ended it, if one did; goes on behind it."""
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
        return case and {**case, "outcome": "crash" if code != -9 else "hang", "message": f"exit status {code}: {said[-300:]}", "where": "", "fault": True, "seconds": SILENT}


def run(options: dict, start: int, cases: int, workers: int, hear) -> None:
    """Run the cases and call `hear` with each one's result, a dict."""
    crew = [Worker(options, start + i, start + cases, workers) for i in range(min(workers, cases))]
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


def kind_of(result: dict) -> tuple:
    """Faults of one kind differ in names and numbers only."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/._]\S*", "*", result["message"][:160])
    return result["target"], result["outcome"], result["where"].partition(" < ")[0], message


def command(result: dict, seed: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --start {result['case']} --cases 1 --show"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="other damage under the same numbers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--target", choices=["load", "inspect", "from_pretrained", "decompress", "eval", "check"], help="give every case to this one")
    parser.add_argument("--show", action="store_true", help="print every case and not only the faults")
    parser.add_argument("--keep", type=Path, help="leave the damaged folder of the last case here")
    parser.add_argument("--log", type=Path, help="append every case to this file, one JSON object a line")
    given = parser.parse_args(arguments)

    from fuzz.folders import build

    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    top = Path(tempfile.mkdtemp(prefix="slab-fuzz-", dir=room))
    began, results, kinds = time.monotonic(), collections.Counter(), {}
    slowest: list[dict] = []
    log = given.log.open("a", encoding="utf-8") if given.log else None

    def hear(result: dict) -> None:
        results[result["target"], result["outcome"], result["fault"]] += 1
        slowest.append(result)
        slowest.sort(key=lambda r: -r["seconds"])
        del slowest[5:]
        if log:
            print(json.dumps(result), file=log, flush=True)
        signature = kind_of(result)
        if result["fault"]:
            kinds.setdefault(signature, []).append(result)
        if given.show or result["fault"] and len(kinds[signature]) == 1:
            print(f"case {result['case']}: {result['target']}, {'; '.join(result['damage'])}\n  {result['outcome']}: {result['message'][:400]}")
            print(f"  {result['where']}\n  {command(result, given.seed)}" if result["fault"] else f"  {result['where']}", flush=True)

    try:
        build(top)
        options = {"top": str(top), "seed": given.seed, "target": given.target, "keep": str(given.keep) if given.keep else None}
        run(options, given.start, given.cases, given.workers, hear)
    finally:
        shutil.rmtree(top)
    seconds = time.monotonic() - began
    print(f"{sum(results.values())} cases from {given.start} on, seed {given.seed}, in {seconds:.0f} s")
    for (target, outcome, fault), count in sorted(results.items()):
        print(f"  {count:7} {target:16} {'FAULT ' if fault else ''}{outcome}")
    for result in slowest:
        print(f"  slow: {result['seconds']:.2f} s, case {result['case']}, {result['target']}, {'; '.join(result['damage'])[:100]}")
    for found in sorted(kinds.values(), key=len, reverse=True):
        first = found[0]
        print(f"  {len(found)} faults: {first['target']}: {first['outcome']}: {first['message'][:150]}\n      {'; '.join(first['damage'])[:150]}\n      {command(first, given.seed)}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
