"""MXFP4 of experts, as gpt-oss stores them: two codes a byte, and one exponent for 32 of them.

A stack `experts.gate_up_proj` [E, K, N] is `gate_up_proj_blocks` uint8 [E, N, K / 32, 16] and
`gate_up_proj_scales` uint8 [E, N, K / 32] (Open Compute Project, Microscaling Formats 1.0). The
arithmetic is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..folder import Checkpoint
from .stored import Entries, Found, Weight, part

GROUP, BYTES = 32, 16  # inputs that share an exponent, and what their codes take


def find(config: Mapping[str, Any], checkpoint: Checkpoint) -> Found:
    """The weights of a folder whose quantization_config is `config`. Raises: CheckpointError."""
    entries = checkpoint.entries
    blocks = [name for name in entries if name.endswith("_blocks")]
    weights = {name.removesuffix("_blocks"): _weight(entries, name) for name in blocks}
    return Found(weights, set(), f"mxfp4, groups of {GROUP}")


def _weight(entries: Entries, blocks: str) -> Weight:
    shape, dtype = entries[blocks].shape, entries[blocks].dtype
    if len(shape) != 4 or shape[-1] != BYTES or dtype != torch.uint8:
        raise CheckpointError(
            f"tensor {blocks!r} is {dtype} of shape {list(shape)}, and MXFP4 codes are uint8 "
            f"[experts, outputs, inputs / {GROUP}, {BYTES}]"
        )
    E, N, groups, _ = shape
    scales = part(
        entries, f"{blocks.removesuffix('blocks')}scales", blocks, (E, N, groups), (torch.uint8,)
    )
    return Weight((blocks, scales), (E, groups * GROUP, N), _dense)


def _dense(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, K, N] fp32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).cpu()
