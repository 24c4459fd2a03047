"""Text that a model writes: what follows a prompt, and at what speed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, CalibrationError
from ..terminal import first_line
from ..text.token_ids import check_fits, ids_device, max_positions
from ..text.windows import Sampling
from .running import check_numbers, running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Continuation(NamedTuple):
    """What a model wrote: ids [tokens], and the seconds that it took."""

    ids: Tensor
    seconds: float


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """A user's message as the tokenizer's chat template writes it, for `continuation`.

    Returns: ids [1, tokens] int64, up to where the model's answer begins.
    Raises: ArgumentError if the tokenizer has no chat template, or its template cannot write the
        message; CalibrationError for a prompt that is no text.
    """
    _check_text(prompt)
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'} has no "
            "chat template; give the prompt as plain text"
        )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the model's author
        raise ArgumentError(
            f"the tokenizer's chat template cannot write this prompt: {first_line(error)}"
        ) from error
    # The template has written the special tokens already.
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Continuation:
    """What the model writes behind a prompt, through `model.generate`.

    Args:
        prompt: text, or ids [1, tokens] as `chat_prompt` gives them.
        tokens: most new tokens; fewer where the model has no more positions.
        temperature: 0 takes the most probable token, more draws by `seed`.

    Raises: CalibrationError for a prompt that is empty, too long, or has tokens that the model does
        not know; CheckpointError for a model that does not run or computes NaN.
    """
    inputs, tokens = prompt_inputs(model, tokenizer, prompt, tokens)
    torch.manual_seed(Sampling(seed=seed).seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    start = time.perf_counter()
    # What follows is drawn from each token's logits, which are NaN in a damaged model.
    sampling["logits_processor"] = [lambda _, logits: _checked(model, logits)]
    with torch.inference_mode(), running(model):
        out = model.generate(**inputs, max_new_tokens=tokens, **sampling)
    return Continuation(out[0, inputs["input_ids"].shape[1] :], time.perf_counter() - start)


def _checked(model: PreTrainedModel, logits: Tensor) -> Tensor:
    check_numbers(model, logits)
    return logits


def _check_text(prompt: object) -> None:
    """Refuse what is no text, or has half a character in it. Raises: CalibrationError."""
    if not isinstance(prompt, str) or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise CalibrationError(f"the prompt {prompt!r} is no text in UTF-8")


def prompt_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | Tensor, tokens: int
) -> tuple[dict[str, Tensor], int]:
    """The prompt [1, tokens] as `generate` takes it, and how many of `tokens` fit behind it.

    Raises: CalibrationError.
    """
    if isinstance(prompt, Tensor):
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    else:
        _check_text(prompt)
        inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    length = inputs["input_ids"].numel()
    if not length:
        raise CalibrationError(
            "the prompt is empty and this tokenizer adds no start token; give some text to go on "
            "from"
        )
    limit = max_positions(model)
    if limit is not None and length >= limit:
        raise CalibrationError(
            f"the prompt has {length} tokens, which leaves none of the model's {limit} positions; "
            "shorten it"
        )
    check_fits(inputs["input_ids"], model, "prompt's", tokenizer)
    device = ids_device(model)
    fitting = tokens if limit is None else min(tokens, limit - length)
    return {name: t.to(device) for name, t in inputs.items()}, fitting


@torch.no_grad()
def tokens_per_second(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int = 128,
) -> float:
    """Speed of greedy decoding: tokens after the first over the time they take.

    The time of a run that makes one token (the prompt and all overhead) is subtracted; both runs
    are warmed up.

    Raises: ArgumentError for fewer than two tokens, and as `continuation`.
    """
    if new_tokens < 2:
        raise ArgumentError(f"new_tokens={new_tokens} must be at least 2 to time decoding")
    inputs, new_tokens = prompt_inputs(model, tokenizer, prompt, new_tokens)
    device = inputs["input_ids"].device

    def seconds(count: int) -> float:
        began = time.perf_counter()
        with running(model):
            model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds(2)
    first = min(seconds(1) for _ in range(2))
    whole = min(seconds(new_tokens) for _ in range(2))
    if whole > 1.1 * first:
        return (new_tokens - 1) / (whole - first)
    # On a busy machine one token may take as long as all: then its time is not subtracted.
    return new_tokens / whole
