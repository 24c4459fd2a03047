"""The formats of compressed-tensors (llm-compressor) that hold a linear's weight as it is.

`pack-quantized` has weight_packed int32 [N, K * bits / 32], weight_shape [2] and weight_scale, and
where asked for weight_zero_point int32 [N * bits / 32, G] and weight_g_idx [K]; codes and zero
points are stored plus 2^(bits - 1). `float-quantized`, `int-quantized` and `naive-quantized` have
weight with a byte for each number, weight_scale and perhaps weight_zero_point (compressed_tensors,
compressors/quantized_compressors/). A scale is for a weight, a row [N, 1], a group [N, G] or a
block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..folder import Checkpoint
from .fp8 import FLOATS, scaled
from .scheme import PACKED, PLAIN, Scheme, scheme_of, schemes
from .stored import (
    INDICES,
    SCALES,
    WORD,
    WORDS,
    Entries,
    Found,
    Weight,
    check_dtype,
    check_indices,
    check_shape,
    part,
    unpacked,
)

OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
ONE_BYTE = (*FLOATS, torch.int8)


def find(config: Mapping[str, Any], checkpoint: Checkpoint) -> Found:
    """The weights of a folder whose quantization_config is `config`. Raises: CheckpointError."""
    known, entries = schemes(config), checkpoint.entries
    weights: dict[str, Weight] = {}
    unused: set[str] = set()
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            scheme = _of_kind(module, known, (PACKED,))
            weights[f"{module}.weight"] = _packed(checkpoint, module, scheme)
        elif leaf == "weight" and entry.dtype in ONE_BYTE:
            scheme = _of_kind(module, known, PLAIN)
            weights[name] = _plain(entries, name, scheme)
        else:
            continue
        leaves = (*OF_ACTIVATIONS, "weight_shape", "weight_zero_point", "weight_g_idx")
        unused |= {f"{module}.{unread}" for unread in leaves} & entries.keys()
    said = " and ".join(dict.fromkeys(map(str, known)))
    return Found(weights, unused, f"compressed-tensors {said}")


def _of_kind(module: str, known: list[Scheme], kinds: tuple[str, ...]) -> Scheme:
    scheme = scheme_of(module, known)
    if scheme.format not in kinds:
        raise CheckpointError(
            f"{module} is not stored as quantization_config says ({scheme.format}); copy or "
            "download the checkpoint again"
        )
    return scheme


def _scale(entries: Entries, holder: str, scheme: Scheme, shape: tuple[int, int]) -> str:
    """The name of the scales, once their shape is known to fit. Raises: CheckpointError."""
    name = part(entries, f"{holder.rpartition('.')[0]}.weight_scale", holder)
    if scheme.strategy == "tensor" and math.prod(entries[name].shape) == 1:
        return name
    sizes = zip(shape, scheme.block(*shape), strict=True)
    check_shape(entries, name, tuple(-(-size // of) for size, of in sizes))
    return name


def _plain(entries: Entries, name: str, scheme: Scheme) -> Weight:
    if len(shape := entries[name].shape) != 2:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, no matrix")
    N, K = shape
    scale = _scale(entries, name, scheme, (N, K))
    parts = [name, scale]
    if not scheme.symmetric:
        kinds = (*SCALES, *ONE_BYTE)
        parts.append(part(entries, f"{name}_zero_point", name, entries[scale].shape, kinds))
    if (order := f"{name}_g_idx") in entries:
        raise CheckpointError(
            f"tensor {order!r} puts the inputs of a {scheme.format} weight into an order of their "
            "own, which is not read here; open the model with transformers and "
            "compressed-tensors, call dequantize() on it, save it, and compress that copy"
        )
    return Weight(tuple(parts), (N, K), partial(_dense_of_bytes, block=scheme.block(N, K)))


def _dense_of_bytes(
    weight: Tensor, scale: Tensor, zero: Tensor | None = None, *, block: tuple[int, int]
) -> Tensor:
    """[N, K] fp32."""
    codes = weight.float()
    if zero is not None:
        codes -= scaled(torch.ones_like(codes), zero, block=block)
    return scaled(codes, scale, block=block)


def _packed(checkpoint: Checkpoint, module: str, scheme: Scheme) -> Weight:
    entries, holder = checkpoint.entries, f"{module}.weight_packed"
    described = part(entries, f"{module}.weight_shape", holder, (2,), INDICES)
    N, K = (int(size) for size in checkpoint.get(described))
    check_shape(entries, holder, (N, -(-K * scheme.bits // WORD)))
    scale = _scale(entries, holder, scheme, (N, K))
    rows, columns = scheme.block(N, K)
    if rows not in (1, N):
        raise CheckpointError(
            f"{module} is packed with a scale for each block of {rows}x{columns}, and groups lie "
            "in rows; copy or download the checkpoint again"
        )
    parts = {"packed": check_dtype(entries, holder, WORDS), "scale": scale}
    if not scheme.symmetric:
        zero = f"{module}.weight_zero_point"
        parts["zero"] = part(entries, zero, holder, dtypes=(*WORDS, torch.int8))
        if scheme.strategy != "tensor":
            rows = N if entries[zero].dtype == torch.int8 else -(-N * scheme.bits // WORD)
            check_shape(entries, zero, (rows, entries[scale].shape[-1]))
    if (index := f"{module}.weight_g_idx") in entries:
        parts["g_idx"] = part(entries, index, holder, (K,), INDICES)
    words = _Words(N, K, scheme.bits, columns, index, tuple(parts))
    return Weight(tuple(parts.values()), (N, K), words.dense)


class _Words(NamedTuple):
    """How a weight [N, K] lies in words.

    columns: inputs of a group. order: the name of g_idx, for messages. parts: which tensors there
    are, in their order.
    """

    N: int
    K: int
    bits: int
    columns: int
    order: str
    parts: tuple[str, ...]

    def dense(self, *tensors: Tensor) -> Tensor:
        """[N, K] fp32."""
        given = dict(zip(self.parts, tensors, strict=True))
        offset, scale = 1 << self.bits - 1, given["scale"].float()
        codes = (unpacked(given["packed"], self.bits)[:, : self.K] - offset).float()
        scale = scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)
        g_idx = given.get("g_idx")
        if g_idx is None or bool((g_idx == -1).all()):  # -1 stands for no order of its own
            g_idx = torch.arange(self.K) // self.columns
        check_indices(self.order, g_idx, scale.shape[1])
        g_idx = g_idx.long()
        if (zero := given.get("zero")) is not None:
            if zero.dtype == torch.int32:  # packed along the rows
                zero = unpacked(zero.T.contiguous(), self.bits)[:, : self.N].T - offset
            codes -= zero.float().reshape(-1, scale.shape[1])[:, g_idx]
        return codes.mul_(scale[:, g_idx])
