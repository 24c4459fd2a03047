"""Times plans of the CUDA kernels on this GPU, and makes the cost model and its rows of the times.

    python benchmarks/fit_plans.py time OUT.csv [--seconds 90]
    python benchmarks/fit_plans.py rows FILE.csv ... [--gpu H100] [--out FILE.json]
    python benchmarks/fit_plans.py fit FILE.csv ... [--gpu H100]

`time` times every plan worth it, for several shapes, value types and token counts. `rows` writes
the plans that were faster than the model's choice into backends/cuda/measured.json, which the
backend asks before the model. `fit` prints the constants of backends/cuda/cost.py and, if there are
times of kernels that they are about, of backends/cuda/unknowns.py, the model's error, and what its
choices cost.

A row of a file is one plan: what decides it, predicted and measured microseconds. "regret" is the
time of the plan that the model takes over that of the best one timed; it is what matters, since the
model only ranks. `predicted_us` is by the constants of that day: of results/plans-h100.csv the
first 865 rows are by the model before the fit (results/plans-h100.json says which tree timed what).
That file is older than the narrow and wide loops. It has no column `loop`, and its rows of up to 16
tokens a warp are of kernels that are gone: `rows` and `fit` leave them out.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from plan_rows import CHOICES, COLUMNS, AnyTiming, PrefillTiming, fused, write_rows
from torch import Tensor

from slab_kernels.backends import dispatch
from slab_kernels.backends.cuda import cost, device_of, launch, measured, plan, prefill, unknowns
from slab_kernels.backends.cuda.gpus import Gpu, gpu_named
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.backends.cuda.tiles import (
    DECODE,
    NARROW_TILES,
    REBUILD,
    SPLIT_TILES,
    TALL_TILES,
    WIDE_TILES,
    CudaSizes,
    sizes_of,
)
from slab_kernels.bench.clocks import CudaClock, copied, size_of
from slab_kernels.cli import console
from slab_kernels.errors import BackendError
from slab_kernels.format import PackedLayout
from slab_kernels.paths import expanded
from slab_kernels.testing import random_packed

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096))
VALUES = (("int4", 128), ("fp16", None), ("int8", 128))
FEW_TOKENS, MANY_TOKENS = (1, 4, 16, 32, 64), (128, 256, 512, 2048)
PREFILL = "prefill"  # the kernels of prefill.py
FITTED = ("ISSUE_CYCLES", "WAIT_CYCLES", "BANDWIDTH_REACHED", "LAUNCH_US", "FILL_US", "REDUCE_US",
          "DECODE_SAVES_US")  # fmt: skip
# Constants of unknowns.py, between which values they may be, and whether times of the kernels in
# prefill.py alone tell of them, or those of the loop that rebuilds the weight too.
UNKNOWN = {
    "COPY_WRITES": (0.01, 1.0, True),
    "TABLE_WAVEFRONTS": (1.0, 2.0, False),
    "CONSUMER_WAIT": (0.01, 20.0, True),
}


def candidates(sizes: CudaSizes, M: int, gpu: Gpu) -> list[cost.Plan]:
    """Plans for up to 64 tokens, those that the model likes first."""
    if M <= DECODE:
        tiles = [(tile, sizes.wide_tokens) for tile in WIDE_TILES]
        if M <= sizes.most_narrow_tokens:
            tiles += [(tile, M) for tile in NARROW_TILES]
    else:
        tiles = [(tile, tokens) for tile in SPLIT_TILES for tokens in sizes.warp_tokens()]
        tiles += [(tile, tokens) for tile in TALL_TILES for tokens in sizes.warp_tokens(True)]
        smallest = min(tokens for tokens in sizes.warp_tokens() if tokens >= M)
        tiles = [each for each in tiles if each[1] * each[0].warp_tokens == smallest]
    found = []
    for (tile, tokens), splits in itertools.product(tiles, plan.SPLITS[:2]):
        if splits == 1 or sizes.k_blocks >= splits * tile.warp_inputs:
            found += plan.residencies(sizes, M, gpu, tile, tokens, splits)
    return sorted(found, key=lambda each: each.microseconds)[:20]


def newer(sizes: CudaSizes, M: int, gpu: Gpu) -> list[cost.Plan | prefill.Prefill]:
    """Plans of the loop that rebuilds the weight, those that the model likes first, and every one
    of the Hopper kernels; both for more than 16 tokens."""
    if M <= DECODE:
        return []
    splits = range(1, plan.MOST_SPLITS + 1)
    found = [
        each
        for groups, many in itertools.product((1, 2, 4, 8), splits)
        if REBUILD in plan.families(sizes, gpu, plan.regime(M))
        for each in plan.plans(sizes, M, gpu, groups, many, REBUILD)
    ]
    found.sort(key=lambda each: each.microseconds)
    return [*found[:6], *prefill.plans(sizes, M, gpu)]


def how(chosen: cost.Plan | prefill.Prefill) -> tuple:
    """The columns CHOICES of a plan."""
    if isinstance(chosen, prefill.Prefill):
        choices = (chosen.tokens, chosen.share, chosen.weight_stages, chosen.resident)
        return ("",) * (len(CHOICES) - len(choices)) + choices
    tile = chosen.tile
    along = (tile.warp_rows, tile.warp_tokens, tile.warp_inputs, tile.row_tiles)
    return (*along, chosen.tokens, chosen.splits, chosen.stages, chosen.resident)


class Stand(NamedTuple):
    """The GPU on which plans are timed."""

    device: CudaDevice
    clock: CudaClock

    def dense(self, N: int, K: int) -> Iterator[tuple]:
        """The rows of torch's dense linear."""
        weights = [random(N, K) for _ in range(self.clock.copies(2 * N * K))]
        for M in (*FEW_TOKENS, *MANY_TOKENS):
            x = random(M, K)
            took = self.clock.time([partial(torch.nn.functional.linear, x, W) for W in weights])
            expected = cost.dense_microseconds(N, K, M, self.device.gpu)
            times = (expected, "", took.median * 1e6, took.iqr * 1e6)
            yield N, K, "", M, "dense", *[""] * len(CHOICES), *times, ""

    def plans(self, states: list[CudaState], values: str) -> Iterator[tuple]:
        """The rows of one weight, of which `states` are copies."""
        sizes, gpu = sizes_of(states[0]), self.device.gpu
        N, K = sizes.N, sizes.K
        for M in (*FEW_TOKENS, *MANY_TOKENS):
            x = random(M, K)
            few = M in FEW_TOKENS
            chosen: list[cost.Plan | prefill.Prefill] = []
            if sizes.rank:  # A file has no rank: the loops are timed with 1.
                chosen += candidates(sizes, M, gpu) if few else plan.plans(sizes, M, gpu, 1, 1)[:6]
            chosen += newer(sizes, M, gpu)
            for each in chosen:
                times = self.measure(each, states, x)
                loop = each.tile.loop if isinstance(each, cost.Plan) else each.loop
                yield N, K, values, M, "fused", *how(each), *times, loop
            if not few and sizes.rank:
                again = cost.rebuild(sizes, M, gpu)
                times = self.measure(again, states, x)
                yield N, K, values, M, "rebuilt", *[""] * len(CHOICES), *times, ""

    def measure(
        self,
        chosen: cost.Plan | prefill.Prefill | cost.Rebuild,
        states: list[CudaState],
        x: Tensor,
    ) -> tuple:
        """The columns TIMES of one plan."""
        choose = launch.choose
        launch.launches.cache_clear()
        launch.choose = lambda *_: chosen
        try:
            took = self.clock.time(
                [partial(launch.linear, x, state, None, self.device) for state in states]
            )
        finally:
            launch.choose = choose
        bound = "" if isinstance(chosen, cost.Rebuild) else chosen.bound
        return chosen.microseconds, bound, took.median * 1e6, took.iqr * 1e6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def timed(out: Path, seconds: float) -> None:
    """Writes OUT row by row; what is not reached in `seconds` is left out.

    Raises: BackendError if the kernels cannot run here.
    """
    backend, end = dispatch.backend("cuda"), time.monotonic() + seconds
    if missing := backend.missing("cuda"):
        raise BackendError(f"plans are timed on a CUDA device: {missing}")
    stand = Stand(device_of(torch.cuda.current_device()), CudaClock("cuda", 0.0))
    with out.open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for N, K in SHAPES:
            writer.writerows(stand.dense(N, K))
        for (N, K), (values, group_size), rank in itertools.product(SHAPES, VALUES, (1, 0)):
            packed = random_packed(PackedLayout(N, K, values, group_size, rank)).to("cuda")
            state = backend.prepare(packed, torch.float16)
            more = stand.clock.copies(size_of(state)) - 1
            for row in stand.plans([state, *(copied(state) for _ in range(more))], values):
                writer.writerow(row)
                file.flush()
                if time.monotonic() > end:
                    return
            print(N, K, values, rank, file=sys.stderr)


