"""A dense output head on a CPU: a single token is copied out of the tensor that it is a slice of.

A model asks its head for the last token alone, `hidden[:, -1:]`. torch multiplies such a slice by a
frozen weight as a batch of matrices (bmm), for which it may copy the whole weight; as a tensor of
its own the token is a plain product. `is_contiguous` does not tell the two apart, since the strides
of dimensions of one element do not matter to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def copy_slices(model: nn.Module) -> None:
    """Have the model's dense output head copy what it is called with where that is a slice on a
    CPU. Without a head, or with a packed one, nothing changes; a second call changes nothing."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if type(head) is nn.Linear and _copied not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_copied)


def _copied(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments of a call with a copy of x [..., K] where x is a slice of a CPU tensor."""
    if not arguments or not isinstance(x := arguments[0], Tensor):
        return None
    if x.device.type != "cpu" or x.dim() < 3 or _is_whole(x):
        return None
    return (x.clone(memory_format=torch.contiguous_format), *arguments[1:])


def _is_whole(x: Tensor) -> bool:
    """Whether each dimension's stride is the size of all behind it, also where it has one
    element."""
    size = 1
    for length, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != size:
            return False
        size *= length
    return True
