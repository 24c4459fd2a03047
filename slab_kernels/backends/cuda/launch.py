"""One linear as launches: fills `LinearParams` of csrc/cuda/params.h and queues one kernel, or two or three.

The linear's kernel reads z = x Q (adapters) or is followed by the sum of its K-splits (small layers) only where the weight asks for
it; the launches overlap by programmatic dependent launch where the device has it. Nothing is kept between calls, and
there are no flags and no atomics: z, the partial sums and a rebuilt weight come from torch's allocator with the call, like
y, so streams and CUDA graphs may overlap as they like.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import MAX_PARTS
from .layout import BLOCK_INPUTS, BLOCK_ROWS, INT4, INT8, W16, adapters
from .plan import REBUILT_ROWS, REGISTERS, Gpu, Plan, Rebuild, Sizes, choose

VALUE_NAMES = {W16: "w16", INT8: "int8", INT4: "int4"}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
BIAS_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_POINTERS = ("x", "stream", "v", "u", "adapter_p", "adapter_z", "bias", "y", "partial")


class LinearParams(ctypes.Structure):
    """`LinearParams` of csrc/cuda/params.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _POINTERS),
        ("token_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "tokens", "in_features", "out_features", "num_k_blocks", "whole_blocks", "rank", "planes", "group_steps", "adapter_steps",
                "z_splits", "bias_type", "x_ragged", "warp_rows", "warp_tokens", "warp_inputs", "stages", "row_tiles", "token_tiles",
                "splits", "parts",
            )
        ),
        *((name, ctypes.c_int32 * (MAX_PARTS + 1)) for name in ("part_tile", "part_block", "part_row")),
    )  # fmt: skip


class Device(NamedTuple):
    """Where kernels go: the facts that plans need, and a way to queue one."""

    gpu: Gpu
    queue: Callable[..., None]  # (name, grid, block, shared bytes, params, dependent)


class _Launch(NamedTuple):
    name: str
    plan: Plan | Rebuild
    template: bytes  # LinearParams without its pointers


@functools.lru_cache(maxsize=4096)
def launches(sizes: Sizes, M: int, dtype: torch.dtype, gpu: Gpu) -> tuple[_Launch | None, _Launch]:
    """The adapter's launch, if there is one, and the linear's."""
    act = DTYPE_NAMES[dtype]
    first, z_splits, chosen = None, 1, choose(sizes, M, gpu)
    if isinstance(chosen, Rebuild):
        return None, _Launch(_dense_name(sizes, act), chosen, _template(sizes, M, chosen, 0))
    if sizes.adapter_steps:
        inner = sizes.adapter()
        adapter = choose(inner, M, gpu)
        first = _Launch(
            f"adapter_{act}_t{adapter.tokens}", adapter, _template(inner, M, adapter, 1)
        )
        z_splits = adapter.splits
    name = _name(sizes, act, chosen.tokens, chosen.tile.blocks == 4)
    return first, _Launch(name, chosen, _template(sizes, M, chosen, z_splits))


def _name(sizes: Sizes, act: str, tokens: int, tall: bool) -> str:
    if sizes.planes > 1:
        which = "any" if sizes.rank > 1 else "two" if sizes.planes == 2 else "three"
        return f"planes_{act}_{VALUE_NAMES[sizes.values]}_{which}_t{tokens}"
    rank = "one" if sizes.rank == 1 else "none" if tall else "any"
    return f"{'tall' if tall else 'linear'}_{act}_{VALUE_NAMES[sizes.values]}_{rank}_t{tokens}"


def _dense_name(sizes: Sizes, act: str) -> str:
    return f"dense_{act}_{VALUE_NAMES[sizes.values]}{'_any' if sizes.planes > 1 or sizes.rank > 1 else ''}"


def kernel_names(sizes: Sizes, dtype: torch.dtype) -> list[str]:
    """Every kernel that this weight may ever use, whatever the number of tokens."""
    act = DTYPE_NAMES[dtype]
    names = [
        _name(sizes, act, tokens, tall)
        for tall in (False, True)
        for tokens in sizes.warp_tokens(tall)
    ]
    if sizes.adapter_steps:
        names += [f"adapter_{act}_t{tokens}" for tokens in REGISTERS]
    return [*names, f"reduce_{act}", _dense_name(sizes, act)]


