"""`torch.ops.slab_kernels.linear`: the operation on canonical packed tensors, as one opaque,
functional op.

`dequantize` beside it rebuilds the dense weight, [N,K] fp32. Both are registered on first use, not
at import, and run the reference on any device, in x's type whatever autocast says: SlabLinear casts
x as nn.Linear does, an op does not. Backends with prepared layouts register ops of their own
(`slab_kernels::linear_cpu`) by `register_linear_op`. Fake kernels, vmap and autograd (of x and
bias: packed weights are frozen) serve torch.compile and torch.export.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import reference
from .errors import FormatError, ShapeError, UnsupportedError
from .format import VALUE_ENTRIES, VALUE_TYPES, PackedLayout, PackedWeight, ceil_div, read_factors

_REGISTERING = threading.Lock()
NAMESPACE = "slab_kernels"
TENSOR_ARGUMENTS = ("values", "metadata", "signs", "scales", "U", "V", "P", "Q")
PACKED = (
    "Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, Tensor? U, Tensor? V, "
    "Tensor? P, Tensor? Q"
)
EVERYWHERE = "CompositeExplicitAutograd"  # the dispatch key of an op that runs on every device


def packed_from_arguments(tensors: tuple[Tensor | None, ...], in_features: int) -> PackedWeight:
    """A PackedWeight around the op's tensor arguments; sizes and types are read off the tensors.

    Raises: FormatError or ShapeError if they do not belong together; their numbers are not looked
    at.
    """
    values, metadata, signs, scales, U, V, P, Q = tensors
    named = dict(zip(TENSOR_ARGUMENTS, tensors, strict=True))
    for name, t in named.items():
        if t is not None and (t.dim() != 2 or t.numel() == 0):
            raise ShapeError(
                f"{name} has shape {list(t.shape)}; packed tensors are matrices, none of them empty"
            )
    assert values is not None and metadata is not None, "the schema makes sure of these"
    Kp = metadata.shape[1] * 8
    # One group pads further than one scale per row does.
    per_row = scales is None or (scales.shape[1] == 1 and Kp == ceil_div(in_features, 16) * 16)
    layout = PackedLayout(
        values.shape[0],
        in_features,
        _value_type(values, metadata),
        None if per_row or scales is None else Kp // scales.shape[1],
        planes=1 if signs is None else 16 * signs.shape[1] // Kp,
        **read_factors(U, P),
    )
    table = layout.tensors()
    for name, t in named.items():
        wanted, found = table.get(name), None if t is None else (t.dtype, tuple(t.shape))
        if found != wanted:
            raise ShapeError(
                f"{name} is {_described(found)}, but beside the other tensors it has to be "
                f"{_described(wanted)}"
            )
    return PackedWeight(layout, values, metadata, signs, scales, U, V, P, Q)


def _value_type(values: Tensor, metadata: Tensor) -> str:
    """The value type of stored values; their width beside the metadata's tells int4 from int3."""
    width = 2 * values.shape[1] / metadata.shape[1]  # entries for 16 inputs
    for name, dtype in VALUE_TYPES.items():
        if (dtype, VALUE_ENTRIES[name]) == (values.dtype, width):
            return name
    raise FormatError(
        f"values {list(values.shape)} of {values.dtype} are of no value type beside metadata "
        f"{list(metadata.shape)}"
    )


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


def fake_result(x: Tensor, in_features: int, out_features: int) -> Tensor:
    """The shape and dtype of a linear's result, for tracing."""
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"x has {x.shape[-1]} features, the weight {in_features}",
    )
    return x.new_empty(*x.shape[:-1], out_features)


def _linear_fake(x, values, metadata, signs, scales, U, V, P, Q, bias, in_features):
    return fake_result(x, in_features, values.shape[0])


def _dequantize(values, metadata, signs, scales, U, V, P, Q, in_features):
    return packed_from_arguments((values, metadata, signs, scales, U, V, P, Q), in_features).dense()


def _dequantize_fake(values, metadata, signs, scales, U, V, P, Q, in_features):
    return values.new_empty((values.shape[0], in_features), dtype=torch.float32)


def _input_gradient(grad, *arguments):
    W = torch.ops.slab_kernels.dequantize(*arguments)
    return grad.to(torch.float32) @ W


def _without_autocast(like: Tensor) -> contextlib.AbstractContextManager:
    """Products on `like`'s device get the types of their factors; meta tensors know no autocast."""
    kind = like.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else contextlib.nullcontext()


class Definition(NamedTuple):
    """How a linear op is defined in Python; ops of the C++ library need none.

    arguments: the schema from its bracket on. run: the kernel. key: the dispatch key it runs for.
    """

    arguments: str
    run: Callable[..., Tensor]
    key: str = EVERYWHERE


def register_linear_op(
    name: str,
    bias: int,
    fake: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    definition: Definition | None = None,
    *,
    frozen: bool = True,
) -> torch.library.Library:
    """Register the op called `name`: its fake kernel, vmap over x, and autograd of x and bias.

    Its arguments are x, the tensors of the prepared weight, the bias, then sizes.

    bias: the place of the bias among them.
    input_gradient: the gradient of x in any dtype, from that of y, the weight's tensors and the
        sizes; called without autocast.
    frozen: also register `{name}_frozen`, the same without autograd, which costs every call some
        10 us, with gradients or without.
    """
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in (name, f"{name}_frozen") if frozen else (name,):
        if definition is not None:
            library.define(op + definition.arguments)
            library.impl(op, definition.run, definition.key)
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=library)
        register_vmap(op, library)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:bias])
        ctx.sizes = inputs[bias + 1 :]

    def backward(ctx, grad):
        grads: list[Tensor | None] = [None] * (bias + 1 + len(ctx.sizes))
        if ctx.needs_input_grad[0]:
            with _without_autocast(grad):
                grad_x = input_gradient(grad, *ctx.saved_tensors, *ctx.sizes)
            grads[0] = grad_x.to(grad.dtype)
        if ctx.needs_input_grad[bias]:
            grads[bias] = grad.reshape(-1, grad.shape[-1]).sum(0)
        return tuple(grads)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library
    )
    return library


def register_vmap(name: str, library: torch.library.Library) -> None:
    """`torch.vmap` over x alone, as one call with more tokens.

    Under vmap the op raises UnsupportedError if anything else is batched: there is one weight and
    one bias.
    """
    op = getattr(torch.ops.slab_kernels, name).default

    def batched(info, in_dims, x, *rest):
        if in_dims[0] is None or any(dim is not None for dim in tree_leaves(in_dims[1:])):
            raise UnsupportedError(
                f"vmap over the weight or the bias of {NAMESPACE}::{name}: only x may be batched; "
                "loop over the weights instead"
            )
        return op(x.movedim(in_dims[0], 0), *rest), 0

    torch.library.register_vmap(f"{NAMESPACE}::{name}", batched, lib=library)


def register() -> None:
    """Define the ops once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> tuple[torch.library.Library, ...]:
    """The libraries, which keep their ops alive."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"dequantize({PACKED}, int in_features) -> Tensor")
    library.impl("dequantize", _dequantize, EVERYWHERE)
    torch.library.register_fake(f"{NAMESPACE}::dequantize", _dequantize_fake, lib=library)
    linear = Definition(f"(Tensor x, {PACKED}, Tensor? bias, int in_features) -> Tensor", _linear)
    bias = 1 + len(TENSOR_ARGUMENTS)
    return library, register_linear_op(
        "linear", bias, _linear_fake, _input_gradient, linear, frozen=False
    )
