"""Decoder blocks found by structure, fed one after another with exactly what the model's own forward gives them.

Nothing here knows an architecture. The model's forward runs once on the calibration tokens with every block's
`forward` replaced by one that notes its arguments and hands its input on, so masks, position embeddings and
layer-type-specific arguments are the model's own. What must hold for that (the hidden state is the only thing that
travels from block to block) is checked on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .text import CalibrationError

TOKENS_PER_BATCH = 4096  # tokens a block sees at once: enough to fill a device, small beside the weights


class ArchitectureError(ValueError):
    """The model is not one that block-by-block compression can treat."""


class _Stop(Exception):
    """What was wanted from this forward has been seen."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost nn.ModuleList with weights inside every element, of
    `num_hidden_layers` elements where the config says so, and with the most parameters if several remain.

    Raises: ArchitectureError saying what was looked for.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{name} is an encoder-decoder model; only decoder-only language models are supported"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text_config, "num_hidden_layers", None)
    found = list(_outer_lists(model, ""))
    fitting = [(path, blocks) for path, blocks in found if depth is None or len(blocks) == depth]
    if not fitting:
        wanted = "" if depth is None else f" and num_hidden_layers={depth} elements"
        seen = ", ".join(f"{path} ({len(blocks)})" for path, blocks in found) or "none"
        raise ArchitectureError(
            f"no decoder blocks found in {name}: looked for an nn.ModuleList with weights in every element{wanted}; found {seen}"
        )
    return max(fitting, key=lambda item: sum(t.numel() for t in _tensors(item[1])))


def _outer_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if (
            isinstance(child, nn.ModuleList)
            and len(child)
            and all(any(t.dim() >= 2 for t in _tensors(b)) for b in child)
        ):
            yield path, child
        else:
            yield from _outer_lists(child, path + ".")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()  # where a compressed block keeps its weights


def block_linears(
    path: str, blocks: nn.ModuleList, group: int, skip: tuple[str, ...] = ()
) -> list[dict[str, nn.Linear]]:
    """Per block: full name -> nn.Linear to compress. `skip` holds fnmatch patterns of full module names.

    Raises: ArchitectureError for weights that are not in plain nn.Linear modules (GPT-2's Conv1D, stacked experts), for
    in_features that groups of `group` do not divide, for a skip pattern that matches nothing, and if nothing is left.
    """
    result, used = [], set()
    for index, block in enumerate(blocks):
        linears = {}
        for name, module in block.named_modules():
            full = f"{path}.{index}.{name}"
            used |= {pattern for pattern in skip if fnmatchcase(full, pattern)}
            kind = type(module).__name__
            if kind == "SlabLinear":
                raise ArchitectureError(f"{full} is compressed already; start from the dense model")
            if _is_skipped(full, skip):
                continue
            if type(module) is nn.Linear:
                if module.in_features % group:
                    raise ArchitectureError(
                        f"{full} has in_features={module.in_features}, which groups of {group} do not divide; "
                        f"leave it dense with skip='*.{name}'"
                    )
                linears[full] = module
            elif not type(module).__module__.startswith("torch.nn."):
                for parameter, value in module.named_parameters(recurse=False):
                    if value.dim() >= 2 and min(value.shape[-2:]) > 1:
                        raise ArchitectureError(
                            f"{full} ({kind}) keeps its weight {parameter!r} {list(value.shape)} outside nn.Linear; only "
                            f"nn.Linear is supported (no Conv1D, no stacked experts). skip='*.{name}' leaves it dense"
                        )
        result.append(linears)
    unused = [pattern for pattern in skip if pattern not in used]
    if unused:
        raise ArchitectureError(
            f"skip={unused[0]!r} matches no module in {path}; names look like {path}.0.<module>"
        )
    if not any(result):
        raise ArchitectureError(f"no nn.Linear is left to compress in {path}")
    return result


