"""The numbers that the linears of a block read, and which linears read the same.

A block may write into a tensor after a linear has read it, so the contents at that moment count.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..nn.experts import DOWN
from .experts import mixtures
from .streams import Stop, Stream


@contextmanager
def _hooks(
    modules: Mapping[str, nn.Module],
    see: Callable[[str, Tensor], None],
    position: int = 0,
    argument: str = "input",
) -> Iterator[None]:
    """Inside, `see(name, value)` is called before each of `modules` runs.

    The value is that of the argument of this position and name.
    """

    def bind(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(
            name, args[position] if len(args) > position else kwargs[argument]
        )

    handles = [
        module.register_forward_pre_hook(bind(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Group:
    """Linears that receive the same numbers, and how often in one forward."""

    names: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class _Seen:
    """One input of a linear, caught when it is read.

    where: the tensor's place in memory and how often it was written to.
    """

    value: Tensor
    where: tuple[Any, ...]

    def same(self, other: _Seen) -> bool:
        return self.value.shape == other.value.shape and torch.equal(self.value, other.value)


def _same(seen: list[_Seen], other: list[_Seen]) -> bool:
    """Whether two linears read the same numbers, call for call."""
    return len(seen) == len(other) and all(map(_Seen.same, seen, other))


def find_groups(
    stream: Stream, index: int, block: nn.Module, linears: dict[str, nn.Linear]
) -> list[Group]:
    """Linears grouped by the contents of their inputs (q/k/v, gate/up), in order of execution.

    Inputs that are equal in one batch and are not one tensor are compared in every batch. What an
    expert puts out is read by one linear alone, so that input is neither kept nor compared: of all
    experts together it may be far more than the block's other numbers.

    Raises: CalibrationError naming a linear that no batch reaches.
    """
    alone = _alone(block, linears)
    groups: list[list[str]] = []
    calls: dict[str, int] = {}
    doubtful: set[str] = set()  # grouped though their inputs are not one tensor
    for batch in range(len(stream.hidden)):
        if len(calls) == len(linears):
            break
        new = {name: linears[name] for name in linears if name not in calls}
        inputs = _inputs(stream, index, block, new, batch, alone)
        found: list[list[str]] = []
        for name, seen in inputs.items():
            calls[name] = len(seen)
            others = [] if name in alone else [g for g in found if g[0] not in alone]
            group = next((g for g in others if _same(seen, inputs[g[0]])), None)
            if group is None:
                found.append([name])
                continue
            group.append(name)
            if any(a.where != b.where for a, b in zip(seen, inputs[group[0]], strict=True)):
                doubtful |= {group[0], name}
        groups += found
    if len(calls) < len(linears):
        raise _never_ran(block, linears, [name for name in linears if name not in calls])
    for batch in range(len(stream.hidden)) if doubtful else ():
        inputs = _inputs(stream, index, block, {name: linears[name] for name in doubtful}, batch)
        groups = [part for group in groups for part in _split(group, inputs, doubtful)]
    return [Group(tuple(names), calls[names[0]]) for names in groups]


def _alone(block: nn.Module, linears: Mapping[str, nn.Linear]) -> set[str]:
    """Those of `linears` that read what only they read: the last one of each expert."""
    last = {
        experts.expert(number).get_submodule(DOWN)
        for experts in mixtures(block).values()
        for number in range(experts.num_experts)
    }
    return {name for name, linear in linears.items() if linear in last}


def _never_ran(
    block: nn.Module, linears: dict[str, nn.Linear], missed: list[str]
) -> CalibrationError:
    """The error for linears that no batch reached.

    Its advice names the largest modules of `block` that hold only such linears.
    """
    inside: dict[nn.Module, str] = {module: name for name, module in block.named_modules()}
    idle = list(dict.fromkeys(inside[linears[name]] for name in missed))
    busy = [inside[linear] for name, linear in linears.items() if name not in missed]
    prefix = missed[0].removesuffix(idle[0])  # of every name: where the block is
    largest = list(dict.fromkeys(_largest_idle(name, busy) for name in idle))
    # In a numbered part, such as one expert, a pattern for all blocks would name others too.
    numbered = any(part.isdigit() for name in largest for part in name.split("."))
    advice = ", ".join(f"skip='{prefix if numbered else '*.'}{name}'" for name in largest)
    return CalibrationError(
        f"{missed[0]} never ran on the calibration text, so nothing is known of its inputs; "
        f"give more text, or leave dense what did not run, with {advice}"
    )


def _largest_idle(name: str, busy: list[str]) -> str:
    """The outermost module around the linear `name` that holds no linear of `busy`."""
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((m for m in around if not any(b.startswith(f"{m}.") for b in busy)), name)


def _split(group: list[str], inputs: dict[str, list[_Seen]], doubtful: set[str]) -> list[list[str]]:
    """A group cut into those whose inputs are equal in this batch too."""
    kept: list[str] = []
    others: list[str] = []
    for name in group:
        equal = _same(inputs.get(name, []), inputs.get(group[0], []))
        (kept if name not in doubtful or equal else others).append(name)
    return [kept, *_split(others, inputs, doubtful)] if others else [kept]


def _inputs(
    stream: Stream,
    index: int,
    block: nn.Module,
    linears: dict[str, nn.Linear],
    batch: int,
    counted: Container[str] = (),
) -> dict[str, list[_Seen]]:
    """What each linear that gets any tokens reads while block `index` runs one batch.

    Equal tensors are kept once. counted: names of linears of which no numbers are kept.
    """
    inputs: dict[str, list[_Seen]] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the place of one that was seen

    def see(name: str, x: Tensor) -> None:
        if not x.numel():
            return
        if name in counted:
            inputs.setdefault(name, []).append(_Seen(x.new_empty(0), ()))
            return
        alive.append(x)
        where = (x.data_ptr(), x.shape, x.stride(), x._version)
        known = (seen for other in inputs.values() for seen in other if seen.where == where)
        seen = next((k for k in known if torch.equal(k.value, x)), None)
        inputs.setdefault(name, []).append(seen or _Seen(x.detach().clone(), where))

    with torch.no_grad(), _hooks(linears, see):
        stream.run(index, block, batch)
    return inputs


def inputs_by_name(
    stream: Stream, index: int, block: nn.Module, linears: dict[str, nn.Linear], batch: int
) -> dict[str, Tensor]:
    """What each linear that gets any tokens reads while block `index` runs one batch.

    [tokens, in_features]; linears that read one tensor get one tensor.
    """
    read: dict[tuple[int, ...], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, seen in _inputs(stream, index, block, linears, batch).items():
        key = tuple(id(one) for one in seen)
        if key not in read:
            read[key] = torch.cat([one.value.flatten(0, -2) for one in seen])
        found[name] = read[key]
    return found


def layer_inputs(
    stream: Stream, index: int, block: nn.Module, linear: nn.Linear, group: Group, batch: int
) -> Tensor:
    """The inputs [tokens, in_features] of `linear` while block `index` runs one batch.

    group: the one that it belongs to.

    Raises: CalibrationError if they are not finite; it names the first linear of the group.
    """
    linears = {group.names[0]: linear}
    return group_inputs(stream, index, block, linears, [group], batch)[0]


def group_inputs(
    stream: Stream,
    index: int,
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: list[Group],
    batch: int,
) -> list[Tensor]:
    """What the linears of each group read while block `index` runs one batch.

    [tokens, in_features] each. The block is stopped at their last call.

    linears: full name -> linear of the block.

    Raises: CalibrationError if they are not finite; it names the first linear of a group.
    """
    calls = {group.names[0]: group.calls for group in groups}
    inputs: dict[str, list[Tensor]] = {name: [] for name in calls}
    missing = sum(calls.values())

    def see(name: str, x: Tensor) -> None:
        nonlocal missing
        if len(inputs[name]) == calls[name]:
            return
        missing -= 1
        x = x.detach().flatten(0, -2)
        inputs[name].append(x.clone() if missing else x)  # the block may write into it afterwards
        if not missing:
            raise Stop  # what follows in the block is not needed

    with torch.no_grad(), _hooks({name: linears[name] for name in calls}, see), suppress(Stop):
        stream.run(index, block, batch)
    return [_joined(name, linears[name], found, stream.device) for name, found in inputs.items()]


def all_inputs(
    stream: Stream,
    index: int,
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: list[Group],
    batch: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """What `layer_inputs` gives for the first linear of every group, and the block's output.

    The block runs once.

    linears: full name -> linear of the block.

    Raises: CalibrationError if inputs are not finite.
    """
    calls = {group.names[0]: group.calls for group in groups}
    inputs: dict[str, list[Tensor]] = {name: [] for name in calls}

    def see(name: str, x: Tensor) -> None:
        if len(inputs[name]) < calls[name]:
            inputs[name].append(x.detach().flatten(0, -2).clone())

    with torch.no_grad(), _hooks({name: linears[name] for name in calls}, see):
        output = stream.run(index, block, batch)
    joined = {
        name: _joined(name, linears[name], parts, stream.device) for name, parts in inputs.items()
    }
    return joined, output


def _joined(name: str, linear: nn.Linear, inputs: list[Tensor], device: torch.device) -> Tensor:
    """The inputs of a linear's calls as one [tokens, in_features]. Raises: CalibrationError."""
    if len(inputs) == 1:
        x = inputs[0]
    else:
        x = torch.cat(inputs) if inputs else torch.empty(0, linear.in_features, device=device)
    # A sum is cheaper to look at than every number; it is finite only if they all are.
    if not bool(x.sum(dtype=torch.float32).isfinite()) and not bool(x.isfinite().all()):
        raise CalibrationError(
            f"the inputs of {name} hold NaN or infinite numbers on the calibration text; check the "
            "model's weights, or compress with more precise activations (device='cpu' computes in "
            "fp32)"
        )
    return x


def routed_tokens(stream: Stream, index: int, block: nn.Module) -> dict[str, list[int]]:
    """How many tokens of the text each expert of block `index` gets from its router.

    Returns: the name of the `Experts` in the block -> the tokens of each of its experts.
    """
    found = mixtures(block)
    counts = {name: [0] * experts.num_experts for name, experts in found.items()}
    for batch in range(len(stream.hidden)) if found else ():
        seen: set[str] = set()

        def see(name: str, chosen: Tensor, seen: set[str] = seen) -> None:
            took = torch.bincount(chosen.flatten(), minlength=len(counts[name])).tolist()
            counts[name] = [a + b for a, b in zip(counts[name], took, strict=True)]
            seen.add(name)
            if len(seen) == len(counts):
                raise Stop  # what the experts compute is not needed

        with torch.no_grad(), _hooks(found, see, 1, "top_k_index"), suppress(Stop):
            stream.run(index, block, batch)
    return counts
