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
BIAS = "_bias"  # what the name of a stack of biases ends with, behind that of the weights
PIECE = 2, 3  # rows and columns by which a weight is tried out, see `stored_slices`


class Slice(NamedTuple):
    """Where the weight or the bias of an expert's linear lies in a stack.

    A stack of weights is [experts, rows, columns], or [experts, columns, rows] if it is transposed;
    one of biases is [experts, rows].

    stack: the full name of the parameter. expert: which one. part, parts: which of so many equal
    parts of its rows. interleaved: parts take turns row by row, and do not follow each other.
    """

    stack: str
    expert: int
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False

    def of(self, stack: Tensor) -> Tensor:
        """The weight [rows, columns] or the bias [rows], a view."""
        own = stack[self.expert]
        own = own.mT if self.transposed else own
        return (
            own[self.part :: self.parts] if self.interleaved else own.chunk(self.parts)[self.part]
        )

    def around(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of one expert in the stack, from that of the weight or bias."""
        whole = (shape[0] * self.parts, *shape[1:])
        return whole[::-1] if self.transposed else whole


Slices = Mapping[str, Slice]  # by the full name of the linear's weight or bias


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds stacked experts that can be taken apart.

    They are those that transformers marks as such, in the order of x W^T or transposed, with biases
    or without: `gate_up_proj` [E, 2I, H] with the rows of gate and up one after the other or in
    turns, or `up_proj` [E, I, H] alone, and `down_proj` [E, H, I].
    """
    marked = hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    if not marked or getattr(module, "has_post_expert_norm", False) or module._buffers:
        return False
    own = dict(module.named_parameters(recurse=False))
    reading = next((name for name in STACKS if name in own), None)
    names = {reading, DOWN, *([f"{reading}{BIAS}", f"{DOWN}{BIAS}"] if module.has_bias else ())}
    if reading is None or own.keys() != names or {own[n].dim() for n in (reading, DOWN)} != {3}:
        return False
    weights = stacked_weights(module)
    (E, rows, H), parts = weights[reading].shape, len(STACKS[reading])
    shapes: dict[str, tuple[int, ...]] = {reading: (E, rows, H), DOWN: (E, H, rows // parts)}
    if module.has_bias:
        shapes |= {f"{reading}{BIAS}": (E, rows), f"{DOWN}{BIAS}": (E, H)}
    found = {name: tuple(tensor.shape) for name, tensor in (own | weights).items()}
    return found == shapes and rows % parts == 0 and _interleaved(module) is not None


def stacked_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of stacked experts [experts, rows, columns], views, by the stacks' own names."""
    return {
        name: stack.detach().mT if module.is_transposed else stack.detach()
        for name, stack in module.named_parameters(recurse=False)
        if not name.endswith(BIAS)
    }


def _interleaved(module: nn.Module) -> bool | None:
    """Whether the rows of gate and up of stacked experts take turns; None if nobody can tell.

    transformers says it in `is_concatenated`. Where it does not (5.0) the gate itself is asked:
    which of two outputs is lost when the second of four inputs is not a number.
    """
    own: Any = module
    if "up_proj" in module._parameters:
        return False
    if hasattr(module, "is_concatenated"):
        return not module.is_concatenated
    asked = torch.tensor([[1.0, math.nan, 1.0, 1.0]], device="cpu")  # models are opened on meta
    lost = own._apply_gate(asked).isnan().flatten().tolist()
    return {(True, False): True, (False, True): False}.get(tuple(lost))


def _slices(
    prefix: str, projections: tuple[str, ...], stacked: nn.Module, experts: int, interleaved: bool
) -> dict[str, Slice]:
    """Where the weights and biases of all linears lie, by their names. prefix: of all names."""
    reading = next(name for name, parts in STACKS.items() if parts == projections)
    found: dict[str, Slice] = {}
    for number in range(experts):
        for name in (*projections, DOWN):
            place = Slice(f"{prefix}{DOWN}", number)
            if name != DOWN:
                part = projections.index(name), len(projections)
                place = Slice(f"{prefix}{reading}", number, *part, interleaved)
            weight = place._replace(transposed=bool(stacked.is_transposed))
            found[f"{prefix}{number}.{name}.weight"] = weight
            if stacked.has_bias:
                bias = place._replace(stack=f"{place.stack}{BIAS}")
                found[f"{prefix}{number}.{name}.bias"] = bias
    return found


def unstack(model: nn.Module, path: str) -> None:
    """Put `Experts` in place of the stacked experts that `model` has at `path`.

    The new weights need no gradients, and are views of the stacks, which may be on meta. The new
    biases are copies, each of which can be saved by itself.
    """
    stacked = model.get_submodule(path)
    stacks = {name: p.detach() for name, p in stacked.named_parameters(recurse=False)}
    projections = next(STACKS[name] for name in STACKS if name in stacks)
    interleaved, count = bool(_interleaved(stacked)), len(stacks[DOWN])
    slices = _slices("", projections, stacked, count, interleaved)
    for name in stacks:
        delattr(stacked, name)

    def linear(name: str) -> nn.Linear:
        weight = slices[f"{name}.weight"]
        bias = slices.get(f"{name}.bias")
        copied = None if bias is None else bias.of(stacks[bias.stack]).clone()
        return _linear(weight.of(stacks[weight.stack]), copied)

    experts = [
        {name: linear(f"{number}.{name}") for name in (*projections, DOWN)}
        for number in range(count)
    ]
    model.set_submodule(path, Experts(stacked, experts, interleaved))


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


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
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
    """The weight and bias of every expert's linear in `model` -> where it is in a stack.

    The linears may be dense or packed. at: the only `Experts` that are wanted; default: all.
    """
    found: dict[str, Slice] = {}
    for path, experts in mixtures(model).items():
        if at in (None, path):
            sizes = experts.num_experts, experts.interleaved
            found |= _slices(f"{path}.", experts.projections, experts.stacked, *sizes)
    return found


class Held(NamedTuple):
    """Which weights or biases of linears a tensor of a checkpoint holds: one, or a whole stack."""

    names: tuple[str, ...]
    whole: bool

    def joined(self, weights: Mapping[str, Tensor], slices: Slices) -> Tensor:
        """The tensor, from the weights or biases by their names."""
        first = weights[self.names[0]]
        if not self.whole:
            return first
        experts = len({slices[name].expert for name in self.names})
        stack = first.new_empty(experts, *slices[self.names[0]].around(first.shape))
        with torch.no_grad():
            for name in self.names:
                slices[name].of(stack).copy_(weights[name])
        return stack

    def apart(self, tensor: Tensor, slices: Slices) -> dict[str, Tensor]:
        """The weights or biases by their names, from the tensor."""
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
        shape = PIECE[:1] if names[0].endswith(".bias") else PIECE
        # Every number is another one, so that conversions show what they do with rows and columns.
        numbers = torch.arange(len(names) * math.prod(shape), dtype=torch.float32)
        pieces[stack] = list(numbers.view(-1, *shape))
        parts_of = dict(zip(names, pieces[stack], strict=True))
        probes[stack] = Held(tuple(names), True).joined(parts_of, slices)
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
    at = int(part.flatten()[0]) // pieces[0].numel()
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
