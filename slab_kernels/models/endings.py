"""What a model makes of a text up to its output head, and the logits of any slice of that.

Logits are tokens * vocabulary numbers, far more than all else of a small batch, so a model is run
up to the input of its head, and the head on as many tokens at a time as memory allows. Nothing here
knows an architecture: the model's own forward runs, and a hook on the head looks at its input or
puts other states in its place. Whatever the model does behind its head (scaling, capping) so
happens to every slice. A model is in memory as a whole (`WholeModel`), or read block by block
(`BlockwiseModel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError
from .blocks import batch_size, find_blocks, load_block, outside_filled
from .streams import Stop, Stream, catch_stream, given_hidden, handed_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import Source

HIDDEN_AT_ONCE = 1 << 30  # bytes of hidden states that a text has on its way through the blocks


class Reader(Protocol):
    """A model that has read some windows of a text."""

    def states(self, batch: int) -> Tensor:
        """The input of the head for one batch of windows, [samples, window, hidden_size]."""

    def logits(self, states: Tensor) -> Tensor:
        """[tokens, vocabulary] fp32 from the states [tokens, hidden_size] of any tokens."""


@dataclass
class WholeModel:
    """A model in memory, which runs on each batch when it is asked for."""

    model: PreTrainedModel

    def portion(self, window: int) -> int | None:
        """How many windows to read at a time; None: all of them."""
        return None

    @contextmanager
    def reading(self, tokens: Tensor, step: Callable[[], None]) -> Iterator[Reader]:
        """As of a `BlockwiseModel`; `step` is never called."""
        yield _InMemory(self.model, tokens)


@dataclass
class _InMemory:
    """returned: what each block returned when the model ran, without its hidden state."""

    model: PreTrainedModel
    tokens: Tensor
    returned: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.blocks = find_blocks(self.model)[1]
        except ArchitectureError:  # then the whole model runs for every slice
            self.blocks = nn.ModuleList()

    @torch.no_grad()
    def states(self, batch: int) -> Tensor:
        """See `Reader`. For a model that names no head they are the logits of the whole batch."""
        ids = _batch(self.tokens, batch).to(self.model.device)
        head = self.model.get_output_embeddings()
        if head is None:
            return self.model(input_ids=ids, use_cache=False).logits
        with _noted(nn.ModuleList() if self.returned else self.blocks, self.returned):
            return _input_of(head, lambda: self.model(input_ids=ids, use_cache=False))

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """See `Reader`. The model gets one token, which passes no block; its head the states."""
        head = self.model.get_output_embeddings()
        if head is None:
            return states.float()
        one = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        once = len(self.returned) == len(self.blocks)  # each was called
        passed = self.blocks if once else nn.ModuleList()
        with _instead(head, states), _passed_over(passed, self.returned):
            return self.model(input_ids=one, use_cache=False).logits[0].float()


def _batch(tokens: Tensor, batch: int) -> Tensor:
    return tokens.split(batch_size(tokens.shape[1]))[batch]


@dataclass
class BlockwiseModel:
    """A dense model whose blocks are read from its source one after another.

    Besides one block there are in memory: either the embedding or the output head with all else
    outside the blocks, and the hidden states of the text that is being read, at most HIDDEN_AT_ONCE
    bytes of them where the text is cut as `portion` says.

    dtype: in which it computes.

    Raises: ArchitectureError for a model in which no blocks are found.
    """

    source: Source
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.path, self.blocks = find_blocks(self.source.model)

    def portion(self, window: int) -> int:
        """How many windows to read at a time."""
        width = self.source.model.get_input_embeddings().weight.shape[1]
        width = max(width, getattr(self.source.model.config, "hidden_size", width))
        return max(1, HIDDEN_AT_ONCE // (window * width * self.dtype.itemsize))

    def load_block(self, index: int) -> nn.Module:
        return load_block(self.source, self.path, self.blocks, index, self.device, self.dtype)

    @contextmanager
    @torch.no_grad()
    def reading(self, tokens: Tensor, step: Callable[[], None]) -> Iterator[Reader]:
        """Lead windows [samples, window] through all blocks; inside, their states can be asked for.

        step: called after each block.

        Raises: as `catch_stream`.
        """
        with outside_filled(self.source, self.path, self.device, self.dtype) as model:
            stream = catch_stream(model, self.blocks, tokens, self.load_block, self.device)
        for index in range(len(self.blocks)):
            stream.advance(index, self.load_block(index))
            step()
        with outside_filled(self.source, self.path, self.device, self.dtype, behind=True) as model:
            yield _Behind(model, self.blocks, stream, tokens)


@dataclass
class _Behind:
    """The end of a model, behind its blocks, and hidden states that have come so far.

    The blocks and an embedding that is not the head hold no weights.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    stream: Stream
    tokens: Tensor

    @torch.no_grad()
    def states(self, batch: int) -> Tensor:
        ids = _batch(self.tokens, batch).to(self.stream.device)
        hidden = self.stream.hidden[batch].to(self.stream.device)
        head = self.model.get_output_embeddings()
        if head is None:
            return self._run(ids, hidden)
        return _input_of(head, lambda: self._run(ids, hidden))

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        if head is None:
            return states.float()
        one = torch.zeros(1, 1, dtype=torch.long, device=self.stream.device)
        hidden = self.stream.hidden[0][:1, :1].to(self.stream.device)
        with _instead(head, states):
            return self._run(one, hidden)[0].float()

    def _run(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits of the model whose last block hands on `hidden`, whatever it is given."""
        embedding = self.model.get_input_embeddings()
        width = embedding.weight.shape[1]

        def embed(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden.new_zeros(*ids.shape, width)

        replaced = {embedding: embed} if embedding.weight.is_meta else {}
        with _forwards(replaced), _passed_over(self.blocks, self.stream.returned, hidden):
            return self.model(input_ids=ids, use_cache=False).logits


@contextmanager
def _passed_over(
    blocks: nn.ModuleList, returned: list[Any], hidden: Tensor | None = None
) -> Iterator[None]:
    """Inside, no block computes: each hands on the hidden state that it is given.

    returned: what each was seen to return, whose form this takes. hidden: what the last one hands
    on instead, where that is given.
    """

    def hand_on(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            last = hidden is not None and index == len(blocks) - 1
            return handed_on(returned[index], hidden if last else given_hidden(args, kwargs))

        return forward

    with _forwards({block: hand_on(index) for index, block in enumerate(blocks)}):
        yield


@contextmanager
def _forwards(replaced: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules have other forwards, on the instances: models look at their classes."""
    own = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


@contextmanager
def _noted(blocks: nn.ModuleList, returned: list[Any]) -> Iterator[None]:
    """Inside, what these blocks return is added to `returned`, without the hidden state."""

    def note(_: nn.Module, __: Any, output: Any) -> None:
        returned.append(handed_on(output, None))

    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _input_of(head: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What `run` gives to the head, which itself is not computed."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise Stop

    hook = head.register_forward_pre_hook(look)
    try:
        run()
    except Stop:
        pass
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def _instead(head: nn.Module, states: Tensor) -> Iterator[None]:
    """Inside, the head is given `states` [tokens, hidden_size], as one text, whatever comes."""
    hook = head.register_forward_pre_hook(lambda *_: (states[None],))
    try:
        yield
    finally:
        hook.remove()
