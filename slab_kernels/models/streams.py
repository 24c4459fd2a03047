"""Decoder blocks fed one after another with exactly what the model's own forward gives them.

Nothing here knows an architecture. The model's forward runs once on the calibration tokens with every block's
`forward` replaced by one that notes its arguments and hands its input on, so masks, position embeddings and
layer-type-specific arguments are the model's own. What must hold for that (the hidden state is the only thing that
travels from block to block, and only a linear itself reads its weight) is checked on the way. A block may write into
what it is given: it gets copies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, CalibrationError
from .blocks import batch_size


class Stop(Exception):
    """What was wanted from this forward has been seen."""


Call = tuple[tuple, dict]


@dataclass
class Stream:
    """The hidden states of one text on their way through the blocks.

    hidden: per batch [samples, window, hidden] at the input of the next block. calls: per block and batch, everything
    else the block is called with; equal tensors are kept once. Bytes held: samples * window * hidden_size * itemsize.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    device: torch.device

    def run(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """The output hidden state of block `index` for one batch, which works on copies."""
        hidden = self.hidden[batch].to(self.device, copy=True)
        args, kwargs = _map(
            self.calls[index][batch], lambda leaf: hidden if leaf is _HIDDEN else _copied(leaf)
        )
        return _hidden_output(block(*args, **kwargs))

    def advance(self, index: int, block: nn.Module) -> None:
        """Run block `index` on every batch and keep its outputs in place of its inputs."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.run(index, block, batch).to(hidden.device)

    def twin(self) -> Stream:
        """The same text at the same point, to be fed through other weights."""
        return Stream(list(self.hidden), self.calls, self.device)


_HIDDEN = object()  # stands for the hidden state in a noted call


def _copied(leaf):
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _take(args: tuple, kwargs: dict) -> tuple[Tensor, Call]:
    """The hidden state (first positional argument, or `hidden_states`) and the call without it."""
    if args and isinstance(args[0], Tensor):
        return args[0], ((_HIDDEN, *args[1:]), kwargs)
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], (args, {**kwargs, "hidden_states": _HIDDEN})
    raise ArchitectureError(
        "a decoder block was called without a hidden state as first argument or `hidden_states`"
    )


def _hidden_output(output) -> Tensor:
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor):
        raise ArchitectureError(
            f"a decoder block returned {type(output).__name__} instead of a hidden state"
        )
    return output


def _map(tree, change: Callable):
    """The same nest of tuples, lists and dicts with every leaf changed."""
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [_map(value, change) for value in tree])
    return change(tree)


def _like(tree: tuple | list, values: list):
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


class _Noted:
    """Call arguments with equal tensors kept once, and caches (which a second run would extend) dropped."""

    def __init__(self):
        self.by_kind: dict[tuple, list[Tensor]] = {}

    def __call__(self, leaf):
        if hasattr(leaf, "get_seq_length"):
            return None
        if not isinstance(leaf, Tensor):
            return leaf
        known = self.by_kind.setdefault((leaf.shape, leaf.dtype), [])
        for other in known[-8:]:
            if torch.equal(other, leaf):
                return other
        known.append(leaf.clone())  # the model may write into its own later
        return known[-1]


def catch_stream(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    materialise: Callable[[int], nn.Module],
    device: torch.device,
    keep_on: torch.device | None = None,
    packed: dict[str, nn.Linear] | None = None,
) -> Stream:
    """Run the model's forward up to the last block and note what each block is called with.

    Args:
        model: everything outside the blocks has real weights on `device`; the blocks may be on meta.
        tokens: [samples, window] int64.
        materialise: index -> that block with real weights on `device`. Called once for every kind of block, to see
            whether it returns a tensor or a tuple.
        keep_on: where the hidden states are kept; default `device`.
        packed: full name -> linear of `blocks` that a layer without `weight` will replace.

    Raises: ArchitectureError if more than the hidden state travels from block to block, or if the
    model's code reads the weight of a linear of `packed`; CalibrationError if the hidden states are
    not finite.
    """
    packed, read = packed or {}, []
    while True:
        unread = {name: linear for name, linear in packed.items() if _inside(name) not in read}
        try:
            with _without_weight(unread):
                stream = _caught(model, blocks, tokens, materialise, device, keep_on or device)
            break
        except _WeightRead as error:
            read.append(_inside(error.linear))
    if read:
        advice = ", ".join(f"skip='*.{name}'" for name in read)
        what = f"{advice} {'leaves it' if len(read) == 1 else 'leave them'} dense"
        if all(_inside(name) in read for name in packed):
            what = "no other linear is left to compress"
        raise ArchitectureError(
            f"{type(model).__name__} reads the weight of {', '.join(read)} in its own code, which a packed layer does "
            f"not have; {what}"
        )
    return stream


def _inside(name: str) -> str:
    """The name of a linear inside its block: what follows the first number, as in layers.0."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[first + 1 :])


class _WeightRead(AttributeError):
    """The model's code asked for the weight of this linear."""

    def __init__(self, linear: str):
        super().__init__(f"{linear} has no attribute 'weight'")
        self.linear = linear


class _WithoutWeight(nn.Linear):
    """A linear as the model's code finds a packed one: it computes, and has no `weight`."""

    full_name: str

    def __getattr__(self, name: str):
        if name == "weight":
            raise _WeightRead(self.full_name)
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._parameters["weight"], self.bias)


