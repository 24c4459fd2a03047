"""`SlabLinear`, the drop-in replacement of `nn.Linear`; `FusedSlabLinear` for q/k/v and gate/up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import ops
from ..backends import dispatch
from ..backends.base import Backend, LinearProblem
from ..errors import ArgumentTypeError, BackendError, ShapeError, UnsupportedError
from ..format import TENSOR_NAMES, PackedLayout, PackedWeight, cast, weight_dtype
from .prepared import Prepared, Source, keep

_any_autocast = torch._C._is_any_autocast_enabled  # torch's own modules ask it, too


def _constant_in_traces(function):
    """What torch.compiler.assume_constant_result does, without importing all of torch._dynamo.

    That import takes seconds, and this module is imported by everybody who opens a model.
    """
    function._dynamo_marked_constant = True
    return function


class SlabLinear(nn.Module):
    """y = x W.T + bias from a packed weight; frozen, differentiable in x and bias.

    The packed tensors are buffers under their format names, so a state dict is the canonical
    checkpoint form. What a backend prepares from them is made on the first call (or by `prepare`),
    never saved, and made anew when the module holds other tensors or somebody wrote into them. Not
    seen is writing through `.data`, into an inference tensor, or between compiled calls: assign the
    tensor again. Casting the module (`.half()`, `.to(dtype)`) casts the bias only:
    packed tensors keep their types. Under autocast x is cast and the result has autocast's type, as
    of an nn.Linear.
    """

    def __init__(
        self,
        layout: PackedLayout,
        bias: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        ops.register()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        table = layout.tensors()
        for name in TENSOR_NAMES:
            stored = table.get(name)
            tensor = (
                None if stored is None else torch.zeros(stored[1], dtype=stored[0], device=device)
            )
            self.register_buffer(name, tensor)
        self.metadata.fill_(
            0x44
        )  # the first two of four kept: legal, so a fresh module is the zero map
        shape = (layout.out_features,)
        self.bias = (
            nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False)
            if bias
            else None
        )
        self._linears: dict[torch.dtype, tuple[Prepared, ...]] = {}
        self._home: torch.device | None = (
            None  # where the layer works, once its canonical tensors are offloaded
        )

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
        """Choose the backend for activations of `dtype` on this device and make its layout now; dtypes of one backend share a layout.

        Raises: BackendError if a forced backend cannot run it.
        """
        backend, kept = self._select(dtype), self._linears.get(dtype, ())
        self._linears[dtype] = tuple(p for p in kept if p.backend is backend)
        self._prepared(dtype)
        return self

    def _select(self, dtype: torch.dtype) -> Backend:
        device = self._home or self.values.device
        return dispatch.select(LinearProblem.of(self.layout, 1, dtype, device.type))

    def _prepared(self, dtype: torch.dtype) -> Prepared:
        """What `_linears` keeps for that dtype and the tensors that are here, made if need be."""
        linears = self._linears  # whoever changes the weight puts another dict there, and what is being made now goes with the old one
        buffers = self._buffers.copy()
        source = Source.of(buffers.values())
        for prepared in linears.get(dtype, ()):
            if prepared.source.is_still(source.tensors):
                return prepared
        backend, packed = self._select(dtype), _packed(self.layout, buffers)
        others = itertools.chain(*linears.copy().values())  # another thread may be adding one
        same = (p for p in others if p.backend is backend and p.source.is_still(source.tensors))
        made = [] if backend.one_dtype else [p.state for p in same]
        if not made:
            # A first call inside inference_mode must not leave inference tensors behind: autograd could not save them.
            with torch.inference_mode(False), torch.no_grad():
                made.append(backend.prepare(packed.to(self._home or packed.values.device), dtype))
        return keep(linears, dtype, Prepared(backend, made[0], source))

    @_constant_in_traces
    def _prepare_in_trace(self, dtype: torch.dtype) -> bool:
        """For torch.compile before the first call: done while it traces, and not traced."""
        self._prepared(dtype)
        return True

    def offload(self) -> SlabLinear:
        """Keep the canonical tensors in CPU memory from now on: a prepared layer works from its own copy of them.

        On a GPU that halves what the layer takes. Saving still works, and so does another dtype (it copies them back for
        the time of preparing). Moving the module brings them along again.

        Raises: RuntimeError before `prepare`.
        """
        if not self._linears:
            raise BackendError("offload() needs a prepared layer: call prepare(dtype) first")
        self._home = self._home or self.values.device
        before = tuple(self._buffers.values())
        for name, tensor in self.packed().tensors().items():
            self._buffers[name] = tensor.cpu()
        after = Source.of(self._buffers.values())
        self._linears = {
            dtype: tuple(p._replace(source=after) for p in kept if p.source.is_still(before))
            for dtype, kept in self._linears.copy().items()
        }
        return self

    @property
    def backend(self) -> str | None:
        """Name of the backend that serves the last prepared dtype, or None before the first call."""
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

    def __setattr__(self, name: str, value) -> None:
        if name in TENSOR_NAMES:
            self.__dict__["_linears"] = {}
        super().__setattr__(name, value)

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
            probe = fn(tensor.new_empty(0, dtype=torch.uint8, device=where))  # fn may cast a float
            device = probe.device
            if device == where and device.type == "cpu" and probe.is_shared():
                tensor.share_memory_()  # fn is that of share_memory()
            elif device != where:
                moved = (
                    torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                )
                self._buffers[name] = moved
                self._linears, self._home = {}, None
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        errors = args[-1]
        for name, buffer in self.packed().tensors().items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.dtype != buffer.dtype:  # torch would cast
                errors.append(
                    f"{prefix}{name} is {found.dtype}, this layer's is {buffer.dtype}: it was packed in another format"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, buffer in self.packed().tensors().items():
            if buffer.is_inference():  # counts no writing: another object has to tell
                self._buffers[name] = buffer.detach()
        self._linears = {}  # after it: a call meanwhile prepared what was there before

    def __getstate__(self):
        return {
            **self.__dict__,
            "_linears": {},
        }  # prepared layouts are never saved, nor deep-copied

    def extra_repr(self) -> str:
        layout = self.layout
        text = f"in_features={layout.in_features}, out_features={layout.out_features}, values={layout.values}"
        if layout.group_size:
            text += f", group_size={layout.group_size}"
        if layout.planes > 1:
            text += f", planes={layout.planes}"
        text += f", rank={layout.rank}, adapter_rank={layout.adapter_rank}, bias={self.bias is not None}"
        return f"{text}, {layout.bits_per_weight():.2f} bits per weight"


class FusedSlabLinear(nn.Module):
    """Several SlabLinear that read the same x (q, k, v; gate, up) as one: one launch where the backend has such a kernel.

    The parts stay modules of their own, `parts.0`, `parts.1`, ..., with their biases; only what a backend prepares is
    shared. Every part keeps its own U, V, P and Q. Frozen, and differentiable in x and the biases,
    like the parts.
    """

    def __init__(self, parts: Iterable[SlabLinear]):
        """Raises: TypeError for anything but SlabLinear, ShapeError if there are none or they differ in in_features."""
        super().__init__()
        parts = [parts] if isinstance(parts, nn.Module) else list(parts)
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
        self.in_features = self.parts[0].in_features
        self.sizes = [part.out_features for part in self.parts]
        self._linears: dict[torch.dtype, tuple[Prepared, ...]] = {}

    def prepare(self, dtype: torch.dtype = torch.float32) -> FusedSlabLinear:
        """Choose a backend that runs every part, and make the parts' common layout now.

        Raises: BackendError if a forced backend cannot run one of them.
        """
        self._linears.pop(dtype, None)
        self._prepared(dtype)
        return self

    @_constant_in_traces
    def _prepare_in_trace(self, dtype: torch.dtype) -> bool:
        kept = self._linears.get(dtype, ())
        return any(p.source.is_still(self._tensors()) for p in kept) or bool(self._prepared(dtype))

    def _tensors(self) -> Iterator[Tensor | None]:
        parts = self._modules["parts"]  # not self.parts, which takes half a microsecond
        return itertools.chain.from_iterable([part._buffers.values() for part in parts])

    def _prepared(self, dtype: torch.dtype) -> Prepared:
        linears, buffers = self._linears, [part._buffers.copy() for part in self.parts]
        source = Source.of(itertools.chain.from_iterable(held.values() for held in buffers))
        packed = [
            _packed(part.layout, held).to(part._home or held["values"].device)
            for part, held in zip(self.parts, buffers, strict=True)
        ]
        return keep(linears, dtype, Prepared(*dispatch.prepare_fused(packed, dtype), source))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"x has shape {list(x.shape)}, but these layers take in_features={self.in_features} last"
            )
        if forward_ad._current_level >= 0:
            _refuse_tangents(x, *(part.bias for part in self.parts))
        if _any_autocast():
            x = _autocast(x)
        if (traced := torch.compiler.is_compiling()) and torch.compiler.is_dynamo_compiling():
            self._prepare_in_trace(x.dtype)
        kept = self._linears.get(x.dtype, ())
        prepared = next((p for p in kept if p.source.is_still(self._tensors(), traced)), None)
        if prepared is None and traced:
            if not (kept and torch.compiler.is_exporting()):  # see SlabLinear.forward
                return tuple(part(x) for part in self.parts)
            prepared = kept[0]
        backend, state, _ = prepared or self._prepared(x.dtype)
        bias = _joined_bias(self._modules["parts"])
        return backend.linear_fused(x, state, bias).split(self.sizes, -1)

    def _apply(self, fn, recurse: bool = True):
        self._linears = {}
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_linears": {}}


def _packed(layout: PackedLayout, buffers: dict[str, Tensor | None]) -> PackedWeight:
    return PackedWeight(layout, **{name: buffers[name] for name in TENSOR_NAMES})


def _refuse_tangents(*tensors: Tensor | None) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UnsupportedError(
            "packed layers have no forward-mode derivatives (jvp); use backward(), or to_linear() for a dense layer"
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

    Made in every call: a bias may have been written into, and a gradient goes back to each.
    """
    biases = [part.bias for part in parts]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    each = zip(parts, biases, strict=True)
    return torch.cat([given.new_zeros(p.out_features) if b is None else b for p, b in each])
