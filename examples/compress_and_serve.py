"""Compresses a model, opens it by plain transformers, lets it write, and says how vLLM serves it.

    python examples/compress_and_serve.py [MODEL] [--out FOLDER] [--samples N] [--window N]

MODEL is a folder or a name on the Hugging Face hub; without one it is the small Llama that ships in
benchmarks/model, which takes half a minute on one core. More samples of a longer window give a
better model and take longer.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import slab_kernels

SHIPPED = Path(__file__).resolve().parents[1] / "benchmarks" / "model"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument("--out", default="compressed")
    parser.add_argument("--samples", type=int, default=4, help="windows of calibration text")
    parser.add_argument("--window", type=int, default=128, help="tokens in a window")
    parser.add_argument("--prompt", default="def read_lines(path):")
    args = parser.parse_args(arguments)

    record = slab_kernels.compress(
        args.model, args.out, preset="balanced", samples=args.samples, window=args.window
    )
    print(f"{args.out}: {record.bits_per_weight:.2f} bits per weight of the compressed linears")

    # With slab_kernels imported, plain from_pretrained opens the folder with its packed weights.
    model = AutoModelForCausalLM.from_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    tokens = tokenizer(args.prompt, return_tensors="pt").input_ids
    written = model.generate(tokens, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))

    # In an environment that has vLLM and slab_kernels; the plugin is found by itself.
    print(f"vllm serve {shlex.quote(args.out)} --dtype bfloat16")


if __name__ == "__main__":
    main()
