"""Times plans, for `benchmarks/fit_plans.py`.

    python -m on_gpu.sweep few|many FILE.csv

few are those of the narrow and the wide loop, many those of all kernels for 17 tokens and more.
The file has the columns that `fit_plans.py` reads, and no row that was not timed whole. A second
call goes on behind the rows that it finds.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from fit_plans import how
from plan_rows import CHOICES, COLUMNS

from on_gpu import plans, verdicts
from on_gpu.causes import Stand, stand_here
from on_gpu.decode import MODEL, TOKENS, VALUES
from on_gpu.parts import begins_anew, deadline, exit_code
from on_gpu.rows import RESULTS
from slab_kernels.backends.cuda.cost import Plan
from slab_kernels.backends.cuda.measured import PREFILL_LOOPS
from slab_kernels.backends.cuda.plan import choose, residencies
from slab_kernels.backends.cuda.tiles import LOOPS, CudaSizes, sizes_of
from slab_kernels.bench.layer_shapes import layers

MANY_TOKENS = (32, 64, 128, 256, 512, 2048)
MOST = 18  # plans of a linear and token count
MOST_OF_KIND = 4  # of a family of kernels for many tokens
NUMBERS = ("n", "k", "values", "m", "route", "loop", *CHOICES)


def candidates(sizes: CudaSizes, M: int, stand: Stand) -> list[Plan]:
    """Plans for M tokens: the one that the model takes, the best of each way of splitting K, then
    those that the model likes best."""
    gpu = stand.device.gpu
    found = [
        each
        for plan in plans.every(sizes, M, gpu)
        for each in residencies(sizes, M, gpu, plan.tile, plan.tokens, plan.splits)
    ]
    found.sort(key=lambda plan: plan.microseconds)
    best: dict[tuple, Plan] = {}
    for plan in found:
        best.setdefault((plan.tile.warp_inputs, plan.splits), plan)
    own = choose(sizes, M, gpu, by_rows=False)
    return list(dict.fromkeys([own, *best.values(), *found]))[:MOST]


def many_candidates(sizes: CudaSizes, M: int, stand: Stand) -> list[plans.AnyPlan]:
    """Plans for M tokens, M above 16: of each family of kernels those that the model likes best,
    with the one that it takes.

    A file has no rank: a weight without signs is there for Hopper's kernel of kept pairs alone.
    """
    by_family: dict[str, list[plans.AnyPlan]] = defaultdict(list)
    for plan in plans.many(sizes, M, stand.device.gpu):
        family = plan.tile.loop if isinstance(plan, Plan) else plan.loop
        if sizes.rank or family == "prefill_one":
            by_family[family].append(plan)
    best = [
        each
        for some in by_family.values()
        for each in sorted(some, key=lambda plan: plan.microseconds)[:MOST_OF_KIND]
    ]
    return sorted(best, key=lambda plan: plan.microseconds)


def chosen(plan: plans.AnyPlan, values: str) -> dict[str, object]:
    """The columns that say which plan it is."""
    return {
        "n": plan.sizes.N,
        "k": plan.sizes.K,
        "values": values,
        "m": plan.M,
        "route": "fused",
        "loop": plan.tile.loop if isinstance(plan, Plan) else plan.loop,
        **dict(zip(CHOICES, how(plan), strict=True)),
    }


class Sweep(NamedTuple):
    """What is timed."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]  # of the sign term
    candidates: Callable[[CudaSizes, int, Stand], list]


SWEEPS = {
    "few": Sweep(TOKENS, (1,), candidates),
    "many": Sweep(MANY_TOKENS, (1, 0), many_candidates),
}


def measure(
    sweep: Sweep, stand: Stand, done: Iterable[Mapping[str, str]]
) -> Iterator[dict[str, object]]:
    """A row for each plan that is not among the rows `done`."""
    known = {_key(row) for row in done}
    for values, rank, (N, K) in itertools.product(VALUES, sweep.ranks, layers(MODEL)):
        state = stand.weight(N, K, values, rank)
        sizes, copies = sizes_of(state), []
        for M in sweep.tokens:
            x = stand.tokens(M, K)
            for plan in sweep.candidates(sizes, M, stand):
                row = chosen(plan, values)
                if _key(row) in known:
                    continue
                copies = copies or stand.copies(state)
                with plans.forced(plan):
                    took = stand.time([stand.call(each, x) for each in copies])
                times = {name: took[name] for name in ("measured_us", "iqr_us")}
                yield row | {"predicted_us": plan.microseconds, "bound": plan.bound} | times


def _key(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in NUMBERS)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, as far as it is whole; none if there is no file of these columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            return []
        # The column that is written last is missing in a torn line.
        return [row for row in reader if row["loop"] in (*LOOPS, *PREFILL_LOOPS)]


def write(
    path: Path, stand: Stand, end: float, which: str = "few"
) -> tuple[list[dict[str, str]], bool]:
    """Writes the file, row by row, until `end`, a time.monotonic(); those of other sweeps stay.

    which: a key of SWEEPS. Returns this sweep's rows, and whether nothing is left to be timed.
    """
    sweep, known = SWEEPS[which], read(path) or read(RESULTS / path.name)
    rows = [row for row in known if int(row["m"]) in sweep.tokens]
    others = [row for row in known if int(row["m"]) not in sweep.tokens]
    if begins_anew():
        rows.clear()
    with path.open("w", newline="") as file, torch.inference_mode():
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(others + rows)
        for row in measure(sweep, stand, rows):
            writer.writerow(row)
            file.flush()
            rows.append({name: str(value) for name, value in row.items()})
            if time.monotonic() > end:
                return rows, False
    return rows, True


def main(which: str, file: str) -> int:
    end = deadline()
    rows, whole = write(Path(file), stand_here(0.0), end, which)
    verdict = verdicts.plans(rows, whole)
    verdict.say()
    return exit_code(whole, verdict.good)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
