"""Times the plans of the narrow and the wide loop, for `benchmarks/fit_plans.py`.

    python -m on_gpu.sweep FILE.csv

The file has the columns that `fit_plans.py` reads, and no row that was not timed whole. A second
call goes on behind the rows that it finds.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from plan_rows import CHOICES, COLUMNS

from on_gpu import plans, verdicts
from on_gpu.causes import Stand, stand_here
from on_gpu.decode import MODEL, TOKENS, VALUES
from on_gpu.parts import begins_anew, deadline, exit_code
from on_gpu.rows import RESULTS
from slab_kernels.backends.cuda.cost import Plan
from slab_kernels.backends.cuda.plan import choose, residencies
from slab_kernels.backends.cuda.tiles import LOOPS, CudaSizes, sizes_of
from slab_kernels.bench.layer_shapes import layers

MOST = 18  # plans of a linear and token count
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


def chosen(plan: Plan, values: str) -> dict[str, object]:
    """The columns that say which plan it is."""
    tile = plan.tile
    return {
        "n": plan.sizes.N,
        "k": plan.sizes.K,
        "values": values,
        "m": plan.M,
        "route": "fused",
        "loop": tile.loop,
        "warp_rows": tile.warp_rows,
        "warp_tokens": tile.warp_tokens,
        "warp_inputs": tile.warp_inputs,
        "blocks": tile.row_tiles,
        "tokens": plan.tokens,
        "splits": plan.splits,
        "stages": plan.stages,
        "resident": plan.resident,
    }


def measure(stand: Stand, done: Iterable[Mapping[str, str]]) -> Iterator[dict[str, object]]:
    """A row for each plan that is not among the rows `done`."""
    known = {_key(row) for row in done}
    for values, (N, K) in itertools.product(VALUES, layers(MODEL)):
        state = stand.weight(N, K, values)
        sizes, copies = sizes_of(state), []
        for M in TOKENS:
            x = stand.tokens(M, K)
            for plan in candidates(sizes, M, stand):
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
        return [row for row in reader if row["loop"] in LOOPS]


def write(path: Path, stand: Stand, end: float) -> tuple[list[dict[str, str]], bool]:
    """Writes the file, row by row, until `end`, a time.monotonic().

    Returns all its rows, and whether nothing is left to be timed.
    """
    rows = [] if begins_anew() else read(path) or read(RESULTS / path.name)
    with path.open("w", newline="") as file, torch.inference_mode():
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        for row in measure(stand, rows):
            writer.writerow(row)
            file.flush()
            rows.append({name: str(value) for name, value in row.items()})
            if time.monotonic() > end:
                return rows, False
    return rows, True


def main(file: str) -> int:
    end = deadline()
    rows, whole = write(Path(file), stand_here(0.0), end)
    verdict = verdicts.plans(rows, whole)
    verdict.say()
    return exit_code(whole, verdict.good)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
