"""Runs a few launches under compute-sanitizer.

    python -m on_gpu.sanitized memcheck|racecheck|synccheck CASE FILE
    python -m on_gpu.sanitized run CASE             (what the sanitizer watches)

rings    K of 33 blocks: every ring of every tile is filled and read several times over
small    K = 204, int4 without a sign term, bf16: what racecheck once complained about
many     the kernels for 17 tokens and more: every kind, several tiles of tokens, K to share

Everything but the launches happens on the CPU, since the sanitizer slows every kernel down.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from on_gpu import machine, plans, verdicts
from on_gpu.correct import faults, rebuilds
from on_gpu.rows import RESULTS, Row, Rows
from on_gpu.weights import DTYPES, Problem, Weight, problem
from slab_kernels.backends import cuda
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.backends.cuda.tiles import sizes_of

PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
CASES = {
    "rings": (
        Weight("fp16", "int4", 128, 1, 1, 4224, (70,)),
        Weight("bf16", "fp16", None, 2, 1, 4100, (33,)),
        Weight("fp16", "int8", 64, 1, 2, 4224, (70,)),
    ),
    "small": (Weight("bf16", "int4", 32, 0, 1, 204, (149,)),),
    "many": (
        Weight("fp16", "int4", 128, 1, 1, 1100, (300,), 20),
        Weight("bf16", "fp16", None, 0, 1, 1100, (140, 30)),
        Weight("fp16", "int8", 64, 3, 2, 516, (70,)),
    ),
}
TOKENS = {"rings": (1, 4, 12), "small": (1, 4, 12), "many": (33, 129)}
RIGHT = "every result is right"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*")
KEPT_LINES = 60  # of what the sanitizer says


def moved(it: Problem, device: str) -> Problem:
    """The same problem with activations and bias on the device, results where they are."""
    return it._replace(x=it.x.to(device), bias=it.bias.to(device))


def launches(case: str, device: CudaDevice, where: str) -> Iterator[tuple[str, list[str]]]:
    """Every tile at some token counts, and what is wrong with its result.

    where: of the tensors, "cuda".
    """
    tokens, every = TOKENS[case], plans.many if case == "many" else plans.every
    for weight in CASES[case]:
        it = problem(weight, "cpu", max(tokens))
        state = cuda.layout.prepare(it.parts, DTYPES[weight.dtype])
        state = type(state)(*(t.to(where) if torch.is_tensor(t) else t for t in state))
        it, linear = moved(it, where), plans.linear_on(device)

        def run(x: Tensor, state: object, bias: Tensor | None, linear=linear) -> Tensor:
            return linear(x, state, bias).cpu()

        for M in tokens:
            for plan in every(sizes_of(state), M, device.gpu):
                exact = not it.rounded or not rebuilds(plan)
                with plans.forced(plan):
                    found = faults(weight, it, state, run, (M,), lambda _, exact=exact: exact)
                yield f"{weight}, M={M}: {plans.in_words(plan)}", found


def watched(case: str) -> int:
    wrong, (where, device) = [], machine.here()
    for name, found in launches(case, device, where):
        wrong += [f"{name}: {fault}" for fault in found]
    print("\n".join(wrong) or RIGHT)
    return 1 if wrong else 0


def result(tool: str, case: str, code: int, said: str) -> Row:
    """A row of what the sanitizer said."""
    found = SUMMARY.findall(said)
    return {
        "case": f"{tool} {case}",
        "code": code,
        "errors": int(found[-1]) if found else None,
        "right": RIGHT in said,
        "said": [line for line in said.splitlines() if line.strip()][-KEPT_LINES:],
    }


def main(tool: str, case: str, file: str = "") -> int:
    if tool == "run":
        return watched(case)
    sanitizer = next(filter(None, map(shutil.which, PLACES)), None)
    if sanitizer is None:
        verdicts.Verdict("compute-sanitizer is not here, nothing was checked", True).say()
        return 0
    # torch asks for what a device may lack, and memcheck would count that.
    more = ["--report-api-errors", "no"] if tool == "memcheck" else []
    inner = [sys.executable, "-m", "on_gpu.sanitized", "run", case]
    # Without torch's cache every tensor is an allocation of its own, with ends that memcheck knows.
    done = subprocess.run(
        [sanitizer, "--tool", tool, *more, "--error-exitcode", "9", *inner],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    row = result(tool, case, done.returncode, done.stdout)
    print("\n".join(row["said"]))
    Rows(Path(file), machine.head(), (RESULTS,)).add(row)
    verdict = verdicts.sanitizer(row)
    verdict.say()
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
