"""A text's forward passes through one block, dense or while its linears are replaced in groups.

The dense block runs once for each batch, and what its linears read is kept. In the other block
every group needs a pass of its own, because the weights before it have changed, and each pass comes
by all that earlier passes came by. What a module puts out for a batch is the same in every later
pass once its linears, and all that ran before it, are replaced for good. Such outputs are kept as
far as there is room, and the module is not run again. With room for all of them every linear
computes once for each batch, whatever the number of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Group, all_inputs, group_inputs
from .streams import Stream, copied, map_leaves

# On a CPU, kept tensors of one block take at most so many bytes, on a GPU this share of what is
# free.
ROOM = 1 << 30
SHARE = 0.1


@dataclass
class Room:
    """How many more bytes may be kept."""

    bytes: int

    @classmethod
    def on(cls, device: torch.device) -> Room:
        """The room for what is kept of one block on `device`."""
        if device.type == "cuda":
            return cls(int(SHARE * torch.cuda.mem_get_info(device)[0]))
        return cls(ROOM)

    def take(self, size: int) -> bool:
        """Whether `size` bytes, at least one, were left; they are taken then.

        What holds no numbers is not worth keeping: a module may return nothing, and write instead.
        """
        if not 0 < size <= self.bytes:
            return False
        self.bytes -= size
        return True


def size_of(tree: Any) -> int:
    """Bytes of all tensors in a nest of tuples, lists and dicts."""
    sizes: list[int] = []
    map_leaves(tree, lambda leaf: sizes.append(leaf.nbytes) if isinstance(leaf, Tensor) else None)
    return sum(sizes)


@dataclass
class Passes:
    """The passes of one text through block `index`.

    linears: full name -> linear of the block, of those that are replaced.
    room: for what is kept; several texts may share it.
    finished: the names of linears whose weight will not change any more.
    """

    stream: Stream
    index: int
    block: nn.Module
    linears: dict[str, nn.Linear]
    room: Room
    finished: set[str] = field(default_factory=set)
    # module -> batch -> what its calls put out, in their order
    _kept: dict[nn.Module, dict[int, list[Any]]] = field(default_factory=dict)

    @property
    def batches(self) -> range:
        return range(len(self.stream.hidden))

    def inputs(self, groups: list[Group], batch: int) -> list[Tensor]:
        """What the linears of each group read in one batch, [tokens, in_features].

        Raises: CalibrationError if it is not finite.
        """
        with self._replaying(batch):
            return group_inputs(self.stream, self.index, self.block, self.linears, groups, batch)

    def finish(self, names: tuple[str, ...]) -> None:
        """Linears that have their final weights from now on."""
        self.finished.update(names)

    def output(self, batch: int) -> Tensor:
        """The hidden state that the block puts out for one batch."""
        with self._replaying(batch):
            return self.stream.run(self.index, self.block, batch)

    def advance(self) -> None:
        """Put the block's outputs in place of its inputs in `stream`, and keep nothing more."""
        for batch in self.batches:
            home = self.stream.hidden[batch].device
            self.stream.hidden[batch] = self.output(batch).to(home)
            self._forget(list(self._kept), batch)

    def forget(self) -> None:
        """Keep nothing, as the block's weights have changed after all."""
        for batch in self.batches:
            self._forget(list(self._kept), batch)

    def forget_modules(self, modules: list[nn.Module]) -> None:
        """Keep nothing of what these modules put out, since they will be called otherwise."""
        for batch in self.batches:
            self._forget(modules, batch)

    def _forget(self, modules: list[nn.Module], batch: int) -> None:
        for module in modules:
            self.room.bytes += size_of(self._kept.get(module, {}).pop(batch, None))

    @contextmanager
    def _replaying(self, batch: int) -> Iterator[None]:
        """Inside, one forward of the block takes what is kept for `batch`, and keeps more."""
        forward = _Forward(self, batch)
        inside = {module: name for name, module in self.linears.items()}
        before: dict[nn.Module, Any] = {}
        try:
            for module in self.block.modules():
                names = [inside[m] for m in module.modules() if m in inside]
                final = all(name in self.finished for name in names)
                if names and module is not self.block and (final or module in inside):
                    stand_in = forward.stand_in(module, final)
                    before[module] = module.__dict__.get("forward")
                    module.__dict__["forward"] = stand_in
            yield
        finally:
            for module, own in before.items():
                module.__dict__.pop("forward")
                if own is not None:
                    module.__dict__["forward"] = own


