"""One linear as Triton launches: the prepared state, the grid, the calls. torch outside, kernels.py inside.

Nothing is kept between calls: z, partial sums and y come from torch's allocator with the call, so streams and CUDA graphs
may overlap as they like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import RangeError
from ...format import (
    MOST_LOST,
    VALUE_TYPES,
    PackedWeight,
    bits,
    plane_unit,
    rounding_error,
)
from .. import factors
from .configs import Config, Sizes

ELEMENT = {
    "fp16": torch.uint32,
    "bf16": torch.uint32,
    "int8": torch.uint16,
    "int4": torch.uint8,
}  # a group's kept values
VALUES = (*ELEMENT, "int3")  # stored types that run
NO_STARTS = (0, 0, 0)


class TritonState(NamedTuple):
    """What `slab_kernels::linear_triton` wants after x: tensors, bias excepted, then sizes.

    values, metadata, signs and scales are the canonical tensors themselves (no copy) for one weight whose values have the
    activations' type, or any integer or fp32 case, int3 and three sign planes excepted; fused weights are joined along N.
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
    group_size: int  # inputs a scale covers; 0 = a whole row


def held_as(values: str, dtype: torch.dtype) -> str:
    """The value type that kernels see: 16-bit values take 16-bit activations' type, as a dense weight would; int3 is widened."""
    if values == "int3":
        return "int4"
    if values not in ("fp16", "bf16") or dtype == torch.float32:
        return values
    return "fp16" if dtype == torch.float16 else "bf16"


def prepare(parts: Sequence[PackedWeight], dtype: torch.dtype) -> TritonState:
    """The state for weights of equal layouts that read the same x, for activations of `dtype`.

    int3 saves disk only: its three bits straddle bytes, so it is widened to int4 here, and takes int4's memory and time.

    Raises: RangeError for numbers that fp16 activations' kernels cannot hold.
    """
    first = parts[0].layout
    K, value_type = first.in_features, held_as(first.values, dtype)
    values = [part.values for part in parts]
    if first.values == "int3":
        values = [bits.pack_int4(bits.unpack_values(t, first.values)) for t in values]
    elif value_type != first.values:
        values = [t.to(dtype) for t in values]
        if not all(rounding_error(part.values.float(), dtype) <= MOST_LOST for part in parts):
            raise RangeError(
                f"a {first.values} value does not fit {dtype} activations' kernels; use {VALUE_TYPES[first.values]} ones"
            )
    joined = {
        name: _joined([getattr(part, name) for part in parts])
        for name in ("metadata", "signs", "scales")
    }
    if (
        first.planes == 3
    ):  # three bytes a unit cannot be copied in wide pieces: 9.2 instructions a weight instead of 8
        joined["signs"] = joined["signs"].unflatten(1, (-1, 3)).movedim(2, 0).contiguous()
    U = V = P = Q = None
    if first.rank:
        U, V = zip(*(_sign_factors(part, dtype) for part in parts), strict=True)
        U, V = torch.cat(U, -1).contiguous(), torch.stack(V).contiguous()
    if first.adapter_rank:
        P, Q = zip(*(factors.adapter(part, dtype) for part in parts), strict=True)
        extra = -P[0].shape[1] % 16
        P, Q = (
            torch.cat([pad(t, (0, extra)) for t in P]),
            torch.cat([pad(t, (0, extra)) for t in Q], 1),
        )
        P, Q = P.contiguous(), Q.contiguous()
    rows = [part.out_features for part in parts]
    return TritonState(_joined(values), **joined, U=U, V=V, P=P, Q=Q, in_features=K, rows=rows, value_type=value_type,
                       group_size=first.group_size or 0)  # fmt: skip


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    if tensors[0] is None:
        return None
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)


