"""Stacked experts: transformers keeps the matrices of all experts of a block as one parameter.

Here each of them becomes the nn.Linear of a module, `experts.3.gate_proj` for one, so that whatever
works on linears works on experts too. The weights of those linears are views of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.experts import DOWN, GATED, PLAIN, Experts
from .stored_names import stored_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The stack that an expert's input is read by -> the linears whose rows it holds, in their order.
STACKS = {"gate_up_proj": GATED, "up_proj": PLAIN}
PIECE = 2, 3  # rows and columns by which a weight is tried out, see `stored_slices`


class Slice(NamedTuple):
    """Where the weight of an expert's linear lies in a stack [experts, rows, columns].

    stack: the full name of the parameter. expert: which one. first, rows: of that one's rows.
    """

    stack: str
    expert: int
    first: int
    rows: int

    def of(self, stack: Tensor) -> Tensor:
        """The weight [rows, columns], a view."""
        return stack[self.expert].narrow(0, self.first, self.rows)


Slices = Mapping[str, Slice]  # by the full name of the linear's weight


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds stacked experts that can be taken apart.

    They are those of transformers that read x W^T without a bias: gate and up rows one after the
    other in `gate_up_proj` [E, 2I, H], or `up_proj` [E, I, H] alone, and `down_proj` [E, H, I].
    """
    plain = not getattr(module, "has_bias", True) and not getattr(module, "is_transposed", True)
    if not plain or getattr(module, "has_post_expert_norm", False):
        return False
    own = dict(module.named_parameters(recurse=False))
    reading = next((name for name in STACKS if name in own), None)
    if reading is None or own.keys() != {reading, DOWN} or module._buffers:
        return False
    into, out = own[reading], own[DOWN]
    if into.dim() != 3 or out.dim() != 3:
        return False
    (E, rows, H), parts = into.shape, len(STACKS[reading])
    return out.shape[0] == E and out.shape[1] == H and rows == parts * out.shape[2]


def unstack(model: nn.Module, path: str) -> None:
    """Put `Experts` in place of the stacked experts that `model` has at `path`.

    The new weights need no gradients, and are views of the stacks, which may be on meta.
    """
    stacked = model.get_submodule(path)
    stacks = dict(stacked.named_parameters(recurse=False))
    for name in stacks:
        delattr(stacked, name)
    reading = next(name for name in stacks if name != DOWN)

    def linears(number: int) -> dict[str, nn.Linear]:
        weights = dict(
            zip(
                STACKS[reading],
                stacks[reading][number].detach().chunk(len(STACKS[reading])),
                strict=True,
            )
        )
        weights[DOWN] = stacks[DOWN][number].detach()
        return {name: _linear(weight) for name, weight in weights.items()}

    experts = [linears(number) for number in range(len(stacks[DOWN]))]
    model.set_submodule(path, Experts(stacked, experts))


def restack(model: nn.Module, path: str) -> None:
    """Undo `unstack` for experts whose linears are dense, with copies of their weights."""
    experts = mixtures(model)[path]
    slices = expert_slices(model, path)
    stacked = experts.stacked
    for stack in dict.fromkeys(part.stack for part in slices.values()):
        names = tuple(name for name, part in slices.items() if part.stack == stack)
        weights = {name: model.get_parameter(name) for name in names}
        whole = Held(names, True).joined(weights, slices)
        parameter = nn.Parameter(whole.detach(), requires_grad=False)
        stacked.register_parameter(stack.removeprefix(f"{path}."), parameter)
    model.set_submodule(path, stacked)


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def unstack_named(model: nn.Module, names: Iterable[str]) -> None:
    """Take apart the stacked experts of `model` that modules of these names lie in, or are."""
    split = [name.split(".") for name in names]
    named = {".".join(parts[:end]) for parts in split for end in range(1, len(parts) + 1)}
    for path, module in list(model.named_modules()):
        if path in named and is_stacked(module):
            unstack(model, path)


