"""Time, memory and bits of compressing a random mixture of experts, by default of 218 M weights.

    python benchmarks/mixture.py
    python benchmarks/mixture.py --method slab --values int4 --planes 2

The dense model is written to a temporary folder first. A process of its own with --threads threads
then compresses it, so that its peak memory is that of compressing. Beside the peak stand the bytes
of one block, as the file has it and in the fp32 in which it is computed, and what the process held
before it began. The table goes to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from slab_kernels.bench import machine
from slab_kernels.paths import expanded

OUT = Path(__file__).resolve().parent / "results" / "mixture-cpu.json"
VOCABULARY, SLOTS = 4096, 2


def write_dense(folder: str, given: argparse.Namespace) -> None:
    """A random Mixtral in bf16, whose router sends tokens to all experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=VOCABULARY,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        num_local_experts=given.experts,
        num_experts_per_tok=SLOTS,
        max_position_embeddings=given.window,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Resident(threading.Thread):
    """Reads every 20 ms what this process has resident; `most` is the largest, in bytes.

    The peak that Linux keeps is of no use here: `compress` resets it before every layer.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = self.read()

    @staticmethod
    def read() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.read())
            time.sleep(0.02)


def compress(dense: str, out: str, given: argparse.Namespace) -> dict[str, Any]:
    """What one compression takes; the figures are of this process."""
    import torch

    import slab_kernels

    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (given.samples, given.window), generator=generator)
    before, memory = resource.getrusage(resource.RUSAGE_SELF), Resident()
    memory.start()
    began = time.perf_counter()
    record = slab_kernels.compress(
        dense,
        out,
        method=given.method,
        values=given.values,
        planes=given.planes,
        calibration=tokens,
        device="cpu",
        progress=True,
    )
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    block = sum(
        shape[0] * shape[1] for shape in (layer.shape for layer in record.layers if not layer.block)
    )
    return {
        "machine": machine.one_line(),
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": memory.most,
        "before_bytes": memory.first,
        "block_bytes": {"bf16": 2 * block, "fp32": 4 * block},
        "hidden_state_bytes": record.hidden_state_bytes,
        "weights": record.weights,
        "layers": len(record.layers),
        "bits_per_weight": record.bits_per_weight,
        "error": record.named_error,
        "routing": [vars(counts) for counts in record.experts],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in (
        ("experts", 8),
        ("blocks", 4),
        ("hidden", 1024),
        ("intermediate", 2048),
        ("samples", 16),
        ("window", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--values", default="int4")
    parser.add_argument("--planes", type=int, help="sign planes, of method slab")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=expanded, default=OUT, help="the table to write")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)  # the process that compresses
    given = parser.parse_args(arguments)
    if given.inside:
        print(json.dumps(compress(*given.inside, given)))
        return
    passed = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as folder:
        write_dense(f"{folder}/dense", given)
        words = [sys.executable, __file__, *passed, "--inside", f"{folder}/dense", f"{folder}/out"]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    sizes = {
        name: getattr(given, name)
        for name in ("experts", "blocks", "hidden", "intermediate", "samples", "window")
    }
    table = {
        "command": "python benchmarks/mixture.py",
        "threads": given.threads,
        "commit": machine.commit(),
        "method": given.method,
        "values": given.values,
        "planes": given.planes,
        **sizes,
        **json.loads(done.stdout),
    }
    given.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(
        f"{table['weights'] / 1e6:.0f} M weights in {table['seconds']:.0f} s, "
        f"{table['bits_per_weight']:.3f} bits per weight, {table['error']}; peak "
        f"{table['peak_bytes'] / 1e6:.0f} MB, of which {table['before_bytes'] / 1e6:.0f} MB were "
        f"there before; one block in fp32 is {table['block_bytes']['fp32'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
