"""How far a compressed model has moved from the dense one: token by token on a text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..device import free_memory
from ..errors import ArgumentError, CheckpointError
from ..models.blocks import batch_size
from ..models.endings import BlockwiseModel, Reader, WholeModel
from ..models.hub import HubArguments
from ..models.packed import check
from ..models.source import FolderSource, open_source
from ..text.token_ids import text_config
from .perplexity import LOGITS_AT_ONCE, pieces_of, text_windows
from .running import check_numbers, running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COPIES = 8  # of the logits of a slice that are in memory at a time: two models', and work on them
FIT = 0.5  # of the free memory that a dense model may take as a whole


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    dense: PreTrainedModel | FolderSource | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    streamed: bool | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """The distance of a model's predictions from the dense model's, in one pass over a text.

    The text is cut as by `perplexity`, and the same tokens are predicted. KL(dense || model) of a
    token is sum p (log p - log q) over the vocabulary, in nats; log-softmax is computed in fp32 and
    every sum over tokens in fp64. Logits are formed for a slice of tokens at a time, at most
    LOGITS_AT_ONCE numbers with all that is computed from them.

    A dense model that is given by its folder is read whole where it takes less than FIT of the
    free memory. Otherwise one of its blocks is in memory at a time (`BlockwiseModel`), beside
    `model`.

    Args:
        model: in memory, compressed or dense.
        dense: what it was compressed from: a model in memory, its folder, or its name on the
            Hugging Face hub.
        window: in tokens; default as of `perplexity`, with the fewer positions of the two models.
        progress: called with the steps done and of all, which are windows measured, and blocks
            that windows have passed.
        streamed: read the dense model block by block or as a whole, whatever memory there is.
        trust_remote_code, revision, subfolder, token: of a dense model that is named, as
            `slab_kernels.compress` takes them.

    Returns: {"kl": mean in nats, "kl_p99": 99th percentile, interpolated, "top1": share of tokens
        whose most probable successor is the same in both, "perplexity", "dense_perplexity",
        "perplexity_ratio", "perplexity_ratio_stderr": its standard error by the windows'
        differences of log-likelihood (None for a single window), "tokens" (predicted), "windows",
        "window"}.
    Raises: ArgumentError for a dense model of another vocabulary or tokenizer; CalibrationError,
        CheckpointError as `perplexity`; ArchitectureError for a dense model that cannot be led
        through the text block by block.
    """
    check(model)
    source: Any = dense
    if not isinstance(dense, nn.Module | FolderSource):
        hub = HubArguments(revision, subfolder, token, trust_remote_code)
        source = open_source(dense, hub)
    named: Any = source if isinstance(source, nn.Module) else source.model
    check_vocabulary(model, named)
    pieces, window = text_windows(_fewer_positions(model, named), tokenizer, text, window)
    if isinstance(source, FolderSource):
        _check_tokens(source, tokenizer, text, window, pieces)
        device = model.device
        dtype = torch.float32 if device.type == "cpu" else model.dtype
        teacher = _dense(source, device, dtype, streamed)
    else:
        teacher = WholeModel(check(source))
    tokens = torch.stack(pieces)
    scores = _Scores(tokens[:, 1:].numel())
    steps = _Steps(tokens, teacher, progress)
    for portion in tokens.split(teacher.portion(tokens.shape[1]) or len(tokens)):
        ours = WholeModel(model).reading(portion, lambda: None)
        with running(named), teacher.reading(portion, steps.block) as theirs, ours as student:
            for number, batch in enumerate(portion.split(batch_size(portion.shape[1]))):
                scores.add(student, theirs, number, batch, model, named)
                steps.windows(len(batch))
    return scores.summary(len(pieces)) | {"windows": len(pieces), "window": window}


def _fewer_positions(model: PreTrainedModel, dense: PreTrainedModel) -> PreTrainedModel:
    limits = [getattr(text_config(m), "max_position_embeddings", None) for m in (model, dense)]
    return dense if limits[1] is not None and limits[1] < (limits[0] or math.inf) else model


def _vocabulary(model: PreTrainedModel) -> int | None:
    return getattr(text_config(model), "vocab_size", None)


def check_vocabulary(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raises: ArgumentError for models of different vocabularies."""
    ours, theirs = _vocabulary(model), _vocabulary(dense)
    if ours != theirs:
        raise ArgumentError(
            f"the model to compare with has a vocabulary of {theirs} tokens, and this one has "
            f"{ours}; give the dense model that it was compressed from"
        )


def _check_tokens(
    source: FolderSource,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int,
    pieces: list[Tensor],
) -> None:
    """Refuse a dense model whose own tokenizer makes other ids of the text.

    A folder without a tokenizer has nothing to say. Raises: ArgumentError.
    """
    try:
        own = source.tokenizer()
    except CheckpointError:
        return
    theirs, ours = torch.cat(pieces_of(own, text, window)), torch.cat(pieces)
    if theirs.shape == ours.shape and torch.equal(theirs, ours):
        return
    length = min(len(ours), len(theirs))
    differs = (ours[:length] != theirs[:length]).nonzero()
    where = int(differs[0]) if len(differs) else length
    raise ArgumentError(
        f"the tokenizer in {source.checkpoint.folder} makes other tokens of this text, from token "
        f"{where} on; give the dense model that this one was compressed from"
    )


