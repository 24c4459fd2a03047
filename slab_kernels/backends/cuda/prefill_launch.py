"""Fills PrefillParams of csrc/cuda/prefill.h and queues the Hopper kernels for many tokens.

One launch multiplies, and where tiles are dealt by their K blocks a second one adds the sums of
their shares. Both are dependent launches. As in launch.py nothing is kept between calls but what
follows from their arguments: the tensor maps are part of the parameters, which the driver copies,
so a captured graph has its own.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...format import ceil_div
from ..base import MAX_PARTS
from .device import BIAS_CODES, DTYPE_NAMES, VALUE_NAMES, CudaDevice
from .layout import BLOCK_ROWS, TILE_ROWS, W16, CudaState
from .prefill import REBUILD, Prefill, frames, is_any_rank
from .tensor_map import ALIGNMENT, BYTES
from .tiles import CudaSizes

REDUCE_THREADS, REDUCE_TOKENS = 128, 64  # of a CTA that adds shares
_POINTERS = ("stream", "v", "u", "powers", "adapter_p", "bias", "y", "partial")
_NUMBERS = ("tokens", "out_features", "num_k_blocks", "rank", "planes", "group_steps",
            "adapter_steps", "bias_type", "tile_tokens", "tile_rows", "cluster_ctas", "row_tiles",
            "token_tiles", "whole_tiles", "tail_share", "tail_more", "clusters", "weight_stages",
            "token_stages", "parts")  # fmt: skip
_BY_PART = ("part_tile", "part_pair", "part_row")


class _Fields(ctypes.Structure):
    _fields_ = (
        ("x_map", ctypes.c_uint8 * BYTES),
        ("z_map", ctypes.c_uint8 * BYTES),
        *((name, ctypes.c_uint64) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _NUMBERS),
        *((name, ctypes.c_int32 * (MAX_PARTS + 1)) for name in _BY_PART),
    )


class PrefillParams(_Fields):
    """`PrefillParams` of csrc/cuda/prefill.h, field by field, as long as its alignment makes it."""

    _fields_ = (("padding", ctypes.c_uint8 * (-ctypes.sizeof(_Fields) % ALIGNMENT)),)


# Maps are packed into the parameters, since ctypes would copy their bytes one by one.
_MAP = struct.Struct(f"{BYTES}s")
_X_MAP, _Z_MAP = PrefillParams.x_map.offset, PrefillParams.z_map.offset


class PrefillLaunch(NamedTuple):
    """A kernel for many tokens."""

    name: str
    plan: Prefill
    template: bytes  # PrefillParams without its maps and pointers


def prefill_launch(plan: Prefill, dtype: torch.dtype) -> PrefillLaunch:
    """What runs a plan."""
    name = _name(plan.sizes, dtype, plan.kind, plan.tokens)
    return PrefillLaunch(name, plan, _template(plan))


def prefill_names(sizes: CudaSizes, dtype: torch.dtype) -> list[str]:
    """Every kernel of prefill.cu that this weight may ever use on a device that has them."""
    found = [_name(sizes, dtype, kind, tokens) for kind, tokens in frames(sizes)]
    return [*found, f"prefill_reduce_{DTYPE_NAMES[dtype]}"] if found else []


def _name(sizes: CudaSizes, dtype: torch.dtype, kind: str, tokens: int) -> str:
    """The kernel. tokens: of a CTA."""
    name = f"prefill_{kind}_{DTYPE_NAMES[dtype]}_{VALUE_NAMES[sizes.values]}"
    if is_any_rank(sizes, kind):
        return f"{name}_any_t{tokens}"
    rank = "_one" if kind == REBUILD else ""
    # Scales that change within a K block have kernels of their own.
    grouped = sizes.values != W16 and sizes.group_steps < 4
    return f"{name}{rank}_t{tokens}{'_groups' if grouped else ''}"


def _template(plan: Prefill) -> bytes:
    sizes, args = plan.sizes, PrefillParams()
    args.tokens, args.out_features, args.num_k_blocks = plan.M, sizes.N, sizes.k_blocks
    args.rank, args.planes, args.group_steps = sizes.rank, sizes.planes, sizes.group_steps
    args.adapter_steps = sizes.adapter_steps
    args.tile_tokens, args.tile_rows, args.cluster_ctas = plan.tokens, plan.rows, plan.pair
    args.row_tiles, args.token_tiles = plan.row_tiles, plan.token_tiles
    args.whole_tiles, args.clusters = plan.whole_tiles, plan.clusters
    args.tail_share, args.tail_more = plan.tail_share, plan.tail_more
    args.weight_stages, args.token_stages = plan.weight_stages, plan.token_stages
    args.parts = len(sizes.rows)
    set_parts(args, sizes.rows, sizes.row_tiles(plan.rows))
    return bytes(args)


def set_parts(args: ctypes.Structure, rows: tuple[int, ...], tiles: list[int]) -> None:
    """part_tile, part_pair and part_row: where each part begins; those that are missing have no
    rows.

    tiles: row tiles of each part.
    """
    missing = [0] * (MAX_PARTS - len(rows))
    for part, (count, tiled) in enumerate(zip((*rows, *missing), (*tiles, *missing), strict=True)):
        args.part_tile[part + 1] = args.part_tile[part] + tiled
        args.part_pair[part + 1] = args.part_pair[part] + ceil_div(count, BLOCK_ROWS)
        args.part_row[part + 1] = args.part_row[part] + count


def set_weight(args: Any, state: CudaState, bias: Tensor | None) -> None:
    """The pointers to a prepared weight, but for its adapter, and to the bias.

    args: LinearParams or PrefillParams, where those of parts that the weight lacks are null.
    """
    args.stream = state.stream.data_ptr()
    if state.U is not None and state.V is not None:
        args.u, args.v = state.U.data_ptr(), state.V.data_ptr()
    if state.powers is not None:
        args.powers = state.powers.data_ptr()
    if bias is not None:
        args.bias, args.bias_type = bias.data_ptr(), BIAS_CODES[bias.dtype]


def multiply(
    x: Tensor,
    z: Tensor | None,
    y: Tensor,
    state: CudaState,
    bias: Tensor | None,
    launch: PrefillLaunch,
    device: CudaDevice,
) -> None:
    """Queues what makes y [M, sum of rows] of x [M, K].

    x: rows aligned to 16 bytes. z: x Q [M, parts R' padded to 16] in x's dtype, for a weight with
    an adapter.
    """
    plan, args = launch.plan, PrefillParams.from_buffer_copy(launch.template)
    _MAP.pack_into(args, _X_MAP, _map(x, plan, device))
    if z is not None:
        assert state.P is not None
        _MAP.pack_into(args, _Z_MAP, _map(z, plan, device))
        args.adapter_p = state.P.data_ptr()
    args.y = y.data_ptr()
    set_weight(args, state, bias)
    if plan.partial_floats:
        partial = x.new_empty(plan.partial_floats, dtype=torch.float32)
        args.partial = partial.data_ptr()
    device.queue(launch.name, plan.grid, plan.block, plan.shared_bytes, args, True)
    if plan.tail_tiles:
        row_warps = plan.tail_tiles * plan.pair * plan.rows // TILE_ROWS
        grid = row_warps, ceil_div(plan.tokens, REDUCE_TOKENS), 1
        name = f"prefill_reduce_{DTYPE_NAMES[x.dtype]}"
        device.queue(name, grid, (REDUCE_THREADS, 1, 1), 0, args, True)


def _map(matrix: Tensor, plan: Prefill, device: CudaDevice) -> bytes:
    """The tensor map of [M, columns], in boxes of a CTA's share of a tile's tokens."""
    rows, columns = matrix.shape
    apart = matrix.stride(0) * matrix.element_size()
    return device.tensor_map(
        matrix.data_ptr(), columns, rows, apart, plan.tokens // plan.pair, matrix.dtype
    )
