"""What the CUDA and Triton backends share: several weights in one launch, and checks of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, BackendError, ShapeError
from ..format import PackedWeight
from . import dense_copy
from .base import Backend, differences

if TYPE_CHECKING:
    from .cuda.layout import CudaState

BIAS_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class OneLaunchBackend(Backend):
    """A backend whose launch takes up to four weights of equal layout; others run one by one."""

    one_dtype = True
    state_types: tuple[type, ...]  # what `prepare_parts` returns

    def prepare_parts(self, parts: Sequence[PackedWeight], dtype: torch.dtype) -> Any:
        """The state of weights that share a launch, for activations of `dtype`."""
        raise NotImplementedError

    def takes(self, state: Any, dtype: torch.dtype) -> bool:
        """Whether `linear` runs such a state of another backend for activations of `dtype`."""
        raise NotImplementedError

    def make_ready(self, state: Any) -> None:
        """Loads or compiles what calls with the state need, so that the first one may be captured
        into a CUDA graph."""
        raise NotImplementedError

    def adopt(self, state: Any, dtype: torch.dtype) -> Any:
        """The other backend's state, ready to be run; of weights that run one by one, all states.

        See `Backend.adopt`.
        """
        if parted(state):
            parts = tuple((self.adopt(part, dtype), rows) for part, rows in state)
            return None if any(part is None for part, _ in parts) else parts
        if not self.takes(state, dtype):
            return None
        self.make_ready(state)
        return state

    def prepare(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> Any:
        """The state of one weight, for activations of `dtype` (default: float16)."""
        return self.prepare_fused((packed,), dtype)

    def prepare_fused(self, parts: Sequence[PackedWeight], dtype: torch.dtype | None = None) -> Any:
        """One state for weights of equal layout; for others a tuple of states, as in `Backend`.

        Raises: BackendError while a CUDA graph is captured.
        """
        for device in {part.values.device for part in parts}:
            refuse_capture(device)
        if len(parts) > 1 and differences(parts):
            return super().prepare_fused(parts, dtype)
        return self.prepare_parts(parts, dtype or torch.float16)

    # A stream has room for a dense copy; canonical tensors, which the plain Triton kernels read,
    # have not. Of weights that run one by one each has its own.

    def dense_device(self, state: Any) -> torch.device | None:
        if parted(state):
            found = {self.dense_device(part) for part, _ in state}
            return found.pop() if len(found) == 1 else None
        return state.stream.device if hasattr(state, "dense") else None

    def dense_bytes(self, state: Any) -> int:
        if parted(state):
            return sum(self.dense_bytes(part) for part, _ in state)
        copy = getattr(state, "dense", None)
        return 0 if copy is None else copy.nbytes

    def with_dense(self, state: Any, parts: Sequence[PackedWeight]) -> Any:
        """See `Backend`. Raises: BackendError while a CUDA graph is captured, RangeError."""
        if parted(state):
            pairs = zip(state, parts, strict=True)
            return tuple((self.with_dense(one, (part,)), rows) for (one, rows), part in pairs)
        device = state.stream.device
        refuse_capture(device)
        return state._replace(dense=dense_copy.made(parts, state.dtype, device))

    def without_dense(self, state: Any) -> Any:
        if not self.dense_bytes(state):
            return state
        if parted(state):
            return tuple((self.without_dense(part), rows) for part, rows in state)
        return state._replace(dense=None)

    def linear_fused(self, x: Tensor, state: Any, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., sum of the parts' N], by one launch where `prepare_fused` could."""
        one = isinstance(state, self.state_types)
        return self.linear(x, state, bias) if one else super().linear_fused(x, state, bias)


def parted(state: Any) -> bool:
    """Whether these are the states of weights that run one by one, as `Backend` pairs them."""
    pairs = type(state) is tuple and bool(state)
    return pairs and all(type(part) is tuple and len(part) == 2 for part in state)


def refuse_capture(device: torch.device) -> None:
    """Raises: BackendError while the device's current stream is captured into a CUDA graph.

    Preparing waits for the device and loads kernels, which no capture allows.
    """
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        captured = torch.cuda.is_current_stream_capturing()
    if captured:
        raise BackendError(
            f"a layer on {device} cannot be prepared while a CUDA graph is captured; call "
            "prepare(dtype) or the layer itself before the capture"
        )


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has to see the call; otherwise the op without autograd saves some 10 us."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


def check_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int, out_features: int
) -> None:
    """Checks all of x and bias but x's dtype, since kernels see only pointers.

    weight: any tensor of the weight, for its device.

    Raises: ShapeError or ArgumentTypeError.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            f"x has shape {list(x.shape)}, but this weight takes in_features={in_features} last"
        )
    if x.device != weight.device:
        raise ArgumentTypeError(f"x is on {x.device}, the weight on {weight.device}")
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


def other_dtype(x: Tensor, dtype: torch.dtype) -> ArgumentTypeError:
    """The error of a call with x of another dtype than the state's."""
    return ArgumentTypeError(
        f"x is {x.dtype}, but this weight was prepared for {dtype} activations"
    )


def check_stream(x: Tensor, state: CudaState, bias: Tensor | None) -> None:
    """Checks a call with a stream, since kernels see only pointers.

    Raises: ShapeError or ArgumentTypeError.
    """
    if x.dtype != state.dtype:
        raise other_dtype(x, state.dtype)
    check_call(x, state.stream, bias, state.in_features, sum(state.rows))