def _dense(
    source: FolderSource, device: torch.device, dtype: torch.dtype, streamed: bool | None
) -> WholeModel | BlockwiseModel:
    """The dense model, in memory if it fits there."""
    if streamed is None:
        numbers = sum(math.prod(source.spec(name)[1]) for name in source.names)
        free = free_memory(device)
        streamed = free is None or numbers * dtype.itemsize > FIT * free
    if streamed:
        return BlockwiseModel(source, device, dtype)
    return WholeModel(source.open_dense().to(device=device, dtype=dtype))


@dataclass
class _Steps:
    """Tells how far the comparison is: every window counts once, and every block it passes."""

    tokens: Tensor
    teacher: WholeModel | BlockwiseModel
    tell: Callable[[int, int], None] | None
    done: int = 0

    def __post_init__(self) -> None:
        portion = self.teacher.portion(self.tokens.shape[1])
        self.total = len(self.tokens)
        if isinstance(self.teacher, BlockwiseModel):
            assert portion is not None
            self.total += len(self.teacher.blocks) * math.ceil(len(self.tokens) / portion)

    def block(self) -> None:
        self.windows(1)

    def windows(self, count: int) -> None:
        self.done += count
        if self.tell is not None:
            self.tell(self.done, self.total)


class _Scores:
    """What is measured of every token, in the order of the text.

    Room for all tokens is made at the start. Small results that are kept one by one would be put
    into the gaps that freed logits leave in the heap, and the next logits would not fit there: the
    process would grow with every slice.

    kl: in nats, fp64. ours, theirs: negative log-likelihoods in nats, fp64. same: whether the most
    probable token is.
    """

    def __init__(self, tokens: int):
        self.kl, self.ours, self.theirs = torch.zeros(3, tokens, dtype=torch.float64)
        self.same = torch.zeros(tokens, dtype=torch.bool)
        self.done = 0

    def add(
        self,
        student: Reader,
        teacher: Reader,
        number: int,
        batch: Tensor,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel,
    ) -> None:
        """Score the batch `number` of windows [samples, window], slice by slice."""
        with running(model):
            ours = student.states(number)[:, :-1].flatten(0, 1)
        theirs = teacher.states(number)[:, :-1].flatten(0, 1)
        targets = batch[:, 1:].flatten()
        at_once = max(1, LOGITS_AT_ONCE // (COPIES * (_vocabulary(model) or 1)))
        for start in range(0, len(targets), at_once):
            part = slice(start, start + at_once)
            with running(model):
                q = student.logits(ours[part])
            before = self.done
            self._slice(teacher.logits(theirs[part]).to(q.device), q, targets[part].to(q.device))
            # NaN in one logit of a token makes NaN of all its likelihoods.
            check_numbers(teacher_model, self.theirs[before : self.done])
            check_numbers(model, self.ours[before : self.done])

    def _slice(self, p: Tensor, q: Tensor, targets: Tensor) -> None:
        """Score logits [tokens, vocabulary] of the dense model, p, and of the other, q."""
        if p.shape != q.shape:
            raise ArgumentError(
                f"the dense model gives {p.shape[1]} logits for a token and this one {q.shape[1]}; "
                "give the dense model that it was compressed from"
            )
        here = slice(self.done, self.done + len(targets))
        self.done += len(targets)
        self.same[here] = p.argmax(1) == q.argmax(1)
        p, q = torch.log_softmax(p, 1), torch.log_softmax(q, 1)
        for found, logs in ((self.theirs, p), (self.ours, q)):
            found[here] = -logs.gather(1, targets[:, None])[:, 0]
        # A token that has no probability at all in p adds nothing, whatever q says of it.
        terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
        self.kl[here] = terms.sum(1, dtype=torch.float64)

    def summary(self, windows: int) -> dict[str, Any]:
        """The numbers over all tokens; every window has equally many."""
        kl, ours, theirs = self.kl, self.ours, self.theirs
        differences = (ours - theirs).reshape(windows, -1).mean(1)
        ratio, error = _exp(float(differences.mean())), None
        if windows > 1:
            error = ratio * float(differences.std()) / windows**0.5
        return {
            "kl": float(kl.mean()),
            "kl_p99": _quantile(kl, 0.99),
            "top1": float(self.same.double().mean()),
            "perplexity": _exp(float(ours.mean())),
            "dense_perplexity": _exp(float(theirs.mean())),
            "perplexity_ratio": ratio,
            "perplexity_ratio_stderr": error,
            "tokens": len(kl),
        }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _quantile(values: Tensor, share: float) -> float:
    """By linear interpolation; torch's own takes 16 million numbers at most."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
