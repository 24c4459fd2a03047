"""What a model computes after its last block, up to the output head, called like one more block.

The final norm, and whatever else a model does there, is the model's own code: its forward runs with
the blocks replaced, and the last of them puts out the hidden state that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError
from .blocks import batch_size
from .streams import Stop, Stream, given_hidden, handed_on, one_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Tail(nn.Module):
    """Called with the last block's hidden states and the token ids, it leads them to its head.

    The head is found under its full name in the model. It computes nothing, which would be logits
    of every token: what it reads is seen by the hooks of whoever wants it.

    Args:
        model: its weights outside the blocks are real; the blocks and the head may be on meta.
        returned: what each block returns (`Stream.returned`).
        name: of the head in the model.
        weight: [N,K] of the head; None: it has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        returned: list[Any],
        name: str,
        weight: Tensor | None = None,
    ):
        super().__init__()
        self._around = (model, blocks, returned)  # within a tuple it is no part of this module
        self.name = name
        original = model.get_submodule(name)
        assert isinstance(original, nn.Linear)
        sizes = original.in_features, original.out_features
        head = nn.Linear(*sizes, bias=False, device="meta")
        if weight is not None:
            head.weight = nn.Parameter(weight, requires_grad=False)
        head.__dict__["forward"] = _nothing
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

        Raises: ArchitectureError for a model that does not call its head.
        """
        model = self._around[0]

        def reach(x: Tensor) -> None:
            self.head(x)
            raise Stop

        with self._replaced(hidden, reach), one_sentence(model):
            try:
                model(input_ids=ids.to(hidden.device), use_cache=False)
            except Stop:
                return hidden
        raise ArchitectureError(
            f"{type(model).__name__} does not call its output head {self.name}; "
            "leave it dense with head=False (--no-head)"
        )

    def run_to_the_end(self, hidden: Tensor, ids: Tensor) -> None:
        """Run the model's code behind the last block to its end, with a head that gives zeros.

        Raises: ArchitectureError for a model that does not run so.
        """
        model, rows = self._around[0], self.head.out_features

        def zeros(x: Tensor) -> Tensor:
            return x.new_zeros(()).expand(*x.shape[:-1], rows)

        with torch.no_grad(), self._replaced(hidden, zeros), one_sentence(model):
            model(input_ids=ids.to(hidden.device), use_cache=False)

    @contextmanager
    def _replaced(self, hidden: Tensor, head: Callable[[Tensor], Any]) -> Iterator[None]:
        """Inside, the last block of the model puts out `hidden`, and `head` is called as head."""
        model, blocks, returned = self._around
        last = len(blocks) - 1

        def bind(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = hidden if index == last else given_hidden(args, kwargs)
                return handed_on(returned[index], given)

            return forward

        places: list[nn.Module] = [*blocks, model.get_submodule(self.name)]
        forwards = [*map(bind, range(len(blocks))), lambda input: head(input)]
        try:
            for module, forward in zip(places, forwards, strict=True):
                module.__dict__["forward"] = forward
            yield
        finally:
            for module in places:
                module.__dict__.pop("forward", None)


def _nothing(input: Tensor) -> Tensor:
    return input


def lead_on(stream: Stream, ids: Tensor) -> None:
    """Let a `Tail` come behind the last block of a stream of the token ids [samples, window]."""
    stream.follow([(batch,) for batch in ids.split(batch_size(ids.shape[1]))])