def _template(sizes: Sizes, M: int, chosen: Plan | Rebuild, z_splits: int) -> bytes:
    p, tiles = LinearParams(), [0] * MAX_PARTS
    p.tokens, p.in_features, p.out_features, p.num_k_blocks = (
        M,
        sizes.K,
        sum(sizes.rows),
        sizes.k_blocks,
    )
    p.whole_blocks = sizes.K // BLOCK_INPUTS
    p.rank, p.planes, p.group_steps = sizes.rank, sizes.planes, sizes.group_steps
    p.adapter_steps, p.z_splits = sizes.adapter_steps, z_splits
    if isinstance(chosen, Plan):
        tile = chosen.tile
        p.warp_rows, p.warp_tokens, p.warp_inputs = (
            tile.warp_rows,
            tile.warp_tokens,
            tile.warp_inputs,
        )
        p.stages, p.row_tiles, p.token_tiles, p.splits = (
            chosen.stages,
            chosen.row_tiles,
            chosen.token_tiles,
            chosen.splits,
        )
        tiles = sizes.row_tiles(tile.rows)
    p.parts = len(sizes.rows)
    for i, rows in enumerate(sizes.rows):
        p.part_tile[i + 1] = p.part_tile[i] + tiles[i]
        p.part_block[i + 1] = p.part_block[i] - (-rows // BLOCK_ROWS)
        p.part_row[i + 1] = p.part_row[i] + rows
    return bytes(p)


def linear(x: Tensor, stream: Tensor, V: Tensor | None, U: Tensor | None, P: Tensor | None, Q: Tensor | None,
           bias: Tensor | None, sizes: Sizes, device: Device) -> Tensor:  # fmt: skip
    """x [..., K] in fp16 or bf16 -> [..., sum of rows]. Tensors as in `CudaState`; x in any strides."""
    N, dtype, shape = sum(sizes.rows), x.dtype, (*x.shape[:-1], sum(sizes.rows))
    M = x.numel() // sizes.K
    if M == 0:
        return x.new_empty(shape)
    x = x.reshape(M, sizes.K)
    if x.stride(1) != 1 or (M > 1 and x.stride(0) < sizes.K):
        x = x.contiguous()
    first, second = launches(sizes, M, dtype, device.gpu)
    if isinstance(second.plan, Rebuild):
        return rebuilt(x, stream, V, U, P, Q, bias, sizes, second, device).view(shape)
    y = x.new_empty(shape)
    p = LinearParams.from_buffer_copy(second.template)
    p.x, p.token_stride = x.data_ptr(), x.stride(0)
    if p.x % 16 != 0 or (M > 1 and p.token_stride % 8 != 0):
        p.x_ragged, p.whole_blocks = 1, 0
    if first is not None:
        z = x.new_empty(
            first.plan.splits, M, len(sizes.rows) * 16 * sizes.adapter_steps, dtype=torch.float32
        )
        q = LinearParams.from_buffer_copy(first.template)
        q.x, q.token_stride, q.x_ragged, q.whole_blocks = (
            p.x,
            p.token_stride,
            p.x_ragged,
            p.whole_blocks,
        )
        q.stream, q.partial = Q.data_ptr(), z.data_ptr()
        device.queue(
            first.name, first.plan.grid, first.plan.block, first.plan.shared_bytes, q, False
        )
        p.adapter_p, p.adapter_z = P.data_ptr(), z.data_ptr()
    p.stream, p.y = stream.data_ptr(), y.data_ptr()
    if U is not None:
        p.u, p.v = U.data_ptr(), V.data_ptr()
    if bias is not None:
        p.bias, p.bias_type = bias.data_ptr(), BIAS_TYPES[bias.dtype]
    splits = second.plan.splits
    if splits > 1:
        partial = x.new_empty(splits, M, N, dtype=torch.float32)
        p.partial = partial.data_ptr()
    device.queue(
        second.name,
        second.plan.grid,
        second.plan.block,
        second.plan.shared_bytes,
        p,
        first is not None,
    )
    if splits > 1:
        device.queue(f"reduce_{DTYPE_NAMES[dtype]}", (-(-N // 256), M, 1), (256, 1, 1), 0, p, True)
    return y


def rebuilt(x: Tensor, stream: Tensor, V: Tensor | None, U: Tensor | None, P: Tensor | None, Q: Tensor | None,
            bias: Tensor | None, sizes: Sizes, launch: _Launch, device: Device) -> Tensor:  # fmt: skip
    """x [M, K] -> [M, sum of rows]: REBUILT_ROWS rows of the weight made by `dense_*`, the adapter added and multiplied by cuBLAS,
    then the next rows in the same memory."""
    y = x.new_empty(x.shape[0], sum(sizes.rows))
    W = x.new_empty(min(REBUILT_ROWS, max(sizes.rows)), -(-sizes.K // 8) * 8)[
        :, : sizes.K
    ]  # dense.cuh: dense_pitch
    pairs = [None] * len(sizes.rows) if P is None else adapters(P, Q, sizes.K, sizes.rows, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    p = LinearParams.from_buffer_copy(launch.template)
    p.y, to, block = W.data_ptr(), 0, 0
    with torch.autocast(
        x.device.type, enabled=False
    ):  # x's type is the result's, whatever surrounds us
        for part, (rows, pair) in enumerate(zip(sizes.rows, pairs, strict=True)):
            for start in range(0, rows, REBUILT_ROWS):
                count = min(REBUILT_ROWS, rows - start)
                first, some = block + start // BLOCK_ROWS, W[:count]
                p.stream, p.out_features = stream[first].data_ptr(), count
                if U is not None:
                    p.u, p.v = U[BLOCK_ROWS * first].data_ptr(), V[part].data_ptr()
                ctas = min(
                    -(-(-(-count // BLOCK_ROWS) * sizes.k_blocks) // 8), launch.plan.ctas
                )  # eight warps each
                device.queue(launch.name, (ctas, 1, 1), (256, 1, 1), 0, p, False)
                if pair is not None:
                    some.addmm_(pair[0][start : start + count], pair[1])
                result = y[:, to : to + count]
                if bias is None:
                    torch.mm(x, some.T, out=result)
                else:
                    torch.addmm(bias[to : to + count], x, some.T, out=result)
                to += count
            block += -(-rows // BLOCK_ROWS)
    return y
