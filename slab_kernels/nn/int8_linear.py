"""y = (x codes^T) * scales + bias for a table of int8 rows, as one op of torch."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from .. import ops

NAME = "int8_linear"
_REGISTERING = threading.Lock()
# Codes that are widened at once on a CPU: as fp32 they stay in its second or third level cache.
CODES_AT_ONCE = 1 << 20
# Up to so many bf16 tokens products in fp32 cost less than those in bf16, on a CPU.
# (torch._weight_int8pack_mm of torch 2.13 reads beyond tables whose width is no multiple of 16, and
# takes more than twice as long as a dense fp32 head for fp32 and fp16 activations.)
FEW_TOKENS = 4


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., D], codes int8 [V,D], scales [V], bias [V] of x's type -> [..., V] of x's type.

    Differentiable in x and bias. `register` has to have been called.
    """
    return torch.ops.slab_kernels.int8_linear(x, codes, scales, bias)


def _run(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The codes are widened piece by piece, so that they are read as int8 and no copy is kept."""
    rows, (V, D) = x.reshape(-1, x.shape[-1]), codes.shape
    on_cpu = x.device.type == "cpu"
    few = on_cpu and rows.shape[0] <= FEW_TOKENS
    wide = x.dtype == torch.float16 or (few and x.dtype == torch.bfloat16)
    kind = torch.float32 if wide else x.dtype  # sums of codes overflow fp16
    rows, y = rows.to(kind), x.new_empty(rows.shape[0], V)
    at_once = max(1, CODES_AT_ONCE // max(1, D)) if on_cpu else V
    for first in range(0, V, at_once):
        piece = slice(first, first + at_once)
        product = (rows @ codes[piece].to(kind).T).mul_(scales[piece].to(kind))
        y[:, piece] = product if bias is None else product.add_(bias[piece].to(kind))
    return y.view(*x.shape[:-1], V)


def _fake(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return ops.fake_result(x, codes.shape[1], codes.shape[0])


def _input_gradient(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """[..., D] fp32 (fp64 of an fp64 gradient), with one piece of the codes widened at a time."""
    kind = torch.promote_types(torch.float32, grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    found = torch.zeros(rows.shape[0], codes.shape[1], dtype=kind, device=grad.device)
    at_once = max(1, CODES_AT_ONCE // max(1, codes.shape[1]))
    for first in range(0, codes.shape[0], at_once):
        piece = slice(first, first + at_once)
        found += (rows[:, piece].to(kind) * scales[piece].to(kind)) @ codes[piece].to(kind)
    return found.view(*grad.shape[:-1], codes.shape[1])


def register() -> None:
    """Define the op once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> torch.library.Library:
    """The library, which keeps the op alive."""
    definition = ops.Definition(
        "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor", _run
    )
    return ops.register_linear_op(NAME, 3, _fake, _input_gradient, definition, frozen=False)
