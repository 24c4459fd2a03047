"""The Triton kernels: `slab_kernels::linear_triton`, on every GPU that Triton serves; loaded on first use, no compiler needed.

They read the canonical packed tensors as they are (launch.py), with tiles from a table (configs.py). fp32 accumulation;
deterministic, and for up to 16 tokens a token's result depends on no other token. With TRITON_INTERPRET=1 in the environment
before Triton is imported they run on CPU tensors, slowly, in Triton's interpreter: for debugging, not in bf16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ArgumentTypeError, ShapeError
from ...format import PackedWeight
from ...ops import EVERYWHERE, Definition, fake_result, register_linear_op
from ..base import Backend, LinearProblem, differences
from . import launch
from .configs import Device, choose, splits, z_splits
from .launch import TritonState

NAMESPACE = "slab_kernels"
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
MOST_RANK = 16  # U V^T is summed rank by rank in registers
OLDEST = (8, 0)
TENSORS = "Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, Tensor? U, Tensor? V, Tensor? P, Tensor? Q"
SIZES = "int in_features, int[] rows, str value_type, int group_size"
_REGISTERING = threading.Lock()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in (
        "1",
        "true",
        "yes",
        "on",
        "y",
    )  # as Triton reads it


class TritonBackend(Backend):
    name = "triton"
    one_dtype = True

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        reasons = []
        if problem.dtype not in ACTIVATIONS:
            reasons.append(f"activations must be float16, bfloat16 or float32, not {problem.dtype}")
        if problem.values not in launch.VALUES:
            reasons.append(
                f"values={problem.values!r} is unknown; it runs {', '.join(launch.VALUES)}"
            )
        if problem.rank > MOST_RANK:
            reasons.append(f"rank={problem.rank} of the sign term is above {MOST_RANK}")
        if problem.device not in ("cuda", "cpu"):
            reasons.append(f"it runs on CUDA tensors, not on {problem.device}")
        elif problem.device == "cpu" and not interpreted():
            reasons.append(
                "it runs on CUDA tensors; on CPU tensors only in Triton's interpreter, with TRITON_INTERPRET=1"
            )
        elif problem.device == "cpu" and problem.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
        elif capability and capability < OLDEST:
            reasons.append(
                "compute capability must be {}.{} or above, not {}.{}".format(*OLDEST, *capability)
            )
        return reasons

    def missing(self, device: str) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if device == "cuda" and interpreted():
            return "TRITON_INTERPRET=1 runs it on CPU tensors only; unset it"
        if device == "cuda" and not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        return None

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> TritonState:
        return self.prepare_fused((packed,), dtype)

    def prepare_fused(
        self, parts: Sequence[PackedWeight], dtype: torch.dtype | None = None
    ) -> TritonState | tuple:
        """One launch for up to four weights of equal value types and ranks; others run one by one."""
        if len(parts) > 1 and differences(parts):
            return super().prepare_fused(parts, dtype)
        dtype = dtype or torch.float16
        state = launch.prepare(parts, dtype)
        register()
        if (
            state.values.is_cuda
        ):  # compile decoding now, so that the first call may be captured into a graph
            self.linear(
                torch.zeros(1, state.in_features, dtype=dtype, device=state.values.device), state
            )
        return state

    def linear(self, x: Tensor, state: TritonState, bias: Tensor | None = None) -> Tensor:
        tensors, sizes = state[:8], state[8:]
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return torch.ops.slab_kernels.linear_triton(x, *tensors, bias, *sizes)
        return torch.ops.slab_kernels.linear_triton_frozen(x, *tensors, bias, *sizes)

    def linear_fused(
        self, x: Tensor, state: TritonState | tuple, bias: Tensor | None = None
    ) -> Tensor:
        one_launch = isinstance(state, TritonState)
        return self.linear(x, state, bias) if one_launch else super().linear_fused(x, state, bias)

    def describe(self, problem: LinearProblem, gpu: str | None = None) -> str:
        """The configuration for this problem on the current device (this backend has no model of one that is not here)."""
        if gpu is not None or problem.device != "cuda":
            return ""
        adapter_rank = -(-problem.adapter_rank // 16) * 16
        values = launch.held_as(problem.values, problem.dtype)
        sizes = launch.Sizes(
            problem.K, (problem.N,), values, problem.group_size or 0, problem.rank, adapter_rank
        )
        device = device_of(torch.cuda.current_device())
        config = choose(sizes, problem.M, bits_of(problem.dtype), device)
        shares = splits(sizes, problem.M, config, device)
        return f"{device.name}: {config.describe()}" + (
            f", K split over {shares} programs" if shares > 1 else ""
        )


def bits_of(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


@functools.cache
def device_of(index: int | None) -> Device:
    """The device's facts; None is the interpreter's, a small device of our own making."""
    if index is None:
        return Device("interpreter", 4, 1 << 20, 80)
    properties = torch.cuda.get_device_properties(index)
    limit = getattr(properties, "shared_memory_per_block_optin", 65536)
    return Device(
        properties.name,
        properties.multi_processor_count,
        limit,
        10 * properties.major + properties.minor,
    )


def _linear(
    x, values, metadata, signs, scales, U, V, P, Q, bias, in_features, rows, value_type, group_size
):
    check(x, values, P, bias, in_features, sum(rows))
    state = (values, metadata, signs, scales, U, V, P, Q, in_features, rows, value_type, group_size)
    device, sizes = device_of(x.device.index), launch.sizes_of(state)
    M = x.numel() // in_features
    config = choose(sizes, M, bits_of(x.dtype), device)
    with _current(x.device):
        if not config.rebuild:
            return launch.linear(
                x, state, bias, config, splits(sizes, M, config, device), z_splits(sizes)
            )
        with torch.autocast(
            x.device.type, enabled=False
        ):  # x's type is the result's, whatever surrounds us
            W = launch.dense(state, x.dtype)
            return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


def _current(device: torch.device):
    """Triton launches on torch's current device: make it this one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def check(
    x: Tensor,
    values: Tensor,
    P: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
) -> None:
    """Raises ShapeError or TypeError in a sentence: the kernels see pointers only."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            f"x has shape {list(x.shape)}, but this weight takes in_features={in_features} last"
        )
    if x.dtype not in ACTIVATIONS:
        raise ArgumentTypeError(
            f"x is {x.dtype}, but the Triton kernels take float16, bfloat16 or float32"
        )
    if x.device != values.device:
        raise ArgumentTypeError(f"x is on {x.device}, the weight on {values.device}")
    for t in (
        values if x.dtype != torch.float32 else None,
        P,
    ):  # fp32 activations take values of either type
        if t is not None and t.is_floating_point() and t.dtype != x.dtype:
            raise ArgumentTypeError(
                f"x is {x.dtype}, but this weight was prepared for {t.dtype} activations"
            )
    if bias is None:
        return
    if bias.shape != (out_features,) or not bias.is_contiguous():
        raise ShapeError(
            f"bias has shape {list(bias.shape)}, expected [{out_features}], contiguous"
        )
    if not bias.is_floating_point() or bias.dtype == torch.float64:
        raise ArgumentTypeError(f"bias is {bias.dtype}, it must be float32, float16 or bfloat16")
    if bias.device != x.device:
        raise ArgumentTypeError(f"bias is on {bias.device}, x on {x.device}")


def _linear_fake(
    x, values, metadata, signs, scales, U, V, P, Q, bias, in_features, rows, value_type, group_size
):
    return fake_result(x, in_features, sum(rows))


def _dense(
    values, metadata, signs, scales, U, V, P, Q, in_features, rows, value_type, group_size, dtype
):
    with _current(values.device):
        return launch.dense(
            (
                values,
                metadata,
                signs,
                scales,
                U,
                V,
                P,
                Q,
                in_features,
                rows,
                value_type,
                group_size,
            ),
            dtype,
        )


def _dense_fake(
    values, metadata, signs, scales, U, V, P, Q, in_features, rows, value_type, group_size, dtype
):
    return values.new_empty(sum(rows), in_features, dtype=dtype)


def _input_gradient(grad, *state):
    return grad @ torch.ops.slab_kernels.dense_triton(
        *state, grad.dtype
    )  # torch.compile traces an op


def register() -> None:
    """Define `linear_triton` once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> tuple[torch.library.Library, ...]:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"dense_triton({TENSORS}, {SIZES}, ScalarType dtype) -> Tensor")
    library.impl("dense_triton", _dense, EVERYWHERE)
    torch.library.register_fake(f"{NAMESPACE}::dense_triton", _dense_fake, lib=library)
    linear = Definition(f"(Tensor x, {TENSORS}, Tensor? bias, {SIZES}) -> Tensor", _linear)
    return library, register_linear_op("linear_triton", 9, _linear_fake, _input_gradient, linear)


BACKEND = TritonBackend()
