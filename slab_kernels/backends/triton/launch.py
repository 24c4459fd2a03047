"""One linear as Triton launches: the prepared state, the grids, the calls of kernels.py.

Nothing is kept between calls: z, partial sums and y come from torch's allocator with the call, so
streams and CUDA graphs may overlap as they like.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import RangeError
from ...format import (
    MOST_LOST,
    VALUE_TYPES,
    PackedWeight,
    bits,
    ceil_div,
    plane_unit,
    rounding_error,
)
from .. import factors
from .rows import TileConfig, TritonSizes

if TYPE_CHECKING:
    from .units import Format

# The type as which a group's kept values are viewed.
ELEMENT = {
    "fp16": torch.uint32,
    "bf16": torch.uint32,
    "int8": torch.uint16,
    "int4": torch.uint8,
}
VALUES = (*ELEMENT, "int3")  # stored types that run
DENSE_ROWS, DENSE_INPUTS = 64, 128  # the tile of `dense_kernel`
SUM_BLOCK = 1024  # numbers per program of `sum_kernel`


class TritonState(NamedTuple):
    """The arguments of `slab_kernels::linear_triton` after x: tensors, bias excepted, then sizes.

    values, metadata, signs and scales of one weight are the canonical tensors themselves, not
    copies, unless a 16-bit value changes to the activations' type, values are int3, or there are
    three sign planes. Fused weights are joined along N.
    """

    values: Tensor
    metadata: Tensor
    signs: Tensor | None  # of three planes [3, N, Kp/16]
    scales: Tensor | None
    U: Tensor | None  # [R, N] fp32, in units of the last plane
    V: Tensor | None  # [parts, R, 4, Kp/4] fp32: by position in the group of four
    P: Tensor | None  # [N, R' padded to 16] in the activations' type
    Q: Tensor | None  # [K, parts R'] in the activations' type
    in_features: int
    rows: list[int]  # out_features of each part
    value_type: str
    group_size: int  # inputs that a scale covers; 0 = a whole row

    @property
    def units(self) -> int:
        """Units of 16 inputs per row."""
        return self.metadata.shape[1] // 2

    @property
    def planes(self) -> int:
        """Sign planes: the bytes of signs that a unit takes. A tile does not depend on them."""
        return 1 if self.signs is None else 2 * self.signs.numel() // self.metadata.numel()


def held_as(values: str, dtype: torch.dtype) -> str:
    """The value type that kernels see, for activations of `dtype`.

    16-bit values take 16-bit activations' type, as those of a dense weight would; int3 is widened.
    """
    if values == "int3":
        return "int4"
    if values not in ("fp16", "bf16") or dtype == torch.float32:
        return values
    return "fp16" if dtype == torch.float16 else "bf16"


def prepare(parts: Sequence[PackedWeight], dtype: torch.dtype) -> TritonState:
    """The state for weights of equal layouts that read the same x, for activations of `dtype`.

    int3 saves disk only: its three bits straddle bytes, so it is widened to int4 here, and takes
    int4's memory and time.

    Raises: RangeError for numbers that the kernels for fp16 activations cannot hold.
    """
    first = parts[0].layout
    values = _together([_values(part, dtype) for part in parts])
    signs = _joined([part.signs for part in parts])
    if signs is not None and first.planes == 3:
        # A unit's three bytes cannot be copied in wide pieces: one after the other they cost 9.2
        # instructions per weight instead of 8.
        signs = signs.unflatten(1, (-1, 3)).movedim(2, 0).contiguous()
    U = V = P = Q = None
    if first.rank:
        sign = [_sign_factors(part, dtype) for part in parts]
        U = torch.cat([u for u, _ in sign], -1).contiguous()
        V = torch.stack([v for _, v in sign]).contiguous()
    if first.adapter_rank:
        adapter = [factors.adapter(part, dtype) for part in parts]
        extra = -first.adapter_rank % 16
        P = torch.cat([pad(p, (0, extra)) for p, _ in adapter]).contiguous()
        Q = torch.cat([pad(q, (0, extra)) for _, q in adapter], 1).contiguous()
    return TritonState(
        values=values,
        metadata=_together([part.metadata for part in parts]),
        signs=signs,
        scales=_joined([part.scales for part in parts]),
        U=U,
        V=V,
        P=P,
        Q=Q,
        in_features=first.in_features,
        rows=[part.out_features for part in parts],
        value_type=held_as(first.values, dtype),
        group_size=first.group_size or 0,
    )


def _values(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The kept values as `held_as` says."""
    values, stored = packed.values, packed.layout.values
    if stored == "int3":
        return bits.pack_int4(bits.unpack_values(values, stored))
    if held_as(stored, dtype) == stored:
        return values
    if not rounding_error(values.float(), dtype) <= MOST_LOST:
        raise RangeError(
            f"a {stored} value does not fit {dtype} activations' kernels; "
            f"use {VALUE_TYPES[stored]} ones"
        )
    return values.to(dtype)


