"""`SlabLinear`, the drop-in replacement of `nn.Linear`; `FusedSlabLinear` for q/k/v and gate/up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import ops
from ..backends import dispatch
from ..backends.base import Backend, LinearProblem
from ..errors import ArgumentTypeError, BackendError, ShapeError, UnsupportedError
from ..format import TENSOR_NAMES, PackedLayout, PackedWeight, cast, weight_dtype
from .prepared import Prepared, Snapshot, keep, usable_by

Function = TypeVar("Function", bound=Callable)
_any_autocast = torch._C._is_any_autocast_enabled  # torch's own modules ask it, too


def _constant_in_traces(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without importing all of torch._dynamo.

    That import takes seconds, and everybody who opens a model imports this module.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch looks for it
    return function


class SlabLinear(nn.Module):
    """y = x W^T + bias from a packed weight; frozen, differentiable in x and bias.

    x [..., K] of a floating dtype, y [..., N] of the same.

    The packed tensors are buffers under their format names, so a state dict is the canonical
    checkpoint form. What a backend prepares from them is made on the first call (or by `prepare`),
    never saved, and made anew when the module holds other tensors or somebody wrote into them. Not
    seen is writing through `.data`, into an inference tensor, or between compiled calls: assign the
    tensor again. Casting the module (`.half()`, `.to(dtype)`) casts the bias only: packed tensors
    keep their types. Under autocast x is cast and the result has autocast's type, as of an
    nn.Linear.
    """

    values: Tensor
    metadata: Tensor
    bias: nn.Parameter | None
    _home: torch.device | None  # where the layer works, once its canonical tensors are offloaded

    def __init__(
        self,
        layout: PackedLayout,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """The zero map with buffers of `layout`. dtype: of the bias, if there is one."""
        super().__init__()
        ops.register()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        table = layout.tensors()
        for name in TENSOR_NAMES:
            tensor = None
            if stored := table.get(name):
                tensor = torch.zeros(stored[1], dtype=stored[0], device=device)
            self.register_buffer(name, tensor)
        self.metadata.fill_(0x44)  # keeps the first two of every four, which is legal
        self.bias = None
        if bias:
            zeros = torch.zeros(layout.out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        self._linears: dict[torch.dtype, tuple[Prepared, ...]] = {}
        self._home = None

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> SlabLinear:
        """A module around existing packed tensors (not copied)."""
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors().items():
            module._buffers[name] = tensor
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    def packed(self) -> PackedWeight:
        """The packed weight that this module holds (not copied)."""
        return _packed(self.layout, self._buffers)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense nn.Linear with the same function.

        Raises: RangeError if its weight or bias does not fit `dtype`, DtypeError if no weight can
        have it.
        """
        dtype = weight_dtype(dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        weight = cast(self.packed().dense(), dtype, "the weight")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = cast(self.bias.detach(), dtype, "the bias")
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def prepare(self, dtype: torch.dtype = torch.float32) -> SlabLinear:
        """Choose the backend for activations of `dtype` on this device and make its layout now.

        Dtypes of one backend share a layout where it can serve them all.

        Raises: BackendError if a forced backend cannot run it.
        """
        linears, backend = self._linears, self._select(dtype)
        self._prepared(dtype, backend)
        linears[dtype] = tuple(p for p in linears.get(dtype, ()) if p.backend is backend)
        return self

    def _select(self, dtype: torch.dtype) -> Backend:
        device = self._home or self.values.device
        return dispatch.select(LinearProblem.of(self.layout, 1, dtype, device.type))

    def _prepared(self, dtype: torch.dtype, wanted: Backend | None = None) -> Prepared:
        """What `_linears` keeps for that dtype and the tensors that are here, made if need be.

        wanted: the backend that it has to be of; default: any.
        """
        # Whoever changes the weight meanwhile puts another dict there; this one goes, with what is
        # made now.
        linears = self._linears
        buffers = self._buffers.copy()
        source = Snapshot.of(buffers.values())
        for prepared in linears.get(dtype, ()):
            if prepared.source.is_still(source.tensors) and wanted in (None, prepared.backend):
                return prepared
        backend, packed = wanted or self._select(dtype), _packed(self.layout, buffers)
        others = itertools.chain(*linears.copy().values())  # another thread may be adding one
        same = [p for p in others if p.source.is_still(source.tensors)]
        # A first call inside inference_mode must not leave inference tensors behind, since autograd
        # could not save them.
        with torch.inference_mode(False), torch.no_grad():
            usable = (usable_by(backend, dtype, p) for p in same)
            state = next((state for state in usable if state is not None), None)
            if state is None:
                state = backend.prepare(packed.to(self._home or packed.values.device), dtype)
        return keep(linears, dtype, Prepared(backend, state, source))

    @_constant_in_traces
    def _prepare_in_trace(self, dtype: torch.dtype) -> bool:
        """Prepares for torch.compile before the first call: done while it traces, but not
        traced."""
        self._prepared(dtype)
        return True

    def offload(self) -> SlabLinear:
        """Keep the canonical tensors in CPU memory from now on.

        Where the backend works from a copy, as it does with a stream on a GPU, this halves what the
        layer takes there. The plain Triton kernels read the canonical tensors themselves, so with
        them nothing is freed. Saving still works, and so does another dtype, for whose preparing
        they are copied back. Moving the module brings them along again.

        Raises: BackendError before `prepare`.
        """
        if not self._linears:
            raise BackendError("offload() needs a prepared layer: call prepare(dtype) first")
        self._home = self._home or self.values.device
        before = tuple(self._buffers.values())
        for name, tensor in self.packed().tensors().items():
            self._buffers[name] = tensor.cpu()
        after = Snapshot.of(self._buffers.values())
        self._linears = {
            dtype: tuple(p._replace(source=after) for p in kept if p.source.is_still(before))
            for dtype, kept in self._linears.copy().items()
        }
        return self

    @property
    def backend(self) -> str | None:
        """The name of the backend for the dtype prepared last, or None before the first call."""
        latest = [kept[-1] for kept in self._linears.copy().values() if kept]
        return latest[-1].backend.name if latest else None

    def forward(self, x: Tensor) -> Tensor:
        if not (shape := x.shape) or shape[-1] != self.in_features:
            takes = f"this layer takes in_features={self.in_features} last"
            raise ShapeError(f"x has shape {list(shape)}, but {takes}")
        if forward_ad._current_level >= 0:
            _refuse_tangents(x, self.bias)
        if _any_autocast():
            x = _autocast(x)
        if (traced := torch.compiler.is_compiling()) and torch.compiler.is_dynamo_compiling():
            self._prepare_in_trace(x.dtype)
        kept = self._linears.get(x.dtype, ())
        for prepared in kept:
            if prepared.source.is_still(self._buffers.values(), traced):
                return prepared.backend.linear(x, prepared.state, self.bias)
        if traced:
            if not (kept and torch.compiler.is_exporting()):  # exporting puts fakes in their place
                tensors = (self._buffers[name] for name in ops.TENSOR_ARGUMENTS)
                return torch.ops.slab_kernels.linear(x, *tensors, self.bias, self.in_features)
            prepared = kept[0]
        else:
            prepared = self._prepared(x.dtype)
        return prepared.backend.linear(x, prepared.state, self.bias)

    def __setattr__(self, name: str, value: object) -> None:
        if name in TENSOR_NAMES:
            self.__dict__["_linears"] = {}
        super().__setattr__(name, value)  # type: ignore[arg-type]  # as nn.Module takes it

    def _apply(self, fn, recurse: bool = True):
        packed = {name: self._buffers.pop(name) for name in TENSOR_NAMES}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(packed)
        home = self._home
        for name, tensor in packed.items():
            if tensor is None:
                continue
            where = home or tensor.device
            # The function may cast floats, so it sees an empty tensor of another type.
            probe = fn(tensor.new_empty(0, dtype=torch.uint8, device=where))
            device = probe.device
            if device == where and device.type == "cpu" and probe.is_shared():
                tensor.share_memory_()  # the function is that of share_memory()
            elif device != where:
                like = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
                self._buffers[name] = like.to(device)
                self._linears, self._home = {}, None
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        errors = args[-1]
        for name, buffer in self.packed().tensors().items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.dtype != buffer.dtype:  # torch would cast
                errors.append(
                    f"{prefix}{name} is {found.dtype}, this layer's is {buffer.dtype}: it was "
                    "packed in another format"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, buffer in self.packed().tensors().items():
            if buffer.is_inference():  # it counts no writing, so another object has to show it
                self._buffers[name] = buffer.detach()
        self._linears = {}  # at the end, since a call meanwhile prepared what was there before

    def __getstate__(self):
        return {**self.__dict__, "_linears": {}}  # prepared layouts are neither saved nor copied

    def extra_repr(self) -> str:
        layout = self.layout
        shown = ["in_features", "out_features", "values"]
        shown += ["group_size"] * bool(layout.group_size) + ["planes"] * (layout.planes > 1)
        shown += ["rank", "adapter_rank"]
        parts = [f"{name}={getattr(layout, name)}" for name in shown]
        parts += [
            f"bias={self.bias is not None}",
            f"{layout.bits_per_weight():.2f} bits per weight",
        ]
        return ", ".join(parts)


class FusedSlabLinear(nn.Module):
    """Several SlabLinear that read the same x (q, k, v; gate, up), by one launch where a backend
    can.

    x [..., K] -> one [..., N] per part. The parts stay modules of their own, `parts.0`, `parts.1`,
    ..., with their biases, U, V, P and Q; only what a backend prepares is shared. Frozen, and
    differentiable in x and the biases, like the parts.
    """

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

    def prepare(self, dtype: torch.dtype = torch.float32) -> FusedSlabLinear:
        """Choose a backend that runs every part, and make the parts' common layout now.

        Raises: BackendError if a forced backend cannot run one of them.
        """
        linears = self._linears
        linears[dtype] = (self._prepared(dtype),)
        return self

    @_constant_in_traces
    def _prepare_in_trace(self, dtype: torch.dtype) -> bool:
        kept = self._linears.get(dtype, ())
        return any(p.source.is_still(self._tensors()) for p in kept) or bool(self._prepared(dtype))

    def _parts(self) -> Iterable[SlabLinear]:
        parts: Any = self._modules["parts"]  # self.parts would take half a microsecond
        return parts

    def _tensors(self) -> Iterator[Tensor | None]:
        return itertools.chain.from_iterable([part._buffers.values() for part in self._parts()])

    def _prepared(self, dtype: torch.dtype) -> Prepared:
        linears, buffers = self._linears, [part._buffers.copy() for part in self._parts()]
        source = Snapshot.of(itertools.chain.from_iterable(held.values() for held in buffers))
        packed = []
        for part, held in zip(self._parts(), buffers, strict=True):
            weight = _packed(part.layout, held)
            packed.append(weight.to(part._home or weight.values.device))
        kept = linears.get(dtype, ())
        before = [(p.backend, p.state) for p in kept if p.source.is_still(source.tensors)]
        made = dispatch.prepare_fused(packed, dtype, before)
        return keep(linears, dtype, Prepared(*made, source))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            takes = f"these layers take in_features={self.in_features} last"
            raise ShapeError(f"x has shape {list(x.shape)}, but {takes}")
        if forward_ad._current_level >= 0:
            _refuse_tangents(x, *(part.bias for part in self._parts()))
        if _any_autocast():
            x = _autocast(x)
        if (traced := torch.compiler.is_compiling()) and torch.compiler.is_dynamo_compiling():
            self._prepare_in_trace(x.dtype)
        kept = self._linears.get(x.dtype, ())
        prepared = next((p for p in kept if p.source.is_still(self._tensors(), traced)), None)
        if prepared is None and traced:
            if not (kept and torch.compiler.is_exporting()):  # see SlabLinear.forward
                return tuple(part(x) for part in self._parts())
            prepared = kept[0]
        backend, state, _ = prepared or self._prepared(x.dtype)
        bias = _joined_bias(self._parts())
        return backend.linear_fused(x, state, bias).split(self.sizes, -1)

    def _apply(self, fn, recurse: bool = True):
        self._linears = {}
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_linears": {}}


def _packed(layout: PackedLayout, buffers: Mapping[str, Tensor | None]) -> PackedWeight:
    present = {name: t for name in TENSOR_NAMES if (t := buffers[name]) is not None}
    return PackedWeight(layout, **present)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises: UnsupportedError if one carries a forward-mode derivative, which would be lost."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UnsupportedError(
            "packed layers have no forward-mode derivatives (jvp); use backward(), or to_linear() "
            "for a dense layer"
        )


def _autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to nn.Linear: in autocast's type, unless x is fp64 or no float."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not on or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(kind))


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
