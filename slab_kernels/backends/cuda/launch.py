"""One linear as launches: fills `LinearParams` of csrc/cuda/params.h and queues its kernels.

The linear's kernel comes after the one of z = x Q where the weight has an adapter, and before the
one that adds partial sums where K is split. Nothing is kept between calls, and there are no flags
and no atomics: z, the partial sums and a rebuilt weight come from torch's allocator with the call,
like y, so streams and CUDA graphs may overlap as they like.

Every linear, the first of a call too, is launched as a dependent kernel where the device has that:
it may start before the kernel in front of it ends, whoever queued that one. Until it has waited for
that kernel it reads nothing but the prepared weight (layout.prepare), and it writes nothing at all.
The kernels that rebuild a weight and that add partial sums do likewise. prefill_launch.py has the
Hopper kernels for many tokens.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...format import ceil_div
from ..base import MAX_PARTS
from .cost import REBUILT_ROWS, Plan, Rebuild
from .device import DTYPE_NAMES, VALUE_NAMES, CudaDevice
from .gpus import Gpu
from .layout import BLOCK_ROWS, DENSE, W16, CudaState, padded_rows
from .plan import choose
from .prefetch import successor_of
from .prefill import CAPABILITY, Prefill
from .prefill_launch import (
    PrefillLaunch,
    multiply,
    prefill_launch,
    prefill_names,
    set_parts,
    set_weight,
)
from .tiles import MANY, NARROW, REBUILD, REBUILD_REGISTERS, WIDE, CudaSizes, sizes_of
from .unpack import adapters

PLANE_NAMES = {0: "none", 1: "one", 2: "two", 3: "three"}  # sign planes; none without a rank
THREADS = 256  # of a CTA that adds partial sums or rebuilds a weight
WARPS = THREADS // 32
STEPS = 4  # of 32 inputs in a K block
_POINTERS = ("x", "stream", "v", "u", "powers", "adapter_p", "adapter_z", "bias", "y", "partial",
             "next")  # fmt: skip
_WIDE_NUMBERS = ("token_stride", "next_bytes")
_NUMBERS = ("tokens", "in_features", "out_features", "num_k_blocks", "rank", "planes",
            "group_steps", "adapter_steps", "z_splits", "bias_type", "warp_rows", "warp_tokens",
            "warp_inputs", "tile_tokens", "stages", "row_tiles", "token_tiles", "splits",
            "k_share", "k_more", "parts")  # fmt: skip
_BY_PART = ("part_tile", "part_pair", "part_row")


class LinearParams(ctypes.Structure):
    """`LinearParams` of csrc/cuda/params.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _WIDE_NUMBERS),
        *((name, ctypes.c_int32) for name in _NUMBERS),
        *((name, ctypes.c_int32 * (MAX_PARTS + 1)) for name in _BY_PART),
    )


class FusedLaunch(NamedTuple):
    """A kernel of a linear, or of an adapter's z = x Q."""

    name: str
    plan: Plan
    template: bytes  # LinearParams without its pointers


class RebuildLaunch(NamedTuple):
    """A kernel that rebuilds rows of a weight for cuBLAS."""

    name: str
    plan: Rebuild
    template: bytes  # LinearParams without its pointers


class Launches(NamedTuple):
    """The launches of one linear; the one that adds partial sums needs no plan."""

    adapter: FusedLaunch | None
    linear: FusedLaunch | RebuildLaunch | PrefillLaunch


