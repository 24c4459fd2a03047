"""Adapter training after compression, SLiM's recipe (arXiv 2410.09615, section 3.4): P and Q learn a text, S and all else stay.

The whole model runs from its packed weights; gradients reach P and Q of every compressed linear alone, so what is kept for
them is small beside the model. A model without adapters gets some: Q random, P zero, as in LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, write_atomically
from .format import PackedWeight, pack_adapter
from .nn import SlabLinear
from .packed_checkpoint import load, save
from .side_files import read_tokenizer
from .source import hub_folder
from .text import CHARACTERS_PER_TOKEN, READ_AHEAD, CalibrationError, read_text, sample_windows

HELD_BACK = 16  # every sixteenth window judges, and is never trained on


@dataclass(frozen=True)
class Training:
    """steps of Adam over `batch` windows of `window` tokens; rate: largest step, reached after a tenth of them, then a cosine to 0.
    adapter_rank: for layers that have no adapter; 0 leaves those alone.  every: steps between two notes of the state.
    """

    steps: int = 200
    batch: int = 8
    window: int = 512
    samples: int = 512
    rate: float = 3e-4
    adapter_rank: int = 0
    every: int = 25
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "samples", "every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} of training must be an integer of at least 1")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate!r} of training must be above 0")


class AdaptedLinear(nn.Module):
    """y = frozen packed linear(x) + (x Q) P^T; P [N,R'] and Q [K,R'] fp32 parameters."""

    def __init__(self, linear: SlabLinear, P: Tensor, Q: Tensor):
        super().__init__()
        packed = linear.packed()
        bare = replace(packed.layout, adapter_rank=0, adapter_values=None)
        self.base = SlabLinear.from_packed(replace(packed, layout=bare, P=None, Q=None), linear.bias)
        self.P, self.Q = nn.Parameter(P.float()), nn.Parameter(Q.float())
        self.whole = packed

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x.float() @ self.Q) @ self.P.T).to(x.dtype)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """With the adapter as it is now, stored as before, a new one as int8."""
        values = "int8" if self.whole.P is None else self.whole.layout.adapter_values
        layout = replace(self.whole.layout, adapter_rank=self.P.shape[1], adapter_values=values)
        P, Q = pack_adapter(self.P, self.Q, layout)
        return replace(self.whole, layout=layout, P=P, Q=Q)


def train(
    path: Path | str,
    out: Path | str,
    text: str | Path | Tensor,
    settings: Training = Training(),
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> dict:
    """Train the adapters of a packed folder on a text and write the result to the folder `out`.

    Args:
        text: see `text.read_text`, or token ids [samples, window] int64.
        resume: go on from the state that an interrupted run left beside `out`; the result is that of a run without a break.

    Returns: {"before", "after": mean negative log-likelihood a token on held-back windows, nats; "steps", "parameters"}.
    Raises: CheckpointError, CalibrationError, ValueError, one sentence each.
    """
    out = Path(out)
    state_file = out.with_name(out.name + ".training.safetensors")
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose an empty folder")
    if state_file.exists() and not resume:
        raise CheckpointError(f"{state_file} is left of an interrupted run; pass resume=True to go on with it, or delete it")
    model = load(path, device=device, dtype=torch.float32 if str(device) == "cpu" else None)
    tokenizer = read_tokenizer(hub_folder(str(path)))
    tokens = text if isinstance(text, Tensor) else _windows(tokenizer, text, settings)
    modules = _adapt(model, settings)
    parameters = [p for module in modules.values() for p in (module.P, module.Q)]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    held = [i for i in range(len(tokens)) if i % HELD_BACK == HELD_BACK - 1] or [len(tokens) - 1]
    used = torch.tensor([i for i in range(len(tokens)) if i not in held] or held)
    optimizer = torch.optim.Adam(parameters, lr=settings.rate)
    done, before = _restore(state_file, settings, optimizer, parameters) if resume and state_file.exists() else (0, None)
    if before is None:
        before = _likelihood(model, tokens[held], settings.batch)
    for step in range(done, settings.steps):
        warm = max(1, settings.steps // 10)
        share = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * share
        draw = torch.randint(len(used), (settings.batch,), generator=torch.Generator().manual_seed(settings.seed + 7919 * step))
        with torch.enable_grad():
            loss = _loss(model, tokens[used[draw]])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % settings.every == 0 and step + 1 < settings.steps:
            _note(state_file, settings, optimizer, parameters, step + 1, before)
            say(f"step {step + 1} of {settings.steps}: {float(loss.detach()):.4f} nats a token")
    after = _likelihood(model, tokens[held], settings.batch)
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SlabLinear.from_packed(module.packed(), module.base.bias))
    save(model, out, tokenizer)
    state_file.unlink(missing_ok=True)
    return {"before": before, "after": after, "steps": settings.steps, "parameters": sum(p.numel() for p in parameters)}


def _adapt(model: nn.Module, settings: Training) -> dict[str, AdaptedLinear]:
    modules = {}
    generator = torch.Generator().manual_seed(settings.seed)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, SlabLinear)]:
        packed = linear.packed()
        N, K, rank = packed.out_features, packed.in_features, min(settings.adapter_rank, packed.out_features, packed.in_features)
        if packed.P is not None:
            P, Q = packed.adapter()
            Q = Q[:K]
        elif rank:
            P = torch.zeros(N, rank, device=packed.values.device)
            Q = (torch.randn(K, rank, generator=generator) / K**0.5).to(P)
        else:
            continue
        modules[name] = AdaptedLinear(linear, P, Q)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, modules[name])
    if not modules:
        raise ValueError("the model has no adapter P Q^T to train; give adapter_rank=16 or so to add them, or compress with adapter_rank")
    return modules


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def _likelihood(model: nn.Module, tokens: Tensor, batch: int) -> float:
    return sum(float(_loss(model, part)) * len(part) for part in tokens.split(batch)) / len(tokens)


def _windows(tokenizer, text: str | Path, settings: Training) -> Tensor:
    content = read_text(text, READ_AHEAD * settings.samples * settings.window * CHARACTERS_PER_TOKEN)
    tokens = sample_windows(tokenizer, content, settings.samples, settings.window, settings.seed, "training")
    if len(tokens) < 2:
        raise CalibrationError(f"the training text fills {len(tokens)} windows of {settings.window}; at least 2 are needed, one to judge by")
    return tokens


def _note(file: Path, settings: Training, optimizer, parameters: list[Tensor], step: int, before: float) -> None:
    """Parameters and Adam's moments; whole or not at all."""
    from safetensors.torch import save as to_bytes

    tensors = {}
    for i, p in enumerate(parameters):
        moments = optimizer.state[p]
        tensors |= {f"{i}.value": p.detach(), f"{i}.first": moments["exp_avg"], f"{i}.second": moments["exp_avg_sq"]}
    notes = {"settings": json.dumps(asdict(settings)), "step": str(step), "before": repr(before)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, [to_bytes({name: t.cpu().contiguous() for name, t in tensors.items()}, notes)])


def _restore(file: Path, settings: Training, optimizer, parameters: list[Tensor]) -> tuple[int, float]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            notes = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        begun, step, before = json.loads(notes["settings"]), int(notes["step"]), float(notes["before"])
        if begun != asdict(settings):
            differing = next(k for k in asdict(settings) if begun.get(k) != asdict(settings)[k])
            raise CheckpointError(f"{file} was begun with {differing}={begun.get(differing)}; use the same settings or delete it")
        for i, p in enumerate(parameters):
            p.data.copy_(tensors[f"{i}.value"])
            first, second = tensors[f"{i}.first"].to(p), tensors[f"{i}.second"].to(p)
            optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged or of another model ({error}); delete it to start anew") from error
    return step, before
