"""The fused CUDA kernels of csrc/cuda, for A100 (sm_80) and newer: `slab_kernels::linear_cuda`.

They are loaded on first use. `prepare` orders the canonical packed tensors as the tensor cores'
lanes want them (layout.py). For a call plan.py chooses a family of kernels and a tile (tiles.py,
prefill.py) by measured rows (measured.py) or a cost model (cost.py, prefill_cost.py) of the GPU
(gpus.py), explain.py says why, launch.py queues one kernel (two with an adapter, one more where K
is split over CTAs), prefill_launch.py those of prefill.py with their tensor maps (tensor_map.py),
and driver.py talks to the driver. prefetch.py knows which weight comes next, if somebody said so.
images.py finds the machine code, which compile.py builds ahead of time and nvrtc.py at run time.
unpack.py is the way back from the stream.

Sums are accumulated in fp32 and are deterministic. Within a regime (up to 16 tokens, up to 64) a
token's result depends on no other token. Above 64 the order in which its products are added depends
on the number of tokens, and in the Hopper kernels on the token's place among them, but never on
what the others are. Where cuBLAS multiplies a weight that was rebuilt dense, or a dense copy, it
decides that order.

With bf16 activations fp16 values are rounded to bf16, as a dense bf16 weight would be. What is
rounded to the activations' type besides: in kernels that multiply signs by v * x, that product and,
from 17 tokens on, where a rank above 1 meets several sign planes, u times the level (1/2 or 3/2;
1/4 to 7/4). In kernels that rebuild the weight, its entries instead: u * v, the sum of those after
each rank, and its product with the level. In these and in all Hopper kernels for many tokens also
an integer's code times its scale (powers.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...format import PackedWeight, ceil_div
from ...ops import Definition, fake_result, register_linear_op
from .. import dense_copy
from ..base import LinearProblem
from ..one_launch import OneLaunchBackend, check_stream, other_dtype, wants_gradient
from . import driver, layout, prefetch, unpack
from .device import CudaDevice
from .explain import explained
from .gpus import Gpu, gpu_like, gpu_named
from .launch import kernel_names, linear
from .layout import (
    ACTIVATIONS,
    SIZE_ARGUMENTS,
    STREAM_VALUES,
    TENSOR_ARGUMENTS,
    TENSORS,
    CudaState,
)
from .plan import dense_from, takes_dense
from .tiles import MOST_RANK, CudaSizes, sizes_of

NAMESPACE = "slab_kernels"
OLDEST = (8, 0)  # the first compute capability with mma.sp and cp.async
ARGUMENTS = f"(Tensor x, {TENSOR_ARGUMENTS}, Tensor? bias, {SIZE_ARGUMENTS}) -> Tensor"
BIAS = TENSORS  # the place of the bias among the arguments after x: behind the state's tensors
_REGISTERING = threading.Lock()


class CudaBackend(OneLaunchBackend):
    """The fused CUDA kernels as a backend."""

    name = "cuda"
    state_types = (CudaState,)

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        """Every reason that no installation and no driver would change."""
        reasons = []
        if problem.dtype not in ACTIVATIONS:
            reasons.append(f"activations must be float16 or bfloat16, not {problem.dtype}")
        if problem.values not in STREAM_VALUES:
            known = ", ".join(STREAM_VALUES)
            reasons.append(f"values={problem.values!r} is unknown; it runs {known}")
        if problem.rank > MOST_RANK:
            reasons.append(f"rank={problem.rank} of the sign term is above {MOST_RANK}")
        if problem.device != "cuda":
            reasons.append(f"it runs on CUDA tensors, not on {problem.device}")
        elif capability and capability < OLDEST:
            oldest, found = ("{}.{}".format(*pair) for pair in (OLDEST, capability))
            reasons.append(f"compute capability must be {oldest} or above, not {found}")
        return reasons

    def missing(self, device: str) -> str | None:
        """What this machine lacks to run the kernels, or None."""
        return driver.missing() if device == "cuda" else None

    def prepare_parts(self, parts: Sequence[PackedWeight], dtype: torch.dtype) -> CudaState:
        """The stream of the parts; on a GPU its kernels are loaded too, so that the first call may
        be captured into a graph."""
        state = layout.prepare(parts, dtype)
        self.make_ready(state)
        return state

    def takes(self, state: Any, dtype: torch.dtype) -> bool:
        """Whether it is a stream for these activations, as the Triton backend prepares it too."""
        return isinstance(state, CudaState) and state.dtype == dtype

    def make_ready(self, state: CudaState) -> None:
        """Defines the op and loads the state's kernels, if it is on a GPU."""
        if state.stream.is_cuda:
            register()
            index = state.stream.device.index
            for name in kernel_names(sizes_of(state), state.dtype, device_of(index).gpu):
                driver.load(name, index)

    def linear(self, x: Tensor, state: CudaState, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., sum of rows] in x's dtype, which is the state's.

        Raises: ArgumentTypeError for another dtype or a wrong device, ShapeError for a wrong shape.
        """
        if x.dtype != state.dtype:
            raise other_dtype(x, state.dtype)
        arguments = (*state[:BIAS], bias, *state[BIAS:])
        if wants_gradient(x, bias):
            return torch.ops.slab_kernels.linear_cuda(x, *arguments)
        return torch.ops.slab_kernels.linear_cuda_frozen(x, *arguments)

    def dense_from(self, problem: LinearProblem, gpu: str | None = None) -> int | None:
        """See `Backend`. Without a name and without a GPU here there is no answer."""
        return dense_from(_sizes(problem), _gpu(gpu)) if self._may_copy(problem, gpu) else None

    def takes_dense(self, problem: LinearProblem, gpu: str | None = None) -> bool:
        may = self._may_copy(problem, gpu)
        return may and takes_dense(_sizes(problem), problem.M, _gpu(gpu))

    def _may_copy(self, problem: LinearProblem, gpu: str | None) -> bool:
        """Whether a copy can be kept on the GPU of that name, or on the current one."""
        on_gpu = replace(problem, device="cuda")
        if self.refusals(on_gpu):
            return False
        return gpu is not None or not self.not_supported_reasons(problem)

    def prefetch_next(self, state: object, following: object, most_bytes: int) -> None:
        """The kernel for `state` prefetches the first bytes of `following` into L2."""
        if isinstance(state, CudaState) and isinstance(following, CudaState):
            prefetch.link(state, following, most_bytes)

    def describe(self, problem: LinearProblem, gpu: str | None = None) -> str:
        """The plan for this problem beside a dense linear's predicted time, or why there is none.

        gpu: a name of gpus.GPUS, whether it is here or not; default: the current device.

        Raises: ArgumentError for another name.
        """
        # The problem may be on another device now: the question is what a GPU would do with it.
        if reasons := self.refusals(replace(problem, device="cuda")):
            return f"the cuda backend does not run this: {'; '.join(reasons)}"
        return explained(_sizes(problem), max(problem.M, 1), _gpu(gpu))


def _gpu(name: str | None) -> Gpu:
    """The GPU of that name, or the current one. Raises: ArgumentError for an unknown name."""
    return gpu_named(name) if name is not None else device_of(torch.cuda.current_device()).gpu


def _sizes(problem: LinearProblem) -> CudaSizes:
    """What a plan is made for."""
    return CudaSizes(
        K=problem.K,
        rows=(problem.N,),
        values=STREAM_VALUES[problem.values],
        group_steps=(problem.group_size or 128) // 32,
        rank=problem.rank,
        adapter_steps=ceil_div(problem.adapter_rank, 16),
        planes=problem.planes,
    )


@functools.cache
def device_of(index: int) -> CudaDevice:
    """The device's facts, and its launches on torch's current stream."""
    name = torch.cuda.get_device_name(index)
    gpu = gpu_like(
        name, driver.capability(index), driver.multiprocessors(index), driver.shared_limit(index)
    )

    def queue(kernel, grid, block, shared_bytes, params, dependent) -> None:
        stream = torch._C._cuda_getCurrentRawStream(index)
        driver.launch(
            kernel,
            grid,
            block,
            shared_bytes,
            params,
            device=index,
            stream=stream,
            dependent=dependent,
        )

    return CudaDevice(gpu, queue)


def _linear(x: Tensor, *arguments) -> Tensor:
    """The op on CUDA tensors. arguments: those of ARGUMENTS after x."""
    state, bias = CudaState(*arguments[:BIAS], *arguments[BIAS + 1 :]), arguments[BIAS]
    check_stream(x, state, bias)
    device = device_of(x.device.index)
    if state.dense is not None:
        M = x.numel() // state.in_features
        if takes_dense(sizes_of(state), M, device.gpu):
            return dense_copy.product(x, state.dense, bias)
    return linear(x, state, bias, device)


def _linear_fake(x: Tensor, *arguments) -> Tensor:
    in_features, rows = arguments[BIAS + 1 : BIAS + 3]
    return fake_result(x, in_features, sum(rows))


def _input_gradient(grad: Tensor, *arguments) -> Tensor:
    """The gradient of x, in fp32 or by the dense copy. arguments: a CudaState's."""
    state = CudaState(*arguments)
    if state.dense is not None:
        return grad @ state.dense
    wide = grad.float()
    grad_x = wide @ unpack.dense(state)
    if factors := unpack.adapters(state):
        for part, (P, Q) in zip(wide.split(list(state.rows), -1), factors, strict=True):
            grad_x = grad_x + (part @ P.float()) @ Q.float()
    return grad_x


def register() -> None:
    """Define `linear_cuda` once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> torch.library.Library:
    definition = Definition(ARGUMENTS, _linear, "CUDA")
    return register_linear_op("linear_cuda", 1 + BIAS, _linear_fake, _input_gradient, definition)


BACKEND = CudaBackend()
