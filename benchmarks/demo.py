"""The whole story on one model: compress it with five methods, measure, time, draw, let it speak.

    python benchmarks/demo.py                        the Llama that ships in benchmarks/model
    python benchmarks/demo.py PATH_OR_HUB_NAME --calibration my.txt --text other.txt

Writes OUT/<method>/ (checkpoints), OUT/results.json, OUT/report/report.html and its PNG files, the
last three anew after every method. A second run with the same settings reuses finished checkpoints,
an interrupted one goes on where it stopped; other settings replace them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from slab_kernels.cli.console import print_table, say
from slab_kernels.cli.progress import Progress
from slab_kernels.cli.threads import wait_passively
from slab_kernels.errors import CheckpointError, PlotsUnavailable
from slab_kernels.paths import expanded
from slab_kernels.report import measurements, tables, write
from slab_kernels.report.headline import headline

METHODS = ("magnitude", "wanda", "sparsegpt", "slab-paper", "slab")
SHIPPED = Path(__file__).resolve().parent / "model"
CODE_PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'
PROSE_PROMPT = "The most surprising thing about the history of science is"
BENCH_SHAPE = (11008, 4096)  # the widest linear of a 7B Llama: what decoding speed is about
BENCH_TOKENS = (1, 4, 16, 64)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=str(SHIPPED),
        help="model folder or hub name (default: the shipped model)",
    )
    parser.add_argument("--out", type=expanded, default=Path("demo-out"))
    parser.add_argument(
        "--calibration", default="stdlib", help="text file, folder, datasets name, or stdlib"
    )
    parser.add_argument(
        "--text", default="stdlib:heldout", help="held-out text for errors and perplexity"
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--values", default="fp16")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument(
        "--window", type=int, default=512, help="tokens a window, for calibration and perplexity"
    )
    parser.add_argument(
        "--eval-tokens", type=int, default=50_000, help="held-out tokens for perplexity"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=64,
        help="tokens generated for the speed and for the prompt",
    )
    parser.add_argument("--prompt", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="tiny settings: does everything work?")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.samples, args.window = "magnitude,slab", 8, 128
        args.eval_tokens, args.new_tokens = 2000, 8
    if args.prompt is None:
        args.prompt = CODE_PROMPT if args.model == str(SHIPPED) else PROSE_PROMPT
    return args


@dataclass
class Story:
    """What was found so far, as results.json holds it and the page shows it."""

    args: argparse.Namespace
    name: str  # of the model
    results: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    plots: bool = True

    @property
    def file(self) -> Path:
        return self.args.out / "results.json"

    def write(self) -> Path:
        """Writes results.json, the pictures and the page; returns the page."""
        content = {
            "model": self.name,
            "prompt": self.args.prompt,
            "results": self.results,
            "bench": self.timings,
            "notes": self.notes,
            "run": {
                "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
                "command": shlex.join(["python", "benchmarks/demo.py", *sys.argv[1:]]),
                "seconds": time.perf_counter() - self.began,
            },
        }
        self.args.out.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1) + "\n")
        found, folder = measurements.read([self.file]), self.args.out / "report"
        try:
            return write.write(found, folder, plots=self.plots)[-1]
        except PlotsUnavailable as error:
            say(str(error))
            self.plots = False
            return write.write(found, folder, plots=False)[-1]


class Dense(NamedTuple):
    """The model as it was before, and the text that every model is measured on."""

    folder: Path
    tokenizer: Any
    text: str
    device: Any
    dtype: Any  # of the activations; None: as stored


def dense_row(args: argparse.Namespace) -> tuple[Dense, dict[str, Any]]:
    """Opens the dense model and measures it. Cuts `args.window` to the model's positions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slab_kernels.device import resolve_device
    from slab_kernels.evaluate.inspect import inspect
    from slab_kernels.models.folder import hub_folder
    from slab_kernels.models.source import open_source
    from slab_kernels.models.totals import read_totals
    from slab_kernels.text import source as texts
    from slab_kernels.text import windows
    from slab_kernels.text.tokenizer import tokenize

    device = resolve_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else None  # half precision is slower on a CPU
    folder = hub_folder(args.model)
    open_source(folder)  # a damaged model is refused here, in a sentence
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").to(device).eval()
    positions = getattr(model.config, "max_position_embeddings", None) or args.window
    args.window = min(args.window, positions)
    text = texts.read_text(args.text, args.eval_tokens * windows.CHARACTERS_PER_TOKEN)
    text = tokenizer.decode(tokenize(tokenizer, text)[: args.eval_tokens])
    seen = inspect(folder)
    row = {
        "method": "dense",
        "bits_per_weight": seen["bits_per_weight"],
        **read_totals(folder).to_dict(),
        **measure(args, model, tokenizer, text, "dense: measuring"),
    }
    return Dense(Path(folder), tokenizer, text, device, dtype), row


