"""Trains the small Llama that ships with slab_kernels on the sources of the standard library.

    OMP_NUM_THREADS=1 python benchmarks/model/train.py --steps 2350 --muon-lr 8e-3 \\
        --batch-tokens 3072 --long-share 0.05 --checkpoint build/stdlib-llama.pt

The tokenizer and the model see `slab_kernels.text.stdlib.training_text()` only, and every
perplexity is measured on `heldout_text()`. A killed run goes on from its checkpoint with the same
command. The files in this folder came from six commands on one checkpoint (AdamW, then Muon), which
training_run.json lists with their first steps; the command above is the last of them and has not
been run from step 0.

The script writes config.json, generation_config.json, model.safetensors (fp16), the tokenizer's
files, training_log.csv (one row per evaluation on every 12th held-out window, with seconds that
leave out restarts and discarded steps) and training_run.json (commands, versions, seed and the
perplexities on all held-out text).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from slab_kernels.text.stdlib import heldout_text, training_modules, training_text

HERE = Path(__file__).resolve().parent
BOS = "<s>"
VOCABULARY = 2048
POSITIONS = 1024

# Newlines carry the indentation that follows them ("\n        " is one token), and identifiers
# carry the character that joins them to their left: " name", "_name", ".name", "(name".
PIECES = r"\n+[ ]*|[ _.(]?\p{L}+|[ ]?\p{N}{1,3}|[ ]?[^\s\p{L}\p{N}]+|[ ]+|\s"

# Periodic evaluations read every 12th held-out window; the final one reads all of them.
EVALUATION_STRIDE = 12
LOG_FIELDS = ("step", "tokens", "lr", "train_loss", "heldout_perplexity", "seconds")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Saves a byte-level BPE of 2048 entries for AutoTokenizer; it decodes any text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer, text: str) -> torch.Tensor:
    """Token ids [tokens] int64, without BOS."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def new_model(seed: int, bos: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=POSITIONS,
        tie_word_embeddings=True, bos_token_id=bos, eos_token_id=bos, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def training_batch(tokens: torch.Tensor, bos: int, step: int, settings) -> torch.Tensor:
    """Token ids [batch, context] int64, each row BOS and a random stretch.

    They depend on (seed, step) alone, so that a resumed run is exact.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    long = step >= settings.steps * (1 - settings.long_share)
    length = POSITIONS if long else settings.context
    rows = settings.batch_tokens // length
    starts = torch.randint(len(tokens) - length, (rows,), generator=generator)
    stretches = tokens[starts[:, None] + torch.arange(length - 1)]
    return torch.cat([torch.full((rows, 1), bos), stretches], dim=1)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.inference_mode()
def heldout_perplexity(
    model: LlamaForCausalLM, tokens: torch.Tensor, bos: int, window: int, stride: int = 1
) -> float:
    """The perplexity per token, over every `stride`-th window of BOS and window-1 tokens."""
    model.eval()
    windows = tokens[: len(tokens) // (window - 1) * (window - 1)].view(-1, window - 1)[::stride]
    losses = [
        loss_of(model, torch.cat([torch.full((len(rows), 1), bos), rows], dim=1)).item() * len(rows)
        for rows in windows.split(4)
    ]
    model.train()
    return math.exp(sum(losses) / len(windows))


def unigram_perplexity(training: torch.Tensor, heldout: torch.Tensor) -> float:
    """The held-out perplexity of the training tokens' frequencies with add-one smoothing."""
    counts = torch.bincount(training, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[heldout].mean().item())


