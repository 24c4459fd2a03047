"""`SlabLinear`, the drop-in replacement of `nn.Linear`, `FusedSlabLinear` for q/k/v and gate/up, and `replace_linear`."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import dispatch, ops
from .backends.base import Backend, LinearProblem
from .format import TENSOR_NAMES, PackedLayout, PackedWeight, ShapeError, cast


class SlabLinear(nn.Module):
    """y = x W.T + bias from a packed weight; frozen, differentiable in x and bias.

    The packed tensors are buffers under their format names, so a state dict is the canonical checkpoint form. What a
    backend prepares from them is made on the first call (or by `prepare`) and never saved; moving the module to another
    device or assigning a packed tensor drops it; after writing into one in place, call `prepare`. Casting the module
    (`.half()`, `.to(dtype)`) casts the bias only: packed tensors keep their types.
    """

    def __init__(self, layout: PackedLayout, bias: bool = False, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        ops.register()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        table = layout.tensors()
        for name in TENSOR_NAMES:
            stored = table.get(name)
            tensor = None if stored is None else torch.zeros(stored[1], dtype=stored[0], device=device)
            self.register_buffer(name, tensor)
        self.metadata.fill_(0x44)  # the first two of four kept: legal, so a fresh module is the zero map
        shape = (layout.out_features,)
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False) if bias else None
        self._linears: dict[torch.dtype, tuple] = {}
        self._home: torch.device | None = None  # where the layer works, once its canonical tensors are offloaded

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
        return PackedWeight(self.layout, **{name: self._buffers[name] for name in TENSOR_NAMES})

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense nn.Linear with the same function.

        Raises: RangeError if its weight or bias does not fit `dtype`.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
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
        if any(versions != self._versions() for *_, versions in self._linears.values()):
            self._linears = {}
        kept = self._linears.get(dtype)
        if kept is not None and kept[0] is not self._select(dtype):
            del self._linears[dtype]
        self._prepared(dtype)
        return self

    def _select(self, dtype: torch.dtype) -> Backend:
        device = self._home or self.values.device
        return dispatch.select(LinearProblem.of(self.layout, 1, dtype, device.type))

    def _versions(self) -> list[int]:
        """How often each packed tensor was written in place."""
        return [0 if t.is_inference() else t._version for t in self.packed().tensors().values()]

    def _prepared(self, dtype: torch.dtype) -> tuple:
        """What `_linears` keeps for that dtype, made if need be."""
        linears = self._linears  # whoever changes the weight puts another dict there, and what is being made now goes with the old one
        if dtype in linears:
            return linears[dtype]
        values, versions, backend = self.values, self._versions(), self._select(dtype)
        made = [state for other, state, *_ in linears.values() if other is backend and not backend.one_dtype]
        shared = made[0] if made else None
        if shared is None:
            # A first call inside inference_mode must not leave inference tensors behind: autograd could not save them.
            with torch.inference_mode(False), torch.no_grad():
                shared = backend.prepare(self.packed().to(self._home or values.device), dtype)
        linears[dtype] = (backend, shared, values, versions)
        return linears[dtype]

    def offload(self) -> SlabLinear:
        """Keep the canonical tensors in CPU memory from now on: a prepared layer works from its own copy of them.

        On a GPU that halves what the layer takes. Saving still works, and so does another dtype (it copies them back for
        the time of preparing). Moving the module brings them along again.

        Raises: RuntimeError before `prepare`.
        """
        if not self._linears:
            raise RuntimeError("offload() needs a prepared layer: call prepare(dtype) first")
        self._home = self._home or self.values.device
        for name, tensor in self.packed().tensors().items():
            self._buffers[name] = tensor.cpu()
        for dtype, kept in self._linears.items():
            self._linears[dtype] = (*kept[:2], self.values, self._versions())
        return self

    @property
    def backend(self) -> str | None:
        """Name of the backend that serves the last prepared dtype, or None before the first call."""
        return next((backend.name for backend, *_ in reversed(self._linears.values())), None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(f"x has shape {list(x.shape)}, but this layer takes in_features={self.in_features} last")
        if forward_ad._current_level >= 0:
            _refuse_tangents(x, self.bias)
        prepared = self._linears.get(x.dtype)
        if prepared is None:
            if torch.compiler.is_compiling():  # a first call inside a trace: the canonical op is always right
                tensors = (self._buffers[name] for name in ops.TENSOR_ARGUMENTS)
                return torch.ops.slab_kernels.linear(x, *tensors, self.bias, self.in_features)
            prepared = self._prepared(x.dtype)
        elif prepared[2] is not self._buffers["values"] and not torch.compiler.is_compiling():
            self._linears = {}  # functional_call put others there for this call; torch.export does too, but fakes of the same
            prepared = self._prepared(x.dtype)
        return prepared[0].linear(x, prepared[1], self.bias)

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
            device = fn(tensor.new_empty(0, dtype=torch.uint8, device=where)).device  # where fn moves things, whatever it casts
            if device != where:
                moved = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                self._buffers[name] = moved
                self._linears, self._home = {}, None
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        errors = args[-1]
        for name, buffer in self.packed().tensors().items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.dtype != buffer.dtype:  # torch would cast
                errors.append(f"{prefix}{name} is {found.dtype}, this layer's is {buffer.dtype}: it was packed in another format")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._linears = {}  # after it: a call meanwhile prepared what was there before

    def __getstate__(self):
        return {**self.__dict__, "_linears": {}}  # prepared layouts are never saved, nor deep-copied

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
    shared. Every part keeps its own U, V, P and Q. Frozen: after a change in place to a part or its bias, call `prepare` again.
    """

    def __init__(self, parts: Iterable[SlabLinear]):
        """Raises: TypeError for anything but SlabLinear, ShapeError if there are none or they differ in in_features."""
        super().__init__()
        parts = [parts] if isinstance(parts, nn.Module) else list(parts)
        if strange := {type(part).__name__ for part in parts if not isinstance(part, SlabLinear)}:
            raise TypeError(f"FusedSlabLinear takes SlabLinear modules, not {', '.join(sorted(strange))}")
        if not parts:
            raise ShapeError("FusedSlabLinear takes at least one SlabLinear, not an empty list")
        self.parts = nn.ModuleList(parts)
        if len(sizes := {part.in_features for part in parts}) > 1:
            raise ShapeError(f"fused parts must read the same x, but these take in_features={sorted(sizes)}")
        self.in_features = self.parts[0].in_features
        self.sizes = [part.out_features for part in self.parts]
        self._linears: dict[torch.dtype, tuple] = {}

    def prepare(self, dtype: torch.dtype = torch.float32) -> FusedSlabLinear:
        """Choose a backend that runs every part, and make the parts' common layout now.

        Raises: BackendError if a forced backend cannot run one of them.
        """
        self._linears.pop(dtype, None)
        self._prepared(dtype)
        return self

    def _prepared(self, dtype: torch.dtype) -> tuple:
        linears, states = self._linears, [part._linears for part in self.parts]
        packed = [part.packed().to(part._home or part.values.device) for part in self.parts]
        linears[dtype] = (*dispatch.prepare_fused(packed, dtype), _joined_bias(self.parts), states)
        return linears[dtype]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(f"x has shape {list(x.shape)}, but these layers take in_features={self.in_features} last")
        if forward_ad._current_level >= 0:
            _refuse_tangents(x)
        prepared = self._linears.get(x.dtype)
        if prepared is None:
            if torch.compiler.is_compiling():
                return tuple(part(x) for part in self.parts)
            prepared = self._prepared(x.dtype)
        elif not torch.compiler.is_compiling() and any(s is not part._linears for s, part in zip(prepared[3], self.parts, strict=True)):
            prepared = self._prepared(x.dtype)  # a part that gets another weight takes another dict
        backend, state, bias, _ = prepared
        return backend.linear_fused(x, state, bias).split(self.sizes, -1)

    def _apply(self, fn, recurse: bool = True):
        self._linears = {}
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_linears": {}}


