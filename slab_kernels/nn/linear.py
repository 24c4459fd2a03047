"""`SlabLinear`, the drop-in replacement of `nn.Linear`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import ops
from ..backends import activations as accuracy_mode
from ..backends import dense_copy, dispatch
from ..backends.base import Backend, LinearProblem, preparing
from ..errors import BackendError, DtypeError, ShapeError
from ..format import TENSOR_NAMES, PackedLayout, PackedWeight, cast, weight_dtype
from .call import (
    EXPORTED,
    LENT,
    any_autocast,
    autocast,
    constant_in_traces,
    refuse_tangents,
    say_once,
)
from .prepared import Prepared, Snapshot, accuracy, copies, keep, keep_only, packed_from, usable_by


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
    _prefill: str | None = None  # what `prepare` was told; None: the environment's word
    _activations: str | None = None  # likewise

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
        """A module around existing packed tensors (not copied).

        bias: [N], of a floating-point dtype.

        Raises: ShapeError, DtypeError for another bias.
        """
        if bias is not None:
            if not isinstance(bias, Tensor) or not bias.is_floating_point():
                what = str(bias.dtype) if isinstance(bias, Tensor) else type(bias).__name__
                raise DtypeError(f"the bias must be a floating-point tensor, not {what}")
            if bias.shape != (packed.out_features,):
                raise ShapeError(
                    f"the bias has shape {list(bias.shape)} and the weight {packed.out_features} "
                    f"outputs; give a bias of shape [{packed.out_features}]"
                )
        module = cls(packed.layout, device="meta")
        for name, tensor in packed.tensors().items():
            module._buffers[name] = tensor
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    def packed(self) -> PackedWeight:
        """The packed weight that this module holds (not copied)."""
        return packed_from(self.layout, self._buffers)

    def hold(self, packed: PackedWeight) -> SlabLinear:
        """Hold another packed weight of the same sizes from now on (not copied).

        It lies where the canonical tensors do now. The next call prepares it.

        Raises: ShapeError.
        """
        sizes, given = [(p.out_features, p.in_features) for p in (self.layout, packed.layout)]
        if given != sizes:
            raise ShapeError(
                f"this layer is {sizes[0]}x{sizes[1]} (out_features x in_features), the packed "
                f"weight {given[0]}x{given[1]}"
            )
        tensors, self.layout = packed.tensors(), packed.layout
        self._buffers.update({name: tensors.get(name) for name in TENSOR_NAMES})
        self._linears = {}
        return self

    @property
    def qweight(self) -> Tensor:
        """An empty tensor where the layer works: what wraps quantized layers (PEFT) asks for it."""
        where = self._home or self.values.device
        return torch.empty(0, dtype=torch.uint8, device=where)

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

    def prepare(
        self,
        dtype: torch.dtype = torch.float32,
        prefill: str | None = None,
        activations: str | None = None,
    ) -> SlabLinear:
        """Choose the backend for activations of `dtype` on this device and make its layout now.

        Dtypes of one backend share a layout where it can serve them all.

        prefill: whether a dense copy of the weight, 16 bits per weight more, serves as many tokens
            as it is faster for: "packed" never, "dense" always, "auto" where it leaves half of the
            free GPU memory free (backends/dense_copy.py). It also holds for whatever the layer
            prepares later by itself. Default: what it was told last, else SLAB_KERNELS_PREFILL,
            else "packed".
        activations: on a CPU, whether x enters the product as 8-bit integers, "int8", which is
            faster for int8, int4 and int3 values and rounds x, or as it is, "exact"; 16-bit values
            stay exact (backends/activations.py). It holds on as `prefill` does. Default:
            what it was told last, else SLAB_KERNELS_CPU_ACTIVATIONS, else "int8".

        Raises: BackendError if a forced backend cannot run it, or keeps no dense copy that is
            wanted; RangeError for a weight that does not fit `dtype` then; ArgumentError for
            another word.
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
    ) -> SlabLinear:
        """`prepare` with the word that holds; room: as `dense_copy.applied` takes it."""
        linears, backend = self._linears, self._select(dtype)
        self._prepared(dtype, backend, told, room, activations)
        if activations not in (None, self._activations):
            keep_only(linears, dtype)  # the others were prepared for another mode
        linears[dtype] = tuple(p for p in linears.get(dtype, ()) if p.backend is backend)
        self._prefill = prefill or self._prefill
        self._activations = activations or self._activations
        return self

    def _select(self, dtype: torch.dtype) -> Backend:
        device = self._home or self.values.device
        return dispatch.select(LinearProblem.of(self.layout, 1, dtype, device.type))

    def _prepared(
        self,
        dtype: torch.dtype,
        wanted: Backend | None = None,
        told: str | None = None,
        room: bool | None = None,
        activations: str | None = None,
    ) -> Prepared:
        """What `_linears` keeps for that dtype and the tensors that are here, made if need be.

        wanted: the backend that it has to be of; default: any. told: whether it has to have a dense
        copy; default: what is kept may stay as it is, what is made is as the layer was told.
        activations: another word than the one that the layer was told last.
        """
        # Whoever changes the weight meanwhile puts another dict there; this one goes, with what is
        # made now.
        linears = self._linears
        buffers = self._buffers.copy()
        source = Snapshot.of(buffers.values())
        here = (p for p in linears.get(dtype, ()) if p.source.is_still(source.tensors))
        found = next((p for p in here if wanted in (None, p.backend)), None)
        if found is not None and told is None:
            return found
        told = told or dense_copy.named(self._prefill)
        mode = accuracy_mode.named(self._activations if activations is None else activations)
        backend, packed = wanted or self._select(dtype), packed_from(self.layout, buffers)
        with preparing(self._home or packed.values.device):
            state = found.state if found else self._state(backend, packed, dtype, source)
            state = dense_copy.applied(backend, state, (packed,), dtype, told, room)
            state = backend.with_activations(state, (packed,), mode)
        if found is not None and state is found.state:
            return found
        return keep(linears, dtype, Prepared(backend, state, source))

    def _state(
        self, backend: Backend, packed: PackedWeight, dtype: torch.dtype, source: Snapshot
    ) -> Any:
        """What another dtype or backend prepared of the same tensors, or else something new."""
        others = itertools.chain(*self._linears.copy().values())  # another thread may be adding one
        same = (p for p in others if p.source.is_still(source.tensors))
        usable = (usable_by(backend, dtype, p) for p in same)
        state = next((state for state in usable if state is not None), None)
        if state is None:
            state = backend.prepare(packed.to(self._home or packed.values.device), dtype)
        return state

    @constant_in_traces
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
            refuse_tangents(x, self.bias)
        if any_autocast():
            x = autocast(x)
        if (traced := torch.compiler.is_compiling()) and torch.compiler.is_dynamo_compiling():
            self._prepare_in_trace(x.dtype)
        kept = self._linears.get(x.dtype, ())
        for prepared in kept:
            if prepared.source.is_still(self._buffers.values(), traced):
                return prepared.backend.linear(x, prepared.state, self.bias)
        if traced:
            if not (kept and torch.compiler.is_exporting()):  # exporting puts fakes in their place
                say_once(EXPORTED if torch.compiler.is_exporting() else LENT)
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
            *accuracy(self._linears),
            *copies(self._linears, layout.out_features * layout.in_features),
        ]
        return ", ".join(parts)