@functools.lru_cache(maxsize=16384)
def launches(sizes: CudaSizes, M: int, dtype: torch.dtype, gpu: Gpu) -> Launches:
    """What runs M tokens. A rebuilt weight includes its adapter from K tokens on: then it is
    cheaper to add P Q to the weight [N, K] than z P^T to the result [M, N]."""
    act = DTYPE_NAMES[dtype]
    chosen = choose(sizes, M, gpu)
    adapter, z_splits = None, 1
    if sizes.adapter_steps and not (isinstance(chosen, Rebuild) and M >= sizes.K):
        inner = sizes.adapter()
        plan = choose(inner, M, gpu)
        assert isinstance(plan, Plan)  # An adapter's sizes are never rebuilt.
        name = _name(inner, act, plan.tile.loop, plan.tokens)
        adapter, z_splits = FusedLaunch(name, plan, _template(inner, M, plan, 1)), plan.splits
    if isinstance(chosen, Rebuild):
        template = _template(sizes, M, chosen, z_splits=0)
        return Launches(adapter, RebuildLaunch(_dense_name(sizes, act), chosen, template))
    if isinstance(chosen, Prefill):
        return Launches(adapter, prefill_launch(chosen, dtype))
    name = _name(sizes, act, chosen.tile.loop, chosen.tokens, chosen.tile.tall)
    return Launches(adapter, FusedLaunch(name, chosen, _template(sizes, M, chosen, z_splits)))


def _name(sizes: CudaSizes, act: str, loop: str, tokens: int, tall: bool = False) -> str:
    """The linear's kernel. act: of the activations. tokens: of a warp. tall: 64 rows per warp."""
    if sizes.values == DENSE:
        return f"adapter_{act}_t{sizes.wide_tokens if loop == WIDE else tokens}"
    kind = f"{act}_{VALUE_NAMES[sizes.values]}"
    if loop == REBUILD:
        several = sizes.rank > 1 or sizes.planes > 1
        return f"rebuild_{kind}_{'any' if several else 'one'}_t{tokens}"
    if loop != MANY:
        kind += f"_{PLANE_NAMES[sizes.planes if sizes.rank else 0]}"
        if loop == WIDE and sizes.rank > 1:
            return f"wide_{kind}_any_t8"
        kind += "_t16" if loop == WIDE else ""
        # The other kernels of several planes are told how many inputs a scale covers.
        grouped = sizes.planes == 1 and sizes.values != W16 and sizes.group_steps < STEPS
        return f"{loop}_{kind}{'_groups' if grouped else ''}"
    if sizes.planes > 1:
        return f"planes_{kind}_{'any' if sizes.rank > 1 else PLANE_NAMES[sizes.planes]}_t{tokens}"
    other_rank = "none" if tall else "any"
    rank = "one" if sizes.rank == 1 else other_rank
    return f"{'tall' if tall else 'linear'}_{kind}_{rank}_t{tokens}"


def _dense_name(sizes: CudaSizes, act: str) -> str:
    """The kernel that rebuilds the weight."""
    any_rank = sizes.planes > 1 or sizes.rank > 1
    return f"dense_{act}_{VALUE_NAMES[sizes.values]}{'_any' if any_rank else ''}"


def kernel_names(sizes: CudaSizes, dtype: torch.dtype, gpu: Gpu) -> list[str]:
    """Every kernel that this weight may ever use on a device, whatever the number of tokens."""
    act, found = DTYPE_NAMES[dtype], []
    for each in (sizes, sizes.adapter()) if sizes.adapter_steps else (sizes,):
        if each.most_narrow_tokens:
            found.append(_name(each, act, NARROW, each.most_narrow_tokens))
        found.append(_name(each, act, WIDE, each.wide_tokens))
        found += [
            _name(each, act, MANY, tokens, tall)
            for tall in (False, True)
            for tokens in each.warp_tokens(tall)
        ]
    if gpu.capability == CAPABILITY:
        found += prefill_names(sizes, dtype)
    elif sizes.rank:
        found += [_name(sizes, act, REBUILD, tokens) for tokens in REBUILD_REGISTERS]
    return [*found, f"reduce_{act}", _dense_name(sizes, act)]


def _template(sizes: CudaSizes, M: int, plan: Plan | Rebuild, z_splits: int) -> bytes:
    """LinearParams without its pointers. z_splits: K-splits of the adapter's z that comes first."""
    args = LinearParams()
    args.tokens = M
    args.in_features, args.out_features = sizes.K, sizes.N
    args.num_k_blocks = sizes.k_blocks
    args.rank, args.planes, args.group_steps = sizes.rank, sizes.planes, sizes.group_steps
    args.adapter_steps, args.z_splits = sizes.adapter_steps, z_splits
    tiles = [0] * len(sizes.rows)
    if isinstance(plan, Plan):
        tile = plan.tile
        args.warp_rows, args.warp_tokens = tile.warp_rows, tile.warp_tokens
        args.warp_inputs, args.stages, args.splits = tile.warp_inputs, plan.stages, plan.splits
        args.row_tiles, args.token_tiles = plan.row_tiles, plan.token_tiles
        args.tile_tokens = plan.cta_tokens
        args.k_share, args.k_more = divmod(sizes.k_blocks, plan.splits)
        tiles = sizes.row_tiles(tile.rows)
    args.parts = len(sizes.rows)
    set_parts(args, sizes.rows, tiles)
    return bytes(args)


