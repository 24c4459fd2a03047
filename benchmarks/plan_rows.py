"""Files of timed plans, and the rows of backends/cuda/measured.json that are made of them.

`benchmarks/fit_plans.py` writes the files and calls what is here.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from slab_kernels.backends.cuda import cost, measured, plan
from slab_kernels.backends.cuda.gpus import Gpu
from slab_kernels.backends.cuda.measured import MeasuredRow
from slab_kernels.backends.cuda.tiles import DECODE, FEW, LOOPS, MANY, CudaSizes, Tile

KINDS = {"fp16": "w16", "int8": "int8", "int4": "int4"}  # of measured.VALUES
CHOICES = ("warp_rows", "warp_tokens", "warp_inputs", "blocks", "tokens", "splits", "stages",
           "resident")  # fmt: skip
TIMES = ("predicted_us", "bound", "measured_us", "iqr_us")
COLUMNS = ("n", "k", "values", "m", "route", *CHOICES, *TIMES, "loop")
OLD_COLUMNS = COLUMNS[:-1]
WORTH = 0.99  # of the model's time: a row that saves less is left out


class Timing(NamedTuple):
    """A fused plan that was timed."""

    sizes: CudaSizes
    M: int
    tile: Tile
    tokens: int  # of a warp
    splits: int
    stages: int
    resident: int
    took: float  # microseconds
    file: str

    def plan(self, gpu: Gpu) -> cost.Plan:
        return cost.Plan(
            self.sizes, self.M, gpu, self.tile, self.tokens, self.splits, self.stages, self.resident
        )

    @property
    def split(self) -> tuple[int, int]:
        """The K groups of a CTA and the CTAs that share K."""
        return self.tile.warp_inputs, self.splits

    def row(self, gpu: Gpu, above: int) -> MeasuredRow:
        """The row for more than `above` tokens, up to those of the timing."""
        sizes, tile = self.sizes, self.tile
        (values,) = (name for name, code in measured.VALUES.items() if code == sizes.values)
        return MeasuredRow(
            gpu.name,
            gpu.multiprocessors,
            sizes.N,
            sizes.K,
            values,
            sizes.group_steps,
            sizes.rank,
            sizes.planes,
            above,
            self.M,
            tile.loop,
            tile.warp_rows,
            tile.warp_tokens,
            tile.warp_inputs,
            tile.row_tiles,
            self.tokens,
            self.splits,
            self.stages,
            self.resident,
            self.took,
            self.file,
        )


def fused(file: Path) -> list[Timing]:
    """A file's fused plans of kernels that there are.

    Raises: ValueError if it is not a file of `time` or has none.
    """
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) not in (COLUMNS, OLD_COLUMNS):
            raise ValueError(
                f"{file} has no columns {', '.join(COLUMNS)}; "
                "give a file that `fit_plans.py time` wrote"
            )
        rows = [_timing(row, file.name) for row in reader if row["route"] == "fused"]
    found = [timing for timing in rows if _exists(timing)]
    if not found:
        raise ValueError(
            f"{file} has no row of a fused plan; run `fit_plans.py time` with more --seconds"
        )
    return found


def _timing(row: dict[str, str], file: str) -> Timing:
    n = {name: int(row[name]) for name in ("n", "k", "m", *CHOICES)}
    loop = row.get("loop", MANY)
    tile = Tile(n["warp_rows"], n["warp_tokens"], n["warp_inputs"], "", n["blocks"], loop)
    sizes = CudaSizes(n["k"], (n["n"],), measured.VALUES[KINDS[row["values"]]], 4, 1, 0)
    took = float(row["measured_us"])
    how = (n["tokens"], n["splits"], n["stages"], n["resident"])
    return Timing(sizes, n["m"], tile, *how, took, file)


def _exists(timing: Timing) -> bool:
    tile = timing.tile
    if tile.loop == MANY:
        return timing.M > DECODE and timing.tokens in timing.sizes.warp_tokens(tile.tall)
    return tile.loop in LOOPS


def rows(timings: list[Timing], gpu: Gpu) -> list[MeasuredRow]:
    """The plans that were faster than the model's, with one way of splitting K in a regime.

    A problem's regime is judged by the timings of one file, the last that has any of it: others may
    be of other kernels. It gets rows if the model's own plan was timed for all of its token counts.
    """
    groups: dict[tuple, dict[str, list[Timing]]] = defaultdict(lambda: defaultdict(list))
    for timing in timings:
        # Above FEW tokens K is not split: each number of tokens stands for itself.
        above, upto = plan.regime(timing.M)
        key = timing.sizes, above, upto if upto <= FEW else timing.M
        groups[key][timing.file].append(timing)
    found = []
    for (sizes, above, _), by_file in groups.items():
        _, group = by_file.popitem()
        by_tokens: dict[int, list[Timing]] = defaultdict(list)
        for timing in group:
            if plan.named(timing.row(gpu, 0), _alternatives(timing, gpu)):
                by_tokens[timing.M].append(timing)
        fastest = _fastest_split(by_tokens)
        own = [_own(sizes, M, gpu, there) for M, there in by_tokens.items()]
        least = sum(timing.took for timing in fastest)
        if not fastest or None in own or least > WORTH * sum(filter(None, own)):
            continue
        counts = sorted({timing.M for timing in timings if timing.sizes == sizes})
        for timing in fastest:
            before = max((M for M in counts if M < timing.M), default=0)
            found.append(timing.row(gpu, max(above, before)))
    return found


def _alternatives(timing: Timing, gpu: Gpu) -> list[cost.Plan]:
    """The plans among which one with the timing's way of splitting K is chosen."""
    return plan.plans(timing.sizes, timing.M, gpu, *timing.split)


