"""The fused linears of Llama-3-8B at 17 to 4096 tokens: CUDA beside cuBLAS and other libraries.

    python -m on_gpu.many FILE

Each row is as `slab_kernels.bench.linear` has it, in units as those of `decode`: of one shape and
value type, with signs or without, with a dense copy of the weight or without. Peers are cuSPARSELt
by torch's own 2:4 linear, Marlin, Machete, gemlite and Humming, as far as they are installed. The
file is one that `slab-kernels report` reads.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from on_gpu import decode, machine, verdicts_many
from on_gpu.parts import begins_anew, deadline, exit_code
from on_gpu.rows import RESULTS, Rows
from slab_kernels.bench import linear, peers
from slab_kernels.bench import machine as whole_machine
from slab_kernels.bench.clocks import clock_of
from slab_kernels.bench.layer_shapes import layers

TOKENS = (17, 32, 64, 128, 256, 512, 1024, 2048, 4096)
VALUES = ("int4", "fp16", "int8")
SECONDS = 0.01  # that a row is timed at least
# rank, prefill: what the goals ask for most comes first.
WAYS = ((1, "packed"), (0, "packed"), (1, "dense"))


class Unit(NamedTuple):
    """Rows that are measured together."""

    n: int
    k: int
    values: str  # empty for other libraries, all of which are one unit
    rank: int = 1
    prefill: str = "packed"

    @property
    def case(self) -> str:
        if not self.values:
            return f"{self.n}x{self.k} others"
        return f"{self.n}x{self.k} {self.values} rank {self.rank} {self.prefill}"

    def linear(self, tokens: Sequence[int], device: str) -> linear.Case:
        """What to measure. Dense is in each unit, so that its rows are of the same minute."""
        return linear.Case(
            self.n,
            self.k,
            tokens=tokens,
            values=(self.values,) if self.values else (),
            dtype="fp16",
            device=device,
            rank=self.rank,
            backends=("cuda",),
            min_seconds=SECONDS,
            peers=not self.values,
            prefill=self.prefill if self.values else None,
        )


def units() -> list[Unit]:
    """One shape after another for each way and value type; other libraries behind the first way."""
    shapes = layers(decode.MODEL)
    ours = [
        [Unit(n, k, values, *way) for values, (n, k) in itertools.product(VALUES, shapes)]
        for way in WAYS
    ]
    others = [Unit(n, k, "") for n, k in shapes]
    return [*ours[0], *others, *itertools.chain(*ours[1:])]


def main(file: str) -> int:
    end, whole = deadline(), False
    device, found = machine.here()
    rows = Rows(Path(file), machine.head(), (RESULTS,))
    if begins_anew():
        rows.forget()
    rows.save(machine=whole_machine.information(), peers=peers.versions())
    try:
        clock = clock_of(device, SECONDS)
        whole = decode.measure(rows, clock, device, found.gpu, end, units(), TOKENS)
    finally:
        verdict = verdicts_many.many(rows.rows, rows.more.get("failed", {}))
        rows.save(verdicts=[*verdict.text.split("; "), *verdict.details])
        verdict.say()
    # A missed goal is a finding; what could not be measured is a failure.
    return exit_code(whole, bool(rows.rows) and not rows.more["failed"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
