"""What packed layers do with a call before a backend gets it: types, derivatives, traces."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UnsupportedError

Function = TypeVar("Function", bound=Callable)
any_autocast = torch._C._is_any_autocast_enabled  # torch's own modules ask it, too


def constant_in_traces(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without importing all of torch._dynamo.

    That import takes seconds, and everybody who opens a model imports this module.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch looks for it
    return function


EXPORTED = (
    "a packed layer is exported before it was prepared: the program will rebuild the dense weight "
    "in every call; call the layer or prepare(dtype) before, or export with strict=True"
)
LENT = (
    "a packed layer is traced with packed tensors that are lent to each call: the program will "
    "rebuild the dense weight in every call; assign the tensors, or lend them around the compiled "
    "module"
)
_SAID: set[str] = set()


@constant_in_traces
def say_once(text: str) -> bool:
    """Warns, once in a process, of what a trace will do; while it traces, but not traced itself."""
    if text not in _SAID:
        _SAID.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return True


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises: UnsupportedError if one carries a forward-mode derivative, which would be lost."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UnsupportedError(
            "packed layers have no forward-mode derivatives (jvp); use backward(), or to_linear() "
            "for a dense layer"
        )


def autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to nn.Linear: in autocast's type, unless x is fp64 or no float."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not on or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(kind))
