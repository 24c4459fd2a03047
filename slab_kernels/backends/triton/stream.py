"""One linear on the stream that the CUDA backend prepares too (backends/cuda/layout.py).

Few tokens are decoded by sparse tensor cores (sparse.py), in tiles of at most 16 tokens. For more
of them the weight is rebuilt dense (rebuild.py), some rows at a time, and multiplied by torch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...format import ceil_div
from ..cuda.layout import ACTIVATIONS, BLOCK_ROWS, INT4, INT8, W16, CudaState
from ..cuda.unpack import adapters
from ..one_launch import refuse_capture
from . import launch, sparse
from .rows import DECODE, TritonSizes

DIFFERS = "gives results that differ from the reference"
COMPILED_TOKENS = (1, 2, 16)  # counts that have a kernel of their own
# Tiles of tokens that decode the weight each for themselves rather than rebuild it once.
MOST_TOKEN_TILES = 8
MOST_PAIRS = 65535  # row pairs: CTAs along y of a grid (CUDA programming guide)
REBUILT_ROWS = 8192  # rows of a rebuilt weight in memory at a time
REBUILD_VALUES = {W16: "w16", INT8: "int8", INT4: "int4"}  # as rebuild.py calls them
_CHECKING = threading.Lock()
_TRUSTED: dict[int | None, bool] = {}  # device index -> whether its first use came out right


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights for activations of `dtype` on the device are prepared as a stream.

    The first use of a device compares a block of random patterns with the reference, since only
    habit says which lane holds which element of a Triton tensor. If it differs, the process warns
    once, and the plain kernels run on the canonical tensors.

    Raises: BackendError if a CUDA graph is captured at that time.
    """
    if dtype not in ACTIVATIONS or not launch.speaks_ptx(device):
        return False
    with _CHECKING:
        if device.index in _TRUSTED:
            return _TRUSTED[device.index]
        refuse_capture(device)  # The check would become part of the graph.
        defect = _defect(device)
        _TRUSTED[device.index] = defect is None
    if defect is not None:
        warnings.warn(
            f"Triton's kernel for sparse tensor cores {defect} on {device}; the slower kernels of "
            "the triton backend run instead. Please report it with torch's and Triton's versions",
            RuntimeWarning,
            stacklevel=2,
        )
    return defect is None


def fits(rows: Sequence[int]) -> bool:
    """Whether a grid has room for the row pairs of parts with so many rows."""
    return sum(ceil_div(count, BLOCK_ROWS) for count in rows) <= MOST_PAIRS


def expected(device: torch.device, dtype: torch.dtype) -> bool:
    """`usable` without a check: what the device will do unless it has failed one."""
    return dtype in ACTIVATIONS and launch.speaks_ptx(device) and _TRUSTED.get(device.index, True)


