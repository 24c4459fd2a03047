"""Train the small Llama that ships with slab_kernels, from nothing but the Python standard library.

    OMP_NUM_THREADS=1 python benchmarks/model/train.py --steps 2350 --muon-lr 8e-3 --batch-tokens 3072 \\
        --long-share 0.05 --checkpoint build/stdlib-llama.pt

The tokenizer and the model see `slab_kernels.text.stdlib.training_text()` only; every perplexity is on
`heldout_text()`. A killed run goes on from the checkpoint with the same command. The files in this folder came
from six commands on one checkpoint (AdamW, then Muon), listed with their first steps in training_run.json;
the single command above is the last of them and has not been run from step 0.
Written: config.json, generation_config.json, model.safetensors (fp16), the tokenizer files, training_log.csv
(one row an evaluation, on every 12th held-out window; seconds without restarts and discarded steps) and
training_run.json (commands, versions, seed, perplexities over all held-out text).
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
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from slab_kernels.text.stdlib import heldout_text, training_modules, training_text

HERE = Path(__file__).resolve().parent
BOS = "<s>"
VOCABULARY = 2048
POSITIONS = 1024

# Newlines carry the indentation that follows them ("\n        " is one token), and identifiers carry the
# character that joins them to their left: " name", "_name", ".name", "(name".
PIECES = r"\n+[ ]*|[ _.(]?\p{L}+|[ ]?\p{N}{1,3}|[ ]?[^\s\p{L}\p{N}]+|[ ]+|\s"

EVALUATION_STRIDE = (
    12  # periodic evaluations read every 12th held-out window, the final one all of them
)
LOG_FIELDS = ("step", "tokens", "lr", "train_loss", "heldout_perplexity", "seconds")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Byte-level BPE, 2048 entries, saved so that AutoTokenizer loads it; decoding is exact for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
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
    """[batch, context] int64: BOS and a random stretch each, a function of (seed, step) so a resume is exact."""
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
    """Per token, over windows of BOS and window-1 tokens without overlap; every `stride`-th window."""
    model.eval()
    windows = tokens[: len(tokens) // (window - 1) * (window - 1)].view(-1, window - 1)[::stride]
    losses = [
        loss_of(model, torch.cat([torch.full((len(rows), 1), bos), rows], dim=1)).item() * len(rows)
        for rows in windows.split(4)
    ]
    model.train()
    return math.exp(sum(losses) / len(windows))


def unigram_perplexity(training: torch.Tensor, heldout: torch.Tensor) -> float:
    """Held-out perplexity of the training token frequencies with add-one smoothing."""
    counts = torch.bincount(training, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[heldout].mean().item())


def schedule(step: int, settings) -> float:
    """Share of the peak learning rates: linear warm-up, then a cosine down to 5 %."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the matrices of the blocks (Jordan et al. 2024), in fp32.

    torch.optim.Muon orthogonalises in bf16, which a CPU without bf16 units does slowly. The update is scaled
    by 0.2 sqrt(max(N, K)) (Liu et al. 2025, equation 4), so that learning rates are those of AdamW.
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
    """Nearest matrix with all singular values near 1, by five quintic Newton-Schulz steps."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


def new_optimizers(model: LlamaForCausalLM, settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (AdamW when its rate is 0), AdamW for the embedding and the norms."""
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


def train(settings) -> None:
    torch.set_num_threads(settings.threads)
    folder = settings.out
    folder.mkdir(parents=True, exist_ok=True)
    settings.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    resumed = torch.load(settings.checkpoint) if settings.checkpoint.exists() else None
    if resumed is None:
        train_tokenizer(list(training_modules().values()), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token_id
    training, heldout = encode(tokenizer, training_text()), encode(tokenizer, heldout_text())
    unigram = unigram_perplexity(training, heldout)
    model = new_model(settings.seed, bos).train()
    optimizers = new_optimizers(model, settings)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first, seen, rows, earlier, commands = 0, 0, [], 0.0, []
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        if len(resumed["optimizers"]) == len(
            optimizers
        ):  # otherwise the optimizer was changed: fresh moments
            for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        first, seen, rows = resumed["step"], resumed["tokens"], resumed["rows"]
        earlier, commands = resumed["seconds"], resumed["commands"]
    commands.append({"from_step": first, "command": settings.command})
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(training)} training tokens, "
        f"{len(heldout)} held-out tokens, {len(heldout_text().encode()) / len(heldout):.2f} bytes a token, "
        f"unigram perplexity {unigram:.1f}, from step {first}",
        flush=True,
    )

    # Compiled: 3.0k instead of 2.2k tokens/s on one thread.
    training_loss = torch.compile(loss_of, dynamic=False) if settings.compile else loss_of
    start = time.monotonic() - earlier
    saved, recent = time.monotonic(), []
    for step in range(first, settings.steps):
        rate = schedule(step, settings)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * rate
        loss = training_loss(model, training_batch(training, bos, step, settings))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        seen += settings.batch_tokens
        recent.append(loss.item())
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.steps:
            perplexity = heldout_perplexity(
                model, heldout, bos, settings.context, EVALUATION_STRIDE
            )
            row = (done, seen, f"{rate * settings.lr:.3e}", f"{sum(recent) / len(recent):.4f}",
                   f"{perplexity:.3f}", round(time.monotonic() - start))  # fmt: skip
            rows.append(dict(zip(LOG_FIELDS, row, strict=True)))
            print(rows[-1], flush=True)
            write_log(folder / "training_log.csv", rows)
            recent = []
        if time.monotonic() - saved > settings.save_minutes * 60 or done == settings.steps:
            save_checkpoint(
                settings.checkpoint, model=model.state_dict(), step=done, tokens=seen, rows=rows,
                optimizers=[optimizer.state_dict() for optimizer in optimizers], seconds=time.monotonic() - start, commands=commands,
            )  # fmt: skip
            saved = time.monotonic()

    seconds = time.monotonic() - start
    model.half().save_pretrained(folder)
    GenerationConfig(bos_token_id=bos, eos_token_id=bos, pad_token_id=bos).save_pretrained(folder)
    # The perplexity on record is that of the fp16 values on file, in fp32 arithmetic.
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    run = {
        "commands": commands,
        "seed": settings.seed,
        "python": platform.python_version(),
        "versions": {
            name: __import__(name).__version__ for name in ("torch", "transformers", "tokenizers")
        },
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "training_tokens": len(training),
        "training_sha256": hashlib.sha256(training_text().encode()).hexdigest(),
        "heldout_tokens": len(heldout),
        "heldout_sha256": hashlib.sha256(heldout_text().encode()).hexdigest(),
        "heldout_bytes_per_token": round(len(heldout_text().encode()) / len(heldout), 4),
        "steps": settings.steps,
        "tokens_seen": seen,
        "seconds": round(seconds),
        "unigram_heldout_perplexity": round(unigram, 3),
        "heldout_perplexity": {
            str(window): round(heldout_perplexity(shipped, heldout, bos, window), 4)
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
