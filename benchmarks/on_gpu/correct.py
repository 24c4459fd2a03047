"""Whether the kernels give the right results, by the reference in fp64.

    python -m on_gpu.correct cuda|many|triton FILE

cuda is the CUDA backend's kernels for up to 16 tokens, many those for 17 and more. Small integers
must come out bit for bit, but where a kernel rebuilds a weight that the activations' type cannot
hold; random numbers within the bound that follows from the types. Up to 64 tokens a token's result
must have the same bits whatever the number of tokens, and of more the same in every call. The CUDA
backend runs every tile of every loop, the Triton backend what it chooses. Every wrong case is
named.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from on_gpu import machine, plans, verdicts
from on_gpu.parts import AGAIN, MARGIN, SECONDS, begins_anew, deadline, exit_code
from on_gpu.rows import RESULTS, Row, Rows
from on_gpu.weights import (
    DTYPES,
    MANY_TOKENS,
    TOKENS,
    Problem,
    Weight,
    large,
    many,
    problem,
    small,
)
from slab_kernels.backends import cuda, dispatch
from slab_kernels.backends.cuda import prefill
from slab_kernels.backends.cuda.cost import Plan, Rebuild, rebuild
from slab_kernels.backends.cuda.device import CudaDevice
from slab_kernels.backends.cuda.gpus import Gpu
from slab_kernels.backends.cuda.launch import kernel_names
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.backends.cuda.plan import choose
from slab_kernels.backends.cuda.tiles import FEW, REBUILD, CudaSizes, sizes_of
from slab_kernels.bench.correctness import tolerance

Linear = Callable[[Tensor, object, Tensor | None], Tensor]
FEW_TOKENS = re.compile(r"narrow_|wide_|adapter_\w+_t16")  # kernels for up to 16 tokens
# Those for more, but for what only adds sums up.
MORE_TOKENS = re.compile(
    r"(linear|tall|planes|rebuild|dense)_|prefill_(?!reduce)|adapter_\w+_t(32|64)"
)
# A kernel of Triton takes seconds to compile: several processes do it, for every eighth weight. No
# common divisor with the numbers of SIZES and of SIGNS: otherwise the same few would be met again.
PROCESSES = 12
TRITON_EVERY = 8


def wrong(weight: Weight, it: Problem, M: int, y: Tensor, exact_sums: bool = True) -> str | None:
    """What is wrong with y, the result of M tokens, or None.

    exact_sums: whether integers come out bit for bit.
    """
    exact, magnitude = it.exact[:M], it.magnitude[:M]
    if tuple(y.shape) != (M, sum(weight.rows)) or y.dtype != it.x.dtype:
        return f"the result is {list(y.shape)} {y.dtype}"
    if not bool(y.isfinite().all()):
        return f"{int((~y.isfinite()).sum())} of {y.numel()} entries are not finite"
    y = y[:, -exact.shape[1] :]
    off = (y.double() - exact).abs()
    if weight.integers and exact_sums:
        bad = y != exact.to(y.dtype)
    else:
        bad = off > tolerance(magnitude, exact, y.dtype, weight.K, rounds=True)
    if not bool(bad.any()):
        return None
    token, row = (int(at) for at in bad.nonzero()[0])
    return (
        f"{int(bad.sum())} of {y.numel()} entries, the first at token {token}, row {row}: "
        f"{float(y[token, row])} instead of {float(exact[token, row])}"
    )


class Broken(Exception):
    """The device answers nothing more to this process, as after an illegal access."""


def faults(
    weight: Weight,
    it: Problem,
    state: object,
    linear: Linear,
    tokens: Iterable[int],
    exact_sums: Callable[[int], bool] = lambda M: True,
) -> list[str]:
    """What is wrong at which token counts, when a weight is run in one way.

    exact_sums: as of `wrong`, for each token count.

    Raises: Broken, with the last fault, if nothing more can be run.
    """
    found: list[str] = []
    before: Tensor | None = None
    for M in tokens:
        try:
            y = linear(it.x[:M], state, it.bias)
            again = linear(it.x[:M], state, it.bias) if M > FEW else y
            if y.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            found.append(f"M={M}: {type(error).__name__}: {' '.join(str(error).split())}")
            if it.x.is_cuda and _broken():
                raise Broken("; ".join(found)) from error
            continue
        if fault := wrong(weight, it, M, y, exact_sums(M)):
            found.append(f"M={M}: {fault}")
        elif not _same_bits(y, again):
            found.append(f"M={M}: a second call has another result")
        elif M > FEW:
            continue
        elif before is not None and not _same_bits(y[: before.shape[0]], before):
            found.append(f"M={M}: a token's result depends on how many there are")
        else:
            before = y
    return found


def _broken() -> bool:
    """Whether the device answers nothing more to this process, as after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def poison() -> None:
    """Outputs begin as NaN from now on, so that an entry that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def cuda_outcome(weight: Weight, device: CudaDevice, where: str, which: str = "cuda") -> Row:
    """The plan that is chosen and every tile of a weight, each at all token counts that it serves.

    where: of the tensors, "cuda", or "cpu" for a device that is emulated. which: a key of SPANS.
    """
    poison()
    span = SPANS[which]
    tokens = span.tokens()
    it = problem(weight, where, max(tokens))
    state = cuda.layout.prepare(it.parts, DTYPES[weight.dtype])
    sizes = sizes_of(state)
    seen: list[str] = []
    linear = plans.linear_on(plans.recorded(device, seen))
    ways: dict[str, dict[int, plans.AnyPlan | Rebuild]] = {}
    for M in tokens:
        for plan in span.every(sizes, M, device.gpu):
            ways.setdefault(plans.way(plan), {})[M] = plan
        if M > FEW:
            ways.setdefault("the weight rebuilt for cuBLAS", {})[M] = rebuild(sizes, M, device.gpu)
    row: Row = {"case": f"{which} {weight}", "ways": 1 + len(ways), "wrong": []}

    def exactly(plan: plans.AnyPlan | Rebuild) -> bool:
        return not isinstance(plan, Rebuild) and not (it.rounded and rebuilds(plan))

    try:
        of_chosen = {M: exactly(choose(sizes, M, device.gpu)) for M in tokens}
        found = faults(weight, it, state, linear, tokens, of_chosen.__getitem__)
        row["wrong"] += [f"chosen, {fault}" for fault in found]
        for way, served in ways.items():

            def run(x: Tensor, state: object, bias: Tensor | None, served=served) -> Tensor:
                with plans.forced(served[x.shape[0]]):
                    return linear(x, state, bias)

            of_way = {M: exactly(plan) for M, plan in served.items()}
            found = faults(weight, it, state, run, served, of_way.__getitem__)
            row["wrong"] += [f"{way}, {each}" for each in found]
    except Broken as error:
        row |= {"wrong": [*row["wrong"], str(error)], "broken": True}
    names = kernel_names(sizes, state.dtype, device.gpu)
    may_use = [name for name in names if span.kernels.match(name)]
    return row | {"kernels": sorted(set(seen)), "may_use": may_use}


def rebuilds(plan: plans.AnyPlan) -> bool:
    """Whether the kernel multiplies by a weight that it has rounded to the activations' type."""
    return plan.tile.loop == REBUILD if isinstance(plan, Plan) else plan.kind == prefill.REBUILD


