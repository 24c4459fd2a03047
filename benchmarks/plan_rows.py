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
from slab_kernels.backends.cuda.measured import PREFILL_LOOPS, MeasuredRow, PrefillRow, Row
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.backends.cuda.tiles import (
    DECODE,
    FEW,
    LOOPS,
    MANY,
    REBUILD,
    REBUILD_REGISTERS,
    CudaSizes,
    Tile,
)

KINDS = {"fp16": "w16", "int8": "int8", "int4": "int4"}  # of measured.VALUES
CHOICES = ("warp_rows", "warp_tokens", "warp_inputs", "blocks", "tokens", "splits", "stages",
           "resident")  # fmt: skip
TIMES = ("predicted_us", "bound", "measured_us", "iqr_us")
COLUMNS = ("n", "k", "values", "m", "route", *CHOICES, *TIMES, "loop")
OLD_COLUMNS = COLUMNS[:-1]
WORTH = 0.99  # of the model's time: a row that saves less is left out


class Timing(NamedTuple):
    """A plan of a loop that was timed."""

    sizes: CudaSizes
    M: int
    tile: Tile
    tokens: int  # of a warp
    splits: int
    stages: int
    resident: int
    took: float  # microseconds
    file: str

    @property
    def family(self) -> str:
        return self.tile.loop if self.M > DECODE else plan.DECODING

    def plan(self, gpu: Gpu) -> cost.Plan | None:
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


class PrefillTiming(NamedTuple):
    """A plan of a Hopper kernel for many tokens that was timed.

    A file has its `tokens` and `share` in the columns tokens and splits. Kernels of kept pairs
    alone were timed with a weight without a sign term, the others with rank 1.
    """

    sizes: CudaSizes
    M: int
    loop: str
    tokens: int  # of a CTA
    share: int
    took: float  # microseconds
    file: str

    @property
    def family(self) -> str:
        return self.loop

    def plan(self, gpu: Gpu) -> Prefill | None:
        """The plan on that GPU, None if it has none."""
        alike = plan.plans_of(self.loop, self.sizes, self.M, gpu, self.split)
        return next((each for each in alike if isinstance(each, Prefill)), None)

    @property
    def split(self) -> tuple[int, int]:
        """As Prefill.split."""
        return self.tokens, self.share

    def row(self, gpu: Gpu, above: int) -> PrefillRow:
        """The row for more than `above` tokens, up to those of the timing."""
        sizes = self.sizes
        (values,) = (name for name, code in measured.VALUES.items() if code == sizes.values)
        problem = (gpu.name, gpu.multiprocessors, sizes.N, sizes.K, values)
        signs = (sizes.group_steps, sizes.rank, sizes.planes)
        how = (self.loop, self.tokens, self.share)
        return PrefillRow(*problem, *signs, above, self.M, *how, self.took, self.file)


AnyTiming = Timing | PrefillTiming


def fused(file: Path) -> list[AnyTiming]:
    """A file's plans of kernels that there are.

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


def _timing(row: dict[str, str], file: str) -> AnyTiming:
    values, loop = measured.VALUES[KINDS[row["values"]]], row.get("loop", MANY)
    n, k, M, took = int(row["n"]), int(row["k"]), int(row["m"]), float(row["measured_us"])
    if loop in PREFILL_LOOPS:
        sizes = CudaSizes(k, (n,), values, 4, 0 if loop == "prefill_one" else 1, 0)
        tokens, share = int(row["tokens"]), int(row["splits"])
        return PrefillTiming(sizes, M, loop, tokens, share, took, file)
    how = {name: int(row[name]) for name in CHOICES}
    tile = Tile(*(how[name] for name in CHOICES[:3]), "", how["blocks"], loop)
    sizes = CudaSizes(k, (n,), values, 4, 1, 0)
    return Timing(sizes, M, tile, *(how[name] for name in CHOICES[4:]), took, file)


def _exists(timing: AnyTiming) -> bool:
    if isinstance(timing, PrefillTiming):
        return timing.M > DECODE
    tile = timing.tile
    if tile.loop == REBUILD:
        return timing.M > DECODE and timing.tokens in REBUILD_REGISTERS
    if tile.loop == MANY:
        return timing.M > DECODE and timing.tokens in timing.sizes.warp_tokens(tile.tall)
    return tile.loop in LOOPS


def rows(timings: list[AnyTiming], gpu: Gpu) -> list[Row]:
    """The plans that were faster than the model's of their family of kernels, with one way of
    splitting K in a regime.

    A problem's regime is judged by the timings of one file, the last that has any of it: others may
    be of other kernels. A family gets rows if the model's own plan of it was timed for all of its
    token counts.
    """
    groups: dict[tuple, dict[str, list[AnyTiming]]] = defaultdict(lambda: defaultdict(list))
    for timing in timings:
        # Above FEW tokens each number of tokens stands for itself.
        above, upto = plan.regime(timing.M)
        key = timing.family, timing.sizes, above, upto if upto <= FEW else timing.M
        groups[key][timing.file].append(timing)
    found: list[Row] = []
    for (family, sizes, above, _), by_file in groups.items():
        _, group = by_file.popitem()
        by_tokens: dict[int, list[AnyTiming]] = defaultdict(list)
        for timing in group:
            alike = plan.plans_of(family, sizes, timing.M, gpu, timing.split)
            if plan.named(timing.row(gpu, 0), alike):
                by_tokens[timing.M].append(timing)
        fastest = _fastest_split(by_tokens)
        own = [_own(family, sizes, M, gpu, there) for M, there in by_tokens.items()]
        least = sum(timing.took for timing in fastest)
        if not fastest or None in own or least > WORTH * sum(filter(None, own)):
            continue
        same = (timing for timing in timings if (timing.family, timing.sizes) == (family, sizes))
        counts = sorted({timing.M for timing in same})
        for timing in fastest:
            before = max((M for M in counts if M < timing.M), default=0)
            found.append(timing.row(gpu, max(above, before)))
    return found


def _fastest_split(by_tokens: dict[int, list[AnyTiming]]) -> list[AnyTiming]:
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


def _own(family: str, sizes: CudaSizes, M: int, gpu: Gpu, timings: list[AnyTiming]) -> float | None:
    """What the model's own plan of a family took; None if it was not timed, or if the weight is
    rebuilt dense for so many tokens."""
    if isinstance(plan.choose(sizes, M, gpu, by_rows=False), cost.Rebuild):
        return None
    if (chosen := plan.own(family, sizes, M, gpu)) is None:
        return None
    took = [
        timing.took
        for timing in timings
        if plan.named(timing.row(gpu, 0), [chosen])
        and (isinstance(timing, PrefillTiming) or timing.stages == chosen.stages)
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
