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

import fit_plans
import torch

from on_gpu import plans, verdicts
from on_gpu.causes import Stand
from on_gpu.decode import MODEL, TOKENS, VALUES
from on_gpu.parts import OUT_OF_TIME, seconds_here
from on_gpu.rows import RESULTS
from slab_kernels.backends import cuda
from slab_kernels.backends.cuda.cost import Plan
from slab_kernels.backends.cuda.plan import residencies
from slab_kernels.backends.cuda.tiles import CudaSizes, sizes_of
from slab_kernels.bench.clocks import CudaClock
from slab_kernels.bench.layer_shapes import layers

MOST = 16  # plans of a linear and token count, those first that the model likes best
NUMBERS = ("n", "k", "values", "m", "route", *fit_plans.CHOICES)


def candidates(sizes: CudaSizes, M: int, stand: Stand) -> list[Plan]:
    """Plans for M tokens with every tile, and every number of CTAs a multiprocessor."""
    gpu = stand.device.gpu
    found = [
        each
        for plan in plans.every(sizes, M, gpu)
        for each in residencies(sizes, M, gpu, plan.tile, plan.tokens, plan.splits)
    ]
    return sorted(found, key=lambda plan: plan.microseconds)[:MOST]


def chosen(plan: Plan, values: str) -> dict[str, object]:
    """The columns that say which plan it is."""
    own = {"n": plan.sizes.N, "k": plan.sizes.K, "values": values, "m": plan.M, "route": "fused"}
    tile = {
        name: getattr(plan.tile, name) for name in fit_plans.CHOICES if hasattr(plan.tile, name)
    }
    rest = {name: getattr(plan, name) for name in fit_plans.CHOICES if name not in tile}
    return own | tile | rest


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
        if tuple(reader.fieldnames or ()) != fit_plans.COLUMNS:
            return []
        return [row for row in reader if row["iqr_us"]]


def write(path: Path, stand: Stand, seconds: float) -> tuple[list[dict[str, str]], bool]:
    """Writes the file, row by row, until the time is over.

    Returns all its rows, and whether nothing is left to be timed.
    """
    end = time.monotonic() + seconds
    rows = read(path) or read(RESULTS / path.name)
    with path.open("w", newline="") as file, torch.inference_mode():
        writer = csv.DictWriter(file, fit_plans.COLUMNS)
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
    index = torch.cuda.current_device()
    stand = Stand(cuda.device_of(index), CudaClock(f"cuda:{index}", 0.0), "cuda")
    rows, whole = write(Path(file), stand, seconds_here())
    verdicts.plans(rows, whole).say()
    return 0 if whole else OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