def schedule(step: int, settings) -> float:
    """The share of the peak learning rates: a linear warm-up, then a cosine down to 5 %."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


class Muon(torch.optim.Optimizer):
    """Orthogonalises the momentum of the blocks' matrices (Jordan et al. 2024) in fp32.

    torch.optim.Muon orthogonalises in bf16, which is slow on a CPU without bf16 units. The update
    is scaled by 0.2 sqrt(max(N, K)) (Liu et al. 2025, equation 4), so that learning rates are those
    of AdamW.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalised(matrix.grad.lerp(average, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are near 1, by five quintic Newton-Schulz steps."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


def new_optimizers(model: LlamaForCausalLM, settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (AdamW when its rate is 0), AdamW for embedding and norms."""
    embedding = [model.get_input_embeddings().weight]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": embedding, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if not settings.muon_lr:
        groups.append({"params": matrices, "weight_decay": 0.1})
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(matrices, lr=settings.muon_lr)] if settings.muon_lr else [adamw]


def save_checkpoint(path: Path, **state) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def write_log(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Texts(NamedTuple):
    """Token ids [tokens] int64 of both texts, and the id that begins every window."""

    training: torch.Tensor
    heldout: torch.Tensor
    bos: int


@dataclass
class Progress:
    """What a checkpoint holds beside the weights and the optimizers' state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    commands: list[dict] = field(default_factory=list)


def restore(path: Path, model: LlamaForCausalLM, optimizers: list) -> Progress:
    """Loads the checkpoint, if there is one, into model and optimizers."""
    if not path.exists():
        return Progress()
    state = torch.load(path)
    model.load_state_dict(state["model"])
    # A run that went on with another set of optimizers starts with fresh moments.
    if len(state["optimizers"]) == len(optimizers):
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    return Progress(**{entry.name: state[entry.name] for entry in fields(Progress)})


def optimise(model, optimizers, texts: Texts, settings, progress: Progress) -> None:
    """Trains from `progress` to the last step, with evaluations and checkpoints on the way."""
    # Compiling gives 3.0k instead of 2.2k tokens/s on one thread.
    training_loss = torch.compile(loss_of, dynamic=False) if settings.compile else loss_of
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start = time.monotonic() - progress.seconds
    saved, recent = time.monotonic(), []
    for step in range(progress.step, settings.steps):
        rate = schedule(step, settings)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * rate
        loss = training_loss(model, training_batch(texts.training, texts.bos, step, settings))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        recent.append(loss.item())
        progress.step, progress.tokens = step + 1, progress.tokens + settings.batch_tokens
        progress.seconds = time.monotonic() - start
        last = progress.step == settings.steps
        if progress.step % settings.evaluate_every == 0 or last:
            perplexity = heldout_perplexity(
                model, texts.heldout, texts.bos, settings.context, EVALUATION_STRIDE
            )
            row = {
                "step": progress.step,
                "tokens": progress.tokens,
                "lr": f"{rate * settings.lr:.3e}",
                "train_loss": f"{sum(recent) / len(recent):.4f}",
                "heldout_perplexity": f"{perplexity:.3f}",
                "seconds": round(time.monotonic() - start),
            }
            progress.rows.append(row)
            print(row, flush=True)
            write_log(settings.out / "training_log.csv", progress.rows)
            recent = []
        if time.monotonic() - saved > settings.save_minutes * 60 or last:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(
                settings.checkpoint, model=model.state_dict(), optimizers=states, **vars(progress)
            )
            saved = time.monotonic()


def train(settings) -> None:
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    settings.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not settings.checkpoint.exists():
        train_tokenizer(list(training_modules().values()), settings.out)
    tokenizer = AutoTokenizer.from_pretrained(settings.out)
    texts = Texts(
        encode(tokenizer, training_text()),
        encode(tokenizer, heldout_text()),
        tokenizer.bos_token_id,
    )
    model = new_model(settings.seed, texts.bos).train()
    optimizers = new_optimizers(model, settings)
    progress = restore(settings.checkpoint, model, optimizers)
    progress.commands.append({"from_step": progress.step, "command": settings.command})
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, "
        f"{len(texts.training)} training tokens, {len(texts.heldout)} held-out tokens, "
        f"from step {progress.step}",
        flush=True,
    )
    optimise(model, optimizers, texts, settings, progress)
    finish(model, texts, settings, progress)


def finish(model: LlamaForCausalLM, texts: Texts, settings, progress: Progress) -> None:
    """Writes the model in fp16 and the record of the run."""
    folder, bos = settings.out, texts.bos
    model.half().save_pretrained(folder)
    GenerationConfig(bos_token_id=bos, eos_token_id=bos, pad_token_id=bos).save_pretrained(folder)
    # The perplexity on record is that of the fp16 values on file, in fp32 arithmetic.
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    libraries = ("torch", "transformers", "tokenizers")
    run = {
        "commands": progress.commands,
        "seed": settings.seed,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in libraries},
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "training_tokens": len(texts.training),
        "training_sha256": hashlib.sha256(training_text().encode()).hexdigest(),
        "heldout_tokens": len(texts.heldout),
        "heldout_sha256": hashlib.sha256(heldout_text().encode()).hexdigest(),
        "heldout_bytes_per_token": round(len(heldout_text().encode()) / len(texts.heldout), 4),
        "steps": settings.steps,
        "tokens_seen": progress.tokens,
        "seconds": round(progress.seconds),
        "unigram_heldout_perplexity": round(unigram_perplexity(texts.training, texts.heldout), 3),
        "heldout_perplexity": {
            str(window): round(heldout_perplexity(shipped, texts.heldout, bos, window), 4)
            for window in (settings.context, POSITIONS)
        },
    }
    (folder / "training_run.json").write_text(json.dumps(run, indent=2) + "\n")
    print(json.dumps(run, indent=2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="resumed from if it exists; outside git"
    )
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate of AdamW")
    parser.add_argument(
        "--muon-lr", type=float, default=0.0, help="peak rate of Muon for the matrices; 0: AdamW"
    )
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--long-share", type=float, default=0.3, help=f"last share of steps at context {POSITIONS}"
    )
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without a C++ compiler"
    )
    settings = parser.parse_args()
    settings.command = "OMP_NUM_THREADS=1 python benchmarks/model/train.py " + shlex.join(
        sys.argv[1:]
    )
    train(settings)


if __name__ == "__main__":
    main()
