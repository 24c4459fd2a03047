"""The fused CUDA kernels of csrc/cuda: `slab_kernels::linear_cuda`, from A100 (sm_80) on, loaded on first use.

`prepare` orders the canonical packed tensors as the tensor cores' lanes want them (layout.py), plan.py chooses tiles,
launch.py queues one kernel (two with an adapter, one more where K is split over CTAs), driver.py talks to the driver.
fp32 accumulation; deterministic, and within a regime (up to 16 tokens, up to 64) a token's result depends on no other
token. Above 64 that holds for every tile of ours; where the plan rebuilds the weight instead, cuBLAS has the word.

With bf16 activations fp16 values are rounded to bf16, as a dense bf16 weight would be; v * x is rounded to the
activations' type, u * v is not rounded at all. Only where a rank above 1 meets several sign planes, u times the level
(1/2 or 3/2; 1/4 to 7/4) is rounded to the activations' type too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import ArgumentTypeError, ShapeError
from ...format import PackedWeight
from ...ops import Definition, fake_result, register_linear_op
from ..base import Backend, LinearProblem, differences
from . import driver, layout
from .launch import BIAS_TYPES, Device, kernel_names, linear
from .layout import ACTIVATIONS, STREAM_VALUES, CudaState
from .plan import MOST_RANK, Sizes, choose, dense_microseconds, gpu_like, gpu_named

NAMESPACE = "slab_kernels"
OLDEST = (8, 0)  # mma.sp, cp.async
ARGUMENTS = (
    "(Tensor x, Tensor stream, Tensor? V, Tensor? U, Tensor? P, Tensor? Q, Tensor? bias, int in_features, int[] rows, "
    "int value_type, int group_steps, int planes, ScalarType dtype) -> Tensor"
)
_REGISTERING = threading.Lock()


class CudaBackend(Backend):
    name = "cuda"
    one_dtype = True

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        reasons = []
        if problem.dtype not in ACTIVATIONS:
            reasons.append(f"activations must be float16 or bfloat16, not {problem.dtype}")
        if problem.values not in STREAM_VALUES:
            reasons.append(
                f"values={problem.values!r} is unknown; it runs {', '.join(STREAM_VALUES)}"
            )
        if problem.rank > MOST_RANK:
            reasons.append(f"rank={problem.rank} of the sign term is above {MOST_RANK}")
        if problem.device != "cuda":
            reasons.append(f"it runs on CUDA tensors, not on {problem.device}")
        elif capability and capability < OLDEST:
            reasons.append(
                "compute capability must be {}.{} or above, not {}.{}".format(*OLDEST, *capability)
            )
        return reasons

    def missing(self, device: str) -> str | None:
        return driver.missing() if device == "cuda" else None

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> CudaState:
        return self.prepare_fused((packed,), dtype)

    def prepare_fused(
        self, parts: Sequence[PackedWeight], dtype: torch.dtype | None = None
    ) -> CudaState | tuple:
        """One launch for up to four weights of equal value types and ranks; others run one by one."""
        if len(parts) > 1 and differences(parts):
            return super().prepare_fused(parts, dtype)
        state = layout.prepare(parts, dtype or torch.float16)
        if state.stream.is_cuda:  # now, so that the first call may be captured into a graph
            register()
            for name in kernel_names(sizes_of(*state[:10]), state.dtype):
                driver.load(name, state.stream.device.index)
        return state

    def linear(self, x: Tensor, state: CudaState, bias: Tensor | None = None) -> Tensor:
        if x.dtype != state.dtype:
            raise ArgumentTypeError(
                f"x is {x.dtype}, but this weight was prepared for {state.dtype} activations"
            )
        tensors, sizes = state[:5], state[5:]
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return torch.ops.slab_kernels.linear_cuda(x, *tensors, bias, *sizes)
        return torch.ops.slab_kernels.linear_cuda_frozen(x, *tensors, bias, *sizes)

    def linear_fused(
        self, x: Tensor, state: CudaState | tuple, bias: Tensor | None = None
    ) -> Tensor:
        one_launch = isinstance(state, CudaState)
        return self.linear(x, state, bias) if one_launch else super().linear_fused(x, state, bias)

    def describe(self, problem: LinearProblem, gpu: str | None = None) -> str:
        """The plan for this problem, or why there is none: tiles, their reason, and the predicted time beside a dense linear's.

        gpu: a name of plan.GPUS, whether it is here or not; default: the current device. Raises: ValueError for another.
        """
        if reasons := self.refusals(replace(problem, device="cuda")):  # wherever the problem is now
            return f"the cuda backend does not run this: {'; '.join(reasons)}"
        found = gpu_named(gpu) if gpu is not None else device_of(torch.cuda.current_device()).gpu
        group_steps, adapter_steps = (
            (problem.group_size or 128) // 32,
            -(-problem.adapter_rank // 16),
        )
        values, M = STREAM_VALUES[problem.values], max(problem.M, 1)
        sizes = Sizes(
            problem.K,
            (problem.N,),
            values,
            group_steps,
            problem.rank,
            adapter_steps,
            problem.planes,
        )
        dense = dense_microseconds(problem.N, problem.K, M, found)
        return f"{found.name}: {choose(sizes, M, found).describe()}; a dense fp16 linear by the same model: {dense:.1f} us"


def sizes_of(
    stream,
    V,
    U,
    P,
    Q,
    in_features: int,
    rows: Sequence[int],
    values: int,
    group_steps: int,
    planes: int,
) -> Sizes:
    """A state's tensors and sizes as plans want them."""
    rank = 0 if V is None else V.shape[1]
    return Sizes(
        in_features, tuple(rows), values, group_steps, rank, 0 if P is None else P.shape[1], planes
    )


