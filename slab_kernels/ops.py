"""`torch.ops.slab_kernels.linear`: the operation on canonical packed tensors, as one opaque, functional torch op.

`dequantize` beside it rebuilds the dense weight, [N,K] fp32. Both are registered on first use, not at import, and run
the reference on any device, in x's type whatever autocast says: SlabLinear casts x as nn.Linear
does, an op does not. Backends with prepared layouts register ops of their own
(`slab_kernels::linear_cpu`). Fake kernels and autograd (of x and bias: packed weights are frozen)
serve torch.compile and torch.export.
"""

from __future__ import annotations

import contextlib
import functools
import threading

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import reference
from .errors import FormatError, ShapeError, UnsupportedError
from .format import VALUE_BYTES, VALUE_TYPES, PackedLayout, PackedWeight, read_factors

_REGISTERING = threading.Lock()
NAMESPACE = "slab_kernels"
TENSOR_ARGUMENTS = ("values", "metadata", "signs", "scales", "U", "V", "P", "Q")
PACKED = "Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, Tensor? U, Tensor? V, Tensor? P, Tensor? Q"
SCHEMAS = (
    f"linear(Tensor x, {PACKED}, Tensor? bias, int in_features) -> Tensor",
    f"dequantize({PACKED}, int in_features) -> Tensor",
)


def packed_from_arguments(tensors: tuple[Tensor | None, ...], in_features: int) -> PackedWeight:
    """A PackedWeight around the op's tensor arguments; sizes and types are read off the tensors.

    Raises: FormatError or ShapeError if they do not belong together; what is in them is not looked at.
    """
    parts = dict(zip(TENSOR_ARGUMENTS, tensors, strict=True))
    values, metadata, scales = parts["values"], parts["metadata"], parts["scales"]
    for name, t in parts.items():
        if t is not None and (t.dim() != 2 or t.numel() == 0):
            raise ShapeError(
                f"{name} has shape {list(t.shape)}; packed tensors are matrices, none of them empty"
            )
    Kp = metadata.shape[1] * 8
    width = 16 * values.shape[1] / Kp  # of 16 inputs: tells int4 from int3
    kinds = [
        name
        for name, dtype in VALUE_TYPES.items()
        if (dtype, VALUE_BYTES[name]) == (values.dtype, width)
    ]
    if not kinds:
        raise FormatError(
            f"values {list(values.shape)} of {values.dtype} are of no value type beside metadata {list(metadata.shape)}"
        )
    value_type = kinds[0]
    a_row = scales is None or (
        scales.shape[1] == 1 and Kp == -(-in_features // 16) * 16
    )  # or one group, which pads further
    group_size = None if a_row else Kp // scales.shape[1]
    planes = 1 if parts["signs"] is None else 16 * parts["signs"].shape[1] // Kp
    layout = PackedLayout(
        values.shape[0],
        in_features,
        value_type,
        group_size,
        planes=planes,
        **read_factors(parts["U"], parts["P"]),
    )
    table = layout.tensors()
    for name, t in parts.items():
        want, found = table.get(name), None if t is None else (t.dtype, tuple(t.shape))
        if found != want:
            raise ShapeError(
                f"{name} is {_described(found)}, but beside the other tensors it has to be {_described(want)}"
            )
    return PackedWeight(layout, **parts)


def _described(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _linear(x, values, metadata, signs, scales, U, V, P, Q, bias, in_features):
    packed = packed_from_arguments((values, metadata, signs, scales, U, V, P, Q), in_features)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            f"x has shape {list(x.shape)}, but the weight takes in_features={in_features} last"
        )
    if bias is not None and tuple(bias.shape) != (packed.out_features,):
        raise ShapeError(f"bias has shape {list(bias.shape)}, expected [{packed.out_features}]")
    return reference.linear(x, packed, bias)


def _linear_fake(x, values, metadata, signs, scales, U, V, P, Q, bias, in_features):
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"x has {x.shape[-1]} features, the weight {in_features}",
    )
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _dequantize(values, metadata, signs, scales, U, V, P, Q, in_features):
    return packed_from_arguments((values, metadata, signs, scales, U, V, P, Q), in_features).dense()


def _dequantize_fake(values, metadata, signs, scales, U, V, P, Q, in_features):
    return values.new_empty((values.shape[0], in_features), dtype=torch.float32)


def without_autocast(like: Tensor) -> contextlib.AbstractContextManager:
    """Products on `like`'s device get the types of their factors; meta tensors know no autocast."""
    kind = like.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else contextlib.nullcontext()


def _setup_context(ctx, inputs, output):
    _, *tensors, _, in_features = inputs
    ctx.save_for_backward(*tensors)
    ctx.in_features = in_features


def _backward(ctx, grad):
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[-2]
    grad_x = grad_bias = None
    if needs_x:
        W = torch.ops.slab_kernels.dequantize(*ctx.saved_tensors, ctx.in_features)
        with without_autocast(grad):
            grad_x = (grad.to(torch.float32) @ W).to(grad.dtype)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, *(None,) * len(TENSOR_ARGUMENTS), grad_bias, None


def register_vmap(name: str, library: torch.library.Library | None = None) -> None:
    """`torch.vmap` of the op called `name`, whose first argument is x: over x alone, as one call with more tokens.

    Under vmap the op raises NotImplementedError if anything else is batched: there is one weight and one bias.
    """
    op = getattr(torch.ops.slab_kernels, name).default

    def batched(info, in_dims, x, *rest):
        if in_dims[0] is None or any(dim is not None for dim in tree_leaves(in_dims[1:])):
            raise UnsupportedError(
                f"vmap over the weight or the bias of {NAMESPACE}::{name}: only x may be batched; loop over the weights instead"
            )
        return op(x.movedim(in_dims[0], 0), *rest), 0

    torch.library.register_vmap(f"{NAMESPACE}::{name}", batched, lib=library)


def register() -> torch.library.Library:
    """Define the ops once; idempotent, and safe from several threads."""
    with _REGISTERING:
        return _register_once()


@functools.cache
def _register_once() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    for name, implementation, fake in (
        ("linear", _linear, _linear_fake),
        ("dequantize", _dequantize, _dequantize_fake),
    ):
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"{NAMESPACE}::linear", _backward, setup_context=_setup_context, lib=library
    )
    register_vmap("linear", library)
    return library
