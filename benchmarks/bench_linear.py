"""Layer tables: torch's dense linear beside our backends on the linears of known models.

    python benchmarks/bench_linear.py [--models llama-2-7b ...] [--m 1 4 16 64] [--values fp16 int4] [--dtype bfloat16]

writes benchmarks/results/linear-<device>-<commit>.{csv,json}; every row names threads, the JSON device, versions, commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
from pathlib import Path

import torch

from slab_kernels import machine
from slab_kernels.bench import bench_layer

ROOT = Path(__file__).resolve().parent
# [N, K] of the linears of a block, q/k/v and gate/up apart, as modules hold them; equal shapes once.
SHAPES = {
    "llama-2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama-2-13b": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "qwen2.5-0.5b": ((896, 896), (128, 896), (4864, 896), (896, 4864)),
    "qwen2.5-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
}
COLUMNS = ("model", "n", "k", "m", "backend", "values", "dtype", "rank", "group_size", "threads", "median_us", "iqr_us",
           "calls", "speedup_vs_dense", "gbytes_per_s", "bandwidth_share", "bits_per_weight", "weight_bytes", "copies",
           "rotated_bytes")  # fmt: skip


def commit() -> str:
    """The commit that was measured, with -dirty where the tree differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--values", nargs="+", default=["fp16", "bf16", "int8", "int4"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time a row is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()

    rows = []
    for model in arguments.models:
        for n, k in SHAPES[model]:
            for m in arguments.m:
                for dtype in arguments.dtype:
                    for values in arguments.values:
                        for row in bench_layer(n, k, m, values, getattr(torch, dtype), rank=arguments.rank,
                                               min_seconds=arguments.seconds):  # fmt: skip
                            rows.append({"model": model, **row})
                            print(
                                f"{model:13} {n:6}x{k:<6} m={m:<4} {row['backend']:6} {row['values']:5} {row['dtype']:9}"
                                f"{row['median_us']:10.1f} us {row['speedup_vs_dense']:6.2f}x {row['gbytes_per_s']:6.1f} GB/s",
                                flush=True,
                            )
    information = machine.information()
    name = re.sub(r"[^a-z0-9]+", "-", information["devices"][0]["name"].lower()).strip("-")
    stem = arguments.out / f"linear-{name}-{commit()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    record = {"bench": rows, "commit": commit(), "machine": information}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {stem}.csv and .json")


if __name__ == "__main__":
    main()
