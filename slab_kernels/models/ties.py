"""Tensors that are one under two names (an output head that is the embedding), as the weights say.

transformers ties what class and config say, unless a checkpoint holds both tensors and they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .stored_names import StoredNames


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter that is another one under a second name -> that name: lm_head -> embed_tokens."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def all_names(name: str, tied: dict[str, str]) -> Iterator[str]:
    """`name`, and every other name that `tied` (see `tied_names`) has for the same tensor."""
    yield name
    yield from (second for second, first in tied.items() if first == name)


def holds(model: PreTrainedModel) -> bool:
    """Whether what `model` or its config calls tied is one tensor, or two of the same numbers."""
    state, tied = model.state_dict(), tied_names(model)
    if hasattr(model, "get_expanded_tied_weights_keys"):
        tied |= model.get_expanded_tied_weights_keys(all_submodels=True)
    return all(_same(state.get(name), state.get(other)) for name, other in tied.items())


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return False
    if first.shape != second.shape or first.device != second.device:
        return False
    if first.is_meta or first.data_ptr() == second.data_ptr():
        return True
    return torch.equal(first.to(second.dtype), second)


def untie(model: PreTrainedModel) -> None:
    """Make every tied tensor one of its own, in `model` and its config; no value is touched."""
    model.all_tied_weights_keys = {}
    for part in (model.config, *vars(model.config).values()):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False


def untie_config(config: dict[str, Any]) -> None:
    """Do the same in the content of a config.json."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False


def retie(model: PreTrainedModel) -> None:
    """Undo `untie` for a model whose output head holds the tensor of its embedding again."""
    for part in (model.config, *vars(model.config).values()):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def retie_config(config: dict[str, Any]) -> None:
    """Undo `untie_config` for a model whose output head is its embedding."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = True


def settle(model: PreTrainedModel, stored: StoredNames, read: Callable[[str], Tensor]) -> bool:
    """Give `stored` one tensor for all tied names, or untie `model` if it holds two that differ.

    Of a tied pair either may be stored, as for transformers. read: the tensor of a stored name.

    Returns: whether the names are still tied.
    """
    tied, origins = tied_names(model), stored.origins
    for name, other in tied.items():
        if name in origins and other not in origins:
            origins[other] = origins.pop(name)
    pairs = [(name, other) for name, other in tied.items() if name in origins and other in origins]
    if all(_same(stored.get(name, read), stored.get(other, read)) for name, other in pairs):
        for name, _ in pairs:
            del origins[name]
        return True
    untie(model)
    for name, other in tied.items():
        if other in origins:
            origins.setdefault(name, origins[other])
    return False
