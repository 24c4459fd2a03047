"""The fused linears of Llama-3-8B at 1, 4 and 16 tokens: CUDA and Triton beside others.

    python -m on_gpu.decode FILE

Each row is as `slab_kernels.bench.linear` has it, in units of one shape, value type and backend, so
that one that fails or hangs takes only its own rows along. The rows of the CUDA backend also tell
what the cost model predicted. The file is one that `slab-kernels report` reads.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from on_gpu import machine, verdicts
from on_gpu.parts import begins_anew, deadline, exit_code
from on_gpu.rows import RESULTS, Row, Rows
from slab_kernels.backends.cuda.cost import dense_microseconds
from slab_kernels.backends.cuda.gpus import Gpu
from slab_kernels.backends.cuda.layout import STREAM_VALUES
from slab_kernels.backends.cuda.plan import choose, takes_dense
from slab_kernels.backends.cuda.tiles import CudaSizes
from slab_kernels.bench import linear, peers
from slab_kernels.bench import machine as whole_machine
from slab_kernels.bench.clocks import Clock, clock_of
from slab_kernels.bench.layer_shapes import layers

MODEL = "llama-3-8b"
TOKENS = (1, 4, 16)
VALUES = ("int4", "int8", "fp16")
BACKENDS = ("cuda", "triton")
SECONDS = 0.02  # that a row is timed at least


class Unit(NamedTuple):
    """Rows that are measured together."""

    n: int
    k: int
    values: str  # empty for other libraries, all of which are one unit
    backend: str

    @property
    def case(self) -> str:
        return f"{self.n}x{self.k} {self.values} {self.backend}".replace("  ", " ")

    def linear(self, tokens: Sequence[int], device: str) -> linear.Case:
        """What to measure. Dense is in each unit, so that its rows are of the same minute."""
        return linear.Case(
            self.n,
            self.k,
            tokens=tokens,
            values=(self.values,) if self.values else (),
            dtype="fp16",
            device=device,
            backends=(self.backend,),
            min_seconds=SECONDS,
            peers=not self.values,
        )


def units() -> list[Unit]:
    """Our kernels first, those that the goals ask for most before the others."""
    ours = [
        Unit(n, k, values, backend)
        for values, (n, k), backend in itertools.product(VALUES, layers(MODEL), BACKENDS)
    ]
    return [*ours, *(Unit(n, k, "", "others") for n, k in layers(MODEL))]


class AnyUnit(Protocol):
    """`Unit`, or that of another part."""

    @property
    def case(self) -> str: ...

    def linear(self, tokens: Sequence[int], device: str) -> linear.Case: ...


def rows_of(
    unit: AnyUnit, clock: Clock, device: str, gpu: Gpu, tokens: Sequence[int] = TOKENS
) -> list[Row]:
    """The rows of a unit.

    Raises: what `linear.measure` raises, such as BenchError for wrong results.
    """
    found = linear.measure(unit.linear(tokens, device), clock)
    for name, reason in found.absent.items():
        print(f"{unit.case} without {name}: {reason}")
    rows = [{"case": unit.case, "model": MODEL, **row} for row in found.rows]
    for row in rows:
        if row["backend"] == "cuda":
            row["predicted_us"] = predicted(row, gpu)
    return rows


def predicted(row: Row, gpu: Gpu) -> float:
    """The cost model's microseconds for the cell of a row."""
    values, steps = STREAM_VALUES[row["values"]], (row["group_size"] or 128) // 32
    sizes = CudaSizes(row["k"], (row["n"],), values, steps, row["rank"], 0)
    if row.get("prefill") == "dense" and takes_dense(sizes, row["m"], gpu):
        return dense_microseconds(row["n"], row["k"], row["m"], gpu)
    return choose(sizes, row["m"], gpu).microseconds


def measure(
    rows: Rows,
    clock: Clock,
    device: str,
    gpu: Gpu,
    end: float,
    some: Sequence[AnyUnit] | None = None,
    tokens: Sequence[int] = TOKENS,
) -> bool:
    """All units that the file neither has nor names as failed.

    some: default `units`.

    Returns whether all were measured until `end`, a time.monotonic().
    """
    failed = rows.more.setdefault("failed", {})
    for unit in units() if some is None else some:
        if rows.has(unit.case) or unit.case in failed:
            continue
        if time.monotonic() > end:
            return False
        print(unit.case)
        try:
            rows.add(*rows_of(unit, clock, device, gpu, tokens))
        except Exception as error:
            failed[unit.case] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            rows.save()
    return True


def main(file: str) -> int:
    end, whole = deadline(), False
    device, found = machine.here()
    rows = Rows(Path(file), machine.head(), (RESULTS,))
    if begins_anew():
        rows.forget()
    rows.save(machine=whole_machine.information(), peers=peers.versions())
    try:
        whole = measure(rows, clock_of(device, SECONDS), device, found.gpu, end)
    finally:
        verdict = verdicts.decode(rows.rows, rows.more.get("failed", {}))
        rows.save(verdicts=[*verdict.text.split("; "), *verdict.details])
        verdict.say()
    # A missed goal is a finding; what could not be measured is a failure.
    return exit_code(whole, bool(rows.rows) and not rows.more["failed"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