@contextmanager
def _without_weight(linears: dict[str, nn.Linear]):
    """Inside, these linears and copies made of them hide their weight."""
    try:
        for name, linear in linears.items():
            linear.__class__ = _WithoutWeight
            linear.full_name = name
        yield
    finally:
        for linear in linears.values():
            linear.__class__ = nn.Linear
            linear.__dict__.pop("full_name", None)


def _caught(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    materialise: Callable[[int], nn.Module],
    device: torch.device,
    keep_on: torch.device,
) -> Stream:
    """The stream of `catch_stream`, from one run of the model's forward."""
    stream, noted, shapes = Stream([], [[] for _ in blocks], device), _Noted(), {}
    travelling: list = []  # what the last block returned beside the hidden state

    def step(index: int, args: tuple, kwargs: dict):
        hidden, call = _take(args, kwargs)
        if index == 0:
            if not bool(hidden.isfinite().all()):
                raise CalibrationError(
                    "the embedded calibration text holds NaN or infinite numbers; check the model's weights"
                )
            stream.hidden.append(hidden.to(keep_on, copy=True))
        elif not torch.equal(hidden, stream.hidden[-1].to(device)):
            raise ArchitectureError(
                f"the model changes the hidden state between blocks {index - 1} and {index}"
            )
        else:
            extra = {id(t) for t in travelling if isinstance(t, Tensor)}

            def refuse(leaf):
                if id(leaf) in extra:
                    raise ArchitectureError(
                        f"block {index} takes more than the hidden state from block {index - 1}"
                    )

            _map(call, refuse)
        stream.calls[index].append(_map(call, noted))
        block = blocks[index]
        kind = (type(block), tuple(name for name, _ in block.named_modules()))
        if kind not in shapes:
            copied = _map((args, kwargs), _copied)
            shapes[kind] = materialise(index)(*copied[0], **copied[1])
        if index == len(blocks) - 1:
            raise Stop
        output = shapes[kind]
        if isinstance(output, (tuple, list)):
            travelling[:] = output[1:]
            return _like(output, [hidden, *travelling])
        travelling.clear()
        return hidden

    def refuse_head(*_):
        raise ArchitectureError(f"{type(model).__name__} did not call its last decoder block")

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hook = (
        None if head is None else head.register_forward_pre_hook(refuse_head)
    )  # it may be on meta
    try:
        with torch.no_grad(), _replaced_forwards(blocks, step):
            for batch in tokens.split(batch_size(tokens.shape[1])):
                try:
                    model(input_ids=batch.to(device), use_cache=False)
                except Stop:
                    continue
                refuse_head()
    finally:
        if hook is not None:
            hook.remove()
    missed = [index for index, calls in enumerate(stream.calls) if len(calls) != len(stream.hidden)]
    if missed:
        raise ArchitectureError(
            f"decoder block {missed[0]} was not called exactly once per forward"
        )
    return stream


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, step: Callable):
    def bind(index: int):
        return lambda *args, **kwargs: step(index, args, kwargs)

    try:
        for index, block in enumerate(blocks):
            block.forward = bind(
                index
            )  # on the instance: class and attributes, which models ask for, stay
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
