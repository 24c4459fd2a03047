"""The native CPU backend: `slab_kernels::linear_cpu` of csrc/, loaded on first use, never at import.

`prepare` interleaves the canonical packed tensors in blocks of 16 output rows (csrc/launch.h has the layout), so that a
SIMD lane is an output row. int3 values become int4 there: they save disk, and take in memory what int4 takes. fp32
accumulation, whatever the activations' type. With few tokens the weight is never rebuilt; from 4 tokens on it is, tile by
tile in cache. Within either regime a row of y depends on its own token only and on no thread count; between the two the
order of summation differs. SLAB_KERNELS_CPU_ISA=scalar|avx2|avx512 forces an instruction set.

Where the reference is finite, so are these kernels for |x| up to 2^80: above it, sums that a scale
or a small factor is yet to multiply may overflow.

NaN and infinity in x reach every output whose weight row reads that input. One exception: a pure 2:4 weight (rank 0)
has no weight at pruned positions, so with few tokens a NaN there does not reach rows that prune it.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import BackendError
from ..format import PackedWeight, bits
from ..ops import fake_result, register_linear_op
from . import factors
from .base import Backend, LinearProblem

LIBRARY = Path(__file__).parent.parent / "_C.so"
ENVIRONMENT = "SLAB_KERNELS_CPU_ISA"  # forces an instruction set
VALUE_CODES = {
    "fp16": 0,
    "bf16": 1,
    "int8": 2,
    "int4": 3,
    "int3": 3,
}  # ValueType of csrc/format.h in the stream
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_LOADING = threading.Lock()  # functools.cache alone lets two threads in at once
ROWS, INPUTS = 16, 128  # of a block of the prepared stream


class CpuState(NamedTuple):
    """What `linear_cpu` wants."""

    prepared: Tensor  # [bytes] uint8: header, stream and factors, laid out by csrc/bindings.cpp
    out_features: int
    in_features: int


class CpuBackend(Backend):
    name = "cpu"

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        reasons = []
        if problem.device != "cpu":
            reasons.append(f"it runs on CPU tensors, not on {problem.device}")
        if problem.dtype not in ACTIVATIONS:
            reasons.append(f"activations must be float32, bfloat16 or float16, not {problem.dtype}")
        if problem.values not in VALUE_CODES:
            reasons.append(
                f"values={problem.values!r} is unknown; it runs {', '.join(VALUE_CODES)}"
            )
        return reasons

    def missing(self, device: str) -> str | None:
        return missing_library()

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> CpuState:
        load_library()
        N, K, layout = packed.out_features, packed.in_features, packed.layout
        kind = VALUE_CODES[layout.values], layout.group_size or 0, layout.planes
        values = widened(packed.values) if layout.values == "int3" else packed.values
        canonical = (
            t if t is None else t.contiguous()
            for t in (values, packed.metadata, packed.signs, packed.scales)
        )
        blocks, columns = -(-N // ROWS), -(-K // INPUTS) * INPUTS

        def row_blocks(t: Tensor) -> Tensor:  # [N,R] -> [blocks,R,16]
            return (
                pad(t, (0, 0, 0, blocks * ROWS - N))
                .view(blocks, ROWS, -1)
                .transpose(1, 2)
                .contiguous()
            )

        def inputs(t: Tensor) -> Tensor:  # [Kp,R] -> [columns,R]
            return pad(t[:K], (0, 0, 0, columns - K))

        U = V = P = Q = None
        if packed.U is not None:
            U, V = factors.beside_results(packed.U, packed.V)
            U, V = row_blocks(U), inputs(V).T.contiguous()
        if packed.P is not None:
            P, Q = packed.adapter()
            exact = all(torch.equal(t.half().to(t.dtype), t) for t in (P, Q))
            stored, rank = torch.float16 if exact else torch.float32, P.shape[1]
            if not exact:
                P, Q = factors.beside_results(P, Q)
            padded = -(-rank // (2 * ROWS)) * 2 * ROWS
            P = row_blocks(P.to(stored))
            Q = (
                pad(inputs(Q.to(stored)), (0, padded - rank))
                .view(columns, -1, ROWS)
                .transpose(0, 1)
                .contiguous()
            )
        return CpuState(
            torch.ops.slab_kernels.prepare_cpu(*canonical, U, V, P, Q, N, K, *kind), N, K
        )

    def linear(self, x: Tensor, state: CpuState, bias: Tensor | None = None) -> Tensor:
        prepared, N, K = state
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return torch.ops.slab_kernels.linear_cpu.default(x, prepared, bias, N, K)
        return torch.ops.slab_kernels.linear_cpu_frozen.default(x, prepared, bias, N, K)


def widened(values: Tensor) -> Tensor:
    """int3 values as int4 ones; in slices of rows, since unpacking takes 8 bytes a value."""
    return torch.cat([bits.pack_int4(bits.unpack_int3(rows)) for rows in values.split(512)])


def missing_library() -> str | None:
    """Why the native library cannot be used here and what to do about it, or None.

    Raises: BackendError if SLAB_KERNELS_CPU_ISA names what cannot run here: a forced choice is
        never passed over.
    """
    if not LIBRARY.exists():
        return (
            f"the native library {LIBRARY.name} was not built; install a C++17 compiler (g++ or clang++) and run "
            "pip install --no-build-isolation -e . where torch is installed"
        )
    try:
        load_library()
    except BackendError:
        raise
    except (OSError, RuntimeError) as error:
        return f"the native library {LIBRARY.name} does not load: {error}"
    return None


def runnable() -> list[str]:
    """Instruction sets that this build can run on this machine, best first."""
    load_library()
    return _runnable()


def _runnable() -> list[str]:
    return torch.ops.slab_kernels.cpu_runnable().split(", ")


def load_library() -> None:
    """Load the library and register fake kernels and autograd, once, whichever thread comes first.

    Raises: OSError or RuntimeError if the library is missing or does not load, BackendError if
        SLAB_KERNELS_CPU_ISA names an instruction set that is unknown or cannot run here.
    """
    with _LOADING:
        _load_once()
    forced = os.environ.get(ENVIRONMENT)
    if forced and forced not in _runnable():
        raise BackendError(
            f"{ENVIRONMENT}={forced} is not an instruction set that this build runs on this "
            f"machine; choose one of {', '.join(_runnable())}, or unset it"
        )


@functools.cache
def _load_once() -> torch.library.Library:
    """The library that keeps the registrations alive; the ops themselves are those of the C++ one."""
    torch.ops.load_library(str(LIBRARY))
    torch.library.register_fake("slab_kernels::dequantize_cpu", _dequantize_fake)
    return register_linear_op("linear_cpu", 2, _linear_fake, _input_gradient)


def _linear_fake(x, prepared, bias, out_features, in_features):
    return fake_result(x, in_features, out_features)


def _dequantize_fake(prepared, out_features, in_features):
    return prepared.new_empty((out_features, in_features), dtype=torch.float32)


def _input_gradient(grad, prepared, out_features, in_features):
    return grad.float() @ torch.ops.slab_kernels.dequantize_cpu(prepared, out_features, in_features)


BACKEND = CpuBackend()
