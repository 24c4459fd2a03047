"""Channels whose order is free: the model's function stays if all that holds them is reordered.

They are those of the residual stream (embedding columns, norms, the inputs of everything that reads
it, the outputs of what writes to it), the hidden channels of every gated MLP, and the channels of
every value head, which all query heads that share it share. Modules are known by the names that
Llama and most models after it give them; that a model computes with them as Llama does is not taken
from names, but tried: see `same_function`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError
from .streams import Stream
from .ties import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# What may differ, as a share of what a block adds to its input. A wrong order differs by the whole.
TOLERANCE, COARSE_TOLERANCE = 0.01, 0.2  # of fp32, and of 16-bit types


class Part(NamedTuple):
    """Where a parameter holds channels: in its dimension `dim`, the first of them at `start`."""

    parameter: str
    dim: int
    start: int = 0


class Channels(NamedTuple):
    """One set of channels with an order of its own.

    kind: "residual", "mlp" or "value". readers: name of a linear, and which of its inputs is the
    first of these channels.
    """

    name: str
    kind: str
    size: int
    readers: list[tuple[str, int]]
    parts: list[Part]


class Move(NamedTuple):
    """`part` of a parameter gets a new order [size]: channel i becomes what order[i] was."""

    part: Part
    order: Tensor


Moves = Mapping[str, list[Move]]  # by the parameter's name


def moves(channels: Channels, order: Tensor) -> list[Move]:
    """What brings `channels` into an order [size]."""
    return [Move(part, order) for part in channels.parts]


def by_parameter(listed: list[Move]) -> Moves:
    found: dict[str, list[Move]] = {}
    for move in listed:
        found.setdefault(move.part.parameter, []).append(move)
    return found


def digest(moved: Moves) -> str:
    """SHA-256, hexadecimal, of the orders of all parameters."""
    found = hashlib.sha256()
    for name in sorted(moved):
        for part, order in moved[name]:
            found.update(repr((*part, order.tolist())).encode())
    return found.hexdigest()


def reordered(tensor: Tensor, listed: list[Move]) -> Tensor:
    """A copy of a parameter with its channels in their new orders."""
    tensor = tensor.clone()
    for part, order in listed:
        held = tensor.narrow(part.dim, part.start, len(order))
        held.copy_(held.index_select(part.dim, order.to(tensor.device)))
    return tensor


def put_in_orders(model: nn.Module, moved: Moves) -> None:
    """Bring the parameters of a dense model in memory into their new orders, in place."""
    for name, listed in moved.items():
        parameter = model.get_parameter(name)
        parameter.data = reordered(parameter.data, listed)


def free_in_block(block: nn.Module, prefix: str) -> dict[str, list[Channels]]:
    """What they are -> channels: the MLP's hidden ones and those of each value head of a block.

    prefix: what the full names of its parameters begin with.

    Raises: ArchitectureError for a block without the modules of Llama's.
    """
    attention, mlp = _child(block, ATTENTION, prefix), _child(block, MLP, prefix)
    return {
        "hidden channels of MLPs": [_hidden(block, prefix, mlp)],
        "channels of value heads": list(_values(block, prefix, attention)),
    }


def residual(model: PreTrainedModel, path: str, blocks: nn.ModuleList) -> Channels:
    """The channels of the residual stream. path: the name of `blocks`.

    Raises: ArchitectureError for weights beside embedding, blocks, norms and output head, or a
        block without the modules of Llama's.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = embedding.weight.shape[1]
    parts: list[Part] = []
    readers: list[tuple[str, int]] = []
    for index, block in enumerate(blocks):
        prefix = f"{path}.{index}."
        attention, mlp = _child(block, ATTENTION, prefix), _child(block, MLP, prefix)
        inside = {attention: ATTENTION, mlp: MLP}
        parts += _norms(block, prefix, tuple(inside), size)
        for module, names in inside.items():
            for leaf in names:
                name = f"{module}.{leaf}"
                writes = leaf == names[-1]
                parts += _linear(block, prefix, name, 0 if writes else 1)
                if not writes:
                    readers.append((prefix + name, 0))
    tied = tied_names(model)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{path}.") or name in tied:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if owner is embedding or (owner is head and parameter.dim() == 2):
            parts.append(Part(name, 1))
        elif owner is not head:
            parts.append(_vector(name, parameter, size))
    return Channels("the residual stream", "residual", size, readers, parts)


def _vector(name: str, parameter: Tensor, size: int) -> Part:
    """A norm's weight or bias [size]. Raises: ArchitectureError."""
    if tuple(parameter.shape) != (size,):
        raise ArchitectureError(
            f"{name} {list(parameter.shape)} is no norm of {size} channels, and nothing is known "
            "of what it does with their order"
        )
    return Part(name, 0)