class Model:
    """The cost model against measured plans, with constants that may be changed."""

    def __init__(self, timings: list[AnyTiming], gpu: Gpu):
        # A plan that this GPU does not have is none of the model's.
        self.timings = [timing for timing in timings if timing.plan(gpu) is not None]
        self.gpu = gpu
        self.took = torch.tensor([timing.took for timing in self.timings], dtype=torch.float64)

    def constants(self) -> list[tuple[ModuleType, str, float, float]]:
        """The constants that these times tell of, by module and name, and between which values they
        may be."""
        kinds = {
            PREFILL if isinstance(timing, PrefillTiming) else timing.tile.loop
            for timing in self.timings
        }
        found = [(cost, name, 0.0, math.inf) for name in FITTED if kinds - {PREFILL, REBUILD}]
        for name, (least, most, of_prefill) in UNKNOWN.items():
            if PREFILL in kinds or (REBUILD in kinds and not of_prefill):
                found.append((unknowns, name, least, most))
        return found

    def predicted(self) -> Tensor:
        plans = (timing.plan(self.gpu) for timing in self.timings)
        return torch.tensor([each.microseconds for each in plans if each], dtype=torch.float64)

    def error(self) -> float:
        """The root mean square of the logarithms of predicted over measured, cut at 0.3."""
        logarithms = (self.predicted() / self.took).log().clamp(-0.3, 0.3)
        return logarithms.square().mean().sqrt().item()

    def fit(self) -> float:
        """Coordinate descent over the constants, ten at most on a thousand rows; the error that is
        left."""
        least_error, step = self.error(), 0.2
        while step > 0.01:
            better = False
            for (module, name, least, most), factor in itertools.product(
                self.constants(), (1 + step, 1 / (1 + step))
            ):
                before = getattr(module, name)
                setattr(module, name, min(most, max(least, before * factor)))
                if (found := self.error()) < least_error - 1e-6:
                    least_error, better = found, True
                else:
                    setattr(module, name, before)
            step = step if better else step / 2
        return least_error