def linear(x: Tensor, state: CudaState, bias: Tensor | None, device: CudaDevice) -> Tensor:
    """x [..., K] in the state's dtype and any strides -> [..., sum of rows] in the same dtype."""
    sizes = sizes_of(state)
    N, M = sizes.N, x.numel() // sizes.K
    shape = (*x.shape[:-1], N)
    if M == 0:
        return x.new_empty(shape)
    x = x.reshape(M, sizes.K)
    adapter, chosen = launches(sizes, M, x.dtype, device.gpu)
    if isinstance(chosen, RebuildLaunch):
        return rebuilt(x, state, bias, adapter, chosen, device).view(shape)
    x = _aligned(x)
    y = x.new_empty(shape)
    if isinstance(chosen, PrefillLaunch):
        rounded = None if adapter is None else _rounded_z(x, state, adapter, device)
        multiply(x, rounded, y, state, bias, chosen, device)
        return y
    args = LinearParams.from_buffer_copy(chosen.template)
    _set_activations(args, x)
    if adapter is not None:
        assert state.P is not None
        z = _queue_adapter(x, state, adapter, device)
        args.adapter_p, args.adapter_z = state.P.data_ptr(), z.data_ptr()
    set_weight(args, state, bias)
    args.next, args.next_bytes = successor_of(args.stream)
    _queue_whole(chosen, args, y, device)
    return y


def _aligned(x: Tensor) -> Tensor:
    """x [M, K], or a copy if kernels could not copy its rows 16 bytes at a time.

    The wide loop counts the bytes of eight rows with 32 bits.
    """
    M, K = x.shape
    apart = x.stride(0)
    rows = x.stride(1) == 1 and (M == 1 or (K <= apart < 2**28 and apart % 8 == 0))
    if rows and x.data_ptr() % 16 == 0:
        return x
    return x.new_empty(M, ceil_div(K, 8) * 8)[:, :K].copy_(x)


def _set_activations(args: LinearParams, x: Tensor) -> None:
    """The pointer to x [M, K], whose rows are aligned to 16 bytes."""
    args.x, args.token_stride = x.data_ptr(), x.stride(0)


def _queue(launch: FusedLaunch, args: LinearParams, device: CudaDevice) -> None:
    plan = launch.plan
    device.queue(launch.name, plan.grid, plan.block, plan.shared_bytes, args, True)


def _queue_whole(launch: FusedLaunch, args: LinearParams, y: Tensor, device: CudaDevice) -> None:
    """The kernel that writes y [..., N], and the one that adds its partial sums if K is split."""
    splits, (M, N) = launch.plan.splits, (launch.plan.M, launch.plan.sizes.N)
    args.y = y.data_ptr()
    if splits == 1:
        _queue(launch, args, device)
        return
    partial = y.new_empty(splits, M, N, dtype=torch.float32)
    args.partial = partial.data_ptr()
    _queue(launch, args, device)
    grid = (ceil_div(N, THREADS), M, 1)
    device.queue(f"reduce_{DTYPE_NAMES[y.dtype]}", grid, (THREADS, 1, 1), 0, args, True)


def _rounded_z(x: Tensor, state: CudaState, launch: FusedLaunch, device: CudaDevice) -> Tensor:
    """z = x Q of x [M, K] with aligned rows: [M, parts * R' padded to 16] in x's dtype."""
    assert state.Q is not None
    z = x.new_empty(x.shape[0], launch.plan.sizes.N)
    args = LinearParams.from_buffer_copy(launch.template)
    _set_activations(args, x)
    args.stream = state.Q.data_ptr()
    _queue_whole(launch, args, z, device)
    return z


