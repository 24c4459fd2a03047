"""FP8 with scales of blocks, as DeepSeek and Qwen store it, or with one scale for a weight.

Beside a weight [N, K] of float8_e4m3fn stands `weight_scale_inv`, with one number for each block of
`weight_block_size` (rows, columns), or a single one: W = weight * scale (DeepSeek-V3,
inference/kernel.py, weight_dequant). AutoFP8 calls its single scale `weight_scale`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..folder import Checkpoint
from .stored import Entries, Found, Weight, check_shape, part

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
OF_ACTIVATIONS = ("activation_scale", "input_scale")
USUAL_BLOCK = (128, 128)  # where quantization_config says nothing of blocks, as in transformers


def find(config: Mapping[str, Any], checkpoint: Checkpoint) -> Found:
    """The weights of a folder whose quantization_config is `config`. Raises: CheckpointError."""
    if config.get("expert_dtype", "fp8") != "fp8":
        raise CheckpointError(
            f"the FP8 checkpoint has experts in {reprlib.repr(config['expert_dtype'])}, which are "
            "not read here; open it with transformers and dequantize=True in its "
            "FineGrainedFP8Config, save it, and compress that copy"
        )
    inverse = any(name.endswith("_scale_inv") for name in checkpoint.entries)
    block = config.get("weight_block_size", USUAL_BLOCK if inverse else None)
    if block is not None:
        block = block_size("weight_block_size", block)
    entries = checkpoint.entries
    weights: dict[str, Weight] = {}
    unused: set[str] = set()
    for name, entry in entries.items():
        if entry.dtype not in FLOATS:
            continue
        weights[name] = _weight(entries, name, block)
        prefix = name.rpartition(".")[0]
        unused |= {f"{prefix}.{leaf}" for leaf in OF_ACTIVATIONS} & entries.keys()
    said = "one scale per weight" if block is None else f"blocks of {block[0]}x{block[1]}"
    return Found(weights, unused, f"fp8, {said}")


def block_size(key: str, value: Any) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises: CheckpointError."""
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(type(size) is int and size > 0 for size in value):
        raise CheckpointError(
            f"quantization_config has {key}={reprlib.repr(value)}, expected rows and columns that "
            "share a scale, such as [128, 128]"
        )
    return value[0], value[1]


def _weight(entries: Entries, name: str, block: tuple[int, int] | None) -> Weight:
    shape = entries[name].shape
    scale = f"{name}_scale_inv"
    if block is None and scale not in entries and f"{name}_scale" in entries:
        scale = f"{name}_scale"
    part(entries, scale, name)
    if len(shape) < 2:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, no matrix")
    if block is None:
        if math.prod(entries[scale].shape) != 1:
            check_shape(entries, scale, (1,))
        block = shape[-2], shape[-1]
    else:
        rows, columns = (-(-size // of) for size, of in zip(shape[-2:], block, strict=True))
        check_shape(entries, scale, (*shape[:-2], rows, columns))
    return Weight((name, scale), shape, partial(scaled, block=block))


def scaled(weight: Tensor, scale: Tensor, *, block: tuple[int, int]) -> Tensor:
    """weight [..., N, K] times the scales of its blocks [..., n, k], or one for all; fp32."""
    dense, (rows, columns) = weight.float(), block
    if scale.numel() == 1:
        return dense.mul_(scale.float().reshape(()))
    N, K = weight.shape[-2:]
    whole = scale.float().repeat_interleave(columns, -1)[..., :K]
    return dense.mul_(whole.repeat_interleave(rows, -2)[..., :N, :])
