"""A dense model's tensors as a run asks for them: channels in new orders, experts taken apart."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from .channels import Moves, reordered
from .experts import Slices, expert_slices, unstack_named
from .shards import Spec


class Rearranged:
    """What both kinds of source do with channels in new orders, and with experts taken apart.

    The kinds themselves say what the model has: `_own_names`, `_own_spec` and `_own`.

    moves: the new orders; `get` gives channels so. slices: the weights and biases of experts'
    linears, which then stand in `names` in place of the stacks that the model had.
    """

    model: Any
    moves: Moves = MappingProxyType({})
    slices: Slices = MappingProxyType({})

    def in_orders(self, moves: Moves) -> Self:
        """The same source with channels in the orders of `moves`."""
        source = copy.copy(self)
        source.moves = moves
        return source

    def unstack_named(self, names: Iterable[str]) -> None:
        """Take apart the stacked experts that modules of these names lie in, or are."""
        unstack_named(self.model, names)
        self.slices = expert_slices(self.model)

    @property
    def names(self) -> list[str]:
        """The model's tensors, each by one name."""
        stacks = {part.stack for part in self.slices.values()}
        return sorted({*self._own_names(), *self.slices} - stacks)

    def _own_names(self) -> Iterable[str]:
        raise NotImplementedError

    def _own_spec(self, name: str) -> Spec:
        raise NotImplementedError

    def _own(self, name: str) -> Tensor:
        raise NotImplementedError

    def spec(self, name: str) -> Spec:
        """Dtype and shape of a tensor of the model."""
        part = self.slices.get(name)
        if part is None:
            return self._own_spec(name)
        dtype, shape = self._own_spec(part.stack)
        return dtype, tuple(part.of(torch.empty(shape, device="meta")).shape)

    def get(self, name: str) -> Tensor:
        """A tensor by its name in the model; whoever gets it does not change it.

        Raises: CheckpointError if it is no longer what it was when the run began (`expect`).
        """
        return self.get_all([name])[name]

    def get_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, for which every stack is read once. Raises: as `get`."""
        found: dict[str, Tensor] = {}
        stacks: dict[str, Tensor] = {}
        for name in names:
            part = self.slices.get(name)
            if part is None:
                found[name] = self._moved(name, self._own(name))
                continue
            if part.stack not in stacks:
                stacks[part.stack] = self._own(part.stack)
            found[name] = part.of(stacks[part.stack])
        return found

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        return reordered(tensor, self.moves[name]) if name in self.moves else tensor