class Span(NamedTuple):
    """Numbers of tokens, what is run for them, and the kernels that are for them."""

    tokens: Callable[[], Sequence[int]]
    every: Callable[[CudaSizes, int, Gpu], Sequence[plans.AnyPlan]]
    weights: Callable[[], Iterable[Weight]]
    kernels: re.Pattern[str]


SPANS = {  # What tests put in place of these functions is found when they are called.
    "cuda": Span(
        lambda: TOKENS, lambda *of: plans.every(*of), lambda: [*small(), *large()], FEW_TOKENS
    ),
    "many": Span(lambda: MANY_TOKENS, lambda *of: plans.many(*of), lambda: many(), MORE_TOKENS),
}


def triton_outcome(weight: Weight, where: str) -> Row:
    """A weight on the Triton backend, and what it warned of: that it fell back, for instance."""
    poison()
    it, backend = problem(weight, where), dispatch.backend("triton")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = backend.prepare_fused(list(it.parts), DTYPES[weight.dtype])
        try:
            found, broken = faults(weight, it, state, backend.linear_fused, TOKENS), False
        except Broken as error:
            found, broken = [str(error)], True
    warned = {" ".join(str(each.message).split()) for each in said if "triton" in str(each.message)}
    if not isinstance(state, CudaState):
        warned.add("the plain kernels ran, not those of the stream")
    row = {"case": f"triton {weight}", "ways": 1, "wrong": found, "warned": sorted(warned)}
    return row | ({"broken": True} if broken else {})


