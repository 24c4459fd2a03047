"""Every method on one model with one calibration: layer error, perplexity, seconds and stored bits.

    python benchmarks/bench_methods.py                  measures the Llama in benchmarks/model
    python benchmarks/bench_methods.py MODEL --calibration my.txt --text other.txt --group-size 128

Errors are those on held-out text, and bits come from the bytes on disk. Beside the 2:4 methods
stand dense integer weights at the same bits: round-to-nearest and GPTQ. Writes OUT.json, one row
per entry as it is done, and OUT.png; a second run with the same OUT goes on where the first one
stopped. `--only` takes a part of a label.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from slab_kernels.paths import expanded

SHIPPED = Path(__file__).resolve().parent / "model"
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    family: which line or marker of the plot it belongs to.
    settings: keywords of `compress`.
    bits: of a dense integer weight; None for a method of the library.
    """

    label: str
    family: str
    settings: dict = field(default_factory=dict)
    bits: int | None = None


# Values and planes of ours that are also matched, which takes minutes each.
MATCHED = {("fp16", 1), ("int4", 2)}
BUDGETS = (3.6, 4.6)  # stored bits per weight of the searches


# Of a method from a paper: as it was published, which is without our last refit.
PUBLISHED = {"polish": 0}
# Values and planes of ours, as they are measured.
OWN = (
    ("fp16", 1), ("fp16", 2), ("int8", 1), ("int4", 1), ("int3", 1), ("int3", 2), ("int4", 2),
    ("int4", 3),
)  # fmt: skip
# Whose family the matched twin of an entry belongs to.
MATCHED_FAMILY = {
    "slab": "slab, matched",
    "slab, searched": "slab, matched",
    "gptq": "gptq, matched",
    "2:4, polished": "2:4, matched",
}


def entries(group_size: int, epochs: int, adapter_rank: int) -> list[Entry]:
    """All rows, the quick ones first. adapter_rank: of ours with P Q^T."""
    rows = dense_entries() + published_entries(group_size) + own_entries(group_size, adapter_rank)
    return rows + matched_entries(rows, epochs)


def dense_entries() -> list[Entry]:
    """Dense integer weights."""
    plain = [
        Entry(f"{name} int{bits}", name, {"method": name}, bits)
        for name in ("rtn", "gptq")
        for bits in (8, 4, 3, 2)
    ]
    finer = {"method": "gptq", "group_size": 32}
    return plain + [
        Entry(f"gptq int{bits}, groups of 32", "gptq", finer, bits) for bits in (4, 3, 2)
    ]


def published_entries(group_size: int) -> list[Entry]:
    """Methods of other papers, as published and with our last refit."""
    before, after = "2:4, published", "2:4, polished"
    names = ("magnitude", "wanda", "sparsegpt", "slab-paper")
    rows = [Entry(name, before, {"method": name}) for name in names]
    for name in ("alps", "eora", "oats", "sslc", "hassle-free", "threebasil"):
        own = {"method": name, "adapter_rank": None}
        rows.append(Entry(f"{name} as published", before, own | PUBLISHED))
        rows.append(Entry(f"{name} polished", after, own))
    int4 = {"values": "int4", "group_size": group_size}
    basil = {"method": "threebasil", "adapter_rank": None, **int4}
    rows.append(Entry("threebasil int4 polished", after, basil))
    inside = {"method": "hassle-free", "inner": "alps", **PUBLISHED}
    rows.append(Entry("hassle-free, alps inside", before, inside))
    for values in ("fp16", "int4"):
        slim = {"method": "slim", "values": values, "group_size": group_size}
        once = {**slim, "alternations": 1, **PUBLISHED}
        rows.append(Entry(f"slim {values} as published", before, once))
        rows.append(Entry(f"slim {values} polished", after, slim))
    return rows


