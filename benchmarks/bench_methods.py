"""Every method on one model, one calibration, one count of bits: held-out layer error, perplexity, seconds, bits from the bytes.

    python benchmarks/bench_methods.py                        the Llama that ships in benchmarks/model
    python benchmarks/bench_methods.py MODEL --calibration my.txt --text other.txt --group-size 128

Beside the 2:4 methods stand dense integer weights at the same bits: round-to-nearest and GPTQ. Writes OUT.json, a row an entry as
it is done, and OUT.png; a second run with the same OUT goes on where the first one stopped. `--only` takes a part of a label.
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
    """label; family: which line or marker of the plot; settings of `compress`; bits: of a dense integer weight, else None."""

    label: str
    family: str
    settings: dict = field(default_factory=dict)
    bits: int | None = None


MATCHED = {
    ("fp16", 1),
    ("int4", 2),
}  # values and planes of ours that are also matched: minutes each
BUDGETS = (3.6, 4.6)  # stored bits per weight of the searches


def entries(group_size: int, epochs: int, adapter_rank: int) -> list[Entry]:
    """All rows, the quick ones first. adapter_rank: of ours with P Q^T."""
    published, adapter = {"polish": 0}, {"adapter_rank": None}
    rows = [
        Entry(f"{name} int{bits}", name, {"method": name}, bits)
        for name in ("rtn", "gptq")
        for bits in (8, 4, 3, 2)
    ]
    rows += [
        Entry(f"gptq int{bits}, groups of 32", "gptq", {"method": "gptq", "group_size": 32}, bits)
        for bits in (4, 3, 2)
    ]
    rows += [
        Entry(name, "2:4, published", {"method": name})
        for name in ("magnitude", "wanda", "sparsegpt", "slab-paper")
    ]
    for name in ("alps", "eora", "oats", "sslc", "hassle-free", "threebasil"):
        rows.append(
            Entry(
                f"{name} as published", "2:4, published", {"method": name, **published, **adapter}
            )
        )
        rows.append(Entry(f"{name} polished", "2:4, polished", {"method": name, **adapter}))
    rows.append(
        Entry(
            "threebasil int4 polished",
            "2:4, polished",
            {"method": "threebasil", "values": "int4", "group_size": group_size, **adapter},
        )
    )
    rows.append(
        Entry(
            "hassle-free, alps inside",
            "2:4, published",
            {"method": "hassle-free", "inner": "alps", **published},
        )
    )
    for values in ("fp16", "int4"):
        slim = {"method": "slim", "values": values, "group_size": group_size}
        rows.append(
            Entry(
                f"slim {values} as published",
                "2:4, published",
                {**slim, "alternations": 1, **published},
            )
        )
        rows.append(Entry(f"slim {values} polished", "2:4, polished", slim))
    ours = {"method": "slab", "group_size": group_size}
    for values, planes in (
        ("fp16", 1),
        ("fp16", 2),
        ("int8", 1),
        ("int4", 1),
        ("int3", 1),
        ("int3", 2),
        ("int4", 2),
        ("int4", 3),
    ):
        name = f"slab {values}" + (f", {planes} planes" if planes > 1 else "")
        rows.append(Entry(name, "slab", {**ours, "values": values, "planes": planes}))
    for values in ("fp16", "int4"):
        both = {**ours, "values": values, "adapter_rank": adapter_rank}
        rows.append(Entry(f"slab {values}, S + P Q^T only", "slab", {**both, "rank": 0}))
        rows.append(Entry(f"slab {values}, with P Q^T", "slab", both))
    rows.append(
        Entry(
            "slab int3, 2 planes, a scale a row",
            "slab",
            {**ours, "values": "int3", "planes": 2, "group_size": None},
        )
    )
    rows += [
        Entry(
            f"slab, searched for {bits} bits",
            "slab, searched",
            {"method": "slab", "bits": bits, "group_size": None},
        )
        for bits in BUDGETS
    ]
    matched = [
        row
        for row in rows
        if (row.settings.get("values"), row.settings.get("planes")) in MATCHED
        or "bits" in row.settings
    ]
    matched += [
        row for row in rows if row.label in ("threebasil polished", "gptq int4", "gptq int3")
    ]
    kin = {
        "slab": "slab, matched",
        "slab, searched": "slab, matched",
        "gptq": "gptq, matched",
        "2:4, polished": "2:4, matched",
    }
    return rows + [
        replace(
            row,
            label=f"{row.label}, matched",
            family=kin[row.family],
            settings={**row.settings, "matching": epochs},
        )
        for row in matched
    ]


def register_dense_quantizers(group_size: int, bits: int) -> None:
    """rtn and gptq as methods of this process: they keep every weight, so they are no decomposition of the library's."""
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
        """GPTQ (arXiv 2210.17323): the sweep with every weight kept, steps of each group searched when it is reached."""
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
    import torch
    from transformers import AutoModelForCausalLM

    import slab_kernels
    from slab_kernels.evaluate.perplexity import perplexity

    settings = dict(entry.settings)
    if entry.bits:
        group_size = settings.setdefault("group_size", args.group_size)
        register_dense_quantizers(group_size, entry.bits)
        settings |= {
            "pattern": "50%"
        }  # what is not 2:4 is written dense; the mask keeps everything
    scratch = Path(tempfile.mkdtemp(prefix="bench-methods-", dir=args.scratch))
    try:
        record = slab_kernels.compress(
            args.model, scratch / "out", calibration=args.calibration, heldout=args.text, samples=args.samples, window=args.window,
            device=args.device, progress=False, **settings,
        )  # fmt: skip
        if entry.bits:
            model = (
                AutoModelForCausalLM.from_pretrained(scratch / "out", dtype=args.dtype)
                .eval()
                .to(args.device)
            )
        else:
            model = slab_kernels.load(scratch / "out", device=args.device, dtype=args.dtype)
        measured = perplexity(model, tokenizer, content, args.window)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    bits = record.bits_per_weight
    if entry.bits:
        shapes = [layer.shape for layer in record.layers]
        bits = entry.bits + sum(16 * N * math.ceil(K / group_size) for N, K in shapes) / sum(
            N * K for N, K in shapes
        )
    errors = (
        None if record.matching else [layer.heldout_error for layer in record.layers]
    )  # those before matching mean nothing after it
    return {
        "label": entry.label, "family": entry.family, "settings": entry.settings,
        "bits_per_weight": bits, "perplexity": measured["perplexity"], "layer_error": errors and sum(errors) / len(errors),
        "seconds": record.seconds, "peak_bytes": max(layer.peak_bytes for layer in record.layers),
    }  # fmt: skip


