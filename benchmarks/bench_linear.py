"""Layer tables: torch's dense linear beside our backends on the linears of known models.

    python benchmarks/bench_linear.py [--models llama-2-7b ...] [--m 1 4 16 64] [--values fp16 int4] [--dtype bf16]

writes benchmarks/results/linear-<device>-<commit>.{csv,json}; every row names threads, the JSON device, versions, commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
from pathlib import Path

from slab_kernels import machine
from slab_kernels.bench import layer_rows
from slab_kernels.layer_shapes import LAYERS

ROOT = Path(__file__).resolve().parent
COLUMNS = ("model", "n", "k", "m", "backend", "values", "dtype", "rank", "group_size", "threads", "median_us", "iqr_us",
           "calls", "speedup_vs_dense", "gbytes_per_s", "bandwidth_share", "bits_per_weight", "weight_bytes", "copies",
           "rotated_bytes")  # fmt: skip


def commit() -> str:
    """The commit that was measured, with -dirty where the tree differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=["llama-2-7b", "llama-3-8b"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--values", nargs="+", default=["fp16", "bf16", "int8", "int4"])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time a row is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()

    rows = []
    for model in arguments.models:
        for n, k in LAYERS[model]:
            for dtype in arguments.dtype:
                for row in layer_rows(n, k, arguments.m, arguments.values, dtype, rank=arguments.rank, min_seconds=arguments.seconds):
                    rows.append({"model": model, **row})
                    print(
                        f"{model:13} {n:6}x{k:<6} m={row['m']:<4} {row['backend']:6} {row['values']:5} {row['dtype']:9}"
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