def mixtures(module: nn.Module) -> dict[str, Experts]:
    """The `Experts` in a module, by their names in it."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Experts)}


def stages(block: nn.Module, prefix: str) -> dict[str, str]:
    """The linears of experts in a block -> a name for all that read when they do.

    Linears of one stage do not depend on each other. prefix: of the full names of the linears.
    """
    found: dict[str, str] = {}
    for path, experts in mixtures(block).items():
        for number in range(experts.num_experts):
            for name in experts.projections:
                found[f"{prefix}{path}.{number}.{name}"] = f"{path} reads"
            found[f"{prefix}{path}.{number}.{DOWN}"] = f"{path} puts out"
    return found


def expert_slices(model: nn.Module, at: str | None = None) -> dict[str, Slice]:
    """The weight of every expert's linear in `model`, dense or packed -> where it is in a stack.

    at: the only `Experts` that are wanted; default: all.
    """
    found: dict[str, Slice] = {}
    for path, experts in mixtures(model).items():
        if at not in (None, path):
            continue
        reading = next(name for name, parts in STACKS.items() if parts == experts.projections)
        for number in range(experts.num_experts):
            first = 0
            for name, linear in experts.expert(number).named_children():
                rows: Any = linear.out_features
                stack = f"{path}.{DOWN if name == DOWN else reading}"
                start = 0 if name == DOWN else first
                found[f"{path}.{number}.{name}.weight"] = Slice(stack, number, start, rows)
                first += rows
    return found


class Held(NamedTuple):
    """Which weights of linears a tensor of a checkpoint holds: one, or those of a whole stack."""

    names: tuple[str, ...]
    whole: bool

    def joined(self, weights: Mapping[str, Tensor], slices: Slices) -> Tensor:
        """The tensor, from the weights by their names."""
        if not self.whole:
            return weights[self.names[0]]
        experts: dict[int, list[Tensor]] = {}
        for name in self.names:
            experts.setdefault(slices[name].expert, []).append(weights[name])
        return torch.stack([torch.cat(parts) for parts in experts.values()])

    def apart(self, tensor: Tensor, slices: Slices) -> dict[str, Tensor]:
        """The weights by their names, from the tensor."""
        if not self.whole:
            return {self.names[0]: tensor}
        return {name: slices[name].of(tensor) for name in self.names}


def stored_slices(model: PreTrainedModel, slices: Slices) -> dict[str, Held]:
    """The dense tensors in which transformers stores the stacks of `slices`, by stored name.

    They are one for each expert and projection, or the stack as it is, under a name that it may
    have. A stack that transformers would store in another form keeps the model's name and form,
    which it reads too.

    model: of the class and config to which they belong.
    """
    by_stack: dict[str, list[str]] = {}
    for name, part in slices.items():
        by_stack.setdefault(part.stack, []).append(name)
    probes: dict[str, Tensor] = {}
    pieces: dict[str, list[Tensor]] = {}  # what stands for the weights of a stack
    for stack, names in by_stack.items():
        # The order of a stack: expert after expert, and the rows of each.
        names.sort(key=lambda name: (slices[name].expert, slices[name].first))
        experts = len({slices[name].expert for name in names})
        # Every number is another one, so that conversions show what they do with rows and columns.
        numbers = torch.arange(len(names) * math.prod(PIECE), dtype=torch.float32)
        pieces[stack] = list(numbers.view(-1, *PIECE))
        probes[stack] = numbers.view(experts, -1, PIECE[1])
    found: dict[str, Held] = {}
    for stack, parts in stored_parts(model, probes, slices).items():
        names = by_stack[stack]
        places = {stored: _place(part, pieces[stack]) for stored, part in parts.items()}
        if all(place is not None for place in places.values()):
            found |= {s: Held((names[at],), False) for s, at in places.items() if at is not None}
            continue
        (stored, first), *others = parts.items()
        same = not others and torch.equal(first, probes[stack])
        found[stored if same else stack] = Held(tuple(names), True)
    return found


def _place(part: Tensor, pieces: list[Tensor]) -> int | None:
    """Which of `pieces` a stored tensor is; None if it is none of them as it was."""
    at = int(part.flatten()[0]) // math.prod(PIECE)
    return at if torch.equal(part, pieces[at]) else None


def routers(block: nn.Module) -> set[str]:
    """The names in `block` of what tells tokens which experts to take.

    They are modules beside experts whose only matrix has one row for each of them.
    """
    return set(_routers(block))


def _routers(block: nn.Module) -> Iterator[str]:
    for path, module in block.named_modules():
        if not (isinstance(module, Experts) or is_stacked(module)):
            continue
        experts = (
            module.num_experts
            if isinstance(module, Experts)
            else len(next(iter(module.parameters(recurse=False))))
        )
        parent = path.rpartition(".")[0]
        for name, beside in block.get_submodule(parent).named_children():
            large = [p for p in beside.parameters() if p.dim() >= 2 and min(p.shape[-2:]) > 1]
            if beside is not module and len(large) == 1 and large[0].shape[0] == experts:
                yield f"{parent}.{name}" if parent else name