def draw(found: dict, out: Path) -> None:
    """Perplexity above the dense model's, in percent of it, against stored bits: two panels, about 2 to 5.5 bits and about 9 to 11."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense = found["dense"]
    families = {
        "rtn": ("dense, round to nearest", "0.55", "o", "--"), "gptq": ("dense, GPTQ", "0.15", "s", "-"),
        "gptq, matched": ("dense, GPTQ, matched", "0.15", "*", ":"),
        "2:4, published": ("2:4 methods as published", "tab:orange", "x", ""), "2:4, polished": ("2:4 methods, polished", "tab:green", "+", ""),
        "2:4, matched": ("3BASiL, matched", "tab:green", "*", ""), "slab": ("slab (ours)", "tab:blue", "D", ""),
        "slab, searched": ("slab, searched", "tab:blue", "v", "--"), "slab, matched": ("slab, matched", "tab:red", "D", ""),
    }  # fmt: skip
    fig, axes = plt.subplots(
        1, 2, figsize=(11, 5), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    for ax, (low, high) in zip(axes, ((2.0, 6.6), (8.0, 12.0)), strict=True):
        for family, (name, colour, marker, line) in families.items():
            rows = [
                r
                for r in found["rows"]
                if r["family"] == family
                and low <= r["bits_per_weight"] < high
                and r["perplexity"] < 1e4
            ]
            rows.sort(key=lambda r: r["bits_per_weight"])
            xs, ys = (
                [r["bits_per_weight"] for r in rows],
                [max(100 * (r["perplexity"] / dense - 1), 0.05) for r in rows],
            )
            ax.plot(
                xs,
                ys,
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument(
        "--out",
        type=expanded,
        default=Path("bench-methods"),
        help="without suffix: OUT.json and OUT.png",
    )
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=50_000)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10, help="of transformer matching")
    parser.add_argument("--only", default="", help="entries whose label contains this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--scratch", default=None, help="where compressed models lie while they are measured"
    )
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from slab_kernels.bench import machine
    from slab_kernels.cli.console import print_table, say
    from slab_kernels.errors import BudgetError
    from slab_kernels.evaluate.perplexity import perplexity
    from slab_kernels.models.folder import hub_folder
    from slab_kernels.models.source import open_source
    from slab_kernels.text import source as texts

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.dtype = torch.float32 if args.device == "cpu" else None
    source = hub_folder(args.model)
    open_source(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    content = texts.read_text(args.text, args.eval_tokens * texts.CHARACTERS_PER_TOKEN)
    content = tokenizer.decode(texts.tokenize(tokenizer, content)[: args.eval_tokens])
    file = args.out.with_suffix(".json")
    settings = {
        k: getattr(args, k) for k in ("samples", "window", "eval_tokens", "group_size", "epochs")
    }
    found = json.loads(file.read_text()) if file.exists() else {}
    if not found or found.get("settings") != settings:
        model = (
            AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype or "auto")
            .to(args.device)
            .eval()
        )
        name = "the shipped Llama" if args.model == str(SHIPPED) else Path(args.model).name
        found = {"model": name, "settings": settings, "machine": machine.one_line(), "rows": []}
        found["dense"] = perplexity(model, tokenizer, content, args.window)["perplexity"]
        del model
    done = {row["label"] for row in found["rows"]}
    rank = max(1, AutoConfig.from_pretrained(source).hidden_size // 16)
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
            f"{entry.label}: perplexity {row['perplexity']:.3f}, {row['bits_per_weight']:.3f} bits, {time.perf_counter() - began:.0f} s"
        )
    draw(found, args.out.with_suffix(".png"))
    rows = sorted(found["rows"], key=lambda row: row["bits_per_weight"])
    body = [
        (r["label"], f"{r['bits_per_weight']:.3f}", f"{r['perplexity']:.3f}", f"{r['layer_error']:.4f}" if r["layer_error"] else "–", f"{r['seconds']:.0f}",
         f"{r['peak_bytes'] / 1e9:.2f}")
        for r in rows
    ]  # fmt: skip
    print_table(
        ("entry", "bits/weight", "perplexity", "held-out layer error", "seconds", "peak GB"),
        body,
        f"{found['model']}, dense {found['dense']:.3f}",
    )
    print(f"{file}  {args.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    from slab_kernels.cli import console

    sys.exit(console.run(main, as_json=False))
