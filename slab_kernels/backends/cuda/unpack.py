"""The stream of layout.py -> dense tensors, for gradients, tests and paths through cuBLAS. It is
plain torch and runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import bits
from .layout import (
    INT4,
    INT8,
    METADATA_BYTES,
    SIGN_BYTES,
    VALUE_BYTES,
    W16,
    WORD,
    CudaState,
    code_units,
    nibble_places,
    padded_rows,
    sign_places,
)


def dense(state: CudaState) -> Tensor:
    """The weight that a stream stands for, without the adapter: [sum of rows, K] fp32.

    It is the inverse of `layout.prepare`, up to that function's rounding.
    """
    metadata_at = VALUE_BYTES[state.values]
    signs_at = metadata_at + METADATA_BYTES
    scales_at = signs_at + (state.planes * SIGN_BYTES if state.U is not None else 0)
    kept = _dense_values(state.stream[..., :metadata_at], state)
    if state.values in (INT8, INT4):
        scales = _dense_scales(state.stream[..., scales_at:], state)
        kept = kept * scales.repeat_interleave(64 // scales.shape[-1], -1)
    metadata = _dense_metadata(state.stream[..., metadata_at:signs_at])
    first, second = bits.kept_positions(metadata)
    W = bits.scatter_positions(kept.reshape(metadata.shape[0], -1), first, second)
    if state.U is not None:
        levels = _dense_levels(state.stream[..., signs_at:scales_at], state.planes)
        B = bits.scatter_positions(levels, *bits.pruned_positions(first, second))
        W = W + _magnitudes(state) * B
    parts = zip(W.split(padded_rows(state.rows)), state.rows, strict=True)
    return torch.cat([part[:count, : state.in_features] for part, count in parts])


def adapters(state: CudaState) -> list[tuple[Tensor, Tensor]]:
    """P [N, R'] and Q^T [R', K] of every part, R' padded to 16, in the activations' type.

    The list is empty for a weight without an adapter.
    """
    if state.P_rows is None or state.Q is None:
        return []
    padded_rank, k_blocks = state.P_rows.shape[1], state.Q.shape[1]
    right = _parted(state.Q, ()).view(state.dtype).view(-1, k_blocks, 8, 8, 4, 2, 2, 2)
    right = right.permute(0, 6, 3, 1, 2, 5, 4, 7).flatten(3).flatten(0, 2)
    right = right[: len(state.rows) * padded_rank].view(len(state.rows), padded_rank, -1)
    parts = zip(state.P_rows.split(padded_rows(state.rows)), right, state.rows, strict=True)
    return [(P[:count], Q[:, : state.in_features]) for P, Q, count in parts]


def _parted(stored: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A field of blocks [pairs, k, bytes] -> [tiles, k, *axes, bytes]; layout._paired's inverse.

    axes: those that stand before the two tiles of a pair.
    """
    pairs, k_blocks, _ = stored.shape
    field = stored.reshape(pairs, k_blocks, *axes, 2, -1)
    return field.movedim(2 + len(axes), 1).flatten(0, 1).contiguous()


def _dense_values(stored: Tensor, state: CudaState) -> Tensor:
    """The kept values without their scales: [row tiles, 16, K blocks, 64] fp32."""
    stored = _parted(stored, ())
    tiles, k_blocks, _ = stored.shape
    shape = (tiles, k_blocks)
    if state.values == W16:
        kept = stored.view(state.dtype).view(*shape, 4, 8, 4, 2, 2, 2).float()
        kept = kept.permute(0, 6, 3, 1, 2, 5, 4, 7)  # from the axes step g t c h half
    elif state.values == INT8:
        kept = stored.view(*shape, 2, 8, 4, 2, 2, 2, 2).float() - 128
        kept = kept.permute(0, 8, 3, 1, 2, 5, 6, 4, 7)  # from the axes j g t parity c half h
    else:
        words = stored.view(torch.int32).to(torch.int64).view(*shape, 8, 4, 4, 1, 1, 1)
        words = (words & WORD) * (1 + (1 << 32))  # twice: a nibble may wrap around
        nibbles = words >> nibble_places(stored.device) & 15
        kept = (nibbles.float() - 8).permute(0, 7, 2, 1, 4, 6, 3, 5)  # from g t step half c h
    return kept.reshape(tiles, 16, k_blocks, 64)


def _dense_metadata(stored: Tensor) -> Tensor:
    """The metadata as the packed format has it: [rows, 16 bytes per K block]."""
    stored = _parted(stored, (8, 2, 2))
    axes = stored.unflatten(-1, (2, 2, 2))  # g selector even h2 h byte
    tiles, k_blocks = stored.shape[:2]
    return axes.permute(0, 6, 2, 1, 5, 3, 4, 7).reshape(tiles * 16, k_blocks * 16)


def _dense_scales(stored: Tensor, state: CudaState) -> Tensor:
    """The scales: [row tiles, 16, K blocks, scales per row and K block] fp32."""
    stored = _parted(stored, (stored.shape[-1] // (8 * 8), 8))  # group g
    tiles, k_blocks = stored.shape[:2]
    scales = stored.view(torch.bfloat16).float()
    if state.values == INT4:
        scales = scales * code_units(state.dtype, scales.device)
    return scales.permute(0, 4, 3, 1, 2).reshape(tiles, 16, k_blocks, -1)


def _dense_levels(stored: Tensor, planes: int) -> Tensor:
    """The level of every pruned entry, the sum of its signs' worths: [rows, 64 K blocks] fp32."""
    tiles, k_blocks = 2 * stored.shape[0], stored.shape[1]
    levels = torch.zeros((), device=stored.device)
    for number, plane in enumerate(sign_places(planes, stored.device)):
        words = _parted(stored[..., plane.first : plane.first + plane.length], (8, 4))
        words = words.view(torch.int32 if plane.length == SIGN_BYTES else torch.int64)
        words = words.view(tiles, k_blocks, 8, 4, 1, 1, 1, 1)
        negative = words >> plane.bit & 1  # the axes are tiles k g t half step c h
        levels = levels + (1 - 2 * negative) / 2.0**number
    return levels.permute(0, 7, 2, 1, 5, 6, 3, 4).reshape(tiles * 16, k_blocks * 64)


def _magnitudes(state: CudaState) -> Tensor:
    """U V^T of every part below one another: [32 row pairs, K padded to 128] fp32."""
    assert state.U is not None and state.V is not None
    U = state.U.contiguous().view(torch.int16)[:, ::2].contiguous().view(state.dtype).float()
    parts = zip(U.split(padded_rows(state.rows)), state.V, strict=True)
    return torch.cat([u @ v.float() for u, v in parts])
