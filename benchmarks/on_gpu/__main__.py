"""Checks and times the kernels on this machine's GPU, in parts, in order of worth.

Each part is a process with a time limit. Its rows and a line of verdict are on disk before the next
one begins, and one that fails or hangs does not stop the others; only where `kernels` is not done,
those that run CUDA kernels are not begun. A second call goes on where the first was stopped: it
leaves out what was finished on the same device and commit, but for `kernels`, since its machine may
have no cache of them. Nothing is downloaded; CUDA kernels that were not built ahead of time are
compiled by NVRTC. Where there is no git, the variable ON_GPU_COMMIT may name the commit.

Exit code: 0 if every part is done, 1 if one failed or ran out of time, 2 if there is nothing to run
on, 3 if nothing failed but the time was too short for some parts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from on_gpu import machine, runner
from on_gpu.parts import Part, parts
from on_gpu.rows import RESULTS

PROBE_SECONDS = 90
LIMIT = 580.0  # seconds: a call is over within ten minutes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in parts(RESULTS, "")]
    parser = argparse.ArgumentParser(
        prog="benchmarks/on_gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"with those that it needs; default: all of {', '.join(names)}",
    )
    parser.add_argument("--again", action="store_true", help="all of it, from its beginning")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for all parts together")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or RESULTS),
        help="folder of the results; default: $OUT, else benchmarks/results. "
        "Earlier results are also looked for in benchmarks/results",
    )
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in names]:
        parser.error(f"no part {', '.join(unknown)}; choose from {', '.join(names)}")
    return args


def probe() -> dict[str, object]:
    """What on_gpu.machine says, or {"reason": why it says nothing}."""
    command = [sys.executable, "-m", "on_gpu.machine"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"reason": f"torch does not answer within {PROBE_SECONDS} s; see nvidia-smi"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        said = " ".join(done.stderr.split()[-40:])
        return {"reason": f"{' '.join(command[1:])} ended with code {done.returncode}: {said}"}


def choice(every: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts of those names and those that they need, in order; without names all."""
    needed = {part.needs for part in every if part.name in names}
    return [part for part in every if not names or part.name in names or part.name in needed]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    found = probe()
    if "reason" in found:
        print(f"on_gpu: {found['reason']}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    stem = machine.stem(found)
    chosen = choice(parts(args.out, stem), args.parts)
    title = machine.title(found)
    summary = runner.Summary(args.out / f"on-gpu-{stem}.txt", title, (RESULTS,))
    print(title)
    code = runner.run_all(chosen, summary, args.seconds, args.again)
    print(f"\n{summary.path}\n{summary.path.read_text(encoding='utf-8')}", end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
