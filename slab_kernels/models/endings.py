"""What a model makes of a text up to its output head, and the logits of any slice of that.

Logits are tokens * vocabulary numbers, far more than all else of a small batch, so a model is run
up to the input of its head, and the head on as many tokens at a time as memory allows. Nothing here
knows an architecture: the model's own forward runs, with its blocks passed over where their outputs
are known (`Ending`), and a hook on the head looks at its input or puts other states in its place.
Whatever the model does behind its head (scaling, capping) so happens to every slice. A model is in
memory as a whole (`WholeModel`), or read block by block (`BlockwiseModel`). Under compression what
lies behind the last block is called like one more block (`Tail`).
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
from .streams import Stop, Stream, catch_stream, given_hidden, handed_on, one_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import Source

HIDDEN_AT_ONCE = 1 << 30  # bytes of hidden states that a text has on its way through the blocks


@dataclass
class Ending:
    """The end of a model, behind its blocks, run on hidden states that are given.

    The blocks may be on meta, and so may the embedding and the head where they are not computed.

    returned: what each block was seen to return (`Stream.returned`), whose form is kept.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    returned: list[Any]

    def run(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The logits for token ids [samples, window] if the last block hands on `hidden`.

        No block computes: each hands on the hidden state that it is given, and so does the last
        one where `hidden` is None.

        Raises: ArchitectureError for a model that does not run so.
        """
        last = len(self.blocks) - 1

        def hand_on(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                known = hidden is not None and index == last
                given = hidden if known else given_hidden(args, kwargs)
                return handed_on(self.returned[index], given)

            return forward

        replaced: dict[nn.Module, Callable[..., Any]] = {
            block: hand_on(index) for index, block in enumerate(self.blocks)
        }
        with one_sentence(self.model):
            if hidden is not None:
                replaced |= _zeros_for_meta(self.model.get_input_embeddings(), hidden.dtype)
            with _forwards(replaced):
                return self.model(input_ids=ids, use_cache=False).logits

    def states(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The input of the head, which is not computed; logits if the model names no head."""
        head = self.model.get_output_embeddings()
        if head is None:
            return self.run(ids, hidden)
        return _input_of(head, lambda: self.run(ids, hidden))

    @torch.no_grad()
    def try_out(self, ids: Tensor, hidden: Tensor) -> None:
        """Run the model's code to its end, or up to a head that is no nn.Linear.

        Raises: as `run`.
        """
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            self.states(ids, hidden)
            return

        def zeros(x: Tensor) -> Tensor:
            return x.new_zeros(()).expand(*x.shape[:-1], head.out_features)

        with _forwards({head: lambda input: zeros(input)}):
            self.run(ids, hidden)


class Tail(nn.Module):
    """Called with the last block's hidden states and the token ids, it leads them to its head.

    The head is found under its full name in the model. It computes nothing, which would be logits
    of every token: what it reads is seen by the hooks of whoever wants it.

    Args:
        name: of the head in the model, an nn.Linear.
        weight: [N,K] of the head.
    """

    def __init__(self, ending: Ending, name: str, weight: Tensor):
        super().__init__()
        self._ending, self.name = ending, name
        N, K = weight.shape
        head = nn.Linear(K, N, bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        head.__dict__["forward"] = lambda input: input
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, head)

    @property
    def head(self) -> nn.Linear:
        """The head in this module."""
        head = self.get_submodule(self.name)
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden [samples, window, hidden_size], ids [samples, window] int64; returns `hidden`.

        Raises: as `Ending.states`.
        """
        self.head(self._ending.states(ids.to(hidden.device), hidden))
        return hidden


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
        with _instead(head, states):
            return Ending(self.model, passed, self.returned).run(one)[0].float()


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
            yield _Behind(Ending(model, self.blocks, stream.returned), stream, tokens)


@dataclass
class _Behind:
    """The end of a model, and hidden states that have come so far.

    The blocks and an embedding that is not the head hold no weights.
    """

    ending: Ending
    stream: Stream
    tokens: Tensor

    @torch.no_grad()
    def states(self, batch: int) -> Tensor:
        ids = _batch(self.tokens, batch).to(self.stream.device)
        return self.ending.states(ids, self.stream.hidden[batch].to(self.stream.device))

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        head = self.ending.model.get_output_embeddings()
        if head is None:
            return states.float()
        one = torch.zeros(1, 1, dtype=torch.long, device=self.stream.device)
        hidden = self.stream.hidden[0][:1, :1].to(self.stream.device)
        with _instead(head, states):
            return self.ending.run(one, hidden)[0].float()


def _zeros_for_meta(
    embedding: nn.Module, dtype: torch.dtype
) -> dict[nn.Module, Callable[..., Any]]:
    """An embedding whose weight is on meta, and a forward that gives zeros; empty for others."""
    table = dict(embedding.named_parameters()).get("weight")
    if table is None or not table.is_meta:
        return {}
    width = table.shape[1]
    return {embedding: lambda ids, *_, **__: ids.new_zeros(*ids.shape, width, dtype=dtype)}


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
    """What `run` gives to the head, which itself is not computed.

    Raises: ArchitectureError if it does not call the head.
    """
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["input"])
        raise Stop

    hook = head.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    except Stop:
        return seen[0]
    finally:
        hook.remove()
    raise ArchitectureError(
        f"the model does not call its output head, a {type(head).__name__}, so nothing is known of "
        "what it would read there"
    )


@contextmanager
def _instead(head: nn.Module, states: Tensor) -> Iterator[None]:
    """Inside, the head is given `states` [tokens, hidden_size], as one text, whatever comes."""
    hook = head.register_forward_pre_hook(lambda *_: ((states[None],), {}), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
