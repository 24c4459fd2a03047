"""Layer tables: torch's dense linear beside ours and other libraries', for known models.

    python benchmarks/bench_linear.py [--models llama-2-7b ...] [--m 1 4 16 64]
                                      [--values fp16 int4] [--dtype bf16]
                                      [--activations exact int8]

Shapes are those that engines run: q, k and v fused, gate and up fused. The script writes
OUT/linear-<device>-<what was chosen>-<commit>.csv, .json and (with matplotlib) .png, all at the end
and each whole; progress goes to stderr. Every row names threads, what was timed and how near it is
to the limits measured in the same run. The JSON also names device, versions and commit, and
`slab-kernels report` reads it. If time is limited on a GPU, give one model per call, since nothing
is written before the end. On a CPU OMP_NUM_THREADS says how many threads everybody gets.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slab_kernels.backends.activations import MODES
from slab_kernels.bench import linear, machine, peers
from slab_kernels.bench.case import Case, Row
from slab_kernels.bench.layer_shapes import MODELS, layers
from slab_kernels.cli import console
from slab_kernels.cli.meanings import DTYPES, parse_shape
from slab_kernels.device import resolve_device
from slab_kernels.errors import PlotsUnavailable
from slab_kernels.paths import expanded
from slab_kernels.report import speed, style
from slab_kernels.report.tables import cold

ROOT = Path(__file__).resolve().parent
COLUMNS = ("model", "n", "k", "m", "backend", "values", "activations", "dtype", "x_dtype",
           "rank", "adapter_rank", "group_size", "threads", "cache", "timing", "median_us",
           "iqr_us", "calls", "speedup_vs_dense", "gbytes_per_s", "bandwidth_share", "tflops",
           "matrix_share", "roofline", "bound", "bits_per_weight", "weight_bytes", "copies",
           "rotated_bytes", "rounds", "measured_gbytes_per_s", "measured_tflops")  # fmt: skip
CPU_TOKENS = (1, 4, 16, 64)
GPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)


class Defaults(NamedTuple):
    """What is run where the user says nothing."""

    models: Sequence[str]
    tokens: Sequence[int]
    dtypes: Sequence[str]  # of the activations
    seconds: float  # per row


DEFAULTS = {
    "cpu": Defaults(("llama-2-7b", "llama-3-8b"), CPU_TOKENS, ("fp32", "bf16"), 0.5),
    "cuda": Defaults(("llama-2-7b", "llama-3-8b", "llama-3-70b"), GPU_TOKENS, ("fp16",), 0.1),
}


def shape(text: str) -> tuple[int, int]:
    try:
        return parse_shape(text)
    except Exception as error:  # typer has its own class of errors.
        raise argparse.ArgumentTypeError(str(error).replace("--shape", "--shapes")) from error


def count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def plain_name(text: str) -> str:
    if not text or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file; --out says the folder")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, help="whose linears")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=[], help="NxK instead of or beside models"
    )
    parser.add_argument("--m", nargs="+", type=count, help="tokens at once")
    parser.add_argument("--values", nargs="+", default=["fp16", "bf16", "int8", "int4"])
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="of the activations and the dense weight"
    )
    parser.add_argument("--rank", type=int, default=1, help="of the sign term; 0 = none")
    parser.add_argument(
        "--adapter-rank", type=int, default=0, help="of the adapter P Q^T; 0 = none"
    )
    parser.add_argument(
        "--backends", nargs="+", help="default: all that can run it, without the reference"
    )
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=MODES,
        default=[None],
        help="how x enters our products on a CPU; default: the environment's word, else int8",
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--peers", action=flag, default=True, help="other libraries' kernels, where installed"
    )
    parser.add_argument("--seconds", type=float, help="least time a row is measured")
    parser.add_argument(
        "--rounds", type=count, default=1, help="time everything so often; the fastest counts"
    )
    parser.add_argument("--out", type=expanded, default=ROOT / "results")
    parser.add_argument(
        "--name", type=plain_name, help="of the files, without ending; default: as said above"
    )
    args = parser.parse_args(arguments)
    args.device = resolve_device(args.device)
    if args.device.type not in DEFAULTS:
        parser.error(f"--device {args.device}: there are clocks for {' and '.join(DEFAULTS)} only")
    defaults = DEFAULTS[args.device.type]
    # The file is named by what the user chose.
    args.chosen = args.models or [f"{n}x{k}" for n, k in args.shapes]
    args.models = args.models or ([] if args.shapes else defaults.models)
    args.m, args.dtype = args.m or defaults.tokens, args.dtype or defaults.dtypes
    args.seconds = defaults.seconds if args.seconds is None else args.seconds
    return args


def shapes(args: argparse.Namespace) -> dict[tuple[int, int], str]:
    """Shape -> the models that have it, each shape once."""
    owners: dict[tuple[int, int], list[str]] = {pair: [] for pair in args.shapes}
    for model in args.models:
        for pair in layers(model):
            owners.setdefault(pair, []).append(model)
    return {pair: " ".join(names) for pair, names in owners.items()}


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """All rows, and why peers are absent."""
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for (n, k), model in shapes(args).items():
        for dtype in args.dtype:
            case = Case(
                n,
                k,
                tokens=tuple(args.m),
                values=tuple(args.values),
                dtype=dtype,
                device=str(args.device),
                rank=args.rank,
                backends=args.backends,
                min_seconds=args.seconds,
                adapter_rank=args.adapter_rank,
                peers=args.peers,
                activations=tuple(args.activations),
            )
            found = linear.measure(case, rounds=args.rounds)
            for row in found.rows:
                rows.append({"model": model, **row})
                console.say(in_words(row))
            for name, reason in found.absent.items():
                if absent.get(name) != reason:
                    console.say(f"{n:6}x{k:<6} without {name}: {reason}")
            absent |= found.absent
    return rows, absent


def in_words(row: Row) -> str:
    return (
        f"{row['n']:6}x{row['k']:<6} m={row['m']:<4} {row['backend']:10} {row['values']:5} "
        f"{row['activations']:5} {row['dtype']} {row['cache']}{row['median_us']:10.1f} us "
        f"{row['speedup_vs_dense']:6.2f}x {row['gbytes_per_s']:7.1f} GB/s "
        f"{row['roofline']:5.0%} of {row['bound']}"
    )


def stem(args: argparse.Namespace, information: dict[str, Any]) -> str:
    """The name of the files: --name, or linear-<device>-<what was chosen>-<commit>."""
    if args.name:
        return args.name
    named = {found["device"]: found["name"] for found in information["devices"]}
    where = "cpu" if args.device.type == "cpu" else f"cuda:{args.device.index or 0}"
    ranks = [f"r{args.rank}"] * (args.rank != 1) + [f"a{args.adapter_rank}"] * (
        args.adapter_rank != 0
    )
    threads = [f"t{torch.get_num_threads()}"] * (where == "cpu")
    text = "-".join([named[where], *args.chosen, *ranks, *threads])
    return "linear-" + re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") + f"-{machine.commit()}"


def write(path: Path, content: bytes) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    # A folder that cannot be made fails before the measurements.
    args.out.mkdir(parents=True, exist_ok=True)
    rows, absent = measure(args)
    information = machine.information()
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    record = {
        "device": machine.one_line(),
        "commit": machine.commit(),
        "arguments": list(sys.argv[1:] if arguments is None else arguments),
        "rows": rows,
        "absent": absent,
        "peers": peers.versions(),
        "machine": information,
    }
    contents = {
        "csv": table.getvalue().encode(),
        "json": (json.dumps(record, indent=1) + "\n").encode(),
    }
    try:
        contents["png"] = style.png(speed.speed_by_tokens(cold(rows), style.LIGHT))
    except PlotsUnavailable as error:
        console.say(str(error))
    name = stem(args, information)
    for ending, content in contents.items():
        write(args.out / f"{name}.{ending}", content)
        print(args.out / f"{name}.{ending}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, as_json=False))
