"""Adapter training after compression: P and Q learn a text, and all else stays as it is.

The recipe is SLiM's (arXiv 2410.09615, section 3.4). The whole model runs from its packed weights;
gradients reach P and Q of every compressed linear alone, so what is kept for them is small beside
the model. A model without adapters gets some: Q random, P zero, as in LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..device import usual_torch
from ..errors import ArgumentError, CalibrationError, CheckpointError
from ..format import PackedWeight, pack_adapter
from ..models.folder import hub_folder
from ..models.hub import HubArguments
from ..models.load import load
from ..models.save import save
from ..nn import SlabLinear
from ..paths import expanded
from ..settings import SEED, WINDOW, enforce, setting
from ..text.source import Text, read_windows
from ..text.token_ids import ids_device
from ..text.tokenizer import open_tokenizer
from ..text.windows import Sampling, Windows
from .training_state import TrainingState, digest, state_file

HELD_BACK = 16  # Every sixteenth window is never trained on; it judges.
MOST_NORM = 1.0  # gradients are shortened to this norm
WARM = 10  # the rate rises during one of so many parts of the steps


@dataclass(frozen=True)
class Training:
    """How adapters are trained.

    rate: is reached after a tenth of the steps, then falls to 0 along a cosine.

    Raises on construction: ArgumentError.
    """

    steps: int = setting(200, "steps of Adam", 1, 10_000_000)
    batch: int = setting(8, "windows per step", 1)
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

    def rate_at(self, step: int) -> float:
        """The rate of step 0 .. steps - 1."""
        warm = max(1, self.steps // WARM)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * (min(1.0, (step + 1) / warm) * cosine)


class AdaptedLinear(nn.Module):
    """y = frozen packed linear(x) + (x Q) P^T; P [N,R'] and Q [K,R'] are fp32 parameters."""

    def __init__(self, linear: SlabLinear, P: Tensor, Q: Tensor):
        super().__init__()
        packed = linear.packed()
        layout = replace(packed.layout, adapter_rank=0, adapter_values=None)
        bare = replace(packed, layout=layout, P=None, Q=None)
        self.base = SlabLinear.from_packed(bare, linear.bias)
        self.base._activations = "exact"  # gradients are those of the exact product
        self.P, self.Q = nn.Parameter(P.float()), nn.Parameter(Q.float())
        self.whole = packed

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x.float() @ self.Q) @ self.P.T).to(x.dtype)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The packed weight with the adapter as it is now.

        An adapter keeps the type in which it was stored; a new one is stored as int8.
        """
        values = "int8" if self.whole.P is None else self.whole.layout.adapter_values
        layout = replace(self.whole.layout, adapter_rank=self.P.shape[1], adapter_values=values)
        P, Q = pack_adapter(self.P, self.Q, layout)
        return replace(self.whole, layout=layout, P=P, Q=Q)


@usual_torch()
def train(
    path: Path | str,
    out: Path | str,
    text: Text,
    settings: Training = Training(),
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] | None = None,
    field: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """Train the adapters of a packed folder on a text and write the result to the folder `out`.

    Args:
        path: the packed folder, or its name on the Hugging Face hub.
        text: as `compress` takes its calibration. field: of its rows, the one to read.
        resume: go on from the state that an interrupted run left beside `out`; the result is that
            of a run without a break.
        say: is called with a line whenever the state is noted.
        progress: is called after every step with the steps done and those in all.
        trust_remote_code: run the Python code in the folder, of which some models are made.
        revision, subfolder, token: of a model on the hub: a branch, tag or commit; the folder in
            its repository (or in a folder here); what opens private ones
            (`models.hub.HubArguments`).

    Returns: {"before", "after": mean negative log-likelihood per token on the windows that are held
        back, nats; "steps"; "parameters": how many were trained}.

    Raises: CheckpointError, CalibrationError, ArgumentError, in one sentence.
    """
    out = expanded(out)
    file = state_file(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose an empty folder")
    if file.exists() and not resume:
        raise CheckpointError(
            f"{file} is left of an interrupted run; pass resume=True to go on with it, or delete it"
        )
    dtype = torch.float32 if str(device) == "cpu" else None
    path = hub_folder(path, HubArguments(revision, subfolder, token, trust_remote_code))
    opened: dict = {"trust_remote_code": trust_remote_code, "activations": "exact"}
    model = load(path, device=device, dtype=dtype, **opened)  # gradients are those of exact
    tokenizer = open_tokenizer(path, trust_remote_code)
    tokens = _windows(model, tokenizer, text, settings, field)
    begun = asdict(settings) | {
        "model_sha256": digest(model.state_dict()),
        "text_sha256": tokens.digest(),
    }
    modules = _adapt(model, settings)
    lesson = Lesson(model, modules, tokens, settings)
    state = TrainingState(file, begun, lesson.optimizer, lesson.parameters)
    done, before = 0, None
    if resume and file.exists():
        done, before = state.restore()
    if before is None:
        before = lesson.likelihood()
    for step in range(done, settings.steps):
        loss = lesson.step(step)
        if progress is not None:
            progress(step + 1, settings.steps)
        if (step + 1) % settings.every == 0 and step + 1 < settings.steps:
            state.note(step + 1, before)
            say(f"step {step + 1} of {settings.steps}: {float(loss):.4f} nats per token")
    after = lesson.likelihood()
    for name, module in modules.items():
        model.set_submodule(name, SlabLinear.from_packed(module.packed(), module.base.bias))
    save(model, out, tokenizer)
    file.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in lesson.parameters)
    return {"before": before, "after": after, "steps": settings.steps, "parameters": parameters}


