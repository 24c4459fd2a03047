"""Decoding by sparse tensor cores: one linear of few tokens from the stream that the CUDA kernels
read (backends/cuda/layout.py), by the kernel of sparse_kernel.py.

Nothing is kept between calls: z, partial sums and y come from torch's allocator with the call. From
compute capability 9.0 on a kernel starts before the one before it ends, and reads weights
meanwhile: whoever writes a state's tensors must wait until they are written.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...format import ceil_div
from ...format.bits import LEGAL_NIBBLES
from ..cuda.layout import (
    BLOCK_INPUTS,
    BLOCK_ROWS,
    DENSE,
    INT4,
    INT8,
    VALUE_BYTES,
    W16,
    CudaState,
)
from ..cuda.unpack import dense
from .launch import SUM_BLOCK, starts

if TYPE_CHECKING:
    from .sparse_block import Kind

TOKENS, WARPS = (1, 2, 4, 8, 16), (8, 16)  # that a program may have
VALUES = {W16: "w16", INT8: "int8", INT4: "int4", DENSE: "dense"}
MOST_SIGN_TILES = 4  # n8 tiles of sign products in a program: 8 fp32 numbers a lane each
MOST_SPLITS = 8
Z_WARPS = 8  # of a program that makes z


class Configuration(NamedTuple):
    """How a weight is decoded.

    Warps and splits follow from the weight and the device, tokens from M too. A token's result has
    the same bits for all tokens.
    """

    tokens: int  # of a program: 1, 2, 4, 8 or 16
    warps: int  # of a program, which take the K blocks of its 32 rows in turn
    splits: int  # programs that share K
    z_splits: int  # programs that share K in the adapter's z = x Q


def configuration(state: CudaState, M: int, multiprocessors: int) -> Configuration:
    """The configuration for M <= 16 tokens of a weight on a device of so many multiprocessors."""
    pairs, k_blocks, _ = state.stream.shape
    tokens = tile_tokens(M, 0 if state.V is None else state.V.shape[1])
    # 16 warps fill a multiprocessor that has one program; of more, two of 8 warps overlap.
    warps = 16 if pairs <= multiprocessors and k_blocks >= 16 else 8
    splits = _splits(pairs, k_blocks // (2 * warps), multiprocessors)
    z_splits = 1
    if state.Q is not None:
        z_splits = _splits(state.Q.shape[0], k_blocks // Z_WARPS, multiprocessors)
    return Configuration(tokens, warps, splits, z_splits)


def tile_tokens(M: int, rank: int) -> int:
    """Tokens of a program for M <= 16 tokens and a sign term of that rank."""
    if rank <= 1:
        return 8 if M <= 8 else 16
    most = MOST_SIGN_TILES * 8 // rank  # tokens whose sign products a program can hold
    return 1 if M == 1 else min(8, 1 << (most.bit_length() - 1))


def _splits(pairs: int, most: int, multiprocessors: int) -> int:
    """A power of two of at most `most` splits for which the programs fit the device at once."""
    splits = 1
    while 2 * splits <= min(most, MOST_SPLITS) and 2 * splits * pairs <= multiprocessors:
        splits *= 2
    return splits


def decode(
    x: Tensor, state: CudaState, bias: Tensor | None, configuration: Configuration
) -> Tensor:
    """x [M, K] -> [M, sum of rows] in x's type, by programs of `configuration`. M is at most 16.

    x may have any strides; one whose rows are not aligned to 4 bytes is copied.
    """
    from . import kernels

    M, N = x.shape[0], sum(state.rows)
    words = _words(x)
    z = None if state.Q is None else _z(words, state, configuration)
    y = x.new_empty(M, N)
    splits = configuration.splits
    out = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    # y stands in for an absent bias, since it has the usual type: the compiled kernel is the same.
    given, biased = (y, 0) if bias is None else (bias, 1)
    _launch(
        words, state.stream, (state.V, state.U, state.P), z, given, out, biased, state.rows,
        kind(state, configuration),
    )  # fmt: skip
    if splits > 1:
        kernels.sum_kernel[(ceil_div(M * N, SUM_BLOCK),)](
            out, given, y, biased, M * N, N, splits, SUM_BLOCK, num_warps=4
        )  # fmt: skip
    return y


def _words(x: Tensor) -> Tensor:
    """x [M, K] as uint32 words of two numbers, [M, K / 2]; copied only if it must be."""
    if x.shape[1] % 2:
        x = pad(x, (0, 1))
    elif x.stride(1) != 1 or _starts_odd(x) or (x.shape[0] > 1 and x.stride(0) % 2):
        x = x.contiguous()
        x = x.clone() if _starts_odd(x) else x
    if x.shape[0] == 1:
        x = x.as_strided(x.shape, (x.shape[1], 1))  # The stride of a single row may be odd.
    return x.view(torch.uint32)


def _starts_odd(x: Tensor) -> bool:
    """Whether x, of 16-bit numbers, begins in the middle of a word, of its storage or in memory.

    The two differ where the storage itself begins there, as one from DLPack may.
    """
    return x.storage_offset() % 2 != 0 or x.data_ptr() % 4 != 0


def _z(words: Tensor, state: CudaState, configuration: Configuration) -> Tensor:
    """z = x Q, [splits, M, parts R'] fp32: the sums over one share of K each."""
    assert state.P is not None and state.Q is not None
    M, ranks = words.shape[0], len(state.rows) * state.P.shape[1] * 16
    splits = configuration.z_splits
    z = words.new_empty(splits, M, ranks, dtype=torch.float32)
    _launch(
        words, state.Q, (None, None, None), None, z, z, 0, (ranks,), z_kind(state, M, splits)
    )  # fmt: skip
    return z


def _launch(
    words: Tensor,
    stream: Tensor,
    factors: tuple[Tensor | None, ...],
    z: Tensor | None,
    bias: Tensor,
    out: Tensor,
    biased: int,
    rows: tuple[int, ...],
    kind: Kind,
) -> None:
    from . import sparse_kernel

    V, U, P = factors
    M, width = words.shape
    pairs, k_blocks, _ = stream.shape
    options = {"launch_pdl": True} if kind.overlap else {}
    # Token tiles are side by side, so that their programs read a weight from memory once.
    grid = (ceil_div(M, kind.tokens), pairs, kind.splits)
    sparse_kernel.decode_kernel[grid](
        words, stream.view(torch.uint32), None if V is None else V.view(torch.uint32), U,
        None if P is None else P.view(torch.uint32), z, bias, out, biased, M, sum(rows), width,
        k_blocks, ceil_div(k_blocks, kind.splits), words.stride(0), *starts(rows), KIND=kind,
        num_warps=kind.warps, num_stages=1, **options,
    )  # fmt: skip


def kind(state: CudaState, configuration: Configuration) -> Kind:
    """What the kernel of a linear is compiled for."""
    from .sparse_block import Kind

    rank = 0 if state.V is None else state.V.shape[1]
    return Kind(
        values=VALUES[state.values],
        value_bytes=VALUE_BYTES[state.values],
        block_bytes=state.stream.shape[2],
        planes=state.planes if rank else 0,
        rank=rank,
        group_steps=state.group_steps,
        adapter_steps=0 if state.P is None else state.P.shape[1],
        parts=len(state.rows),
        dtype=_triton_type(state.dtype),
        tokens=configuration.tokens,
        sign_tiles=ceil_div(rank * configuration.tokens, 8),
        warps=configuration.warps,
        splits=configuration.splits,
        z_splits=configuration.z_splits,
        overlap=overlaps(state.stream.device),
    )


def z_kind(state: CudaState, M: int, splits: int) -> Kind:
    """What the kernel of the adapter's z = x Q is compiled for."""
    from .sparse_block import Kind

    return Kind(
        values=VALUES[DENSE],
        value_bytes=VALUE_BYTES[DENSE],
        block_bytes=VALUE_BYTES[DENSE],
        planes=0,
        rank=0,
        group_steps=4,
        adapter_steps=0,
        parts=1,
        dtype=_triton_type(state.dtype),
        tokens=8 if M <= 8 else 16,
        sign_tiles=0,
        warps=Z_WARPS,
        splits=splits,
        z_splits=1,
        overlap=overlaps(state.stream.device),
    )


def overlaps(device: torch.device) -> bool:
    """Whether kernels on the device may start before the one before them has ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def self_check(device: torch.device) -> bool:
    """Whether the kernel computes on the device what it should: 32 rows of random patterns, bit for
    bit, of integers and of 16-bit values, by either number of warps and for one n8 tile of tokens
    and two.

    Which thread holds an element of a Triton tensor is habit and no promise; so this is asked once.
    """
    return all(
        _comes_out_right(device, values, dtype, warps, tokens)
        for values, dtype, warps, tokens in (
            (INT4, torch.float16, 8, 8),
            (W16, torch.bfloat16, 16, 16),
        )
    )


def _comes_out_right(
    device: torch.device, values: int, dtype: torch.dtype, warps: int, tokens: int
) -> bool:
    """`self_check` for one program, with small integers."""
    generator = torch.Generator().manual_seed(17)
    k_blocks, K = warps + 1, BLOCK_INPUTS * warps + 72

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    legal = torch.tensor(sorted(LEGAL_NIBBLES), dtype=torch.uint8)
    nibbles = legal[whole(0, len(legal), 2, k_blocks, 512)]
    metadata, signs = nibbles[0] | nibbles[1] << 4, whole(0, 256, k_blocks, 256).byte()
    if values == INT4:
        codes = whole(0, 256, k_blocks, VALUE_BYTES[INT4]).byte()
        # Codes are 4 q in rows g and 64 q in rows g + 8.
        scales = torch.tensor([1 / 4, 1 / 64], dtype=torch.bfloat16).repeat(k_blocks, 16)
        blocks = [codes, metadata, signs, scales.view(torch.uint8)]
    else:
        kept = whole(-2, 3, k_blocks, VALUE_BYTES[W16] // 2).to(dtype)
        blocks = [kept.view(torch.uint8), metadata, signs]
    U = whole(1, 4, BLOCK_ROWS, 1).to(dtype).view(torch.int16)
    state = CudaState(
        stream=torch.cat(blocks, 1)[None].to(device),
        V=whole(-2, 3, 1, 1, BLOCK_INPUTS * k_blocks).to(device, dtype),
        U=(U.int() | U.int() << 16).to(device),
        P=None,
        Q=None,
        powers=None,
        dense=None,
        P_rows=None,
        in_features=K,
        rows=(BLOCK_ROWS,),
        values=values,
        group_steps=4,
        planes=1,
        dtype=dtype,
    )
    x = whole(-2, 3, tokens - 3, K).to(device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # The kernel may read weights before copies have ended.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        y = decode(x, state, None, Configuration(tokens, warps, splits=1, z_splits=1))
    return torch.equal(y, (x.double() @ dense(state).double().T).to(dtype))