def fit(files: list[Path], gpu: Gpu) -> None:
    """Prints the constants that fit best.

    Raises: OSError or ValueError for a file that cannot be used.
    """
    timings = [timing for file in files for timing in fused(file)]
    model = Model(timings, gpu)
    least = model.fit()
    timings = model.timings
    print(f"{len(timings)} rows, error {least:.3f} (root mean square of logarithms, cut at 0.3)")
    constants = model.constants()
    print(", ".join(f"{name} = {getattr(module, name):.3g}" for module, name, *_ in constants))
    predicted, took = model.predicted(), model.took
    problems = defaultdict(list)  # problem -> its timings
    for i, timing in enumerate(timings):
        problems[timing.sizes, timing.M].append(i)
    for M in sorted({m for *_, m in problems}):
        regret = [
            float(took[min(group, key=lambda i: predicted[i])] / took[group].min())
            for (_, m), group in problems.items()
            if m == M
        ]
        print(f"m={M}: regret {sum(regret) / len(regret):.3f}, worst {max(regret):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("time", "rows", "fit"))
    parser.add_argument("files", type=expanded, nargs="+")
    parser.add_argument("--seconds", type=float, default=90.0, help="time at most")
    parser.add_argument("--gpu", default="H100", help="whose rows to write, or constants to fit")
    parser.add_argument("--out", type=expanded, default=measured.FILE, help="where rows go")
    args = parser.parse_args()
    if args.what == "time":
        timed(args.files[0], args.seconds)
    elif args.what == "rows":
        write_rows(args.files, gpu_named(args.gpu), args.out)
    else:
        fit(args.files, gpu_named(args.gpu))


if __name__ == "__main__":
    sys.exit(console.run(main, as_json=False))