class Lesson:
    """A model whose adapters learn, and the windows of text that they learn from."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, AdaptedLinear],
        tokens: Windows,
        settings: Training,
    ):
        self.model, self.tokens, self.settings = model, tokens, settings
        self.parameters = [p for module in modules.values() for p in (module.P, module.Q)]
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.rate)
        count = len(tokens)
        self.held = [i for i in range(count) if i % HELD_BACK == HELD_BACK - 1] or [count - 1]
        self.used = torch.tensor([i for i in range(count) if i not in self.held] or self.held)

    def step(self, number: int) -> Tensor:
        """One step of Adam on windows that its number decides; returns the loss before it, []."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(number)
        generator = torch.Generator().manual_seed(settings.seed + 7919 * number)
        draw = torch.randint(len(self.used), (settings.batch,), generator=generator)
        with torch.enable_grad():
            loss = _loss(self.model, self.tokens.chosen(self.used[draw].tolist()))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MOST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def likelihood(self) -> float:
        """Mean negative log-likelihood per token on the windows that are held back, nats."""
        held = self.tokens.chosen(self.held)
        return float(_loss(self.model, held, self.settings.batch * held.longest))


def _adapt(model: nn.Module, settings: Training) -> dict[str, AdaptedLinear]:
    """Put an AdaptedLinear in the place of every packed linear that has an adapter or gets one.

    Raises: ArgumentError if none does, for a rank that a layer cannot have, and for one that no
        layer gets, since each has an adapter of another rank.
    """
    modules: dict[str, AdaptedLinear] = {}
    generator = torch.Generator().manual_seed(settings.seed)
    added = False
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, SlabLinear)]:
        packed = linear.packed()
        N, K = packed.out_features, packed.in_features
        rank = settings.adapter_rank
        if packed.P is not None:
            P, Q = packed.adapter()
            Q = Q[:K]
        elif rank > min(N, K):
            raise ArgumentError(
                f"adapter_rank={rank} is larger than {name} allows, which is {N}x{K}; give at most "
                f"{min(N, K)}"
            )
        elif rank:
            added = True
            P = torch.zeros(N, rank, device=packed.values.device)
            Q = (torch.randn(K, rank, generator=generator) / K**0.5).to(P)
        else:
            continue
        modules[name] = AdaptedLinear(linear, P, Q)
        model.set_submodule(name, modules[name])
    if not modules:
        raise ArgumentError(
            "the model has no adapter P Q^T to train; give adapter_rank=16 or so to add them"
        )
    ranks = {adapted.P.shape[1] for adapted in modules.values()}
    if settings.adapter_rank and not added and ranks != {settings.adapter_rank}:
        raise ArgumentError(
            f"every layer has an adapter already, of rank {max(ranks)}, and is trained as it is; "
            f"adapter_rank={settings.adapter_rank} is that of new ones, so leave it out"
        )
    return modules


def _loss(model: Any, windows: Windows, at_once: int | None = None) -> Tensor:
    """Mean negative log-likelihood of every next token of some windows, nats, [].

    at_once: tokens that the model reads together; default all of the windows of one length.
    """
    device, parts = ids_device(model), []
    for batch in windows.batches(at_once or windows.tokens):
        tokens = batch.to(device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        targets = tokens[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        parts.append(losses)
    return torch.stack(parts).sum() / (windows.tokens - len(windows))


def _windows(
    model: Any, tokenizer: Any, text: Text, settings: Training, field: str | None
) -> Windows:
    """Windows of the text that training can use. Raises: CalibrationError."""
    sampling = Sampling(settings.samples, settings.window, settings.seed)
    windows, _ = read_windows(text, model, lambda: tokenizer, sampling, field, "training")
    if len(windows) < 2:
        raise CalibrationError(
            f"the training text fills {len(windows)} windows of {windows.longest}; at least 2 are "
            "needed, one to judge by"
        )
    if windows.shortest < 2:
        raise CalibrationError(
            "the training text has a window of a single token, which predicts nothing; leave such "
            "windows out"
        )
    return windows