def _refuse_tangents(*tensors: Tensor | None) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("packed layers have no forward-mode derivatives (jvp); use backward(), or to_linear() for a dense layer")


def _joined_bias(parts: Iterable[SlabLinear]) -> Tensor | None:
    biases = [part.bias for part in parts]
    if all(bias is None for bias in biases):
        return None
    given = next(bias for bias in biases if bias is not None)
    dtype = functools.reduce(torch.promote_types, (bias.dtype for bias in biases if bias is not None))
    zero = functools.partial(given.new_zeros, dtype=dtype)
    joined = [zero(part.out_features) if part.bias is None else part.bias.to(dtype) for part in parts]
    return torch.cat(joined).detach()


def replace_linear(model: nn.Module, packed: dict[str, PackedWeight]) -> nn.Module:
    """Swap the named nn.Linear modules of `model` for SlabLinear, in place; biases are kept.

    Raises: KeyError for a name that is no nn.Linear of the model, ShapeError for a weight of another shape. Everything
    is checked before anything is replaced.
    """
    modules = dict(model.named_modules())
    for name, weight in packed.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            kind = "absent" if linear is None else type(linear).__name__
            raise KeyError(f"{name!r} is {kind} in {type(model).__name__}; only nn.Linear modules can be replaced")
        if (linear.out_features, linear.in_features) != (weight.out_features, weight.in_features):
            raise ShapeError(
                f"{name!r} is {linear.out_features}x{linear.in_features}, the packed weight "
                f"{weight.out_features}x{weight.in_features} (out_features x in_features)"
            )
    for name, weight in packed.items():
        linear = modules[name]
        device = linear.weight.device
        moved = weight if device.type == "meta" else weight.to(device)
        model.set_submodule(name, SlabLinear.from_packed(moved, linear.bias))
    return model