def _child(block: nn.Module, names: tuple[str, ...], prefix: str) -> str:
    """The name of the child that holds linears of these names, and no other weights than vectors.

    Raises: ArchitectureError.
    """
    for name, child in block.named_children():
        if all(type(getattr(child, leaf, None)) is nn.Linear for leaf in names):
            others = [p for n, p in child.named_parameters() if n.split(".")[0] not in names]
            if all(p.dim() < 2 for p in others):
                return name
    raise ArchitectureError(f"{prefix[:-1]} has no module with the linears {', '.join(names)}")


def _norms(block: nn.Module, prefix: str, beside: tuple[str, ...], size: int) -> Iterator[Part]:
    """Find the vectors of a block that belong to no module in `beside`, such as its norms.

    Raises: ArchitectureError.
    """
    for name, parameter in block.named_parameters():
        if name.split(".")[0] not in beside:
            yield _vector(prefix + name, parameter, size)


def _linear(block: nn.Module, prefix: str, name: str, dim: int, start: int = 0) -> Iterator[Part]:
    """A linear whose outputs (dim 0, with its bias) or inputs (dim 1) are the channels."""
    yield Part(f"{prefix}{name}.weight", dim, start)
    if dim == 0 and _linear_at(block, name).bias is not None:
        yield Part(f"{prefix}{name}.bias", 0, start)


def _linear_at(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _hidden(block: nn.Module, prefix: str, mlp: str) -> Channels:
    down = f"{mlp}.down_proj"
    parts = [*_linear(block, prefix, down, 1)]
    for leaf in ("gate_proj", "up_proj"):
        parts += _linear(block, prefix, f"{mlp}.{leaf}", 0)
    size = _linear_at(block, down).in_features
    return Channels(f"{prefix}{mlp}", "mlp", size, [(prefix + down, 0)], parts)


def _values(block: nn.Module, prefix: str, attention: str) -> Iterator[Channels]:
    """One set for every value head. Raises: ArchitectureError."""
    module = block.get_submodule(attention)
    size = int(getattr(module, "head_dim", 0))
    output, value = f"{attention}.o_proj", f"{attention}.v_proj"
    reads = _linear_at(block, output).in_features
    rows = _linear_at(block, value).out_features
    if not size or rows % size or reads % rows:
        raise ArchitectureError(
            f"{prefix}{attention} has {rows} outputs of v_proj and {reads} inputs of o_proj, which "
            f"are no value heads of head_dim={size}"
        )
    queries = reads // rows  # heads that share a value head
    for head in range(rows // size):
        starts = [(head * queries + query) * size for query in range(queries)]
        parts = [*_linear(block, prefix, value, 0, head * size)]
        for start in starts:
            parts += _linear(block, prefix, output, 1, start)
        readers = [(prefix + output, start) for start in starts]
        yield Channels(f"{prefix}{attention}, value head {head}", "value", size, readers, parts)


@torch.no_grad()
def same_function(
    stream: Stream,
    index: int,
    block: nn.Module,
    prefix: str,
    changed: Moves,
    order: Tensor | None = None,
) -> bool:
    """Whether block `index` computes the same with its channels in new orders, for one batch.

    prefix: what the full names of its parameters begin with. order: of the residual stream, None
    where that stays. Errors of rounding, measured by what the block adds to its input, pass.
    """
    twin = copy.deepcopy(block)
    for name, parameter in twin.named_parameters():
        if prefix + name in changed:
            parameter.data = reordered(parameter.data, changed[prefix + name])
    hidden = stream.hidden[0]
    moved = hidden if order is None else hidden[..., order.to(hidden.device)]
    before = stream.run(index, block, 0)
    after = replace(stream, hidden=[moved]).run(index, twin, 0)
    wanted = before if order is None else before[..., order.to(before.device)]
    added = (before - hidden.to(before.device)).float().norm()
    limit = TOLERANCE if before.dtype == torch.float32 else COARSE_TOLERANCE
    return bool((after - wanted).float().norm() <= limit * added)


@torch.no_grad()
def same_norms(model: PreTrainedModel, path: str, channels: Channels, order: Tensor) -> bool:
    """Whether the norms outside the blocks do the same to a vector in another order.

    Their weights are real; those of the blocks, whose list is called `path`, need not be.
    """
    for part in channels.parts:
        owner = model.get_submodule(part.parameter.rpartition(".")[0])
        inside = part.parameter.startswith(f"{path}.")
        if inside or part.dim or owner is model.get_output_embeddings():
            continue
        twin = copy.deepcopy(owner)
        for name, parameter in twin.named_parameters():
            parameter.data = reordered(parameter.data, [Move(Part(name, 0), order)])
        value = torch.linspace(-2, 3, channels.size).to(model.get_parameter(part.parameter))
        where = order.to(value.device)
        if not torch.allclose(twin(value[where]), owner(value)[where], rtol=1e-2, atol=1e-2):
            return False
    return True