def own_entries(group_size: int, adapter_rank: int) -> list[Entry]:
    """The library's own method."""
    ours = {"method": "slab", "group_size": group_size}
    rows = []
    for values, planes in OWN:
        name = f"slab {values}" + (f", {planes} planes" if planes > 1 else "")
        rows.append(Entry(name, "slab", {**ours, "values": values, "planes": planes}))
    for values in ("fp16", "int4"):
        both = {**ours, "values": values, "adapter_rank": adapter_rank}
        rows.append(Entry(f"slab {values}, S + P Q^T only", "slab", {**both, "rank": 0}))
        rows.append(Entry(f"slab {values}, with P Q^T", "slab", both))
    by_row = {**ours, "values": "int3", "planes": 2, "group_size": None}
    rows.append(Entry("slab int3, 2 planes, a scale a row", "slab", by_row))
    for bits in BUDGETS:
        searched = {"method": "slab", "bits": bits, "group_size": None}
        rows.append(Entry(f"slab, searched for {bits} bits", "slab, searched", searched))
    return rows


def matched_entries(rows: list[Entry], epochs: int) -> list[Entry]:
    """Some of the rows again, with transformer matching."""
    labels = ("threebasil polished", "gptq int4", "gptq int3")
    chosen = [
        row
        for row in rows
        if (row.settings.get("values"), row.settings.get("planes")) in MATCHED
        or "bits" in row.settings
    ]
    chosen += [row for row in rows if row.label in labels]
    return [
        replace(
            row,
            label=f"{row.label}, matched",
            family=MATCHED_FAMILY[row.family],
            settings={**row.settings, "matching": epochs},
        )
        for row in chosen
    ]


def register_dense_quantizers(group_size: int, bits: int) -> None:
    """Add rtn and gptq as methods of this process.

    They keep every weight, so they are no decomposition of the library's.
    """
    import torch

    from slab_kernels.format import INTEGER_RANGES, Decomposition
    from slab_kernels.methods import METHODS, Config, Method
    from slab_kernels.methods.solvers.masks import Pattern
    from slab_kernels.methods.solvers.quantize import Grid, quantize
    from slab_kernels.methods.solvers.sweep import curvature, sweep

    values = f"int{bits}"
    INTEGER_RANGES.setdefault("int2", (-2, 1))

    def rtn(weight, stats, config):
        """Nearest point of symmetric grids, steps of least squared error."""
        mask = torch.ones_like(weight, dtype=torch.bool)
        S, scales = quantize(weight, mask, values, group_size)
        return Decomposition(S, mask, scales=scales, values=values, group_size=group_size)

    def gptq(weight, stats, config):
        """GPTQ (arXiv 2210.17323): the sweep with every weight kept.

        The steps of a group are searched when the sweep reaches it.
        """
        mask = torch.ones_like(weight, dtype=torch.bool)
        swept = sweep(
            weight,
            curvature(stats.gram, 0.01),
            Pattern(),
            mask=mask,
            grid=Grid(values, group_size),
            joint=False,
        )
        return Decomposition(
            swept.approximation,
            swept.mask,
            scales=swept.scales,
            values=values,
            group_size=group_size,
        )

    METHODS["rtn"] = Method("rtn", rtn, Config, "none", "dense integers, round to nearest")
    METHODS["gptq"] = Method("gptq", gptq, Config, "gram", "dense integers, GPTQ")