@dataclass
class _Forward:
    """One forward of a block for one batch.

    settled: whether all that ran so far is as it will be in every later pass.
    calls: how often each module was called.
    """

    passes: Passes
    batch: int
    settled: bool = True
    calls: dict[nn.Module, int] = field(default_factory=dict)

    def stand_in(self, module: nn.Module, final: bool) -> Callable[..., Any]:
        """What is called in place of the module's forward. final: its linears are replaced."""
        real, passes, batch = module.forward, self.passes, self.batch

        def unsettled(*args: Any, **kwargs: Any) -> Any:
            self.settled = False
            return real(*args, **kwargs)

        def kept_or_run(*args: Any, **kwargs: Any) -> Any:
            call = self.calls[module] = self.calls.get(module, -1) + 1
            kept = passes._kept.setdefault(module, {}).setdefault(batch, [])
            if call < len(kept):
                return map_leaves(kept[call], copied)
            output = real(*args, **kwargs)
            if self.settled and call == len(kept) and passes.room.take(size_of(output)):
                # The block may write into its own copy afterwards.
                kept.append(map_leaves(output, copied))
                passes._forget([m for m in module.modules() if m is not module], batch)
            return output

        return kept_or_run if final else unsettled


def may_replay(stream: Stream, index: int, block: nn.Module, linears: dict[str, nn.Linear]) -> bool:
    """Whether block `index` puts out the same if its modules' outputs are taken as they were kept.

    Not so a block whose modules tell each other something by other ways than arguments and results.
    It is tried on one batch, with another one in between.
    """
    trial = Passes(stream, index, block, linears, Room.on(stream.device))
    trial.finish(tuple(linears))
    plain = stream.run(index, block, 0)
    for batch in (0, len(stream.hidden) - 1):
        trial.output(batch)
    return torch.equal(trial.output(0), plain)


@dataclass
class DensePasses:
    """The passes of one text through block `index` whose weights stay: one for each batch.

    Inputs of linears and outputs of the block are kept as far as there is room; the rest is run
    again when it is asked for.

    linears: full name -> linear of the block. groups: those that will be asked for.
    """

    stream: Stream
    index: int
    block: nn.Module
    linears: dict[str, nn.Linear]
    groups: list[Group]
    room: Room
    _inputs: list[dict[str, Tensor]] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for batch in range(len(self.stream.hidden)):
            if self._expected(batch) > self.room.bytes:
                break
            inputs, output = all_inputs(
                self.stream, self.index, self.block, self.linears, self.groups, batch
            )
            if not self.room.take(size_of((inputs, output))):
                break
            self._inputs.append(inputs)
            self._outputs.append(output)

    def _expected(self, batch: int) -> int:
        """Bytes that a batch is expected to take, where every linear reads all of its tokens.

        Experts that are shown all tokens read so much that it may not fit into memory once.
        """
        hidden = self.stream.hidden[batch]
        read = sum(self.linears[g.names[0]].in_features * g.calls for g in self.groups)
        return hidden.nbytes + hidden.shape[:-1].numel() * read * hidden.element_size()

    def inputs(self, groups: list[Group], batch: int) -> list[Tensor]:
        """What the linears of each group read in one batch, [tokens, in_features]; asked for once.

        Raises: CalibrationError if it is not finite.
        """
        if batch < len(self._inputs):
            return [self._inputs[batch].pop(group.names[0]) for group in groups]
        return group_inputs(self.stream, self.index, self.block, self.linears, groups, batch)

    def advance(self) -> None:
        """Put the block's outputs in place of its inputs in `stream`."""
        for batch, hidden in enumerate(self.stream.hidden):
            known = batch < len(self._outputs)
            run = self.stream.run
            output = self._outputs[batch] if known else run(self.index, self.block, batch)
            self.stream.hidden[batch] = output.to(hidden.device)
        self._inputs, self._outputs = [], []
