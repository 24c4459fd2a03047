"""The Triton kernels, on every GPU that Triton serves. They are loaded on first use and need no
compiler.

On NVIDIA GPUs 16-bit activations are multiplied from the stream that the CUDA backend prepares too
(stream.py): a layer prepared for one of the two backends serves the other. All else, and a GPU on
which the first use of that way comes out wrong, takes the plain kernels, which read the canonical
packed tensors as they are (launch.py) with tiles from a table (configs.py; rows.py and row_files.py
hold the rows). The table also says from how many tokens on either rebuilds the weight.

Sums are accumulated in fp32 and are deterministic, and for up to 16 tokens a token's result depends
on no other token. With TRITON_INTERPRET=1 in the environment before Triton is imported the plain
kernels run on CPU tensors, slowly, in Triton's interpreter: for debugging, not in bf16.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentTypeError, RangeError
from ...format import PackedWeight, ceil_div
from ...ops import EVERYWHERE, Definition, fake_result, register_linear_op
from .. import dense_copy
from ..base import LinearProblem
from ..cuda import layout
from ..cuda.layout import CudaState
from ..one_launch import OneLaunchBackend, check_call, check_stream, wants_gradient
from . import launch, stream
from .configs import choose, splits, z_splits
from .launch import TritonState
from .rows import DECODE, REBUILD, TileConfig, TritonDevice, TritonSizes

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
STREAM_TENSORS, STREAM_SIZES = layout.TENSOR_ARGUMENTS, layout.SIZE_ARGUMENTS
STREAM_BIAS = layout.TENSORS
# Tokens from which on a dense copy is used. Nothing predicts what a stream takes here, and up to 16
# tokens no result may depend on how many they are. On an H100 the plain kernels were at best as
# fast as dense with 32 tokens, and far behind with 64 and 128 (the rows of triton in
# benchmarks/results/linear-nvidia-h100-80gb-hbm3-llama-3-8b-b421ae1.csv).
DENSE_FROM = DECODE + 1
State = TritonState | CudaState
_REGISTERING = threading.Lock()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    told = os.environ.get("TRITON_INTERPRET", "").lower()
    return told in ("1", "true", "yes", "on", "y")  # These words are Triton's own.


class TritonBackend(OneLaunchBackend):
    """The Triton kernels as a backend."""

    name = "triton"
    state_types = (TritonState, CudaState)

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

    def prepare_parts(self, parts: Sequence[PackedWeight], dtype: torch.dtype) -> State:
        """The stream of the parts, or their canonical tensors where no stream can serve; on a GPU
        decoding is compiled too, so that the first call may be captured into a graph."""
        streamed = _stream_of(parts, dtype)
        if streamed is not None:
            self.make_ready(streamed)
            return streamed
        state = launch.prepare(parts, dtype)
        register()
        if state.values.is_cuda:
            self._compile(state, state.values.new_zeros(1, state.in_features, dtype=dtype))
        return state

    def takes(self, state: Any, dtype: torch.dtype) -> bool:
        """Whether it is a stream for these activations that fits a grid, on a device that reads
        streams."""
        return (
            isinstance(state, CudaState)
            and state.dtype == dtype
            and stream.fits(state.rows)
            and stream.usable(state.stream.device, dtype)
        )

    def make_ready(self, state: CudaState) -> None:
        """Defines the ops, and on a GPU compiles what decodes from a stream."""
        register()
        if state.stream.is_cuda:
            for M in stream.COMPILED_TOKENS:
                self._compile(
                    state, state.stream.new_zeros(M, state.in_features, dtype=state.dtype)
                )

    def _compile(self, state: State, x: Tensor) -> None:
        """Runs what a call with x runs, for which it is compiled: with no bias or one of x's type,
        which are the same kernel, and with one of fp32, as an fp32 layer has under autocast."""
        self.linear(x, state)
        self.linear(x, state, x.new_zeros(sum(state.rows), dtype=torch.float32))

    def linear(self, x: Tensor, state: State, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., sum of rows] in x's dtype, which is the one prepared for.

        Raises: ArgumentTypeError for another dtype or a wrong device, ShapeError for a wrong shape.
        """
        ops, gradient = torch.ops.slab_kernels, wants_gradient(x, bias)
        if isinstance(state, CudaState):
            op = ops.linear_triton_stream if gradient else ops.linear_triton_stream_frozen
            return op(x, *state[:STREAM_BIAS], bias, *state[STREAM_BIAS:])
        op = ops.linear_triton if gradient else ops.linear_triton_frozen
        return op(x, *state[:BIAS], bias, *state[BIAS:])

    def dense_from(self, problem: LinearProblem, gpu: str | None = None) -> int | None:
        """See `Backend`: the same for every weight that is a stream."""
        if gpu is not None or self.not_supported_reasons(problem):
            return None
        if problem.device != "cuda" or not stream.fits((problem.N,)):
            return None
        here = torch.device("cuda", torch.cuda.current_device())
        return DENSE_FROM if stream.expected(here, problem.dtype) else None

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
        here = torch.device("cuda", torch.cuda.current_device())
        if stream.fits((problem.N,)) and stream.expected(here, problem.dtype):
            if not config.rebuild and stream.decodes(problem.M, problem.rank):
                return f"{device.name}: {stream.describe(problem.M, problem.rank)}"
            if not config.rebuild:
                config = TileConfig(rebuild=True, reason=REBUILD)
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


