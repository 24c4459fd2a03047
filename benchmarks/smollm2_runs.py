"""What a user of SmolLM2-135M-Instruct waits for: compressing it, and each token it then writes.

    make smollm2
    python benchmarks/smollm2_runs.py .cache/smollm2 --calibration my.txt

Five parts, each in processes of its own with --threads threads, and each stored once it is done:

compress    wall and CPU seconds of `compress --preset balanced` with 128 windows of 512 tokens.
chat        `generate --chat` of that folder beside the dense model: tokens per second of one and of
            eight texts at once, and where the time of a step goes.
answers     what both write to a few questions, greedily. Nothing is timed.
activations how far the compressed model is from the dense one with each accuracy mode of the CPU
            kernels, reading --text: many tokens at once by `eval --against`, and eight texts token
            by token, as in decoding.
layer       seconds of `decompose` with int4 values and two planes for one layer of random weights,
            whose 4096 inputs are correlated.

The compressed model stays in --folder, beside MODEL by default; one that is there is replaced when
compressing is timed. What --out already has is not measured again, unless --again asks for it, and
`--only chat` does one part.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slab_kernels.backends import activations as accuracy
from slab_kernels.bench import machine
from slab_kernels.paths import expanded

OUT = Path(__file__).resolve().parent / "results" / "smollm2-runs.json"
NAME = "SmolLM2-135M-Instruct"
PRESET, SAMPLES, WINDOW = "balanced", 128, 512
TOKENS, BATCH = 64, 8
QUESTIONS = (
    "What is the capital of France? Name three of its sights.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
)
RECORD = "slab_run.json"  # what `compress` leaves in a folder that it has finished
READ, STEPS = 12_000, 320  # tokens that are read at once in all; of each text token by token
SIZE, INPUTS, SHARED = 4096, 8192, 512  # of the layer: N and K, input vectors, their common causes


def run(words: list[str]) -> dict[str, Any]:
    """The JSON that a Python process prints, with its wall and CPU seconds and peak memory."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"smollm2_runs: {' '.join(words[:4])} failed: {done.stdout.decode().strip()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads(done.stdout) | {
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": after.ru_maxrss * 1024,
    }


def compress(args: argparse.Namespace) -> dict[str, Any]:
    """The whole command, from its start to its end."""
    if args.folder.exists():
        if not (args.folder / RECORD).is_file():
            sys.exit(f"smollm2_runs: {args.folder} is there and no compressed model; move it away")
        shutil.rmtree(args.folder)
    command = ["-m", "slab_kernels", "compress", args.model, str(args.folder), "--preset", PRESET]
    command += ["--calibration", args.calibration, "--samples", str(SAMPLES)]
    found = run([*command, "--window", str(WINDOW), "--device", "cpu", "--json"])
    names = (
        "bits_per_weight", "bytes", "mean_error", "mean_heldout_error", "wall_seconds",
        "cpu_seconds", "peak_bytes",
    )  # fmt: skip
    settings = {"preset": PRESET, "samples": SAMPLES, "window": WINDOW}
    settings["calibration"] = Path(args.calibration).name
    return settings | {name: found[name] for name in names}


def chat(args: argparse.Namespace) -> dict[str, Any]:
    """How fast both models answer the first question, in fp32."""
    command = ["-m", "slab_kernels", "generate", str(args.folder), "--against", args.model]
    command += ["--chat", "--prompt", QUESTIONS[0], "--tokens", str(TOKENS), "--batch", str(BATCH)]
    found = run([*command, "--device", "cpu", "--json"])
    names = ("stored", "bits_per_weight", "bytes", "dtype", "decoding")
    rows = [{name: row[name] for name in names} for row in found["results"]]
    return {"prompt": QUESTIONS[0], "tokens": TOKENS, "results": rows}


def answers(args: argparse.Namespace) -> dict[str, Any]:
    """What both models write to every question, and whether it was cut off."""
    rows = []
    for question in QUESTIONS:
        row = {"question": question}
        for name, folder in (("dense", args.model), (PRESET, str(args.folder))):
            command = ["-m", "slab_kernels", "generate", folder, "--chat", "--prompt", question]
            found = run([*command, "--tokens", str(TOKENS), "--device", "cpu", "--json"])
            row[name] = {"text": found["text"], "cut": found["tokens"] == TOKENS}
        rows.append(row)
    return {"tokens": TOKENS, "rows": rows}


def activations(args: argparse.Namespace) -> dict[str, Any]:
    """KL(dense || compressed) with each accuracy mode, in nats."""
    command = ["-m", "slab_kernels", "eval", str(args.folder), "--against", args.model, "--device"]
    command += ["cpu", "--text", args.text, "--window", str(WINDOW), "--max-tokens", str(READ)]
    many = {m: run([*command, "--json", "--activations", m]) for m in accuracy.MODES}
    few = run([__file__, args.model, "--folder", str(args.folder), "--text", args.text, "--decode"])
    return {
        "text": Path(args.text).name,
        "read_tokens": many["exact"]["tokens"],
        "decoded_tokens": BATCH * STEPS,
        "window": WINDOW,
        "batch": BATCH,
        "modes": [
            {"activations": m, "kl": many[m]["kl"], "kl_decoding": few[m]} for m in accuracy.MODES
        ],
    }


def decoding(args: argparse.Namespace) -> dict[str, float]:
    """Mode -> mean KL(dense || compressed) of BATCH texts of STEPS tokens, read token by token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    import slab_kernels
    from slab_kernels.text.source import read_text
    from slab_kernels.text.tokenizer import tokenize
    from slab_kernels.text.windows import CHARACTERS_PER_TOKEN

    content = read_text(args.text, BATCH * STEPS * CHARACTERS_PER_TOKEN)
    ids = tokenize(AutoTokenizer.from_pretrained(args.model), content)
    ids = ids[: BATCH * STEPS].view(BATCH, STEPS)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    found = {}
    with torch.no_grad():
        p = dense(ids, use_cache=False).logits.log_softmax(-1)
        for mode in accuracy.MODES:
            model = slab_kernels.load(args.folder, "cpu", torch.float32, activations=mode)
            cache, total = DynamicCache(), 0.0
            for step in range(STEPS):
                token = ids[:, step : step + 1]
                q = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
                terms = p[:, step].exp() * (p[:, step] - q.log_softmax(-1))
                total += float(terms.sum(dtype=torch.float64))
            found[mode] = total / (BATCH * STEPS)
    return found


def layer(args: argparse.Namespace) -> dict[str, Any]:
    """One large layer, timed without the start of Python."""
    return run([__file__, args.model, "--solve"])


def solve() -> dict[str, Any]:
    """Decompose the layer in this process, and print how long that took."""
    import torch

    import slab_kernels

    torch.manual_seed(0)
    x = torch.randn(INPUTS, SHARED) @ torch.randn(SHARED, SIZE) / SHARED**0.5
    x += 0.3 * torch.randn(INPUTS, SIZE)
    stats = slab_kernels.InputStats.from_gram(x.T @ x / INPUTS, INPUTS)
    weight = torch.randn(SIZE, SIZE) / SIZE**0.5
    began, cpu = time.perf_counter(), time.process_time()
    parts = slab_kernels.decompose(weight, stats, values="int4", planes=2)
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    lost = (parts.dense() - weight) @ x[:512].T
    error = float(lost.norm() / (weight @ x[:512].T).norm())
    sizes = {"out_features": SIZE, "in_features": SIZE, "values": "int4", "planes": 2}
    return sizes | {"seconds": seconds, "solver_cpu_seconds": spent, "error": error}


MEASURES = {
    "compress": compress,
    "chat": chat,
    "answers": answers,
    "activations": activations,
    "layer": layer,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("--calibration", default="stdlib", help="text that compression reads")
    parser.add_argument("--text", default="stdlib:heldout", help="text that activations reads")
    parser.add_argument("--folder", type=expanded, help="of the compressed model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=MEASURES, help="this part, and no other")
    parser.add_argument("--again", action="store_true", help="measure what is there anew")
    parser.add_argument("--out", type=expanded, default=OUT)
    parser.add_argument("--solve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder or Path(f"{args.model.rstrip('/')}-{PRESET}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is loaded, here and below
    return args


def stored(file: Path) -> dict[str, Any]:
    """What earlier runs have measured."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def wanted(args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """The parts to measure; the model is compressed where no folder of it is left."""
    parts = [args.only] if args.only else list(MEASURES)
    left = [part for part in parts if args.again or part not in found]
    opened = {"chat", "answers", "activations"} & set(left)
    if opened and "compress" not in left and not args.folder.is_dir():
        left.insert(0, "compress")
    return left


def main() -> int:
    args = arguments()
    if args.solve:
        print(json.dumps(solve()))
        return 0
    if args.decode:
        print(json.dumps(decoding(args)))
        return 0
    for part in wanted(args, stored(args.out)):
        print(f"smollm2_runs: {part}", file=sys.stderr, flush=True)
        measured = MEASURES[part](args)
        here = {
            "machine": machine.one_line(), "threads": args.threads, "commit": machine.commit(),
        }  # fmt: skip
        command = "python benchmarks/smollm2_runs.py"  # a report asks how a file was made
        found = {"model": NAME, "command": command, **stored(args.out), part: here | measured}
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        args.out.write_text(text, encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
