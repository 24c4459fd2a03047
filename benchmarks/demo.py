"""The whole story on one model: compress it with five methods, measure, time, draw, and let it speak.

    python benchmarks/demo.py                        the Llama that ships in benchmarks/model
    python benchmarks/demo.py PATH_OR_HUB_NAME --calibration my.txt --text other.txt

Writes OUT/<method>/ (checkpoints), OUT/results.json, OUT/report/report.html and its PNG files. A second run with the same
settings reuses finished checkpoints, an interrupted one goes on where it stopped; other settings replace them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path

from slab_kernels.paths import expanded

METHODS = ("magnitude", "wanda", "sparsegpt", "slab-paper", "slab")
SHIPPED = Path(__file__).resolve().parent / "model"
CODE_PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'
PROSE_PROMPT = "The most surprising thing about the history of science is"
BENCH_SHAPE = (11008, 4096)  # the widest linear of a 7B Llama: what decoding speed is about


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
        args.methods, args.samples, args.window, args.eval_tokens, args.new_tokens = (
            "magnitude,slab",
            8,
            128,
            2000,
            8,
        )
    if args.prompt is None:
        args.prompt = CODE_PROMPT if args.model == str(SHIPPED) else PROSE_PROMPT
    return args


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def compress(args: argparse.Namespace, method: str, folder: Path):
    """The run record of OUT/<method>: reused, resumed, or made anew when the settings have changed."""
    import slab_kernels
    from slab_kernels.errors import CheckpointError

    def run(resume: bool):
        return slab_kernels.compress(
            args.model, folder, method=method, pattern="2:4", rank=args.rank, values=args.values, calibration=args.calibration,
            heldout=args.text, samples=args.samples, window=args.window, device=args.device, resume=resume,
            progress=True if sys.stderr.isatty() else None,
        )  # fmt: skip

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


def measure(args: argparse.Namespace, model, tokenizer, text: str) -> dict:
    """Perplexity, speed and a continuation of one model."""
    import torch

    from slab_kernels.evaluate.generation import tokens_per_second
    from slab_kernels.evaluate.perplexity import perplexity

    measured = perplexity(model, tokenizer, text, args.window)
    speeds = [
        tokens_per_second(model, tokenizer, args.prompt, args.new_tokens)
        for _ in range(1 if args.smoke else 3)
    ]
    measured["tokens_per_second"] = max(speeds)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(
        model.device
    )
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens)
    measured["continuation"] = tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return measured


def layer_timings(device: str) -> list[dict]:
    """torch's dense linear beside ours at the size of a large model, since the shipped one is too small to show speed."""
    from slab_kernels.bench import linear as bench
    from slab_kernels.report import tables as report

    return report.cold(
        bench.layer_rows(
            *BENCH_SHAPE, tokens=(1,), values=("fp16", "int4"), dtype="bf16", device=device
        )
    )


def main() -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args = arguments()
    begun = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import slab_kernels
    from slab_kernels.bench import machine
    from slab_kernels.cli.console import print_table
    from slab_kernels.device import resolve_device
    from slab_kernels.evaluate.inspect import inspect
    from slab_kernels.models.folder import hub_folder
    from slab_kernels.models.source import open_source
    from slab_kernels.report import tables as report
    from slab_kernels.text import source as texts

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = resolve_device(args.device)
    dtype = (
        torch.float32 if device.type == "cpu" else None
    )  # the activations; half precision is slower on a CPU
    name = "the shipped Llama" if args.model == str(SHIPPED) else args.model
    say(
        f"model: {name}\ncalibration: {args.calibration}, held-out text: {args.text}\n{machine.one_line()}\n"
    )

    say("dense: measuring")
    source = hub_folder(args.model)
    open_source(source)  # a damaged model is refused here, in a sentence
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto").to(device).eval()
    args.window = min(
        args.window, getattr(dense.config, "max_position_embeddings", None) or args.window
    )
    content = texts.read_text(args.text, args.eval_tokens * texts.CHARACTERS_PER_TOKEN)
    content = tokenizer.decode(texts.tokenize(tokenizer, content)[: args.eval_tokens])
    stored_bits = inspect(source)["bits_per_weight"]
    results = [
        {
            "method": "dense",
            "bits_per_weight": stored_bits,
            **measure(args, dense, tokenizer, content),
        }
    ]
    del dense

    for method in args.methods.split(","):
        gc.collect()
        say(f"{method}: compressing")
        folder = args.out / method
        record = compress(args, method, folder)
        model = slab_kernels.load(folder, device=device, dtype=dtype)
        measured = measure(args, model, tokenizer, content)
        del model
        errors = {layer.name: layer.heldout_error for layer in record.layers}
        results.append(
            {
                "method": method, "pattern": "2:4", "rank": record.layers[0].rank, "values": args.values,
                "bits_per_weight": record.bits_per_weight, "layer_error": sum(errors.values()) / len(errors), "errors": errors,
                "heldout": True, "folder": str(folder), "compress_seconds": record.seconds, **measured,
            }
        )  # fmt: skip
        say(f"  {record.seconds:.0f} s, perplexity {measured['perplexity']:.3f}\n")

    timings = [] if args.smoke else layer_timings(str(device))
    first = results[0]
    notes = [
        machine.one_line(),
        f"Calibration: {args.samples} windows of {args.window} tokens of {args.calibration}. Held out: {args.text}, {first['tokens']} tokens "
        f"in {first['windows']} windows of {first['window']} for perplexity. Activations {str(dtype or 'as stored').removeprefix('torch.')}.",
        f"Bits per weight of the compressed linears as on disk; dense: {stored_bits:g} as stored. Speed: greedy generation of "
        f"{args.new_tokens} tokens, one sequence, the best of three.",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    file.write_text(
        json.dumps({"model": name, "results": results, "bench": timings, "notes": notes}, indent=1)
        + "\n"
    )
    found = report.read([file])
    try:
        page = report.write(found, args.out / "report")[-1]
    except report.PlotsUnavailable as error:
        say(str(error))
        page = report.write(found, args.out / "report", plots=False)[-1]

    print()
    print_table(
        report.COLUMNS, report.table(found), f"{name}, 2:4, rank {args.rank}, {args.values} values"
    )
    for row in timings:
        print(f"  one {row['n']}×{row['k']} linear, m={row['m']}: {row['backend']} {row['values'] or ''} {row['median_us']:,.0f} µs, "
              f"{row['speedup_vs_dense']:.2f}× torch's {row['dtype']} linear")  # fmt: skip
    print(f"\n{report.headline(found)}")
    print(f"\nThe model compressed with {results[-1]['method']} continues:\n")
    print("  " + (args.prompt + results[-1]["continuation"]).replace("\n", "\n  "))
    print(
        f"\npage      {page}\nresults   {file}\nmodels    {args.out}/<method>   (slab-kernels generate {args.out / results[-1]['method']} --prompt …)"
    )
    print(f"{time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    from slab_kernels.cli import console

    sys.exit(console.run(main, as_json=False))