def _is_skipped(full: str, skip: tuple[str, ...]) -> bool:
    """A skipped module covers what is below it."""
    parts = full.split(".")
    return any(
        fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1) for pattern in skip
    )


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
        """The output hidden state of block `index` for one batch."""
        args, kwargs = _fill(self.calls[index][batch], self.hidden[batch].to(self.device))
        return _hidden_output(block(*args, **kwargs))

    def advance(self, index: int, block: nn.Module) -> None:
        """Run block `index` on every batch and keep its outputs in place of its inputs."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.run(index, block, batch).to(hidden.device)

    def twin(self) -> Stream:
        """The same text at the same point, to be fed through other weights."""
        return Stream(list(self.hidden), self.calls, self.device)


_HIDDEN = object()  # stands for the hidden state in a noted call


def _fill(call: Call, hidden: Tensor) -> Call:
    args, kwargs = call
    return tuple(hidden if a is _HIDDEN else a for a in args), {
        k: hidden if v is _HIDDEN else v for k, v in kwargs.items()
    }


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
        raise ArchitectureError(f"a decoder block returned {type(output).__name__} instead of a hidden state")
    return output


def _map(tree, change: Callable):
    """The same nest of tuples, lists and dicts with every leaf changed."""
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        return type(tree)(_map(value, change) for value in tree)
    return change(tree)


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
            if other is leaf or torch.equal(other, leaf):
                return other
        known.append(leaf)
        return leaf


def batch_size(window: int) -> int:
    return max(1, TOKENS_PER_BATCH // window)


def catch_stream(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    materialise: Callable[[int], nn.Module],
    device: torch.device,
    keep_on: torch.device | None = None,
) -> Stream:
    """Run the model's forward up to the last block and note what each block is called with.

    Args:
        model: everything outside the blocks has real weights on `device`; the blocks may be on meta.
        tokens: [samples, window] int64.
        materialise: index -> that block with real weights on `device`. Called once for every class of block, to see
            whether it returns a tensor or a tuple.
        keep_on: where the hidden states are kept; default `device`.

    Raises: ArchitectureError if more than the hidden state travels from block to block, CalibrationError if the hidden
    states are not finite.
    """
    stream, noted, shapes = Stream([], [[] for _ in blocks], device), _Noted(), {}
    travelling: list = []  # the hidden state last handed on, then whatever else that block returned

    def step(index: int, args: tuple, kwargs: dict):
        hidden, call = _take(args, kwargs)
        if index == 0:
            if not bool(hidden.isfinite().all()):
                raise CalibrationError(
                    "the embedded calibration text holds NaN or infinite numbers; check the model's weights"
                )
            stream.hidden.append(hidden.to(keep_on or device))
        elif hidden is not travelling[0] and not torch.equal(hidden, travelling[0]):
            raise ArchitectureError(
                f"the model changes the hidden state between blocks {index - 1} and {index}"
            )
        else:
            extra = {id(t) for t in travelling[1:] if isinstance(t, Tensor)}

            def refuse(leaf):
                if id(leaf) in extra:
                    raise ArchitectureError(
                        f"block {index} takes more than the hidden state from block {index - 1}"
                    )

            _map(call, refuse)
        stream.calls[index].append(_map(call, noted))
        if index == len(blocks) - 1:
            raise _Stop
        kind = type(blocks[index])
        if kind not in shapes:
            shapes[kind] = materialise(index)(*args, **kwargs)
        output = shapes[kind]
        if isinstance(output, (tuple, list)):
            travelling[:] = [hidden, *output[1:]]
            return type(output)(travelling)
        travelling[:] = [hidden]
        return hidden

    with torch.no_grad(), _replaced_forwards(blocks, step):
        for batch in tokens.split(batch_size(tokens.shape[1])):
            try:
                model(input_ids=batch.to(device), use_cache=False)
            except _Stop:
                continue
            raise ArchitectureError(f"{type(model).__name__} did not call its last decoder block")
    missed = [index for index, calls in enumerate(stream.calls) if len(calls) != len(stream.hidden)]
    if missed:
        raise ArchitectureError(f"decoder block {missed[0]} was not called exactly once per forward")
    return stream


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, step: Callable):
    def bind(index: int):
        return lambda *args, **kwargs: step(index, args, kwargs)

    try:
        for index, block in enumerate(blocks):
            block.forward = bind(index)  # on the instance: class and attributes, which models ask for, stay
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def _hooks(modules: dict[str, nn.Module], see: Callable[[str, Tensor], None]):
    """Call `see(name, input)` before each of `modules` runs."""

    def bind(name: str):
        return lambda module, args, kwargs: see(name, args[0] if args else kwargs["input"])

    handles = [
        module.register_forward_pre_hook(bind(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Group:
    """Linears that receive the same tensor, and how often in one forward."""

    names: tuple[str, ...]
    calls: int


def find_groups(stream: Stream, index: int, block: nn.Module, linears: dict[str, nn.Linear]) -> list[Group]:
    """Linears grouped by identity of the input tensor (q/k/v, gate/up), in order of execution.

    Raises: CalibrationError naming a linear that no batch reaches.
    """
    groups: list[Group] = []
    unseen = dict(linears)
    for batch in range(len(stream.hidden)):
        inputs: dict[
            str, list[Tensor]
        ] = {}  # keeps the tensors alive, so that equal addresses mean the same tensor

        def see(name: str, x: Tensor, inputs=inputs):
            inputs.setdefault(name, []).append(x)

        with torch.no_grad(), _hooks(unseen, see):
            stream.run(index, block, batch)
        by_input: dict[tuple, list[str]] = {}
        for name, tensors in inputs.items():
            key = tuple((t.data_ptr(), t.shape, t.stride(), t._version) for t in tensors)
            by_input.setdefault(key, []).append(name)
            del unseen[name]
        groups += [Group(tuple(names), len(key)) for key, names in by_input.items()]
        if not unseen:
            return groups
    raise CalibrationError(
        f"{next(iter(unseen))} never ran on the calibration text, so nothing is known of its inputs; "
        "give more text, or leave it dense with skip="
    )


def layer_inputs(
    stream: Stream, index: int, block: nn.Module, linear: nn.Linear, name: str, calls: int, batch: int
) -> Tensor:
    """The inputs [tokens, in_features] that `linear` receives while block `index` runs one batch, up to its last call.

    Raises: CalibrationError if they are not finite.
    """
    inputs: list[Tensor] = []

    def see(_, x: Tensor):
        inputs.append(x.detach().flatten(0, -2))
        if len(inputs) == calls:
            raise _Stop  # what follows in the block is not needed

    with torch.no_grad(), _hooks({name: linear}, see), suppress(_Stop):
        stream.run(index, block, batch)
    x = torch.cat(inputs) if inputs else torch.empty(0, linear.in_features, device=stream.device)
    if not bool(x.isfinite().all()):
        raise CalibrationError(
            f"the inputs of {name} hold NaN or infinite numbers on the calibration text; check the model's weights, or "
            "compress with more precise activations (device='cpu' computes in fp32)"
        )
    return x


def filled_copy(
    block: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """A copy of `block` (which may be on meta) holding `tensors` on `device`, floating parameters cast to `dtype`.

    The copy is all that is ever materialised of a block: dropping it releases the memory.
    """
    filled = copy.deepcopy(block)
    filled.__dict__.pop("forward", None)  # the copy of a block under `catch_stream` computes

    def place(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=dtype if dtype and t.is_floating_point() else t.dtype)

    filled.load_state_dict({name: place(t) for name, t in tensors.items()}, strict=False, assign=True)
    for owner in filled.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)
    return filled.eval().requires_grad_(False)
