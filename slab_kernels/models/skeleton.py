"""Models built without memory for their weights, and without touching what other threads see.

What is allocated without values goes to meta; what a model computes (rotary tables, masks) is real.
The mode that does this is of one thread; `init_empty_weights` of accelerate patches nn.Module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ArchitectureError

EMPTY = (torch.empty, torch.empty_permuted, torch.empty_strided)
DEFAULT_DTYPE = (
    *EMPTY,
    torch.zeros,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.eye,
    torch.linspace,
    torch.logspace,
)
# The numbers given decide whether these make the default dtype.
MAYBE_DEFAULT_DTYPE = (torch.tensor, torch.full, torch.arange, torch.scalar_tensor)


class _Unfilled(TorchFunctionMode):
    """dtype: of tensors made without one; torch.set_default_dtype would set it for all threads."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        plain = torch.get_default_dtype()
        if func is torch.Tensor.to and args[1:] == (plain,) and args[0].dtype == plain:
            return args[0].to(self.dtype)  # such a cast asks for torch's default
        default = kwargs.get("dtype") is None
        probe = func is torch.tensor and args and isinstance(args[0], list) and not args[0]
        if func in EMPTY or probe:  # by torch.tensor([]) transformers sees that it builds on meta
            kwargs["device"] = kwargs.get("device") or "meta"
        if default and func in DEFAULT_DTYPE:
            kwargs["dtype"] = self.dtype
        made = func(*args, **kwargs)
        if default and func in MAYBE_DEFAULT_DTYPE and made.dtype == plain:
            made = made.to(self.dtype)
        return made


def build(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model that `make` makes, parameters on meta in `dtype`, buffers that it computes real.

    Raises: ArchitectureError if it leaves a buffer without values that no checkpoint holds.
    """
    with _Unfilled(dtype):
        model = make()
    _compute(model, model)
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None and module._buffers[name].is_meta:
                raise ArchitectureError(
                    f"{type(model).__name__} makes the buffer {name!r} of '{path}' "
                    f"({type(module).__name__}) without values, and no checkpoint holds it"
                )
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                if parameter not in empty:
                    empty[parameter] = nn.Parameter(
                        parameter.detach().to("meta"), requires_grad=False
                    )
                module._parameters[name] = empty[parameter]
    return model


def computes(module: nn.Module) -> bool:
    """Whether a buffer in `module` or below is computed from the config and so in no checkpoint."""
    return any(part._non_persistent_buffers_set for part in module.modules())


def _compute(module: nn.Module, model: nn.Module) -> None:
    """Let `_init_weights` of `model` fill computed buffers, as in `from_pretrained`."""
    if not computes(module):
        return
    for child in module.children():
        _compute(child, child if hasattr(child, "_init_weights") else model)
    with torch.no_grad():
        model._init_weights(module)


def blanked(model: nn.Module) -> dict[str, int]:
    """Weight of an embedding -> its padding row, where transformers makes that row zero.

    It does so whenever it opens a dense folder, whatever the file holds (in 5.23 for Youtu).
    """
    rows = {}
    if not type(model).__module__.startswith("transformers."):
        return rows  # code of a folder initialises no module that came from a file
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            probe = nn.Embedding(module.padding_idx + 1, 1, padding_idx=module.padding_idx)
            nn.init.ones_(probe.weight)
            probe.weight._is_hf_initialized = True  # as weights are that came from a file
            with torch.no_grad():
                model._init_weights(probe)
            if not probe.weight[-1].any():
                rows[f"{name}.weight"] = module.padding_idx
    return rows