def run(entry: Entry, args: argparse.Namespace, tokenizer, content: str) -> dict:
    """Compress with one entry's settings, measure, and throw the model away."""
    import torch
    from transformers import AutoModelForCausalLM

    import slab_kernels
    from slab_kernels.evaluate.against import compare
    from slab_kernels.models.totals import read_totals

    settings = dict(entry.settings)
    if entry.bits:
        group_size = settings.setdefault("group_size", args.group_size)
        register_dense_quantizers(group_size, entry.bits)
        # What is not 2:4 is written dense; the mask of these methods keeps everything.
        settings["pattern"] = "50%"
    scratch = Path(tempfile.mkdtemp(prefix="bench-methods-", dir=args.scratch))
    try:
        record = slab_kernels.compress(
            args.model,
            scratch / "out",
            calibration=args.calibration,
            heldout=args.text,
            samples=args.samples,
            window=args.window,
            device=args.device,
            progress=False,
            **settings,
        )
        if entry.bits:
            opened = AutoModelForCausalLM.from_pretrained(scratch / "out", dtype=args.dtype)
            model = opened.eval().to(args.device)
        else:
            model = slab_kernels.load(scratch / "out", device=args.device, dtype=args.dtype)
        measured = compare(model, args.source, tokenizer, content, args.window)
        totals = read_totals(scratch / "out")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    bits, size = record.bits_per_weight, totals.bytes
    if entry.bits:
        scales = sum(16 * N * math.ceil(K / group_size) for N, K in shapes(record))
        bits = entry.bits + scales / record.weights
        # They are written as dense weights; what counts is what they would take as integers.
        size += round((bits - record.bits_per_weight) * record.weights / 8)
    return {
        "label": entry.label,
        "family": entry.family,
        "settings": entry.settings,
        "bits_per_weight": bits,
        **{name: measured[name] for name in MEASURED},
        "bytes": size,
        "parameters": totals.parameters,
        "bits_per_parameter": 8 * size / totals.parameters,
        # Errors were measured before matching, and mean nothing after it.
        "layer_error": None if record.matching else record.mean_heldout_error,
        "seconds": record.seconds,
        "peak_bytes": max(layer.peak_bytes for layer in record.layers),
    }


# What a row has of `evaluate.against.compare`.
MEASURED = (
    "perplexity", "kl", "kl_p99", "top1", "perplexity_ratio", "perplexity_ratio_stderr",
)  # fmt: skip


def shapes(record) -> list[tuple[int, int]]:
    return [layer.shape for layer in record.layers]


# Family of entries: its name in the legend, colour, marker and line.
STYLES = {
    "rtn": ("dense, round to nearest", "0.55", "o", "--"),
    "gptq": ("dense, GPTQ", "0.15", "s", "-"),
    "gptq, matched": ("dense, GPTQ, matched", "0.15", "*", ":"),
    "2:4, published": ("2:4 methods as published", "tab:orange", "x", ""),
    "2:4, polished": ("2:4 methods, polished", "tab:green", "+", ""),
    "2:4, matched": ("3BASiL, matched", "tab:green", "*", ""),
    "slab": ("slab (ours)", "tab:blue", "D", ""),
    "slab, searched": ("slab, searched", "tab:blue", "v", "--"),
    "slab, matched": ("slab, matched", "tab:red", "D", ""),
}
MOST_PERPLEXITY = 1e4  # of a model that is drawn
# Each panel of the picture shows this range of stored bits per weight.
PANELS = ((2.0, 6.6), (8.0, 12.0))