def _fastest_split(by_tokens: dict[int, list[Timing]]) -> list[Timing]:
    """The fastest timing for each number of tokens, by that way of splitting K whose times have the
    least sum, among those that were timed for all of them."""
    ways = [{timing.split for timing in there} for there in by_tokens.values()]
    totals = []
    for split in set.intersection(*ways) if ways else ():
        best = [
            min((t for t in there if t.split == split), key=lambda timing: timing.took)
            for there in by_tokens.values()
        ]
        totals.append((sum(timing.took for timing in best), split, best))
    return min(totals)[2] if totals else []


def _own(sizes: CudaSizes, M: int, gpu: Gpu, timings: list[Timing]) -> float | None:
    """What the model's own plan took; None if it was not timed, or is to rebuild the weight."""
    chosen = plan.choose(sizes, M, gpu, by_rows=False)
    if not isinstance(chosen, cost.Plan):
        return None
    took = [
        timing.took
        for timing in timings
        if plan.named(timing.row(gpu, 0), [chosen]) and timing.stages == chosen.stages
    ]
    return min(took, default=None)


def write_rows(files: list[Path], gpu: Gpu, out: Path) -> None:
    """Puts the rows of the files into `out`, in place of all that it has of that GPU.

    Raises: OSError or ValueError for a file that cannot be used.
    """
    found = rows([timing for file in files for timing in fused(file)], gpu)
    others = measured.rows(out) if out.exists() else ()
    kept = [row for row in others if row.problem[:2] != (gpu.name, gpu.multiprocessors)]
    lines = ",\n  ".join(json.dumps(row._asdict()) for row in sorted([*kept, *found]))
    text = f'{{\n "format": {measured.FORMAT},\n "rows": [\n  {lines}\n ]\n}}\n'
    fresh = out.with_suffix(".tmp")
    fresh.write_text(text, encoding="utf-8")
    measured.rows(fresh)  # It is checked before it takes the old one's place.
    fresh.replace(out)
    measured.rows.cache_clear()
    print(f"wrote {out}: {len(found)} rows of {gpu.name}, {len(kept)} of others")
