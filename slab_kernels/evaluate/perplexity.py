"""Perplexity of a dense or compressed model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.blocks import batch_size
from ..models.packed import check
from ..text.token_ids import check_fits, ids_device, max_positions, vocabulary_rows
from ..text.tokenizer import tokenize
from ..text.windows import Sampling, windows
from .running import check_numbers, running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 2048  # tokens, if the model has positions for so many
LOGITS_AT_ONCE = 1 << 26  # tokens * vocabulary whose logits are held at a time: 256 MiB in fp32


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """exp of the mean negative log-likelihood per token.

    `text` is cut without overlap into windows of the BOS token and window - 1 tokens of text, or
    window tokens where the tokenizer has no BOS. The tail that fills no window is left out, as is
    usual, unless it is all there is. Every token of a window is predicted except the first.
    Likelihoods are summed in fp64.

    Args:
        text: the text itself (`text.source.read_text` reads one).
        window: in tokens; default WINDOW, cut to the model's maximum positions.
        progress: called with the number of windows measured and of all, after each batch.

    Returns: {"perplexity", "tokens" (predicted), "windows", "window"}.
    Raises: CalibrationError for an empty text, or a window longer than the model's positions;
        CheckpointError for a packed model that transformers opened with random weights, or one
        that does not run or computes NaN.
    """
    check(model)
    pieces, window = text_windows(model, tokenizer, text, window)
    logits_of_window = window * vocabulary_rows(model)
    at_once = max(1, min(batch_size(window), LOGITS_AT_ONCE // logits_of_window))
    total, tokens, done = 0.0, 0, 0
    for batch in _batches(pieces, at_once):
        batch = batch.to(ids_device(model))
        with running(model):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        check_numbers(model, loss)
        total += float(loss.double().sum())
        tokens += loss.numel()
        done += len(batch)
        if progress is not None:
            progress(done, len(pieces))
    mean = total / tokens
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "tokens": tokens,
        "windows": len(pieces),
        "window": window,
    }


def text_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int | None
) -> tuple[list[Tensor], int]:
    """What `perplexity` measures of a text: its windows, all of one length, and that setting.

    Raises: CalibrationError.
    """
    limit = max_positions(model)
    window = Sampling(window=min(WINDOW, limit or WINDOW) if window is None else window).window
    if limit is not None and window > limit:
        raise CalibrationError(f"window={window} is longer than the model's {limit} positions")
    pieces = pieces_of(tokenizer, text, window)
    check_fits(torch.cat(pieces), model, "evaluation", tokenizer)
    return pieces, window


def pieces_of(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[Tensor]:
    """The windows to measure: whole ones, or the tail if there is no whole one.

    Raises: CalibrationError if no token can be predicted.
    """
    ids = tokenize(tokenizer, text)
    cut = windows(ids, window, tokenizer.bos_token_id) if len(ids) else []
    pieces = [piece for piece in cut if len(piece) > 1]
    if not pieces:
        raise CalibrationError(f"the evaluation text has {len(ids)} tokens; at least 2 are needed")
    return [piece for piece in pieces if len(piece) == window] or pieces


def _batches(pieces: list[Tensor], size: int) -> Iterator[Tensor]:
    """At most `size` neighbours of equal length at a time, [samples, window]."""
    start = 0
    while start < len(pieces):
        end = start + 1
        while end < len(pieces) and end - start < size and len(pieces[end]) == len(pieces[start]):
            end += 1
        yield torch.stack(pieces[start:end])
        start = end