def _defect(device: torch.device) -> str | None:
    """What a first use of sparse tensor cores on the device shows to be wrong, if anything.

    Raises: torch.OutOfMemoryError and OSError, which say nothing of the kernel: the next use tries
        again.
    """
    try:
        with launch.current(device):
            return None if sparse.self_check(device) else DIFFERS
    except (torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:  # whatever a version of Triton raises for what it cannot compile
        return f"could not be tried ({type(error).__name__}: {' '.join(str(error).split())})"


def sizes_of(state: CudaState) -> TritonSizes:
    """What a row is chosen for."""
    sixteen_bits = "fp16" if state.dtype == torch.float16 else "bf16"
    return TritonSizes(
        K=state.in_features,
        rows=tuple(state.rows),
        values=sixteen_bits if state.values == W16 else REBUILD_VALUES[state.values],
        group_size=0 if state.values == W16 else 32 * state.group_steps,
        rank=0 if state.V is None else state.V.shape[1],
        adapter_rank=0 if state.P is None else 16 * state.P.shape[1],
    )


def decodes(M: int, rank: int) -> bool:
    """Whether M tokens may be decoded from a stream with a sign term of that rank.

    Every tile of tokens decodes the weight again. Up to DECODE tokens that is always done, since no
    result may depend on how many they are.
    """
    return M <= DECODE or ceil_div(M, _tile_tokens(rank)) <= MOST_TOKEN_TILES


def _tile_tokens(rank: int) -> int:
    """Tokens of a tile for more than DECODE of them."""
    return sparse.tile_tokens(DECODE, rank)


def decoded(x: Tensor, state: CudaState, bias: Tensor | None, multiprocessors: int) -> Tensor:
    """x [..., K] -> [..., sum of rows] by sparse tensor cores, in tiles of tokens.

    multiprocessors: of the device.
    """
    shape = (*x.shape[:-1], sum(state.rows))
    x = x.reshape(-1, state.in_features)
    M = x.shape[0]
    if M == 0:
        return x.new_empty(shape)
    configuration = sparse.configuration(state, min(M, DECODE), multiprocessors)
    return sparse.decode(x, state, bias, configuration).view(shape)


def describe(M: int, rank: int) -> str:
    """How M tokens are decoded, in words."""
    tiles = ceil_div(max(M, 1), _tile_tokens(rank))
    more = f", in {tiles} tiles of tokens" if tiles > 1 else ""
    return f"sparse tensor cores on the stream of the cuda backend{more}"


def rebuilt(x: Tensor, state: CudaState, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., sum of rows] by torch, REBUILT_ROWS rows of a part at a time.

    The next rows take the same memory.
    """
    shape = (*x.shape[:-1], sum(state.rows))
    x = x.reshape(-1, state.in_features)
    y = x.new_empty(x.shape[0], shape[-1])
    W = _room(state, min(REBUILT_ROWS, max(state.rows)))
    factors = adapters(state)
    bias = None if bias is None else bias.to(x.dtype)
    done = 0  # columns of y
    for part, rows in enumerate(state.rows):
        for start in range(0, rows, REBUILT_ROWS):
            count = min(REBUILT_ROWS, rows - start)
            piece, result = W[:count], y[:, done : done + count]
            _rebuild(state, part, start, piece, factors)
            if bias is None:
                torch.mm(x, piece.T, out=result)
            else:
                torch.addmm(bias[done : done + count], x, piece.T, out=result)
            done += count
    return y.view(shape)


def dense(state: CudaState) -> Tensor:
    """The whole weight, [sum of rows, K] in the state's dtype, adapters included."""
    W, factors = _room(state, sum(state.rows)), adapters(state)
    done = 0
    for part, rows in enumerate(state.rows):
        _rebuild(state, part, 0, W[done : done + rows], factors)
        done += rows
    return W


def empty_dense(state: CudaState) -> Tensor:
    """What `dense` returns before anything is written: its rows lie a multiple of 8 numbers apart,
    so that each begins at a multiple of 16 bytes."""
    return _room(state, sum(state.rows))


def _room(state: CudaState, rows: int) -> Tensor:
    pitch = ceil_div(state.in_features, 8) * 8
    return state.stream.new_empty(rows, pitch, dtype=state.dtype)[:, : state.in_features]


def _rebuild(
    state: CudaState, part: int, start: int, W: Tensor, factors: list[tuple[Tensor, Tensor]]
) -> None:
    """Writes rows of a part into W [rows, K], with the adapter. start: a multiple of 32."""
    import triton.language as tl

    from . import rebuild

    pairs = ceil_div(W.shape[0], BLOCK_ROWS)
    first = sum(ceil_div(rows, BLOCK_ROWS) for rows in state.rows[:part]) + start // BLOCK_ROWS
    u = v = None
    if state.U is not None and state.V is not None:
        u = state.U[BLOCK_ROWS * first :].view(torch.uint32)
        v = state.V[part].view(torch.uint64)
    types: dict[torch.dtype, Any] = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    whole = W.as_strided((W.shape[0], W.stride(0)), (W.stride(0), 1)).view(torch.uint64)
    rebuild.rebuild_kernel[(state.stream.shape[1], pairs)](
        state.stream[first:].view(torch.uint32), u, v, whole, *W.shape, whole.shape[1],
        VALUES=REBUILD_VALUES[state.values], GROUP_STEPS=state.group_steps,
        RANK=0 if v is None else v.shape[0], PLANES=state.planes, T=types[state.dtype],
        num_warps=4,
    )  # fmt: skip
    if factors:
        P, Q = factors[part]
        W.addmm_(P[start : start + W.shape[0]], Q)
