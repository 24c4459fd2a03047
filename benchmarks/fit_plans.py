"""Times plans of the CUDA kernels on this GPU, and makes the cost model and its rows of the times.

    python benchmarks/fit_plans.py time OUT.csv [--seconds 90]
    python benchmarks/fit_plans.py rows FILE.csv ... [--gpu H100] [--out FILE.json]
    python benchmarks/fit_plans.py fit FILE.csv ... [--gpu H100]

`time` times every plan worth it, for several shapes, value types and token counts. `rows` writes
the plans that were faster than the model's choice into backends/cuda/measured.json, which the
backend asks before the model. `fit` prints the constants of backends/cuda/cost.py, the model's
error, and what its choices cost.

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
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from plan_rows import CHOICES, COLUMNS, Timing, fused, write_rows
from torch import Tensor

from slab_kernels.backends import dispatch
from slab_kernels.backends.cuda import cost, device_of, launch, measured, plan
from slab_kernels.backends.cuda.gpus import Gpu, gpu_named
from slab_kernels.backends.cuda.launch import CudaDevice
from slab_kernels.backends.cuda.layout import CudaState
from slab_kernels.backends.cuda.tiles import (
    DECODE,
    NARROW_TILES,
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
FITTED = ("ISSUE_CYCLES", "WAIT_CYCLES", "BANDWIDTH_REACHED", "LAUNCH_US", "FILL_US", "REDUCE_US",
          "DECODE_SAVES_US")  # fmt: skip


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
            chosen = candidates(sizes, M, gpu) if few else plan.plans(sizes, M, gpu, 1, 1)[:6]
            for each in chosen:
                tile = each.tile
                how = (tile.warp_rows, tile.warp_tokens, tile.warp_inputs, tile.row_tiles)
                how += (each.tokens, each.splits, each.stages, each.resident)
                times = self.measure(each, states, x)
                yield N, K, values, M, "fused", *how, *times, tile.loop
            if not few:
                again = cost.rebuild(sizes, M, gpu)
                times = self.measure(again, states, x)
                yield N, K, values, M, "rebuilt", *[""] * len(CHOICES), *times, ""

    def measure(
        self, chosen: cost.Plan | cost.Rebuild, states: list[CudaState], x: Tensor
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
        bound = chosen.bound if isinstance(chosen, cost.Plan) else ""
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
        for (N, K), (values, group_size) in itertools.product(SHAPES, VALUES):
            packed = random_packed(PackedLayout(N, K, values, group_size, 1)).to("cuda")
            state = backend.prepare(packed, torch.float16)
            more = stand.clock.copies(size_of(state)) - 1
            for row in stand.plans([state, *(copied(state) for _ in range(more))], values):
                writer.writerow(row)
                file.flush()
                if time.monotonic() > end:
                    return
            print(N, K, values, file=sys.stderr)


class Model:
    """The cost model against measured plans, with constants that may be changed."""

    def __init__(self, timings: list[Timing], gpu: Gpu):
        self.timings, self.gpu = timings, gpu
        self.took = torch.tensor([timing.took for timing in timings], dtype=torch.float64)

    def predicted(self) -> Tensor:
        times = [timing.plan(self.gpu).microseconds for timing in self.timings]
        return torch.tensor(times, dtype=torch.float64)

    def error(self) -> float:
        """The root mean square of the logarithms of predicted over measured, cut at 0.3."""
        logarithms = (self.predicted() / self.took).log().clamp(-0.3, 0.3)
        return logarithms.square().mean().sqrt().item()

    def fit(self) -> float:
        """Coordinate descent over FITTED, seven constants on a thousand rows; the error that is
        left."""
        least, step = self.error(), 0.2
        while step > 0.01:
            better = False
            for name, factor in itertools.product(FITTED, (1 + step, 1 / (1 + step))):
                before = getattr(cost, name)
                setattr(cost, name, before * factor)
                if (found := self.error()) < least - 1e-6:
                    least, better = found, True
                else:
                    setattr(cost, name, before)
            step = step if better else step / 2
        return least


def fit(files: list[Path], gpu: Gpu) -> None:
    """Prints the constants that fit best.

    Raises: OSError or ValueError for a file that cannot be used.
    """
    timings = [timing for file in files for timing in fused(file)]
    model = Model(timings, gpu)
    least = model.fit()
    print(f"{len(timings)} rows, error {least:.3f} (root mean square of logarithms, cut at 0.3)")
    print(", ".join(f"{name} = {getattr(cost, name):.3g}" for name in FITTED))
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