def _queue_adapter(x: Tensor, state: CudaState, launch: FusedLaunch, device: CudaDevice) -> Tensor:
    """z = x Q, one sum for each K-split: [splits, M, parts * R' padded to 16] fp32."""
    assert state.Q is not None
    ranks = launch.plan.sizes.N
    z = x.new_empty(launch.plan.splits, x.shape[0], ranks, dtype=torch.float32)
    args = LinearParams.from_buffer_copy(launch.template)
    _set_activations(args, x)
    args.stream, args.partial = state.Q.data_ptr(), z.data_ptr()
    _queue(launch, args, device)
    return z


def rebuilt(
    x: Tensor,
    state: CudaState,
    bias: Tensor | None,
    adapter: FusedLaunch | None,
    launch: RebuildLaunch,
    device: CudaDevice,
) -> Tensor:
    """x [M, K] -> [M, sum of rows] by cuBLAS, REBUILT_ROWS rows of a part at a time.

    The rows are rebuilt by a `dense_*` kernel; the next rows take the same memory. With `adapter`,
    which computes z = x Q, the result begins as z P^T + bias and each product is added to it; else
    P Q is added to the rows.
    """
    y = x.new_empty(x.shape[0], sum(state.rows))
    K, k_blocks = state.in_features, state.stream.shape[1]
    pitch = ceil_div(K, 8) * 8  # as dense_pitch of csrc/cuda/dense.cuh
    W = x.new_empty(min(REBUILT_ROWS, max(state.rows)), pitch)[:, :K]
    bias = None if bias is None else bias.to(x.dtype)
    args = LinearParams.from_buffer_copy(launch.template)
    args.y = W.data_ptr()
    factors: list[tuple[Tensor, Tensor]] = []
    with torch.autocast(x.device.type, enabled=False):  # The result has x's type even in autocast.
        if adapter is not None:
            x = _aligned(x)
            _begin_with_adapter(y, _rounded_z(x, state, adapter, device), state, bias)
        else:
            factors = adapters(state)
        done = 0  # columns of y
        for part, rows in enumerate(state.rows):
            for start in range(0, rows, REBUILT_ROWS):
                count = min(REBUILT_ROWS, rows - start)
                row_pairs = ceil_div(count, BLOCK_ROWS)
                first_pair = args.part_pair[part] + start // BLOCK_ROWS
                args.stream, args.out_features = state.stream[first_pair].data_ptr(), count
                if state.U is not None and state.V is not None:
                    args.u = state.U[BLOCK_ROWS * first_pair].data_ptr()
                    args.v = state.V[part].data_ptr()
                along_k = ceil_div(k_blocks, WARPS)  # CTAs
                grid = along_k, min(row_pairs, ceil_div(launch.plan.max_ctas, along_k)), 1
                device.queue(launch.name, grid, (THREADS, 1, 1), 0, args, True)
                piece, result = W[:count], y[:, done : done + count]
                if factors:
                    P, Q = factors[part]
                    piece.addmm_(P[start : start + count], Q)
                if adapter is not None:
                    result.addmm_(x, piece.T)
                else:
                    own_bias = None if bias is None else bias[done : done + count]
                    _multiply(x, piece, own_bias, result)
                done += count
    return y


def _begin_with_adapter(y: Tensor, z: Tensor, state: CudaState, bias: Tensor | None) -> None:
    """y = z P^T + bias, part by part."""
    assert state.P_rows is not None
    padded = state.P_rows.split(padded_rows(state.rows))
    parts = zip(z.split(state.P_rows.shape[1], 1), padded, state.rows, strict=True)
    done = 0
    for own_z, P, rows in parts:
        own_bias = None if bias is None else bias[done : done + rows]
        _multiply(own_z, P[:rows], own_bias, y[:, done : done + rows])
        done += rows


def _multiply(x: Tensor, W: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x W^T + bias, by cuBLAS."""
    if bias is None:
        torch.mm(x, W.T, out=y)
    else:
        torch.addmm(bias, x, W.T, out=y)