def method_row(args: argparse.Namespace, method: str, dense: Dense, step: str) -> dict[str, Any]:
    """Compresses with one method and measures the result. step: which of how many, for a reader."""
    import slab_kernels
    from slab_kernels.evaluate.crop import weight_crop
    from slab_kernels.evaluate.inspect import inspect
    from slab_kernels.models.totals import read_totals

    folder = args.out / method
    record = compress(args, method, folder, f"{step} {method}: compressing")
    model = slab_kernels.load(folder, device=dense.device, dtype=dense.dtype)
    name = f"{step} {method}: measuring"
    measured = measure(args, model, dense.tokenizer, dense.text, name, dense.folder)
    errors = {layer.name: layer.heldout_error for layer in record.layers}
    seen = inspect(folder)
    totals = read_totals(folder)
    say(
        f"{step} {method}: {record.seconds:.0f} s, perplexity {measured['perplexity']:.3f}, "
        f"KL {measured['kl']:.4f} nats per token, {totals}"
    )
    return {
        "method": method,
        "pattern": "2:4",
        "rank": record.layers[0].rank,
        "values": args.values,
        "bits_per_weight": record.bits_per_weight,
        **totals.to_dict(),
        "layer_error": sum(errors.values()) / len(errors),
        "errors": errors,
        "heldout": True,
        "parts": {layer["name"]: layer["parts"] for layer in seen["layers"]},
        "crop": weight_crop(folder, dense.folder),
        "folder": str(folder),
        "compress_seconds": record.seconds,
        **measured,
    }


def compress(args: argparse.Namespace, method: str, folder: Path, name: str):
    """The run record of OUT/<method>: reused, resumed, or made anew when the settings changed."""
    import slab_kernels

    def run(resume: bool):
        with Progress(name, "layers") as progress:

            def note(event) -> None:
                if event.layers:
                    progress(event.done, event.layers)
                if event.kind == "warning":
                    progress.say(str(event))

            return slab_kernels.compress(
                args.model,
                folder,
                method=method,
                pattern="2:4",
                rank=args.rank,
                values=args.values,
                planes=1,  # as the methods beside ours have them
                embeddings="dense",
                head=False,
                calibration=args.calibration,
                heldout=args.text,
                samples=args.samples,
                window=args.window,
                device=args.device,
                resume=resume,
                progress=note,
            )

    ours = [folder / name for name in ("slab_run.json", "slab_progress.json")]
    if not any(path.exists() for path in ours):
        return run(resume=False)
    try:
        return run(resume=True)
    except CheckpointError as error:
        say(f"  {error}")
        say(f"  starting {folder} anew")
        shutil.rmtree(folder)  # holds a run of ours, as slab_run.json or slab_progress.json shows
        return run(resume=False)


