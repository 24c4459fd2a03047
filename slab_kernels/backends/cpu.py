"""The native CPU backend: `slab_kernels::linear_cpu` of csrc/, loaded on first use, never at
import.

`prepare` interleaves the canonical packed tensors in blocks of 16 output rows (csrc/launch.h has
the layout), so that a SIMD lane is an output row. int3 values become int4 there: they save disk,
and take in memory what int4 takes. Sums are accumulated in fp32, whatever the activations' type.
With few tokens the weight is never rebuilt; from 4 tokens on it is, with AVX2 and signs from 3 on,
panel by panel in cache. Within either regime a row of y depends on its own token only and on no
thread count; between the two the order of summation differs. bf16 activations on a CPU that
multiplies bf16, by pairs or by AMX's tiles: from 3 tokens on every entry of the rebuilt weight is
rounded to bf16, as in a dense model of that dtype.
SLAB_KERNELS_CPU_ISA=scalar|avx2|avx512|avx512_bf16|avx512_amx forces an instruction set.

With int8 activations (activations.py) integer values are multiplied by x as 8-bit integers, from
the same prepared tensor (csrc/int8.h); with AVX2 and many tokens x and the weight become integers
of 13 bits (csrc/int16.h). A token that holds NaN, infinity or numbers from 2^108 on is computed
exactly.

Where the sum of all |x w| of a row is finite in fp32, so are these kernels for |x| up to 2^80:
above it, sums that a scale or a small factor is yet to multiply may overflow.

NaN and infinity in x reach every output whose weight row reads that input. One exception: a pure
2:4 weight (rank 0) has no weight at pruned positions, so with few tokens a NaN there does not reach
rows that prune it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import native
from ..format import INTEGER_RANGES, PackedWeight, bits
from ..ops import fake_result, register_linear_op, register_vmap
from . import activations as accuracy
from . import factors
from .base import Backend, LinearProblem

# A value type has the number of csrc/format.h's ValueType in the stream; int3 becomes int4 there.
VALUE_CODES = {"fp16": 0, "bf16": 1, "int8": 2, "int4": 3, "int3": 3}
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_REGISTERING = threading.Lock()  # functools.cache alone lets two threads in at once
ROWS, INPUTS = 16, 128  # rows and inputs of a block of the prepared stream


class CpuState(NamedTuple):
    """What `linear_cpu` wants.

    prepared: [bytes] uint8, header, stream and factors as csrc/prepared_bindings.cpp lays them out.
    """

    prepared: Tensor
    out_features: int
    in_features: int


class CpuInt8State(CpuState):
    """The same prepared tensor, for calls with int8 activations."""


class CpuBackend(Backend):
    """The native CPU kernels as a backend."""

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
        reason = native.missing_library()
        if reason is None:
            load_library()
        return reason

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> CpuState:
        load_library()
        N, K, layout = packed.out_features, packed.in_features, packed.layout
        values = widened(packed.values) if layout.values == "int3" else packed.values
        canonical = [
            None if t is None else t.contiguous()
            for t in (values, packed.metadata, packed.signs, packed.scales)
        ]
        U = V = P = Q = None
        if layout.rank:
            U, V = factors.beside_results(*packed.sign_factors())
            U, V = _row_blocks(U), _padded_inputs(V, K).T.contiguous()
        if layout.adapter_rank:
            P, Q = _adapter(packed)
        kind = VALUE_CODES[layout.values], layout.group_size or 0, layout.planes
        prepared = torch.ops.slab_kernels.prepare_cpu(*canonical, U, V, P, Q, N, K, *kind)
        return CpuState(prepared, N, K)

    def linear(self, x: Tensor, state: CpuState, bias: Tensor | None = None) -> Tensor:
        prepared, N, K = state
        if isinstance(state, CpuInt8State):
            if _wants_gradient(x, bias):
                return torch.ops.slab_kernels.linear_cpu_int8.default(x, prepared, bias, N, K)
            return torch.ops.slab_kernels.linear_cpu_int8_frozen.default(x, prepared, bias, N, K)
        if _wants_gradient(x, bias):
            return torch.ops.slab_kernels.linear_cpu.default(x, prepared, bias, N, K)
        return torch.ops.slab_kernels.linear_cpu_frozen.default(x, prepared, bias, N, K)

    def linear_fused(self, x: Tensor, state: Any, bias: Tensor | None = None) -> Tensor:
        """See `Backend`. With int8 activations one call, for whose parts x is quantised
        once (but for AVX2's product for many tokens)."""
        states = [part for part, _ in state]
        if not all(isinstance(part, CpuInt8State) for part in states) or _wants_gradient(x, bias):
            return super().linear_fused(x, state, bias)
        tensors, sizes, K = [p.prepared for p in states], [N for _, N in state], states[0][2]
        return torch.ops.slab_kernels.linear_cpu_int8_parts.default(x, tensors, bias, sizes, K)

    def with_activations(self, state: Any, parts: Sequence[PackedWeight], told: str) -> Any:
        if type(state) is tuple:
            pairs = zip(state, parts, strict=True)
            new = tuple((self.with_activations(s, (p,), told), N) for (s, N), p in pairs)
            return state if all(a[0] is b[0] for a, b in zip(new, state, strict=True)) else new
        int8 = told == "int8" and parts[0].layout.values in INTEGER_RANGES
        kind = CpuInt8State if int8 else CpuState
        return state if type(state) is kind else kind(*state)

    def activations(self, state: Any) -> str:
        states = [part for part, _ in state] if type(state) is tuple else [state]
        return "int8" if any(isinstance(part, CpuInt8State) for part in states) else "exact"

    def describe(self, problem: LinearProblem, gpu: str | None = None) -> str:
        """How x enters the product, by the word of the problem or else of the environment."""
        if accuracy.named(problem.activations) == "exact":
            return "activations=exact: x as it is given, sums in fp32"
        if problem.values not in INTEGER_RANGES:
            return (
                f"activations=int8: exact runs instead, since {problem.values} values have no "
                "product with int8 activations; int8, int4 and int3 have"
            )
        native.load_library()
        way, name, bits = torch.ops.slab_kernels.cpu_int8(problem.rank, problem.M)
        if way == "exact":
            return (
                f"activations=int8: exact runs for M={problem.M} and rank {problem.rank} with "
                f"{name}; docs/cpu.md says when each product runs"
            )
        rounded = {
            ("few", 8): "1/506 of what the least of 32 inputs, the greatest and 0 span",
            ("many", 8): "1/254 of the second largest of 64 inputs, the largest not at all",
            ("many", 13): "1/8190 of the largest of 128 inputs",
        }[way, bits]
        weight = "; the weight is rounded too" if bits == 13 else ""
        return (
            f"activations=int8: the product for {way} tokens ({name}) with integers of {bits} "
            f"bits; x is rounded, by at most {rounded}{weight}; more in docs/cpu.md"
        )


def _wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has to see the call."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


def _row_blocks(t: Tensor) -> Tensor:
    """[N,R] -> [blocks,R,16]: rows in blocks of 16, zeros below them."""
    padding = -len(t) % ROWS
    return pad(t, (0, 0, 0, padding)).unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def _padded_inputs(t: Tensor, in_features: int) -> Tensor:
    """[Kp,R] -> [columns,R]: the K real inputs, then zeros to a whole number of blocks."""
    return pad(t[:in_features], (0, 0, 0, -in_features % INPUTS))


def _adapter(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """P [blocks,R',16] and Q [R'/16,columns,16], its ranks padded to a multiple of 32.

    They are fp16 where that holds them exactly, else fp32.
    """
    P, Q = packed.adapter()
    exact = all(torch.equal(t.half().to(t.dtype), t) for t in (P, Q))
    stored = torch.float16 if exact else torch.float32
    if not exact:
        P, Q = factors.beside_results(P, Q)
    Q = pad(_padded_inputs(Q.to(stored), packed.in_features), (0, -P.shape[1] % (2 * ROWS)))
    return _row_blocks(P.to(stored)), Q.unflatten(1, (-1, ROWS)).transpose(0, 1).contiguous()


def widened(values: Tensor) -> Tensor:
    """int3 values as int4 ones, in slices of rows, since unpacking takes 8 bytes per value."""
    return torch.cat([bits.pack_int4(bits.unpack_int3(rows)) for rows in values.split(512)])


def load_library() -> None:
    """Load the library and register fake kernels and autograd, once, whichever thread comes first.

    Raises: as `native.load_library`.
    """
    native.load_library()
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> tuple[torch.library.Library, ...]:
    """The libraries that keep the registrations alive; the ops themselves are those of the C++
    one."""
    torch.library.register_fake("slab_kernels::dequantize_cpu", _dequantize_fake)
    torch.library.register_fake("slab_kernels::linear_cpu_int8_parts", _parts_fake)
    exact = register_linear_op("linear_cpu", 2, _linear_fake, _input_gradient)
    # The gradient of int8 activations is that of the exact product: rounding has none.
    int8 = register_linear_op("linear_cpu_int8", 2, _linear_fake, _input_gradient)
    register_vmap("linear_cpu_int8_parts", int8)
    return exact, int8


def _linear_fake(x, prepared, bias, out_features, in_features):
    return fake_result(x, in_features, out_features)


def _parts_fake(x, prepared, bias, out_features, in_features):
    return fake_result(x, in_features, sum(out_features))


def _dequantize_fake(prepared, out_features, in_features):
    return prepared.new_empty((out_features, in_features), dtype=torch.float32)


def _input_gradient(grad, prepared, out_features, in_features):
    return grad.float() @ torch.ops.slab_kernels.dequantize_cpu(prepared, out_features, in_features)


BACKEND = CpuBackend()
