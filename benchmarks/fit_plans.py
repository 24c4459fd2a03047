"""Times plans of the CUDA kernels on this GPU and fits the constants of the cost model to them (backends/cuda/plan.py).

    python benchmarks/fit_plans.py time OUT.csv [--seconds 90]    every plan worth it, several shapes, values and token counts
    python benchmarks/fit_plans.py fit FILE.csv ...               the constants, the model's error, and what its choices cost

A row is one plan: what decides it, predicted and measured microseconds. "regret" is the time of the plan that the model takes over
that of the best one timed: what matters, since the model only ranks. `predicted_us` is by the constants of that day: of
results/plans-h100.csv the first 865 rows are by the model before the fit (results/plans-h100.json says which tree timed what).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from slab_kernels.backends import dispatch
from slab_kernels.backends.cuda import device_of, launch, plan, sizes_of
from slab_kernels.bench import clocks as timing
from slab_kernels.cli import console
from slab_kernels.errors import BackendError
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096))
VALUES = (("int4", 128), ("fp16", None), ("int8", 128))
FEW, MANY = (1, 8, 16, 32, 64), (128, 256, 512, 2048)
KINDS = {"fp16": plan.W16, "int8": plan.INT8, "int4": plan.INT4}
COLUMNS = ("n", "k", "values", "m", "route", "warp_rows", "warp_tokens", "warp_inputs", "blocks", "tokens", "splits", "stages",
           "resident", "predicted_us", "bound", "measured_us", "iqr_us")  # fmt: skip
FITTED = ("ISSUE_CYCLES", "WAIT_CYCLES", "BANDWIDTH_REACHED", "LAUNCH_US", "FILL_US", "REDUCE_US")


def candidates(sizes: plan.Sizes, M: int, gpu: plan.Gpu) -> list[plan.Plan]:
    """Plans for up to 64 tokens, those that the model likes first."""
    tiles = [(tile, tokens) for tile in plan.SPLIT_TILES for tokens in sizes.warp_tokens()]
    tiles += [(tile, tokens) for tile in plan.TALL_TILES for tokens in sizes.warp_tokens(tall=True)]
    smallest = min(tokens for tokens in sizes.warp_tokens() if tokens >= M)
    found = []
    for (tile, tokens), splits in itertools.product(tiles, plan.SPLITS[:2]):
        if tokens * tile.warp_tokens == smallest and sizes.k_blocks >= splits * tile.warp_inputs:
            found += plan.residencies(sizes, M, gpu, tile, tokens, splits)
    return sorted(found, key=lambda each: each.microseconds)[:20]


def timed(out: Path, seconds: float) -> None:
    """Writes OUT row by row; what is not reached in `seconds` is left out. Raises: BackendError if the kernels cannot run here."""
    backend, end = dispatch.backend("cuda"), time.monotonic() + seconds
    if missing := backend.missing("cuda"):
        raise BackendError(f"plans are timed on a CUDA device: {missing}")
    device, clock, choose = (
        device_of(torch.cuda.current_device()),
        timing.CudaClock("cuda", 0.0),
        launch.choose,
    )
    gpu = device.gpu

    def measure(chosen, states, x, sizes) -> list[float]:
        launch.launches.cache_clear()
        launch.choose = lambda *_: chosen
        try:
            took = clock.time(
                [lambda s=s: launch.linear(x, *s[:5], None, sizes, device) for s in states]
            )
        finally:
            launch.choose = choose
        return [
            chosen.microseconds,
            getattr(chosen, "bound", ""),
            took.median * 1e6,
            took.iqr * 1e6,
        ]

    with out.open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for N, K in SHAPES:
            weights = [
                torch.randn(N, K, device="cuda", dtype=torch.float16)
                for _ in range(clock.copies(2 * N * K))
            ]
            for M in (*FEW, *MANY):
                x = torch.randn(M, K, device="cuda", dtype=torch.float16)
                took = clock.time([partial(torch.nn.functional.linear, x, W) for W in weights])
                expected = plan.dense_microseconds(N, K, M, gpu)
                writer.writerow(
                    (
                        N,
                        K,
                        "",
                        M,
                        "dense",
                        *[""] * 8,
                        expected,
                        "",
                        took.median * 1e6,
                        took.iqr * 1e6,
                    )
                )
        del weights
        for (N, K), (values, group_size) in itertools.product(SHAPES, VALUES):
            packed = random_packed(PackedLayout(N, K, values, group_size, 1)).to("cuda")
            state = backend.prepare(packed, torch.float16)
            sizes = sizes_of(*state[:10])
            states = [
                state,
                *(timing.copied(state) for _ in range(clock.copies(timing.size_of(state)) - 1)),
            ]
            for M in (*FEW, *MANY):
                x = torch.randn(M, K, device="cuda", dtype=torch.float16)
                plans = (
                    candidates(sizes, M, gpu) if M in FEW else plan.plans(sizes, M, gpu, 1, 1)[:6]
                )
                for each in plans:
                    if time.monotonic() > end:
                        return
                    t = each.tile
                    how = (
                        t.warp_rows,
                        t.warp_tokens,
                        t.warp_inputs,
                        t.blocks,
                        each.tokens,
                        each.splits,
                        each.stages,
                        each.resident,
                    )
                    writer.writerow(
                        (N, K, values, M, "fused", *how, *measure(each, states, x, sizes))
                    )
                if M in MANY:
                    again = plan.rebuild(sizes, M, gpu)
                    writer.writerow(
                        (N, K, values, M, "rebuilt", *[""] * 8, *measure(again, states, x, sizes))
                    )
                file.flush()
            print(N, K, values, file=sys.stderr)


def fused(file: Path) -> list[dict[str, str]]:
    """Its rows of fused plans. Raises: ValueError if it is not a file of `time` or has none."""
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{file} has no columns {', '.join(COLUMNS)}; give a file that `fit_plans.py time` wrote"
            )
        rows = [row for row in reader if row["route"] == "fused"]
    if not rows:
        raise ValueError(
            f"{file} has no row of a fused plan; run `fit_plans.py time` with more --seconds"
        )
    return rows


def fit(files: list[Path], gpu: plan.Gpu) -> None:
    """Prints the constants that fit best. Raises: OSError or ValueError for a file that cannot be used."""
    rows = [row for file in files for row in fused(file)]
    cases, took = [], torch.tensor([float(row["measured_us"]) for row in rows], dtype=torch.float64)
    for row in rows:
        n = {name: int(row[name]) for name in COLUMNS[:2] + COLUMNS[3:4] + COLUMNS[5:13]}
        tile = plan.Tile(n["warp_rows"], n["warp_tokens"], n["warp_inputs"], "", n["blocks"])
        sizes = plan.Sizes(n["k"], (n["n"],), KINDS[row["values"]], 4, 1, 0)
        cases.append(
            (sizes, n["m"], gpu, tile, n["tokens"], n["splits"], n["stages"], n["resident"])
        )
    predict = lambda: torch.tensor(
        [plan.predict(*case).microseconds for case in cases], dtype=torch.float64
    )
    error = lambda: (predict() / took).log().clamp(-0.3, 0.3).square().mean().sqrt().item()  # noqa: E731
    least, step = error(), 0.2
    while step > 0.01:  # coordinate descent: six constants, a thousand rows
        better = False
        for name, factor in itertools.product(FITTED, (1 + step, 1 / (1 + step))):
            before = getattr(plan, name)
            setattr(plan, name, before * factor)
            if (found := error()) < least - 1e-6:
                least, better = found, True
            else:
                setattr(plan, name, before)
        step = step if better else step / 2
    print(f"{len(rows)} rows, error {least:.3f} (root mean square of logarithms, cut at 0.3)")
    print(", ".join(f"{name} = {getattr(plan, name):.3g}" for name in FITTED))
    groups, predicted = defaultdict(list), predict()
    for i, row in enumerate(rows):
        groups[row["n"], row["k"], row["values"], row["m"]].append(i)
    for M in sorted({int(row["m"]) for row in rows}):
        here = [group for key, group in groups.items() if int(key[3]) == M]
        regret = [
            float(took[min(group, key=lambda i: predicted[i])] / took[group].min())
            for group in here
        ]
        print(f"m={M}: regret {sum(regret) / len(regret):.3f}, worst {max(regret):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("time", "fit"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=90.0, help="time at most")
    parser.add_argument("--gpu", default="H100", help="whose constants to fit")
    args = parser.parse_args()
    timed(args.files[0], args.seconds) if args.what == "time" else fit(
        args.files, plan.gpu_named(args.gpu)
    )


if __name__ == "__main__":
    sys.exit(console.run(main, as_json=False))
