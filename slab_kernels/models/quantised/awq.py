"""AWQ in its order "gemm", as AutoAWQ stores it: codes and zero points along the outputs.

A linear [N, K] is qweight int32 [K, N / 8], scales [G, N] and qzeros int32 [G, N / 8], with
W[n, k] = scales[g, n] * (q[k, n] - zero[g, n]). The eight codes of a word are those of outputs
0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ, utils/packing_utils.py).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ..folder import Checkpoint
from .stored import (
    WORDS,
    Entries,
    Found,
    Weight,
    check_dtype,
    grouped,
    groups,
    integer,
    part,
    unpacked,
)

BITS = 4
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # output of eight -> its place in the word


def find(config: Mapping[str, Any], checkpoint: Checkpoint) -> Found:
    """The weights of a folder whose quantization_config is `config`. Raises: CheckpointError."""
    integer(config, "bits", (BITS,))
    order = config.get("version") or config.get("format") or "gemm"
    if not isinstance(order, str) or order.lower() != "gemm":
        raise CheckpointError(
            f"the AWQ weights are stored in the order {reprlib.repr(order)}, and only 'gemm' can "
            "be read; save the model in that order with AutoAWQ"
        )
    _refuse_scaled_activations(checkpoint)
    weights = {
        f"{name.removesuffix('qweight')}weight": _weight(config, checkpoint.entries, name)
        for name in checkpoint.entries
        if name.endswith(".qweight")
    }
    return Found(weights, set(), f"awq, {BITS} bits, {grouped(config)}")


def _refuse_scaled_activations(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError where outputs of an activation are divided by stored scales, which
    AutoAWQ does in models without gates (Falcon, MPT, Starcoder2)."""
    for name in checkpoint.entries:
        stem, _, leaf = name.rpartition(".")
        if leaf == "scales" and f"{stem}.qweight" not in checkpoint.entries:
            raise CheckpointError(
                f"the AWQ folder scales the outputs of an activation ({name}), which is not read "
                "here; open the model with transformers, call dequantize() on it, divide the "
                "weight behind the activation by these scales, and save that copy"
            )


def _weight(config: Mapping[str, Any], entries: Entries, qweight: str) -> Weight:
    prefix = qweight.removesuffix("qweight")
    if len(entries[qweight].shape) != 2:
        raise CheckpointError(
            f"tensor {qweight!r} has shape {list(entries[qweight].shape)}, no matrix"
        )
    K, words = entries[qweight].shape
    size, G = groups(config, K)
    N = words * len(PLACES)
    parts = (
        check_dtype(entries, qweight, WORDS),
        part(entries, f"{prefix}qzeros", qweight, (G, words), WORDS),
        part(entries, f"{prefix}scales", qweight, (G, N)),
    )
    return Weight(parts, (N, K), partial(_dense, size=size))


def _dense(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, size: int) -> Tensor:
    """[N, K] fp32."""
    codes, zeros = _in_order(qweight).float(), _in_order(qzeros).float()
    K = len(codes)
    zeros = zeros.repeat_interleave(size, 0)[:K]
    return (codes - zeros).mul_(scales.float().repeat_interleave(size, 0)[:K]).T.contiguous()


def _in_order(words: Tensor) -> Tensor:
    """Codes [R, C * 8] from words [R, C]."""
    codes = unpacked(words, BITS).unflatten(1, (-1, len(PLACES)))
    return codes[..., PLACES].flatten(1)