def _sign_factors(packed: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U [R, N] in units of the last plane and V [R, 4, Kp/4], in fp32.

    Of rank 1, and for 16-bit activations, V is numbers of their type. So is U of one plane; of more, the kernel rounds U
    times the levels, and they must fit.
    """
    layout = packed.layout
    Kp, rank, planes = layout.padded_in_features, layout.rank, layout.planes
    U, V = packed.U.float() * plane_unit(planes), packed.V[: packed.in_features].float()
    if rank == 1:
        largest, V = factors.sign(replace(packed, U=U * (2**planes - 1)), dtype)
        U = largest if planes == 1 else factors.sign(replace(packed, U=U), torch.float32)[0]
    V = pad(V.float(), (0, 0, 0, Kp - V.shape[0])).T.reshape(rank, Kp // 4, 4).transpose(1, 2)
    return U.float().T, V


def sizes_of(state: Sequence) -> Sizes:
    """What a configuration is chosen for."""
    _values, _, _signs, _, _U, V, P, _, K, rows, value_type, group_size = state
    rank = 0 if V is None else V.shape[1]
    return Sizes(K, tuple(rows), value_type, group_size, rank, 0 if P is None else P.shape[1])


def planes_of(state: Sequence) -> int:
    """Sign planes: bytes of signs that a unit of 16 inputs takes. A configuration does not depend on them (configs.Sizes)."""
    _values, metadata, signs, *_ = state
    return 1 if signs is None else 2 * signs.numel() // metadata.numel()


def linear(
    x: Tensor, state: Sequence, bias: Tensor | None, config: Config, splits: int, z_splits: int
) -> Tensor:
    """x [..., K] -> [..., sum of rows] in x's type, by `config`'s tiles, K shared by `splits` programs."""
    from . import kernels

    _values, metadata, _signs, _scales, _U, _V, P, Q, K, rows, _value_type, _group_size = state
    N, shape, ranks = sum(rows), (*x.shape[:-1], sum(rows)), 0 if P is None else P.shape[1]
    M = x.numel() // K
    if M == 0:
        return x.new_empty(shape)
    x = x.reshape(M, K)
    if x.stride(1) != 1 or (M > 1 and x.stride(0) < K):
        x = x.contiguous()
    T, common = element_type(x.dtype), _common(x, state)
    z = None
    if ranks:
        z = x.new_empty(z_splits, M, len(rows) * ranks, dtype=torch.float32)
        BM, BR = (
            16 if M <= 16 else 64,
            min(64, 16 * (1 << (len(rows) * ranks // 16 - 1).bit_length())),
        )
        grid = (-(-M // BM) * -(-z.shape[2] // BR), z_splits)
        kernels.adapter_kernel[grid](x, Q, z, M, K, z.shape[2], x.stride(0), T, z_splits, common["PRECISION"], BM, BR,
                                     BK=64, num_warps=4, num_stages=3)  # fmt: skip
    given, biased = (
        (x, 0) if bias is None else (bias, 1)
    )  # x stands in, of the usual type: its kernel is the same
    y = x.new_empty(M, N)
    out = x.new_empty(splits, M, N, dtype=torch.float32) if splits > 1 else y
    grid = (sum(-(-part // config.block_n) for part in rows) * -(-M // config.block_m), splits)
    kernels.linear_kernel[grid](
        x, *_stored(state), P, z, given, out, biased, M, N, K, metadata.shape[1] // 2, x.stride(0), *starts(rows), **common,
        Z_SPLITS=z_splits if ranks else 0, SPLITS=splits, MASKED=K % config.block_k != 0,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        kernels.sum_kernel[(-(-M * N // 1024),)](
            out, given, y, biased, M * N, N, splits, 1024, num_warps=4
        )
    return y.view(shape)


def dense(state: Sequence, dtype: torch.dtype) -> Tensor:
    """The whole weight, [sum of rows, K] in `dtype`, adapters included: for backward, and for very many tokens."""
    from . import kernels

    values, metadata, _, _, _, _, P, Q, K, rows, _, _ = state
    W = torch.empty(sum(rows), K, dtype=dtype, device=values.device)
    grid = (sum(-(-part // 64) for part in rows), -(-K // 128))
    common = _common(W, state)
    kernels.dense_kernel[grid](*_stored(state), P, Q, W, sum(rows), K, metadata.shape[1] // 2, *starts(rows), **common,
                               BN=64, BK=128, num_warps=4)  # fmt: skip
    return W


def element_type(dtype: torch.dtype):
    import triton.language as tl

    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[
        dtype
    ]


def starts(rows: Sequence[int]) -> tuple[int, int, int]:
    """First rows of parts 1, 2 and 3."""
    sums = [sum(rows[:i]) for i in range(1, len(rows))]
    return tuple((*sums, *NO_STARTS)[:3])


def _stored(state: Sequence) -> tuple:
    """Values, metadata, signs, scales, U, V as the kernels' elements."""
    values, metadata, signs, scales, U, V, _, _, _, _, value_type, _ = state
    scales = None if scales is None else scales.view(torch.uint16)
    if planes_of(state) == 2:
        signs = signs.view(torch.uint16)
    return values.view(ELEMENT[value_type]), metadata.view(torch.uint16), signs, scales, U, V


def speaks_ptx(device: torch.device) -> bool:
    """Whether kernels may hold PTX instructions: on NVIDIA GPUs, not on others, not in Triton's interpreter."""
    return device.type == "cuda" and torch.version.hip is None


def _common(like: Tensor, state: Sequence) -> dict:
    """The constants that every kernel of a weight shares."""
    sizes = sizes_of(state)
    return {
        "T": element_type(like.dtype),
        "VALUES": sizes.values,
        "GROUP": sizes.group_size,
        "RANK": sizes.rank,
        "PLANES": planes_of(state),
        "ADAPTER": sizes.adapter_rank,
        "PARTS": len(sizes.rows),
        "PACKED": like.dtype != torch.float32 and speaks_ptx(like.device),
        # Three TF32 products lose 2^-22 a term, less than fp32's own sums over K; HIP has no such mode.
        "PRECISION": "tf32x3" if torch.version.hip is None else "ieee",
    }