def draw(found: dict, out: Path) -> None:
    """Perplexity above the dense model's, in percent of it, against stored bits in two panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense = found["dense"]
    fig, axes = plt.subplots(
        1, 2, figsize=(11, 5), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    for ax, (low, high) in zip(axes, PANELS, strict=True):
        shown = [
            row
            for row in sorted(found["rows"], key=lambda row: row["bits_per_weight"])
            if low <= row["bits_per_weight"] < high and row["perplexity"] < MOST_PERPLEXITY
        ]
        for family, (name, colour, marker, line) in STYLES.items():
            rows = [row for row in shown if row["family"] == family]
            ax.plot(
                [row["bits_per_weight"] for row in rows],
                [max(100 * (row["perplexity"] / dense - 1), 0.05) for row in rows],
                linestyle=line or "none",
                color=colour,
                marker=marker,
                label=name,
                linewidth=1.2,
                markersize=6,
            )
        ax.set_yscale("log")
        ax.set_xlim(low, high)
        ax.grid(alpha=0.3)
        ax.set_xlabel("stored bits per weight")
    axes[0].set_ylabel(f"held-out perplexity above dense ({dense:.2f}), %")
    axes[0].legend(fontsize=8)
    fig.suptitle(found["model"], fontsize=10)
    fig.savefig(out, dpi=130)


SETTINGS = ("samples", "window", "eval_tokens", "group_size", "epochs")  # of a results file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    out_help = "without suffix: OUT.json and OUT.png"
    parser.add_argument("--out", type=expanded, default=Path("bench-methods"), help=out_help)
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=50_000)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10, help="of transformer matching")
    parser.add_argument("--only", default="", help="entries whose label contains this")
    parser.add_argument("--device", default="cpu")
    scratch_help = "where compressed models lie while they are measured"
    parser.add_argument("--scratch", default=None, help=scratch_help)
    return parser.parse_args()


def begun(file: Path, args: argparse.Namespace, tokenizer, content: str) -> dict:
    """What an earlier run with these settings has found, else a new table with the dense model."""
    from transformers import AutoModelForCausalLM

    from slab_kernels.bench import machine
    from slab_kernels.evaluate.perplexity import perplexity

    settings = {name: getattr(args, name) for name in SETTINGS}
    found = json.loads(file.read_text()) if file.exists() else {}
    if found and found.get("settings") == settings:
        return found
    dense = AutoModelForCausalLM.from_pretrained(args.source, dtype=args.dtype or "auto")
    measured = perplexity(dense.to(args.device).eval(), tokenizer, content, args.window)
    return {
        "model": "the shipped Llama" if args.model == str(SHIPPED) else Path(args.model).name,
        "settings": settings,
        "machine": machine.one_line(),
        "rows": [],
        "dense": measured["perplexity"],
    }


def fill(found: dict, file: Path, args: argparse.Namespace, tokenizer, content: str) -> None:
    """Run every entry that has no row yet; the file is written after each."""
    from transformers import AutoConfig

    from slab_kernels.cli.console import say
    from slab_kernels.errors import BudgetError

    done = {row["label"] for row in found["rows"]}
    rank = max(1, AutoConfig.from_pretrained(args.source).hidden_size // 16)
    for entry in entries(args.group_size, args.epochs, rank):
        if entry.label in done or args.only not in entry.label:
            continue
        began = time.perf_counter()
        try:
            row = run(entry, args, tokenizer, content)
        except BudgetError as error:
            say(f"{entry.label}: {error}")
            continue
        found["rows"].append(row)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(file)
        say(
            f"{entry.label}: perplexity {row['perplexity']:.3f}, "
            f"{row['bits_per_weight']:.3f} bits, {time.perf_counter() - began:.0f} s"
        )


def show(found: dict) -> None:
    """Print the table of the results."""
    from slab_kernels.cli.console import print_table

    body = [
        (
            row["label"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else "–",
            f"{row['bits_per_parameter']:.3f}" if "bits_per_parameter" in row else "–",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.5f}" if "kl" in row else "–",
            f"{row['kl_p99']:.4f}" if "kl_p99" in row else "–",
            f"{row['top1']:.2%}" if "top1" in row else "–",
            f"{row['layer_error']:.4f}" if row["layer_error"] else "–",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        )
        for row in sorted(found["rows"], key=lambda row: row["bits_per_weight"])
    ]
    print_table(
        (
            "entry",
            "bits/weight",
            "MB",
            "bits/parameter",
            "perplexity",
            "KL",
            "KL 99 %",
            "same top token",
            "held-out layer error",
            "seconds",
            "peak GB",
        ),
        body,
        f"{found['model']}, dense {found['dense']:.3f}",
    )


def main() -> int:
    args = arguments()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from slab_kernels.models.folder import hub_folder
    from slab_kernels.models.source import open_source
    from slab_kernels.text import source as texts

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.dtype = torch.float32 if args.device == "cpu" else None
    args.source = hub_folder(args.model)
    open_source(args.source)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    content = texts.read_text(args.text, args.eval_tokens * texts.CHARACTERS_PER_TOKEN)
    content = tokenizer.decode(texts.tokenize(tokenizer, content)[: args.eval_tokens])
    file = args.out.with_suffix(".json")
    found = begun(file, args, tokenizer, content)
    fill(found, file, args, tokenizer, content)
    draw(found, args.out.with_suffix(".png"))
    show(found)
    print(f"{file}  {args.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    from slab_kernels.cli import console

    sys.exit(console.run(main, as_json=False))