def _together(tensors: list[Tensor]) -> Tensor:
    """Tensors joined along N; a single one stays where it is."""
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    """`_together`, or None where weights of this layout have no such tensor."""
    found = [t for t in tensors if t is not None]
    return _together(found) if found else None


def _sign_factors(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U [R, N] in units of the last plane and V [R, 4, Kp/4], in fp32.

    Of rank 1, and for 16-bit activations, V is numbers of their type. So is U of one plane; of
    more, the kernel rounds U times the levels, and they must fit.
    """
    layout = packed.layout
    assert packed.U is not None and packed.V is not None
    Kp, rank, planes = layout.padded_in_features, layout.rank, layout.planes
    U, V = packed.U.float() * plane_unit(planes), packed.V[: packed.in_features].float()
    if rank == 1:
        largest, V = factors.sign(replace(packed, U=U * (2**planes - 1)), dtype)
        U = largest if planes == 1 else factors.sign(replace(packed, U=U), torch.float32)[0]
    V = pad(V.float(), (0, 0, 0, Kp - V.shape[0])).T.reshape(rank, Kp // 4, 4).transpose(1, 2)
    return U.float().T, V


def sizes_of(state: TritonState) -> TritonSizes:
    """What a tile is chosen for."""
    return TritonSizes(
        K=state.in_features,
        rows=tuple(state.rows),
        values=state.value_type,
        group_size=state.group_size,
        rank=0 if state.V is None else state.V.shape[1],
        adapter_rank=0 if state.P is None else state.P.shape[1],
    )


def linear(
    x: Tensor,
    state: TritonState,
    bias: Tensor | None,
    config: TileConfig,
    splits: int,
    z_splits: int,
) -> Tensor:
    """x [..., K] -> [..., sum of rows] in x's type, by `config`'s tiles.

    splits: programs that share K. z_splits: those that share the K of z = x Q.
    """
    from . import kernels

    N, K = sum(state.rows), state.in_features
    M, shape = x.numel() // K, (*x.shape[:-1], N)
    if M == 0:
        return x.new_empty(shape)
    x = x.reshape(M, K)
    if x.stride(1) != 1 or (M > 1 and x.stride(0) < K):
        x = x.contiguous()
    z = None if state.Q is None else _z(x, state.Q, z_splits)
    # x stands in for an absent bias, since it has the usual type: the compiled kernel is the same.
    given, biased = (x, 0) if bias is None else (bias, 1)
    y = x.new_empty(M, N)
    out = x.new_empty(splits, M, N, dtype=torch.float32) if splits > 1 else y
    row_tiles = sum(ceil_div(part, config.block_n) for part in state.rows)
    grid = (row_tiles * ceil_div(M, config.block_m), splits)
    kernels.linear_kernel[grid](
        x, *_stored(state), state.P, z, given, out, biased, M, N, K, state.units, x.stride(0),
        *starts(state.rows), FORMAT=_format(x, state), PRECISION=_precision(),
        Z_SPLITS=0 if z is None else z_splits, SPLITS=splits, MASKED=K % config.block_k != 0,
        BM=config.block_m, BN=config.block_n, BK=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        kernels.sum_kernel[(ceil_div(M * N, SUM_BLOCK),)](
            out, given, y, biased, M * N, N, splits, SUM_BLOCK, num_warps=4
        )  # fmt: skip
    return y.view(shape)


def _z(x: Tensor, Q: Tensor, splits: int) -> Tensor:
    """z = x Q, [splits, M, parts R'] fp32: the sums over one share of K each."""
    from . import kernels

    (M, K), ranks = x.shape, Q.shape[1]
    z = x.new_empty(splits, M, ranks, dtype=torch.float32)
    BM = 16 if M <= 16 else 64
    BR = min(64, 16 * (1 << (ranks // 16 - 1).bit_length()))
    grid = (ceil_div(M, BM) * ceil_div(ranks, BR), splits)
    kernels.adapter_kernel[grid](
        x, Q, z, M, K, ranks, x.stride(0), splits, _precision(), BM, BR, BK=64,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return z


def dense(state: TritonState, dtype: torch.dtype) -> Tensor:
    """The whole weight, [sum of rows, K] in `dtype`, adapters included.

    It serves gradients, and products with very many tokens.
    """
    from . import kernels

    N, K = sum(state.rows), state.in_features
    W = torch.empty(N, K, dtype=dtype, device=state.values.device)
    row_tiles = sum(ceil_div(part, DENSE_ROWS) for part in state.rows)
    kernels.dense_kernel[(row_tiles, ceil_div(K, DENSE_INPUTS))](
        *_stored(state), state.P, state.Q, W, N, K, state.units, *starts(state.rows),
        FORMAT=_format(W, state), PRECISION=_precision(), BN=DENSE_ROWS, BK=DENSE_INPUTS,
        num_warps=4,
    )  # fmt: skip
    return W


def starts(rows: Sequence[int]) -> tuple[int, int, int]:
    """The first rows of parts 1, 2 and 3; 0 for parts that are not there."""
    second, third, fourth = [*itertools.accumulate(rows[:-1]), 0, 0, 0][:3]
    return second, third, fourth


def _stored(state: TritonState) -> tuple[Tensor | None, ...]:
    """Values, metadata, signs, scales, U, V as the kernels' elements (units.Pointers)."""
    signs, scales = state.signs, state.scales
    if signs is not None and state.planes == 2:
        signs = signs.view(torch.uint16)
    if scales is not None:
        scales = scales.view(torch.uint16)
    values = state.values.view(ELEMENT[state.value_type])
    return values, state.metadata.view(torch.uint16), signs, scales, state.U, state.V


def speaks_ptx(device: torch.device) -> bool:
    """Whether kernels may hold PTX: on NVIDIA GPUs, not on others, not in Triton's interpreter."""
    return device.type == "cuda" and torch.version.hip is None


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes the device torch's current one, on which Triton launches."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def _precision() -> str:
    """How products of fp32 numbers are made, where there are any.

    Three TF32 products lose 2^-22 of a term, less than fp32's own sums over K; HIP has no such
    mode.
    """
    return "tf32x3" if torch.version.hip is None else "ieee"


def _format(like: Tensor, state: TritonState) -> Format:
    """What kernels of a weight are compiled for, with activations on `like`'s device."""
    import triton.language as tl

    from .units import Format

    sizes = sizes_of(state)
    types: dict[torch.dtype, Any] = {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
    }
    return Format(
        values=sizes.values,
        group_size=sizes.group_size,
        rank=sizes.rank,
        planes=state.planes,
        adapter_rank=sizes.adapter_rank,
        parts=len(sizes.rows),
        dtype=types[like.dtype],
        packed=like.dtype != torch.float32 and speaks_ptx(like.device),
    )
