"""The Triton kernels: `slab_kernels::linear_triton`, on every GPU that Triton serves.

They are loaded on first use and need no compiler. They read the canonical packed tensors as they
are (launch.py), with tiles from a table (configs.py; rows.py and row_files.py hold the rows).

Sums are accumulated in fp32 and are deterministic, and for up to 16 tokens a token's result depends
on no other token. With TRITON_INTERPRET=1 in the environment before Triton is imported they run on
CPU tensors, slowly, in Triton's interpreter: for debugging, not in bf16.
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

from ...errors import ArgumentTypeError
from ...format import PackedWeight, ceil_div
from ...ops import EVERYWHERE, Definition, fake_result, register_linear_op
from ..base import LinearProblem
from ..one_launch import OneLaunchBackend, check_call, wants_gradient
from . import launch
from .configs import choose, splits, z_splits
from .launch import TritonState
from .rows import TritonDevice, TritonSizes

NAMESPACE = "slab_kernels"
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
MOST_RANK = 16  # U V^T is summed rank by rank in registers.
OLDEST = (8, 0)  # compute capability
TENSORS = (
    "Tensor values, Tensor metadata, Tensor? signs, Tensor? scales, "
    "Tensor? U, Tensor? V, Tensor? P, Tensor? Q"
)
SIZES = "int in_features, int[] rows, str value_type, int group_size"
BIAS = 8  # the place of the bias among the arguments after x: behind the state's tensors
_REGISTERING = threading.Lock()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    told = os.environ.get("TRITON_INTERPRET", "").lower()
    return told in ("1", "true", "yes", "on", "y")  # These words are Triton's own.


class TritonBackend(OneLaunchBackend):
    """The Triton kernels as a backend."""

    name = "triton"
    state_type = TritonState

    def refusals(
        self, problem: LinearProblem, capability: tuple[int, int] | None = None
    ) -> list[str]:
        """Every reason that no installation would change."""
        reasons = []
        if problem.dtype not in ACTIVATIONS:
            reasons.append(f"activations must be float16, bfloat16 or float32, not {problem.dtype}")
        if problem.values not in launch.VALUES:
            known = ", ".join(launch.VALUES)
            reasons.append(f"values={problem.values!r} is unknown; it runs {known}")
        if problem.rank > MOST_RANK:
            reasons.append(f"rank={problem.rank} of the sign term is above {MOST_RANK}")
        if problem.device not in ("cuda", "cpu"):
            reasons.append(f"it runs on CUDA tensors, not on {problem.device}")
        elif problem.device == "cpu" and not interpreted():
            reasons.append(
                "it runs on CUDA tensors; on CPU tensors only in Triton's interpreter, "
                "with TRITON_INTERPRET=1"
            )
        elif problem.device == "cpu" and problem.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
        elif capability and capability < OLDEST:
            oldest, found = ("{}.{}".format(*pair) for pair in (OLDEST, capability))
            reasons.append(f"compute capability must be {oldest} or above, not {found}")
        return reasons

    def missing(self, device: str) -> str | None:
        """What this machine lacks to run the kernels, or None."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if device == "cuda" and interpreted():
            return "TRITON_INTERPRET=1 runs it on CPU tensors only; unset it"
        if device == "cuda" and not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        return None

    def prepare_parts(self, parts: Sequence[PackedWeight], dtype: torch.dtype) -> TritonState:
        """The state of the parts; on a GPU decoding is compiled too, so that the first call may be
        captured into a graph."""
        state = launch.prepare(parts, dtype)
        register()
        if state.values.is_cuda:
            x = torch.zeros(1, state.in_features, dtype=dtype, device=state.values.device)
            self.linear(x, state)
        return state

    def linear(self, x: Tensor, state: TritonState, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., sum of rows] in x's dtype, which is the one prepared for.

        Raises: ArgumentTypeError for another dtype or a wrong device, ShapeError for a wrong shape.
        """
        arguments = (*state[:BIAS], bias, *state[BIAS:])
        if wants_gradient(x, bias):
            return torch.ops.slab_kernels.linear_triton(x, *arguments)
        return torch.ops.slab_kernels.linear_triton_frozen(x, *arguments)

    def describe(self, problem: LinearProblem, gpu: str | None = None) -> str:
        """The configuration for this problem on the current device.

        It is empty for a GPU given by its name, since there is no model of one that is not here.
        """
        if gpu is not None or problem.device != "cuda":
            return ""
        sizes = TritonSizes(
            K=problem.K,
            rows=(problem.N,),
            values=launch.held_as(problem.values, problem.dtype),
            group_size=problem.group_size or 0,
            rank=problem.rank,
            adapter_rank=ceil_div(problem.adapter_rank, 16) * 16,
        )
        device = device_of(torch.cuda.current_device())
        config = choose(sizes, problem.M, bits_of(problem.dtype), device)
        shares = splits(sizes, problem.M, config, device)
        split = f", K split over {shares} programs" if shares > 1 else ""
        return f"{device.name}: {config.describe()}{split}"


def bits_of(dtype: torch.dtype) -> int:
    """The bits of an activation."""
    return 8 * dtype.itemsize


@functools.cache
def device_of(index: int | None) -> TritonDevice:
    """The device's facts; None is the interpreter's, a small device that is made up here."""
    if index is None:
        return TritonDevice("interpreter", 4, 1 << 20, 80)
    properties = torch.cuda.get_device_properties(index)
    return TritonDevice(
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared_limit=getattr(properties, "shared_memory_per_block_optin", 65536),
        capability=10 * properties.major + properties.minor,
    )


def _linear(x: Tensor, *arguments) -> Tensor:
    """The op. arguments: TENSORS, the bias, SIZES."""
    state, bias = TritonState(*arguments[:BIAS], *arguments[BIAS + 1 :]), arguments[BIAS]
    check(x, state, bias)
    device, sizes = device_of(x.device.index), launch.sizes_of(state)
    M = x.numel() // sizes.K
    config = choose(sizes, M, bits_of(x.dtype), device)
    with _current(x.device):
        if not config.rebuild:
            shares = splits(sizes, M, config, device)
            return launch.linear(x, state, bias, config, shares, z_splits(sizes))
        with torch.autocast(x.device.type, enabled=False):  # The result has x's type even then.
            W = launch.dense(state, x.dtype)
            return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes the device torch's current one, on which Triton launches."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def check(x: Tensor, state: TritonState, bias: Tensor | None) -> None:
    """Raises ShapeError or ArgumentTypeError in a sentence: kernels see only pointers."""
    if x.dtype not in ACTIVATIONS:
        raise ArgumentTypeError(
            f"x is {x.dtype}, but the Triton kernels take float16, bfloat16 or float32"
        )
    check_call(x, state.values, bias, state.in_features, sum(state.rows))
    # fp32 activations take values of either 16-bit type.
    held = (None if x.dtype == torch.float32 else state.values, state.P)
    for t in held:
        if t is not None and t.is_floating_point() and t.dtype != x.dtype:
            raise ArgumentTypeError(
                f"x is {x.dtype}, but this weight was prepared for {t.dtype} activations"
            )


def _linear_fake(x: Tensor, *arguments) -> Tensor:
    in_features, rows = arguments[BIAS + 1 : BIAS + 3]
    return fake_result(x, in_features, sum(rows))


def _dense(*arguments) -> Tensor:
    """The op that rebuilds the weight. arguments: TENSORS, SIZES, dtype."""
    *stored, dtype = arguments
    state = TritonState(*stored)
    with _current(state.values.device):
        return launch.dense(state, dtype)


def _dense_fake(*arguments) -> Tensor:
    *stored, dtype = arguments
    state = TritonState(*stored)
    return state.values.new_empty(sum(state.rows), state.in_features, dtype=dtype)


def _input_gradient(grad: Tensor, *state) -> Tensor:
    """The gradient of x in grad's dtype. state: a TritonState's."""
    # torch.compile can trace an op, but not the launch in it.
    return grad @ torch.ops.slab_kernels.dense_triton(*state, grad.dtype)


def register() -> None:
    """Define `linear_triton` once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> tuple[torch.library.Library, ...]:
    """The libraries, which keep their ops alive."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"dense_triton({TENSORS}, {SIZES}, ScalarType dtype) -> Tensor")
    library.impl("dense_triton", _dense, EVERYWHERE)
    torch.library.register_fake(f"{NAMESPACE}::dense_triton", _dense_fake, lib=library)
    linear = Definition(f"(Tensor x, {TENSORS}, Tensor? bias, {SIZES}) -> Tensor", _linear)
    return library, register_linear_op(
        "linear_triton", 1 + BIAS, _linear_fake, _input_gradient, linear
    )


BACKEND = TritonBackend()
