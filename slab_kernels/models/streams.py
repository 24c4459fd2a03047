"""Decoder blocks fed one after another with exactly what the model's own forward gives them.

Nothing here knows an architecture. The model's forward runs once on the calibration tokens, and in
place of every block a recorder notes the arguments and hands the input on, so masks, position
embeddings and layer-type-specific arguments are the model's own. Two things must hold for that,
and both are checked: the hidden state is all that travels from block to block, and only a linear
itself reads its weight. A block may write into what it is given: it gets copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, CalibrationError, SlabError
from ..terminal import first_line
from ..text.windows import Windows
from .blocks import batches
from .weight_reads import WeightRead, without_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kind_of(block: nn.Module) -> tuple:
    """Equal for blocks that are made alike: of one class, with modules of the same names."""
    return type(block), tuple(name for name, _ in block.named_modules())


class Stop(Exception):
    """What was wanted from this forward has been seen."""


Call = tuple[tuple, dict[str, Any]]  # positional arguments and keywords of a block


@dataclass
class Stream:
    """The hidden states of one text on their way through the blocks.

    hidden: [samples, window, hidden_size] for each batch, at the input of the next block; windows
    of one batch have one length, so that nothing in it is padding. calls: for each block and batch
    what else the block is called with; equal tensors are kept once. Bytes held: tokens *
    hidden_size * itemsize. returned: what each block was seen to return, whatever hidden state was
    in it. products: the type to which blocks round the operands of their matrix products; None for
    the one that they compute in.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    device: torch.device
    returned: list[Any] = field(default_factory=list)
    products: torch.dtype | None = None

    def run(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """The output hidden state of block `index` for one batch, which works on copies."""
        hidden = self.hidden[batch].to(self.device, copy=True)
        args, kwargs = map_leaves(
            self.calls[index][batch], lambda leaf: hidden if leaf is _HIDDEN else copied(leaf)
        )
        with rounded_products(self.device, self.products):
            return _hidden_output(block(*args, **kwargs)).to(hidden.dtype)

    def advance(self, index: int, block: nn.Module) -> None:
        """Run block `index` on every batch and keep its outputs in place of its inputs."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.run(index, block, batch).to(hidden.device)

    def twin(self) -> Stream:
        """The same text at the same point, to be fed through other weights."""
        return replace(self, hidden=list(self.hidden))

    def exact(self) -> Stream:
        """The same hidden states, fed through blocks that round no operands."""
        return replace(self, products=None)

    def follow(self, arguments: list[tuple]) -> None:
        """Let one more module come behind the last block, called with the hidden state and these
        positional arguments of each batch."""
        self.calls.append([((_HIDDEN, *rest), {}) for rest in arguments])


def rounded_products(
    device: torch.device, dtype: torch.dtype | None
) -> AbstractContextManager[Any]:
    """Inside, matrix products round their operands to `dtype`; sums and all else stay fp32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


_HIDDEN = object()  # stands for the hidden state in a noted call


def copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _take(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden state (first positional argument, or `hidden_states`) and the call without it."""
    if args and isinstance(args[0], Tensor):
        return args[0], ((_HIDDEN, *args[1:]), kwargs)
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], (args, {**kwargs, "hidden_states": _HIDDEN})
    raise ArchitectureError(
        "a decoder block was called without a hidden state as first argument or `hidden_states`"
    )


def _hidden_output(output: Any) -> Tensor:
    """The hidden state among what a block returns. Raises: ArchitectureError."""
    output = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(output, Tensor):
        raise ArchitectureError(
            f"a decoder block returned {type(output).__name__} instead of a hidden state"
        )
    return output


def handed_on(output: Any, hidden: Tensor | None) -> Any:
    """`hidden` in the form of what a block returns, with all else that it returned."""
    return _like(output, [hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden


def given_hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block is called with. Raises: ArchitectureError."""
    return _take(args, kwargs)[0]


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dicts with every leaf changed."""
    if isinstance(tree, dict):
        return {key: map_leaves(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return _like(tree, [map_leaves(value, change) for value in tree])
    return change(tree)


def _like(tree: tuple | list, values: list) -> Any:
    """`values` in a tuple, named tuple or list of the kind of `tree`."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


class _Noted:
    """Makes leaves of a call fit to be kept.

    Equal tensors are kept once; caches, which a second run would extend, are dropped.
    """

    def __init__(self) -> None:
        self.by_kind: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def __call__(self, leaf: Any) -> Any:
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
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    tokens: Tensor | Windows,
    materialise: Callable[[int], nn.Module],
    device: torch.device,
    *,
    keep_on: torch.device | None = None,
    packed: Mapping[str, nn.Linear] | None = None,
    products: torch.dtype | None = None,
) -> Stream:
    """Run the model's forward up to the last block and note what each block is called with.

    Args:
        model: outside the blocks its weights are real and on `device`; the blocks may be on meta.
        tokens: [samples, window] int64, or windows of several lengths.
        materialise: index -> that block with real weights on `device`. Called once for every kind
            of block, to see whether it returns a tensor or a tuple.
        keep_on: where the hidden states are kept; default `device`.
        packed: full name -> linear of `blocks` that a layer without `weight` will replace.
        products: see `Stream`; None is taken where a block does not run so.

    Raises: ArchitectureError if the model's forward fails, if more than the hidden state travels
        from block to block, or if the model's code reads the weight of a linear of `packed`;
        CalibrationError if the hidden states are not finite.
    """
    packed = packed or {}
    read: list[str] = []  # names inside a block of linears whose weight the model's code reads
    while True:
        unread = {name: linear for name, linear in packed.items() if _inside(name) not in read}
        stream = Stream([], [[] for _ in blocks], device, products=products)
        recorder = _Recorder(blocks, materialise, stream, keep_on or device)
        try:
            with without_weight(unread):
                _run_model(model, Windows.of(tokens), recorder)
            break
        except WeightRead as error:
            read.append(_inside(error.linear))
    if read:
        advice = ", ".join(f"skip='*.{name}'" for name in read)
        what = f"{advice} {'leaves it' if len(read) == 1 else 'leave them'} dense"
        if all(_inside(name) in read for name in packed):
            what = "no other linear is left to compress"
        raise ArchitectureError(
            f"{type(model).__name__} reads the weight of {', '.join(read)} in its own code, which "
            f"a packed layer does not have; {what}"
        )
    return stream


def _inside(name: str) -> str:
    """The name of a linear inside its block: what follows the first number, as in layers.0."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[first + 1 :])


@dataclass
class _Handover:
    """What a block has handed on: the hidden state, and what it returned beside it."""

    hidden: Tensor
    rest: tuple = ()


@dataclass
class _Recorder:
    """Stands in place of every block while the model's forward runs, and fills `stream`.

    keep_on: where the hidden states are kept. outputs: what a block of each kind returned when it
    was run; later ones return the like. handed_over: what the block before this one handed on.
    """

    blocks: nn.ModuleList
    materialise: Callable[[int], nn.Module]
    stream: Stream
    keep_on: torch.device
    noted: _Noted = field(default_factory=_Noted)
    outputs: dict[tuple, Any] = field(default_factory=dict)
    handed_over: _Handover | None = None

    def on_call(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the model's code gets from block `index`: its own input, in the form of an output.

        Raises: Stop at the last block; ArchitectureError, CalibrationError.
        """
        hidden, call = _take(args, kwargs)
        if index == 0:
            self._begin(hidden)
        else:
            self._check_handover(index, hidden, call)
        self.stream.calls[index].append(map_leaves(call, self.noted))
        output = self._output(index, args, kwargs)
        if index == len(self.stream.returned):
            self.stream.returned.append(output)
        if index == len(self.blocks) - 1:
            raise Stop
        rest = tuple(output[1:]) if isinstance(output, tuple | list) else ()
        self.handed_over = _Handover(hidden, rest)
        return handed_on(output, hidden)

    def _begin(self, hidden: Tensor) -> None:
        """Keep the input of the first block."""
        if not bool(hidden.isfinite().all()):
            raise CalibrationError(
                "the embedded calibration text holds NaN or infinite numbers; "
                "check the model's weights"
            )
        self.stream.hidden.append(hidden.to(self.keep_on, copy=True))

    def _check_handover(self, index: int, hidden: Tensor, call: Call) -> None:
        """Refuse anything but the hidden state on its way to block `index`."""
        if not torch.equal(hidden, self.stream.hidden[-1].to(self.stream.device)):
            raise ArchitectureError(
                f"the model changes the hidden state between blocks {index - 1} and {index}"
            )
        rest = self.handed_over.rest if self.handed_over else ()
        beside = {id(t) for t in rest if isinstance(t, Tensor)}

        def refuse(leaf: Any) -> None:
            if id(leaf) in beside:
                raise ArchitectureError(
                    f"block {index} takes more than the hidden state from block {index - 1}"
                )

        map_leaves(call, refuse)

    def _output(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a block of this kind returns; the first of each kind is run to see it."""
        kind = kind_of(self.blocks[index])
        if kind not in self.outputs:
            self.outputs[kind] = self._first_output(index, args, kwargs)
        return self.outputs[kind]

    def _first_output(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the block returns; the stream's `products` become None where they make it fail."""
        stream, block = self.stream, self.materialise(index)
        for products in dict.fromkeys((stream.products, None)):
            own_args, own_kwargs = map_leaves((args, kwargs), copied)
            try:
                with rounded_products(stream.device, products):
                    return block(*own_args, **own_kwargs)
            except Exception as error:
                if products is None or not is_model_failure(error):
                    raise
                stream.products = None  # Code of a model may take its tensors to be of one type.


def _run_model(model: PreTrainedModel, tokens: Windows, recorder: _Recorder) -> None:
    """Run the model's forward on all batches, with `recorder` in place of the blocks.

    Raises: as `catch_stream`, and WeightRead.
    """

    def refuse_head(*_: Any) -> None:
        raise ArchitectureError(f"{type(model).__name__} did not call its last decoder block")

    stream = recorder.stream
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # The head may be on meta, where its own failure would be another.
    hook = None if head is None else head.register_forward_pre_hook(refuse_head)
    try:
        with torch.no_grad(), _replaced_forwards(recorder):
            for batch in batches(tokens):
                try:
                    with one_sentence(model):
                        model(input_ids=batch.to(stream.device), use_cache=False)
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


@contextmanager
def one_sentence(model: PreTrainedModel) -> Iterator[None]:
    """Around a model's own forward, whose failures are of any type and mostly of many lines.

    Raises: ArchitectureError that names the model's class; what is not the model's matter
        (`is_model_failure`) as it is.
    """
    try:
        yield
    except (Stop, WeightRead):
        raise
    except Exception as error:
        if not is_model_failure(error):
            raise
        raise ArchitectureError(
            f"{type(model).__name__} does not run on the calibration text: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def is_model_failure(error: Exception) -> bool:
    """Whether an exception that came out of a model's forward is a matter of that model.

    Errors of this library, of memory, devices, files and packages are not.
    """
    others = (SlabError, OSError, MemoryError, ImportError)
    of_devices = (torch.OutOfMemoryError, torch.AcceleratorError)
    return not isinstance(error, others + of_devices) and "DefaultCPUAllocator" not in str(error)


@contextmanager
def _replaced_forwards(recorder: _Recorder) -> Iterator[None]:
    """Inside, a call of a block goes to `recorder`.

    The forwards are replaced on the instances: models ask a block for its class and attributes.
    """

    def bind(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: recorder.on_call(index, args, kwargs)

    try:
        for index, block in enumerate(recorder.blocks):
            block.__dict__["forward"] = bind(index)
        yield
    finally:
        for block in recorder.blocks:
            block.__dict__.pop("forward", None)