def measure(
    args: argparse.Namespace, model, tokenizer, text: str, name: str, dense: Path | None = None
) -> dict[str, Any]:
    """Perplexity, speed and a continuation of one model, and how far it is from the dense one.

    dense: the folder of the dense model; None where the model is that itself.
    """
    from slab_kernels.evaluate.against import compare
    from slab_kernels.evaluate.generation import continuation, tokens_per_second
    from slab_kernels.evaluate.perplexity import perplexity

    with Progress(name, "windows") as progress:
        if dense is None:
            measured = perplexity(model, tokenizer, text, args.window, progress=progress)
        else:
            measured = compare(model, dense, tokenizer, text, args.window, progress=progress)
        speeds = [
            tokens_per_second(model, tokenizer, args.prompt, args.new_tokens)
            for _ in range(1 if args.smoke else 3)
        ]
        new, _ = continuation(model, tokenizer, args.prompt, args.new_tokens)
    measured["tokens_per_second"] = max(speeds)
    measured["continuation"] = tokenizer.decode(new, skip_special_tokens=True)
    return measured


def layer_timings(device: str) -> list[dict[str, Any]]:
    """torch's dense linear beside ours at the size of a large model: the shipped one is too small
    to show speed."""
    from slab_kernels.bench import linear

    case = linear.Case(
        *BENCH_SHAPE, tokens=BENCH_TOKENS, values=("fp16", "int4"), dtype="bf16", device=device
    )
    with Progress("timing a linear", "timings") as progress:
        return tables.cold(linear.measure(case, progress=progress).rows)


def notes(args: argparse.Namespace, dense: Dense, first: dict[str, Any]) -> list[str]:
    """What the numbers are of. first: the dense model's row."""
    from slab_kernels.bench import machine

    activations = str(dense.dtype or "as stored").removeprefix("torch.")
    return [
        machine.one_line(),
        f"Calibration: {args.samples} windows of {args.window} tokens of {args.calibration}. "
        f"Held out: {args.text}, {first['tokens']} tokens in {first['windows']} windows of "
        f"{first['window']} for perplexity. Activations {activations}.",
        "Bits per weight of the compressed linears as on disk; dense: "
        f"{first['bits_per_weight']:g} as stored. Speed: greedy generation of {args.new_tokens} "
        "tokens, one sequence, the best of three.",
    ]


def tell(story: Story, page: Path) -> None:
    """The end of the run, for people."""
    args, found = story.args, measurements.read([story.file])
    settings = f"2:4, rank {args.rank}, {args.values} values"
    print()
    print_table(tables.columns(found), tables.table(found), f"{story.name}, {settings}")
    for row in story.timings:
        print(
            f"  one {row['n']}×{row['k']} linear, m={row['m']}: {row['backend']} "
            f"{row['values'] or ''} {row['median_us']:,.0f} µs, "
            f"{row['speedup_vs_dense']:.2f}× torch's {row['dtype']} linear"
        )
    print("\n" + "\n".join(headline(found)))
    last = story.results[-1]
    print(f"\nThe model compressed with {last['method']} continues:\n")
    print("  " + (args.prompt + last["continuation"]).replace("\n", "\n  "))
    folder = shlex.quote(str(args.out / last["method"]))
    print(f"\npage      {page}\nresults   {story.file}\nmodels    {args.out}/<method>")
    print(f"next      slab-kernels generate {folder} --prompt 'Once upon a time'")
    print(f"{time.perf_counter() - story.began:.0f} s")


def main() -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    wait_passively()
    args = arguments()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = "the shipped Llama" if args.model == str(SHIPPED) else args.model
    story = Story(args, name)
    say(f"model: {name}")
    say(f"calibration: {args.calibration}, held-out text: {args.text}")
    dense, row = dense_row(args)
    story.results.append(row)
    story.notes = notes(args, dense, row)
    methods = args.methods.split(",")
    for number, method in enumerate(methods, 1):
        gc.collect()
        story.results.append(method_row(args, method, dense, f"[{number}/{len(methods)}]"))
        say(f"page so far: {story.write()}")
    if not args.smoke:
        story.timings = layer_timings(str(dense.device))
    tell(story, story.write())
    return 0


if __name__ == "__main__":
    from slab_kernels.cli import console

    sys.exit(console.run(main, as_json=False))
