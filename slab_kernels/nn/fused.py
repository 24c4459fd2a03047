"""`FusedSlabLinear`: q, k and v, or gate and up, as one layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backends import activations as accuracy_mode
from ..backends import dense_copy, dispatch
from ..errors import ArgumentTypeError, ShapeError
from .call import any_autocast, autocast, constant_in_traces, refuse_tangents
from .linear import SlabLinear
from .prepared import Prepared, Snapshot, accuracy, copies, keep, keep_only, packed_from


class FusedSlabLinear(nn.Module):
    """Several SlabLinear that read the same x (q, k, v; gate, up), by one launch where a backend
    can.

    x [..., K] -> one [..., N] per part. The parts stay modules of their own, `parts.0`, `parts.1`,
    ..., with their biases, U, V, P and Q; only what a backend prepares is shared. Frozen, and
    differentiable in x and the biases, like the parts. What a part had prepared for itself is
    dropped, since memory would hold its weight twice; a call of the part alone prepares it anew.

    While another module, such as an adapter, stands around a part, every part runs by itself; who
    puts it there calls `forget`.
    """

    _prefill: str | None = None  # what `prepare` was told; None: the environment's word
    _activations: str | None = None  # likewise

    def __init__(self, parts: SlabLinear | Iterable[SlabLinear]):
        """Raises: ArgumentTypeError for anything but SlabLinear, ShapeError without a part or if
        they differ in in_features."""
        super().__init__()
        parts = [parts] if isinstance(parts, SlabLinear) else list(parts)
        if strange := {type(part).__name__ for part in parts if not isinstance(part, SlabLinear)}:
            raise ArgumentTypeError(
                f"FusedSlabLinear takes SlabLinear modules, not {', '.join(sorted(strange))}"
            )
        if not parts:
            raise ShapeError("FusedSlabLinear takes at least one SlabLinear, not an empty list")
        self.parts = nn.ModuleList(parts)
        if len(sizes := {part.in_features for part in parts}) > 1:
            raise ShapeError(
                f"fused parts must read the same x, but these take in_features={sorted(sizes)}"
            )
        self.in_features = parts[0].in_features
        self.sizes = [part.out_features for part in parts]
        self._linears: dict[torch.dtype, tuple[Prepared, ...]] = {}
        words = {part._prefill for part in parts}
        self._prefill = words.pop() if len(words) == 1 else None
        modes = {part._activations for part in parts}
        self._activations = modes.pop() if len(modes) == 1 else None
        for part in parts:
            part._linears = {}

    def prepare(
        self,
        dtype: torch.dtype = torch.float32,
        prefill: str | None = None,
        activations: str | None = None,
    ) -> FusedSlabLinear:
        """Choose a backend that runs every part, and make the parts' common layout now.

        prefill: as `SlabLinear.prepare` takes it; one copy holds the rows of all parts. Default:
            what it was told last, or its parts were if they agree, else as there.
        activations: as there, with the same default; with int8 the parts share the integers of x.
            It holds for calls of a part alone, too.

        Raises: as `SlabLinear.prepare`.
        """
        told = dense_copy.named(self._prefill if prefill is None else prefill)
        return self._prepare(dtype, prefill, told, activations=activations)

    def _prepare(
        self,
        dtype: torch.dtype,
        prefill: str | None,
        told: str,
        room: bool | None = None,
        activations: str | None = None,
    ) -> FusedSlabLinear:
        """`prepare` with the word that holds; room: as `dense_copy.applied` takes it."""
        if self.wrapped:
            for part in self.modules():
                if isinstance(part, SlabLinear):
                    part._prepare(dtype, prefill, told, room, activations)
            return self
        linears = self._linears
        linears[dtype] = (self._prepared(dtype, told, room, activations),)
        if activations not in (None, self._activations):
            keep_only(linears, dtype)  # the others were prepared for another mode
        self._prefill = prefill or self._prefill
        if activations:
            self._activations = activations
            for part in self._parts():  # so that a part called alone runs in this mode, too
                if part._activations != activations:
                    part._activations, part._linears = activations, {}
        return self

    @constant_in_traces
    def _prepare_in_trace(self, dtype: torch.dtype) -> bool:
        kept = self._linears.get(dtype, ())
        found = any(p.source.is_still(self._tensors()) for p in kept)
        return found or self.wrapped or bool(self._prepared(dtype))

    @property
    def wrapped(self) -> bool:
        """Whether another module, such as an adapter, stands around a part."""
        return any(not isinstance(part, SlabLinear) for part in self._parts())

    def forget(self) -> None:
        """Drop what is prepared, for the parts too; the next call looks at them again."""
        self._linears = {}
        for part in self._parts():
            if isinstance(part, SlabLinear):
                part._linears = {}

    def _parts(self) -> Iterable[SlabLinear]:
        parts: Any = self._modules["parts"]  # self.parts would take half a microsecond
        return parts

    def _tensors(self) -> Iterator[Tensor | None]:
        return itertools.chain.from_iterable([part._buffers.values() for part in self._parts()])

    def _prepared(
        self,
        dtype: torch.dtype,
        told: str | None = None,
        room: bool | None = None,
        activations: str | None = None,
    ) -> Prepared:
        linears, buffers = self._linears, [part._buffers.copy() for part in self._parts()]
        source = Snapshot.of(itertools.chain.from_iterable(held.values() for held in buffers))
        packed = []
        for part, held in zip(self._parts(), buffers, strict=True):
            weight = packed_from(part.layout, held)
            packed.append(weight.to(part._home or weight.values.device))
        kept = linears.get(dtype, ())
        before = [(p.backend, p.state) for p in kept if p.source.is_still(source.tensors)]
        told = told or dense_copy.named(self._prefill)
        mode = accuracy_mode.named(self._activations if activations is None else activations)
        made = dispatch.prepare_fused(packed, dtype, before, told, room, mode)
        return keep(linears, dtype, Prepared(*made, source))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            takes = f"these layers take in_features={self.in_features} last"
            raise ShapeError(f"x has shape {list(x.shape)}, but {takes}")
        if forward_ad._current_level >= 0:
            refuse_tangents(x, *(part.bias for part in self._parts()))
        if any_autocast():
            x = autocast(x)
        if (traced := torch.compiler.is_compiling()) and torch.compiler.is_dynamo_compiling():
            self._prepare_in_trace(x.dtype)
        kept = self._linears.get(x.dtype, ())
        prepared = next((p for p in kept if p.source.is_still(self._tensors(), traced)), None)
        if prepared is None and self.wrapped:
            return tuple(part(x) for part in self._parts())
        if prepared is None and traced:
            if not (kept and torch.compiler.is_exporting()):  # see SlabLinear.forward
                return tuple(part(x) for part in self._parts())
            prepared = kept[0]
        backend, state, _ = prepared or self._prepared(x.dtype)
        bias = _joined_bias(self._parts())
        return backend.linear_fused(x, state, bias).split(self.sizes, -1)

    def extra_repr(self) -> str:
        said = copies(self._linears, self.in_features * sum(self.sizes))
        return ", ".join([*accuracy(self._linears), *said])

    def _apply(self, fn, recurse: bool = True):
        self._linears = {}
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_linears": {}}


def _joined_bias(parts: Iterable[SlabLinear]) -> Tensor | None:
    """The parts' biases one after the other, zeros for a part without, or None if no part has one.

    It is made in every call, since a bias may have been written into and each gets its gradient.
    """
    biases = [part.bias for part in parts]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    each = zip(parts, biases, strict=True)
    return torch.cat([given.new_zeros(p.out_features) if b is None else b for p, b in each])
