"""Tokens a second of a whole model on a CPU: dense, ours, and llama.cpp's Q4_0.

    python benchmarks/bench_end_to_end.py [--threads 1 2] [--dtype fp32] [--out FILE.json]

The model has the shapes of Llama-3.2-1B and random numbers, which cost the same time as trained
ones; nothing is downloaded. Contestants are the dense model in transformers, in bf16 or, where a
CPU has no instructions for that, in fp32 (--dtype), the same model with packed linears (int4
values, one plane of rank 1) in both accuracy modes, with its tied head dense or packed, and a Q4_0
file of the same shapes in llama.cpp, where the package llama_cpp is installed
(end_to_end_gguf.py). Timed are decode steps of 1 and 8 texts that begin with one token, and the
reading of a prompt of 512 tokens. The faster of two runs counts, so the first may warm up. The
JSON names machine, versions and commit. Memory stays below 8 GB (fp32: 12 GB).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import end_to_end_gguf as gguf_file
import torch
from torch import Tensor

from slab_kernels.backends.activations import MODES
from slab_kernels.bench import machine, peers
from slab_kernels.bench.random_weight import random_weight
from slab_kernels.cli import console
from slab_kernels.format import PackedLayout, PackedWeight
from slab_kernels.models.skeleton import config_skeleton, place
from slab_kernels.models.ties import untie
from slab_kernels.nn import prepare, replace_linear
from slab_kernels.nn.dense_head import copy_slices
from slab_kernels.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP = 128  # inputs that a scale of our int4 values covers
SLICE = 4008  # rows of the head that are made, and repeated, at most
REPEATS = 2  # runs of which the faster counts
HEADS = ("dense", "packed")


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama, and how much of it is timed."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    steps: int  # decode steps of a run
    prompt: int  # tokens that are read at once
    batches: tuple[int, ...] = (1, 8)

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name within a block -> (out_features, in_features)."""
        kv = self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }


WHOLE = Shapes(2048, 8192, 16, 32, 8, 128256, steps=24, prompt=512)
SMOKE = Shapes(256, 512, 2, 4, 2, 512, steps=2, prompt=8)

Run = Callable[[], float]  # returns tokens a second


def skeleton(shapes: Shapes, dtype: torch.dtype) -> PreTrainedModel:
    """The model without numbers, its head tied to its embedding."""
    from transformers import LlamaConfig

    return config_skeleton(
        LlamaConfig(
            hidden_size=shapes.hidden,
            intermediate_size=shapes.ffn,
            num_hidden_layers=shapes.layers,
            num_attention_heads=shapes.heads,
            num_key_value_heads=shapes.kv_heads,
            vocab_size=shapes.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            dtype=dtype,
        )
    )