def triton_weights() -> list[Weight]:
    """Fewer weights than the CUDA kernels get: all large ones, which take longest, first."""
    chosen = [weight for weight in small() if weight.values != "int3"]
    return [*large(), *chosen[::TRITON_EVERY]]


def run_cuda(which: str, rows: Rows, end: float) -> bool:
    """Whether all weights were run until `end`, a time.monotonic(). which: a key of SPANS."""
    where, device = machine.here()
    for weight in SPANS[which].weights():
        if rows.has(f"{which} {weight}"):
            continue
        if time.monotonic() > end:
            return False
        print(f"{which} {weight}")
        row = cuda_outcome(weight, device, where, which)
        rows.add(row)
        if "broken" in row:
            # The fresh process leaves out the cases whose rows are in the file already.
            print(f"{row['case']} left the device unusable; a fresh process goes on", flush=True)
            os.environ |= {AGAIN: "", SECONDS: str(end - time.monotonic() + MARGIN)}
            os.execv(sys.executable, [sys.executable, "-m", "on_gpu.correct", *sys.argv[1:]])
    return True


class Worker:
    """A process for one weight after another; a fresh one where the last left it unusable."""

    def __init__(self) -> None:
        self.process: ProcessPoolExecutor | None = None

    def outcome(self, weight: Weight, where: str) -> Row:
        """`triton_outcome`, or what is wrong if it ends without one: the weight could not be
        prepared, or the process died."""
        if self.process is None:
            self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            row = self.process.submit(triton_outcome, weight, where).result()
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            row = {"case": f"triton {weight}", "ways": 1, "wrong": [said], "broken": True}
        if "broken" in row:
            self.process.shutdown(wait=False)
            self.process = None
        return row


def run_triton(rows: Rows, end: float) -> bool:
    """Whether all weights were run until `end`, a time.monotonic()."""
    where, _ = machine.here()
    todo = [weight for weight in triton_weights() if not rows.has(f"triton {weight}")]
    threads, mine = ThreadPoolExecutor(PROCESSES), threading.local()

    def outcome(weight: Weight) -> Row:
        if not hasattr(mine, "worker"):
            mine.worker = Worker()
        return mine.worker.outcome(weight, where)

    jobs = [threads.submit(outcome, weight) for weight in todo]
    try:
        for job in as_completed(jobs, min(end - time.monotonic(), threading.TIMEOUT_MAX)):
            row = job.result()
            print(row["case"])
            rows.add(row)
    except TimeoutError:
        return False
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return True


def main(backend: str, file: str) -> int:
    end, rows, whole = deadline(), Rows(Path(file), machine.head(), (RESULTS,)), False
    if begins_anew():
        rows.forget(f"{backend} ")
    try:
        whole = run_triton(rows, end) if backend == "triton" else run_cuda(backend, rows, end)
    finally:
        rows.save()
        mine = [row for row in rows.rows if row["case"].startswith(f"{backend} ")]
        verdict = verdicts.correctness(mine)
        verdict.say()
    return exit_code(whole, verdict.good)


if __name__ == "__main__":
    # Without Python's own end, which would wait for what still compiles.
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
