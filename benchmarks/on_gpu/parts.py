"""The parts of `benchmarks/on_gpu.sh`, in order of worth, each with its command and time limit."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = "ON_GPU_SECONDS"  # the variable that tells a part its limit
AGAIN = "ON_GPU_AGAIN"  # the variable by which a part forgets what an earlier call found
MARGIN = 10.0  # seconds before it at which a part that can end itself does
OUT_OF_TIME = 3  # exit code of a part that ended by itself before it was through
KERNELS = "kernels"  # the part that those with CUDA kernels need


@dataclass(frozen=True)
class Part:
    """A process of its own, which may fail or hang without harm to the others.

    It prints what it is about, and its verdict as lines that begin with "verdict: ", of which the
    last one counts. Its exit code is 0 if all is well, OUT_OF_TIME if another call has to go on,
    and another one if it failed.
    """

    name: str
    what: str  # in words
    command: Sequence[str]
    limit: float  # seconds
    least: float  # It is not begun with fewer seconds left.
    needs: str = ""  # the part without which it is not begun: it must be done in the same call
    every_call: bool = False  # It is run even if an earlier call finished it.


def seconds_here() -> float:
    """How long this process, a part, may go on; without a runner as long as it likes."""
    return float(os.environ.get(SECONDS, "inf")) - MARGIN


def deadline() -> float:
    """The time.monotonic() at which this process, a part that begins now, ends by itself."""
    return time.monotonic() + seconds_here()


def begins_anew() -> bool:
    """Whether this process, a part, forgets what an earlier call found."""
    return bool(os.environ.get(AGAIN))


def exit_code(whole: bool, good: bool) -> int:
    """That of a part. whole: whether it is through."""
    if not whole:
        return OUT_OF_TIME
    return 0 if good else 1


def program(name: str, *arguments: object) -> list[str]:
    """The command of a file of this package, which finds it by the PYTHONPATH of on_gpu.sh."""
    return [sys.executable, "-m", f"on_gpu.{name}", *map(str, arguments)]


def parts(out: Path, stem: str) -> list[Part]:
    """All parts, in order.

    out: the folder of the result files. stem: device and commit, which their names hold.
    """

    def file(kind: str, ending: str = "json") -> Path:
        return out / f"{kind}-{stem}.{ending}"

    # Some share a file: with the summary a lent machine gives no more than eight back.
    correct, hardware, plans = file("correct"), file("hardware"), file("plans", "csv")
    return [
        # Both are kernels of their own, which NVRTC compiles in seconds.
        Part(
            "hardware",
            "wgmma, tensor maps and multicast do what the interpreter says",
            program("hardware", hardware),
            40,
            15,
        ),
        Part(
            "unknowns",
            "the shared-memory port, look-ups and issue, each by itself",
            program("unknowns", hardware),
            30,
            15,
        ),
        # NVRTC compiles all kernels in one call, and keeps nothing if that is stopped; nvcc took
        # five minutes of a core for five architectures and PTX. Each call may be on a fresh
        # machine, which has no cache.
        Part(KERNELS, "machine code of every kernel", program("kernels"), 300, 30, every_call=True),
        Part(
            "right",
            "every CUDA kernel for 17 tokens and more is right",
            program("correct", "many", correct),
            90,
            30,
            KERNELS,
        ),
        Part(
            "many",
            "four shapes at 17 to 4096 tokens beside dense and other libraries",
            program("many", file("many")),
            150,
            40,
            KERNELS,
        ),
        Part(
            "sweep-many",
            "plans for 32 tokens and more of those shapes, for benchmarks/fit_plans.py",
            program("sweep", "many", plans),
            80,
            40,
            KERNELS,
        ),
        Part(
            "cuda",
            "every CUDA kernel for up to 16 tokens is right",
            program("correct", "cuda", correct),
            60,
            20,
            KERNELS,
        ),
        Part(
            "triton",
            "every Triton kernel for up to 16 tokens is right",
            program("correct", "triton", correct),
            80,
            30,
        ),
        Part(
            "causes",
            "start, loop, warps and overlap timed apart, beside the prediction",
            program("causes", file("causes")),
            60,
            30,
            KERNELS,
        ),
        Part(
            "decode",
            "four shapes at 1, 4 and 16 tokens beside dense and other libraries",
            program("decode", file("linear")),
            150,
            40,
            KERNELS,
        ),
        Part(
            "sweep",
            "every tile of those shapes, for benchmarks/fit_plans.py",
            program("sweep", "few", plans),
            100,
            40,
            KERNELS,
        ),
        Part("tests", "pytest -m gpu", program("pytests", file("tests")), 120, 40, KERNELS),
        *(
            Part(
                f"{tool}-{case}",
                f"compute-sanitizer --tool {tool} on {what}",
                program("sanitized", tool, case, correct),
                60,
                30,
                KERNELS,
            )
            for case, what in (
                ("rings", "rings that are used many times"),
                ("small", "K = 204, int4, rank 0, bf16"),
                ("many", "the kernels for 17 tokens and more"),
            )
            for tool in ("memcheck", "racecheck", "synccheck")[: 3 if case == "many" else 2]
        ),
    ]