def fill(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Random numbers for every parameter; blocks hold copies of the same ones."""
    made: dict[tuple[int, ...], Tensor] = {}
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        shape = tuple(parameter.shape)
        if len(shape) == 1:  # of a norm
            place(model, name, torch.ones(shape, dtype=dtype))
            continue
        if shape not in made:
            made[shape] = torch.empty(shape, dtype=dtype).normal_(std=0.02)
        place(model, name, made[shape].clone())
    model.tie_weights()
    return model.eval()


def layout(n: int, k: int) -> PackedLayout:
    return PackedLayout(n, k, "int4", GROUP, rank=1)


def tall(n: int, k: int) -> PackedWeight:
    """A random packed weight whose rows repeat: making n of them takes long, and much memory."""
    rows = next(size for size in range(min(n, SLICE), 0, -1) if n % size == 0)
    part = random_weight(layout(rows, k))
    tensors = {
        name: t.clone() if name == "V" else t.repeat(n // rows, 1)
        for name, t in part.tensors().items()
    }
    return PackedWeight(layout(n, k), **tensors)


def packed_model(shapes: Shapes, head: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with every linear of its blocks packed, and its head if that is "packed"."""
    model = skeleton(shapes, dtype)
    weights: dict[str, PackedWeight] = {}
    if head == "packed":
        untie(model)
        weights["lm_head"] = tall(shapes.vocabulary, shapes.hidden)
    for name, (n, k) in shapes.linears().items():
        made = random_weight(layout(n, k))
        for block in range(shapes.layers):
            own = {part: t.clone() for part, t in made.tensors().items()}
            weights[f"model.layers.{block}.{name}"] = PackedWeight(made.layout, **own)
    replace_linear(model, weights)
    copy_slices(model)  # as `load` does
    return fill(model, dtype)


def tokens_of(shapes: Shapes, batch: int, count: int) -> Tensor:
    """The same random ids [batch, count] every time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(shapes.vocabulary, (batch, count), generator=generator)


@torch.inference_mode()
def decode(model: PreTrainedModel, shapes: Shapes, batch: int) -> float:
    """Tokens a second of all texts together, by `generate`, without its first call."""
    moments: list[float] = []
    hook = model.register_forward_pre_hook(lambda *_: moments.append(time.perf_counter()))
    ids = tokens_of(shapes, batch, 1)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=None,
            min_new_tokens=shapes.steps + 2,
            max_new_tokens=shapes.steps + 2,
            pad_token_id=0,
        )
    finally:
        hook.remove()
    # From the second call to the last there are `steps` of them.
    return batch * shapes.steps / (moments[-1] - moments[1])


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, shapes: Shapes) -> float:
    """Tokens a second of one prompt, with the logits of its last token, as `generate` asks."""
    ids = tokens_of(shapes, 1, shapes.prompt)
    began = time.perf_counter()
    logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    took = time.perf_counter() - began
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite, so its times mean nothing")
    return shapes.prompt / took


def timings(model: PreTrainedModel, shapes: Shapes) -> Iterator[tuple[dict[str, Any], Run]]:
    """What is timed of a model, each with a function that runs it once."""
    for batch in shapes.batches:
        yield (
            {"what": "decode", "batch": batch, "tokens": shapes.steps},
            partial(decode, model, shapes, batch),
        )
    yield (
        {"what": "prompt", "batch": 1, "tokens": shapes.prompt},
        partial(read_prompt, model, shapes),
    )


def contestants(shapes: Shapes, word: str) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Columns that name a contestant, and its model, ready to run; one model is in memory."""
    dtype = DTYPES[word]
    model = fill(skeleton(shapes, dtype), dtype)
    yield {"backend": "dense", "values": word, "activations": "exact", "head": "dense"}, model
    del model
    for head in HEADS:
        model = packed_model(shapes, head, dtype)
        for mode in MODES:
            prepare(model, dtype, activations=mode)
            yield {"backend": "slab", "values": "int4", "activations": mode, "head": head}, model
        del model


def weight_bytes(model: PreTrainedModel) -> int:
    """The bytes of all parameters and packed tensors, each tensor once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def measure(
    shapes: Shapes, threads: Sequence[int], dtype: str, llama: bool
) -> tuple[list[dict], dict]:
    """All rows, and why contestants are absent."""
    rows: list[dict[str, Any]] = []

    def note(columns: dict[str, Any], run: Run) -> None:
        rows.append({**columns, "tokens_per_second": max(run() for _ in range(REPEATS))})
        console.say(in_words(rows[-1]))

    for name, model in contestants(shapes, dtype):
        stored = {"weight_bytes": weight_bytes(model)}
        for count in threads:
            torch.set_num_threads(count)
            for columns, run in timings(model, shapes):
                note({**name, "threads": count, **columns, **stored}, run)
        del model, run
        gc.collect()
    absent: dict[str, str] = {}
    if reason := gguf_file.missing():
        absent["llama.cpp"] = reason
    elif llama:
        try:
            with gguf_file.written(shapes) as path:
                for columns, run in gguf_file.timings(path, shapes, threads):
                    note(columns, run)
        except Exception as error:  # It is not ours, and what was measured before is kept.
            absent["llama.cpp"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, reason in absent.items():
        console.say(f"without {name}: {reason}")
    return rows, absent


def in_words(row: dict[str, Any]) -> str:
    return (
        f"{row['backend']:10} {row['values']:5} {row['activations']:6} head {row['head']:7} "
        f"{row['threads']} threads  {row['what']:6} batch {row['batch']}: "
        f"{row['tokens_per_second']:.1f} tokens/s"
    )


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and the dense model")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument(
        "--llama-cpp", action=argparse.BooleanOptionalAction, default=True, help="time it too"
    )
    parser.add_argument("--out", type=expanded, default=RESULTS / "end-to-end-cpu.json")
    args = parser.parse_args(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails before the measurements
    shapes = SMOKE if args.smoke else WHOLE
    before = torch.get_num_threads()
    try:
        rows, absent = measure(shapes, args.threads, args.dtype, args.llama_cpp)
    finally:
        torch.set_num_threads(before)
    record = {
        "device": machine.one_line(),
        "commit": machine.commit(),
        "arguments": list(sys.argv[1:] if arguments is None else arguments),
        "shapes": vars(shapes),
        "rows": rows,
        "absent": absent,
        "peers": peers.versions(),
        "machine": machine.information(),
    }
    temporary = args.out.with_name(args.out.name + ".tmp")
    try:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.out)
    finally:
        temporary.unlink(missing_ok=True)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, as_json=False))
