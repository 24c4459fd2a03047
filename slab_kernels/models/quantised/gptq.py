"""GPTQ, as AutoGPTQ and GPTQModel store it: codes along the inputs, zero points along the outputs.

A linear [N, K] is qweight int32 [K * bits / 32, N], scales [G, N], qzeros int32 [G, N * bits / 32]
and g_idx int32 [K], the group of every input: W[n, k] = scales[g, n] * (q[n, k] - zero[g, n]). The
first format of checkpoints stores zero points less one, `gptq_v2` as they are (GPTQModel,
nn_modules/qlinear/torch.py).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..folder import Checkpoint
from .stored import (
    INDICES,
    WORD,
    WORDS,
    Entries,
    Found,
    Weight,
    check_dtype,
    check_indices,
    grouped,
    groups,
    integer,
    part,
    unpacked,
)

BITS = (2, 4, 8)  # those that divide a word; 3 bits lie across words
LESS_ONE = {"gptq": True, "gptq_v2": False}  # checkpoint_format -> how zero points are stored

# Entries of quantization_config by which stored weights do not stand for themselves.
ELSEWHERE = {
    "rotation": "inputs are rotated when the model runs",
    "dynamic": "modules have settings of their own",
}


def find(config: Mapping[str, Any], checkpoint: Checkpoint) -> Found:
    """The weights of a folder whose quantization_config is `config`. Raises: CheckpointError."""
    bits = integer(config, "bits", BITS)
    kind = config.get("checkpoint_format") or "gptq"
    if not isinstance(kind, str) or kind not in LESS_ONE:
        raise CheckpointError(
            f"the GPTQ weights have checkpoint_format={reprlib.repr(kind)}, and only "
            f"{' and '.join(LESS_ONE)} can be read; save the model in one of these with GPTQModel"
        )
    for key, what in ELSEWHERE.items():
        if config.get(key):
            raise CheckpointError(
                f"the GPTQ folder has {key}={reprlib.repr(config[key])}: {what}, which is not read "
                "here; open it with GPTQModel, dequantise and save it, and compress that copy"
            )
    weights = {
        f"{name.removesuffix('qweight')}weight": _weight(
            config, checkpoint.entries, name, LESS_ONE[kind]
        )
        for name in checkpoint.entries
        if name.endswith(".qweight")
    }
    return Found(weights, set(), f"gptq, {bits} bits, {grouped(config)}")


def _weight(config: Mapping[str, Any], entries: Entries, qweight: str, less_one: bool) -> Weight:
    bits, prefix = config["bits"], qweight.removesuffix("qweight")
    if len(entries[qweight].shape) != 2:
        raise CheckpointError(
            f"tensor {qweight!r} has shape {list(entries[qweight].shape)}, no matrix"
        )
    rows, N = entries[qweight].shape
    K = rows * WORD // bits
    size, G = groups(config, K)
    parts = [
        check_dtype(entries, qweight, WORDS),
        part(entries, f"{prefix}qzeros", qweight, (G, N * bits // WORD), WORDS),
        part(entries, f"{prefix}scales", qweight, (G, N)),
    ]
    if (index := f"{prefix}g_idx") in entries:
        parts.append(part(entries, index, qweight, (K,), INDICES))
    elif config.get("desc_act"):
        part(entries, index, qweight)
    make = partial(_dense, bits=bits, size=size, less_one=less_one, index=index)
    return Weight(tuple(parts), (N, K), make)


def _dense(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int,
    size: int,
    less_one: bool,
    index: str,
) -> Tensor:
    """[N, K] fp32."""
    codes = unpacked(qweight.T.contiguous(), bits)
    zeros = unpacked(qzeros, bits)
    if less_one:  # a zero point of 0 was stored with all bits set
        zeros = zeros + 1 & (1 << bits) - 1
    if g_idx is None:
        g_idx = torch.arange(codes.shape[1]) // size
    check_indices(index, g_idx, len(scales))
    g_idx = g_idx.long()
    return (codes - zeros.T[:, g_idx]).float().mul_(scales.float().T[:, g_idx])
