"""How fast a model decodes, and where the time of a decode step goes."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.blocks import find_blocks
from ..models.packed import packed_modules
from .generation import prompt_inputs
from .running import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where the time of a decode step goes, in the order in which it is shown.
PARTS = {
    "linears": "linears of the blocks",
    "head": "output head",
    "attention": "attention",
    "modules": "norms and other modules",
    "overhead": "Python and transformers around them",
}
WARM_UP = 3  # tokens that are generated before anything is timed
SPLIT = 16  # steps whose time is split, at most
REPEATS = 2  # runs of which the faster counts


@torch.no_grad()
def decoding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    tokens: int = 64,
    batch: int = 1,
) -> dict[str, Any]:
    """The speed of greedy decoding by `model.generate`, and the parts of a step.

    A step is one token for each text of the batch; it begins where the model's forward is called,
    and ends where it is called for the next one. The first call, which reads the prompt, is no
    step. Before anything is timed a short text is generated.

    The steps of a second, shorter run are split: whenever a module is called, the time until it
    returns is counted to it, without that of the modules inside. What is left of the run's time
    belongs to no module: the model's own loop over its blocks, its masks and caches, and
    `generate`. Looking at the clock takes about half a microsecond a module, which is part of it.
    On a GPU every look waits for the device, so steps that are split take longer there.

    Args:
        prompt: text, or ids [1, tokens] as `chat_prompt` gives them.
        tokens: new tokens, at least 3; fewer where the model has no more positions.
        batch: texts that are generated together, all from the same prompt.

    Returns: {"batch", "prompt_tokens", "tokens": timed steps, "prompt_seconds", "seconds_per_step",
        "tokens_per_second": of all texts together, "split": share of a step for every name of
        PARTS, which add up to 1}.
    Raises: ArgumentError for numbers that are too small; CalibrationError, CheckpointError as
        `continuation`.
    """
    if tokens < 3 or batch < 1:
        raise ArgumentError(
            f"tokens={tokens} and batch={batch}: decoding is timed on 3 tokens at least of at "
            "least 1 text"
        )
    inputs, tokens = prompt_inputs(model, tokenizer, prompt, tokens)
    if tokens < 3:
        raise ArgumentError(
            f"the prompt leaves {tokens} of the model's positions, and decoding is timed on 3 "
            "tokens at least; shorten it"
        )
    inputs = {name: t.expand(batch, -1) for name, t in inputs.items()}
    clock = _Clock(model)
    with running(model):
        clock.run(inputs, min(WARM_UP, tokens), tokenizer)
        timed = min((clock.run(inputs, tokens, tokenizer) for _ in range(REPEATS)), key=_last)
        with clock.splitting():
            split = clock.run(inputs, min(SPLIT + 1, tokens), tokenizer)
    steps = len(timed) - 2
    seconds = (timed[-1] - timed[1]) / steps
    return {
        "batch": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "tokens": steps,
        "prompt_seconds": timed[1] - timed[0],
        "seconds_per_step": seconds,
        "tokens_per_second": batch / seconds,
        "split": clock.shares(split[-1] - split[1]),
    }


def _last(moments: list[float]) -> float:
    return moments[-1] - moments[1]


class _Clock:
    """Notes when a model's forward is called, and what its modules spend in between.

    spent: seconds by part since the first step of the latest run.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.spent: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of every open call, the time of the modules inside

    def now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def run(
        self, inputs: dict[str, Tensor], tokens: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[float]:
        """Generate; returns the moments of all calls of the model, and of the end."""
        moments: list[float] = []

        def note(*_: Any) -> None:
            if len(moments) == 1:
                self.spent.clear()  # until here the prompt was read
            moments.append(self.now())

        hook = self.model.register_forward_pre_hook(note)
        try:
            self.model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
        finally:
            hook.remove()
        return [*moments, self.now()]

    @contextmanager
    def splitting(self) -> Iterator[None]:
        """Inside, the time of every module is counted to its part."""
        parts = module_parts(self.model)
        own = {module: module.__dict__.get("forward") for module in parts}
        try:
            for module, part in parts.items():
                module.__dict__["forward"] = self._timed(module.forward, part)
            yield
        finally:
            for module, before in own.items():
                del module.__dict__["forward"]
                if before is not None:  # somebody else had put one in its place
                    module.__dict__["forward"] = before

    def _timed(self, plain: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            self._inside.append(0.0)
            try:
                return plain(*args, **kwargs)
            finally:
                took = self.now() - began
                self.spent[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return forward

    def shares(self, seconds: float) -> dict[str, float]:
        """Every part of PARTS as a share of so many seconds."""
        found = {part: self.spent.get(part, 0.0) / seconds for part in PARTS if part != "overhead"}
        return found | {"overhead": 1 - sum(found.values())}


def module_parts(model: PreTrainedModel) -> dict[nn.Module, str]:
    """Every module whose time is counted -> its part of PARTS.

    The modules that hold the list of blocks are left out, since their own code is overhead.
    """
    path, _ = find_blocks(model)
    head = model.get_output_embeddings()
    packed = set(packed_modules(model).values())
    parts: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if not name or f"{path}.".startswith(f"{name}."):
            continue
        if module is head:
            parts[module] = "head"
        elif module in packed or isinstance(module, nn.Linear):
            parts[module] = "linears"
        elif "attention" in type(module).__name__.lower():
            parts[module] = "attention"
        else:
            parts[module] = "modules"
    return parts