@functools.cache
def device_of(index: int) -> Device:
    """The device's facts, and its launches on torch's current stream."""
    name = torch.cuda.get_device_name(index)
    gpu = gpu_like(
        name, driver.capability(index), driver.multiprocessors(index), driver.shared_limit(index)
    )

    def queue(kernel, grid, block, shared_bytes, params, dependent) -> None:
        stream = torch._C._cuda_getCurrentRawStream(index)
        driver.launch(kernel, grid, block, shared_bytes, params, index, stream, dependent)

    return Device(gpu, queue)


def _linear(x, stream, V, U, P, Q, bias, in_features, rows, values, group_steps, planes, dtype):
    check(x, stream, bias, in_features, sum(rows), dtype)
    sizes = sizes_of(stream, V, U, P, Q, in_features, rows, values, group_steps, planes)
    return linear(x, stream, V, U, P, Q, bias, sizes, device_of(x.device.index))


def check(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> None:
    """Raises ShapeError or TypeError in a sentence: below this only raw pointers are left."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            f"x has shape {list(x.shape)}, but this weight takes in_features={in_features} last"
        )
    if x.dtype != dtype:
        raise ArgumentTypeError(
            f"x is {x.dtype}, but this weight was prepared for {dtype} activations"
        )
    if x.device != stream.device:
        raise ArgumentTypeError(f"x is on {x.device}, the weight on {stream.device}")
    if bias is None:
        return
    if bias.shape != (out_features,) or not bias.is_contiguous():
        raise ShapeError(
            f"bias has shape {list(bias.shape)}, expected [{out_features}], contiguous"
        )
    if bias.dtype not in BIAS_TYPES:
        raise ArgumentTypeError(f"bias is {bias.dtype}, it must be float32, float16 or bfloat16")
    if bias.device != x.device:
        raise ArgumentTypeError(f"bias is on {bias.device}, x on {x.device}")


def _linear_fake(
    x, stream, V, U, P, Q, bias, in_features, rows, values, group_steps, planes, dtype
):
    return fake_result(x, in_features, sum(rows))


def _input_gradient(
    grad, stream, V, U, P, Q, in_features, rows, values, group_steps, planes, dtype
):
    wide = grad.float()
    W = layout.dense(stream, V, U, in_features, rows, values, group_steps, planes, dtype)
    grad_x = wide @ W
    if P is not None:
        parts = layout.adapters(P, Q, in_features, rows, dtype)
        for part, (left, right) in zip(wide.split(list(rows), -1), parts, strict=True):
            grad_x = grad_x + (part @ left.float()) @ right.float()
    return grad_x


def register() -> None:
    """Define `linear_cuda` once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> torch.library.Library:
    definition = Definition(ARGUMENTS, _linear, "CUDA")
    return register_linear_op("linear_cuda", 6, _linear_fake, _input_gradient, definition)


BACKEND = CudaBackend()