def _stream_of(parts: Sequence[PackedWeight], dtype: torch.dtype) -> CudaState | None:
    """The parts as a stream, or None where the device takes none.

    Nor are numbers a stream that only the plain kernels hold, as some of a rank above 1, or more
    rows than its kernels' grids.
    """
    rows = [part.out_features for part in parts]
    if not stream.fits(rows) or not stream.usable(parts[0].values.device, dtype):
        return None
    try:
        return layout.prepare(parts, dtype)
    except RangeError:
        return None


def _linear(x: Tensor, *arguments) -> Tensor:
    """The op on canonical tensors. arguments: TENSORS, the bias, SIZES."""
    state, bias = TritonState(*arguments[:BIAS], *arguments[BIAS + 1 :]), arguments[BIAS]
    check(x, state, bias)
    device, sizes = device_of(x.device.index), launch.sizes_of(state)
    M = x.numel() // sizes.K
    config = choose(sizes, M, bits_of(x.dtype), device)
    with launch.current(x.device):
        if not config.rebuild:
            shares = splits(sizes, M, config, device)
            return launch.linear(x, state, bias, config, shares, z_splits(sizes))
        with torch.autocast(x.device.type, enabled=False):  # The result has x's type even then.
            W = launch.dense(state, x.dtype)
            return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


def _linear_stream(x: Tensor, *arguments) -> Tensor:
    """The op on a stream. arguments: STREAM_TENSORS, the bias, STREAM_SIZES."""
    state = CudaState(*arguments[:STREAM_BIAS], *arguments[STREAM_BIAS + 1 :])
    bias = arguments[STREAM_BIAS]
    check_stream(x, state, bias)
    sizes = stream.sizes_of(state)
    M = x.numel() // sizes.K
    if state.dense is not None and M >= DENSE_FROM:
        return dense_copy.product(x, state.dense, bias)
    device = device_of(x.device.index)
    config = choose(sizes, M, bits_of(x.dtype), device)
    with launch.current(x.device):
        if not config.rebuild and stream.decodes(M, sizes.rank):
            return stream.decoded(x, state, bias, device.multiprocessors)
        with torch.autocast(x.device.type, enabled=False):
            return stream.rebuilt(x, state, bias)


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


def _linear_stream_fake(x: Tensor, *arguments) -> Tensor:
    in_features, rows = arguments[STREAM_BIAS + 1 : STREAM_BIAS + 3]
    return fake_result(x, in_features, sum(rows))


def _dense(*arguments) -> Tensor:
    """The op that rebuilds the weight. arguments: TENSORS, SIZES, dtype."""
    *stored, dtype = arguments
    state = TritonState(*stored)
    with launch.current(state.values.device):
        return launch.dense(state, dtype)


def _dense_fake(*arguments) -> Tensor:
    *stored, dtype = arguments
    state = TritonState(*stored)
    return state.values.new_empty(sum(state.rows), state.in_features, dtype=dtype)


def _dense_stream(*arguments) -> Tensor:
    """The same from a stream, in the state's dtype. arguments: STREAM_TENSORS, STREAM_SIZES."""
    state = CudaState(*arguments)
    device = state.stream.device
    with launch.current(device), torch.autocast(device.type, enabled=False):
        return stream.dense(state)


def _dense_stream_fake(*arguments) -> Tensor:
    return stream.empty_dense(CudaState(*arguments))


def _input_gradient(grad: Tensor, *state) -> Tensor:
    """The gradient of x in grad's dtype. state: a TritonState's."""
    # torch.compile can trace an op, but not the launch in it.
    return grad @ torch.ops.slab_kernels.dense_triton(*state, grad.dtype)


def _input_gradient_stream(grad: Tensor, *state) -> Tensor:
    """The gradient of x in grad's dtype. state: a CudaState's."""
    if (copy := CudaState(*state).dense) is not None:
        return grad @ copy
    return grad @ torch.ops.slab_kernels.dense_triton_stream(*state)


def register() -> None:
    """Define the ops once; idempotent, and safe from several threads."""
    with _REGISTERING:
        _register_once()


@functools.cache
def _register_once() -> tuple[torch.library.Library, ...]:
    """The libraries, which keep their ops alive."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, arguments, run, fake in (
        ("dense_triton", f"{TENSORS}, {SIZES}, ScalarType dtype", _dense, _dense_fake),
        (
            "dense_triton_stream",
            f"{STREAM_TENSORS}, {STREAM_SIZES}",
            _dense_stream,
            _dense_stream_fake,
        ),
    ):
        library.define(f"{name}({arguments}) -> Tensor")
        library.impl(name, run, EVERYWHERE)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    plain = Definition(f"(Tensor x, {TENSORS}, Tensor? bias, {SIZES}) -> Tensor", _linear)
    streamed = Definition(
        f"(Tensor x, {STREAM_TENSORS}, Tensor? bias, {STREAM_SIZES}) -> Tensor", _linear_stream
    )
    return (
        library,
        register_linear_op("linear_triton", 1 + BIAS, _linear_fake, _input_gradient, plain),
        register_linear_op(
            "linear_triton_stream",
            1 + STREAM_BIAS,
            _linear_stream_fake,
            _input_gradient_stream,
            streamed,
        ),
    )


BACKEND = TritonBackend()
