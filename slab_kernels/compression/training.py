"""Adapter training after compression, SLiM's recipe (arXiv 2410.09615, section 3.4): P and Q learn a text, S and all else stay.

The whole model runs from its packed weights; gradients reach P and Q of every compressed linear alone, so what is kept for
them is small beside the model. A model without adapters gets some: Q random, P zero, as in LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..device import usual_torch
from ..errors import ArgumentError, CalibrationError, CheckpointError
from ..format import PackedWeight, pack_adapter
from ..models.folder import hub_folder
from ..models.load import load
from ..models.save import save
from ..models.shards import tensor_bytes, write_atomically
from ..nn import SlabLinear
from ..paths import expanded
from ..settings import SEED, WINDOW, enforce, setting
from ..text.source import (
    CHARACTERS_PER_TOKEN,
    READ_AHEAD,
    open_tokenizer,
    read_text,
    sample_windows,
)
from ..text.token_ids import check_fits, text_config, token_ids

HELD_BACK = 16  # every sixteenth window judges, and is never trained on


@dataclass(frozen=True)
class Training:
    """`rate` is reached after a tenth of the steps, then falls to 0 along a cosine.

    Raises on construction: ValueError.
    """

    steps: int = setting(200, "steps of Adam", 1, 10_000_000)
    batch: int = setting(8, "windows a step", 1)
    window: int = setting(512, **WINDOW)
    samples: int = setting(512, "windows of text, one in sixteen held back", 2)
    rate: float = setting(3e-4, "largest step", 0, 1, above=True)
    adapter_rank: int = setting(
        0, "rank of new adapters for layers that have none; 0 leaves those alone", 0
    )
    every: int = setting(25, "steps between two notes of the state", 1)
    seed: int = setting(0, **SEED)

    def __post_init__(self):
        enforce(self, of=" of training")


class AdaptedLinear(nn.Module):
    """y = frozen packed linear(x) + (x Q) P^T; P [N,R'] and Q [K,R'] fp32 parameters."""

    def __init__(self, linear: SlabLinear, P: Tensor, Q: Tensor):
        super().__init__()
        packed = linear.packed()
        bare = replace(packed.layout, adapter_rank=0, adapter_values=None)
        self.base = SlabLinear.from_packed(
            replace(packed, layout=bare, P=None, Q=None), linear.bias
        )
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


def state_file(out: Path) -> Path:
    """Where a run that writes to `out` keeps its state until it is done: beside it."""
    return out.with_name(out.name + ".training.safetensors")


@usual_torch()
def train(
    path: Path | str,
    out: Path | str,
    text: str | Path | Tensor | list | dict,
    settings: Training = Training(),
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> dict:
    """Train the adapters of a packed folder on a text and write the result to the folder `out`.

    Args:
        text: see `text.read_text`, or token ids [samples, window] (see `token_ids`).
        progress: called with the steps done and those in all.
        resume: go on from the state that an interrupted run left beside `out`; the result is that of a run without a break.
        trust_remote_code: run the Python code in the folder, of which some models are made.

    Returns: {"before", "after": mean negative log-likelihood a token on held-back windows, nats; "steps", "parameters"}.
    Raises: CheckpointError, CalibrationError, ValueError, one sentence each.
    """
    out = expanded(out)
    state = state_file(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose an empty folder")
    if state.exists() and not resume:
        raise CheckpointError(
            f"{state} is left of an interrupted run; pass resume=True to go on with it, or delete it"
        )
    dtype = torch.float32 if str(device) == "cpu" else None
    model = load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(hub_folder(path), trust_remote_code)
    ids = token_ids(text, "training")
    window = min(
        settings.window,
        getattr(text_config(model), "max_position_embeddings", None) or settings.window,
    )
    tokens = _windows(tokenizer, text, replace(settings, window=window)) if ids is None else ids
    check_fits(tokens, model, "training", tokenizer if ids is None else None)
    begun = asdict(settings) | {
        "model_sha256": _digest(model.state_dict()),
        "text_sha256": _digest({"tokens": tokens}),
    }
    modules = _adapt(model, settings)
    parameters = [p for module in modules.values() for p in (module.P, module.Q)]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    held = [i for i in range(len(tokens)) if i % HELD_BACK == HELD_BACK - 1] or [len(tokens) - 1]
    used = torch.tensor([i for i in range(len(tokens)) if i not in held] or held)
    optimizer = torch.optim.Adam(parameters, lr=settings.rate)
    done, before = (
        _restore(state, begun, optimizer, parameters) if resume and state.exists() else (0, None)
    )
    if before is None:
        before = _likelihood(model, tokens[held], settings.batch)
    for step in range(done, settings.steps):
        warm = max(1, settings.steps // 10)
        share = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * share
        draw = torch.randint(
            len(used),
            (settings.batch,),
            generator=torch.Generator().manual_seed(settings.seed + 7919 * step),
        )
        with torch.enable_grad():
            loss = _loss(model, tokens[used[draw]])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, settings.steps)
        if (step + 1) % settings.every == 0 and step + 1 < settings.steps:
            _note(state, begun, optimizer, parameters, step + 1, before)
            say(f"step {step + 1} of {settings.steps}: {float(loss.detach()):.4f} nats a token")
    after = _likelihood(model, tokens[held], settings.batch)
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            leaf,
            SlabLinear.from_packed(module.packed(), module.base.bias),
        )
    save(model, out, tokenizer)
    state.unlink(missing_ok=True)
    return {
        "before": before,
        "after": after,
        "steps": settings.steps,
        "parameters": sum(p.numel() for p in parameters),
    }


def _adapt(model: nn.Module, settings: Training) -> dict[str, AdaptedLinear]:
    modules = {}
    generator = torch.Generator().manual_seed(settings.seed)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, SlabLinear)]:
        packed = linear.packed()
        N, K, rank = (
            packed.out_features,
            packed.in_features,
            min(settings.adapter_rank, packed.out_features, packed.in_features),
        )
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
        raise ArgumentError(
            "the model has no adapter P Q^T to train; give adapter_rank=16 or so to add them, or compress with adapter_rank"
        )
    return modules


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def _likelihood(model: nn.Module, tokens: Tensor, batch: int) -> float:
    return sum(float(_loss(model, part)) * len(part) for part in tokens.split(batch)) / len(tokens)


def _windows(tokenizer, text: str | Path | list | dict, settings: Training) -> Tensor:
    content = read_text(
        text, READ_AHEAD * settings.samples * settings.window * CHARACTERS_PER_TOKEN, tokenizer
    )
    tokens = sample_windows(
        tokenizer, content, settings.samples, settings.window, settings.seed, "training"
    )
    if len(tokens) < 2:
        raise CalibrationError(
            f"the training text fills {len(tokens)} windows of {settings.window}; at least 2 are needed, one to judge by"
        )
    return tokens


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _note(
    file: Path, begun: dict, optimizer, parameters: list[Tensor], step: int, before: float
) -> None:
    """Parameters and Adam's moments; whole or not at all.

    begun: what the run began with, to be found again.
    """
    from safetensors.torch import save as to_bytes

    tensors = {}
    for i, p in enumerate(parameters):
        moments = optimizer.state[p]
        tensors |= {
            f"{i}.value": p.detach(),
            f"{i}.first": moments["exp_avg"],
            f"{i}.second": moments["exp_avg_sq"],
        }
    notes = {
        "begun": json.dumps(begun),
        "step": str(step),
        "before": repr(before),
        "sha256": _digest(tensors),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        file, [to_bytes({name: t.cpu().contiguous() for name, t in tensors.items()}, notes)]
    )


def _restore(file: Path, begun: dict, optimizer, parameters: list[Tensor]) -> tuple[int, float]:
    """Raises: CheckpointError if the state is damaged, or of a run that began otherwise."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            notes = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        known, step, before = json.loads(notes["begun"]), int(notes["step"]), float(notes["before"])
        if notes["sha256"] != _digest(tensors):
            raise ValueError("its numbers are not those that were written")
        differing = next((name for name in begun if known[name] != begun[name]), None)
        if differing is not None:
            raise CheckpointError(
                f"{file} was begun with {differing}={known[differing]}, now it is {begun[differing]}; "
                "use the model, the text and the settings of the first run, or delete it"
            )
        for i, p in enumerate(parameters):
            p.data.copy_(tensors[f"{i}.value"])
            first, second = tensors[f"{i}.first"].to(p), tensors[f"{i}.second"].to(p)
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": first,
                "exp_avg_sq": second,
            }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is damaged or of another model ({error}); delete it to start anew"
        ) from error
    return step, before
