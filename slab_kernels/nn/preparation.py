"""`prepare`: every packed layer of a model prepared now, and dense copies weighed all together."""

from __future__ import annotations

import torch
from torch import nn

from ..backends import activations as accuracy_mode
from ..backends import dense_copy
from .dense_head import copy_slices
from .embedding import Int8Head
from .fused import FusedSlabLinear
from .linear import SlabLinear
from .prepared import copied_bytes

Layer = SlabLinear | FusedSlabLinear


def prepare(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    prefill: str | None = None,
    activations: str | None = None,
) -> nn.Module:
    """Prepare every packed layer of a model for activations of `dtype`; returns the model.

    prefill: as `SlabLinear.prepare` takes it; without it each layer keeps to what it was told last.
        "auto" decides for all layers of a device that it holds for at once: their dense copies, 16
        bits per weight, are made if all of them together take no more than half of the GPU memory
        that is free now, else none is.
    activations: as `SlabLinear.prepare` takes it, with the same default.

    Raises: as `SlabLinear.prepare`.
    """
    _prepare(layers_of(model), dtype, prefill, activations)
    _prepare_heads(model, dtype)
    return model


def prepare_opened(
    model: nn.Module, dtype: torch.dtype, prefill: str | None, activations: str | None = None
) -> None:
    """`prepare` of a model that was just opened, where it lies on GPUs; its dense head on a CPU.

    There the first call may be captured into a CUDA graph, which preparing cannot be. On a CPU the
    first call prepares: nothing is captured, and who opens a model to read or to save it would wait
    for nothing. Only prefill="dense" is tried there too, so that this refuses it and not that call.
    """
    layers = layers_of(model)
    if prefill is not None:
        for layer in layers:
            layer._prefill = prefill
    if activations is not None:
        for module in model.modules():  # the parts of fused layers too, which may be called alone
            if isinstance(module, FusedSlabLinear | SlabLinear):
                module._activations = activations
    if prefill != "dense":
        layers = [layer for layer in layers if _place(layer).type == "cuda"]
    _prepare(layers, dtype, prefill, activations)
    _prepare_heads(model, dtype)
    copy_slices(model)


def _prepare_heads(model: nn.Module, dtype: torch.dtype) -> None:
    """The dense copies by which heads of int8 rows compute on a GPU."""
    for module in model.modules():
        if isinstance(module, Int8Head):
            module.prepare(dtype)


def check_words(prefill: str | None, activations: str | None) -> None:
    """Refuses a word before long work. Raises: ArgumentError."""
    dense_copy.named(prefill)
    accuracy_mode.named(activations)


def dense_copy_bytes(model: nn.Module) -> int:
    """The bytes of all dense copies that the model's packed layers keep."""
    every = (made for layer in layers_of(model) for made in layer._linears.copy().values())
    return sum(map(copied_bytes, every))


def activations_of(model: nn.Module) -> str | None:
    """The accuracy mode of the model's packed layers on a CPU: "int8" if x may be rounded in one of
    them at least, which depends on the CPU and the number of tokens (`slab-kernels explain`), else
    "exact"; None where none is prepared."""
    every = (
        made for layer in layers_of(model) for one in layer._linears.copy().values() for made in one
    )
    words = {made.backend.activations(made.state) for made in every}
    return "int8" if "int8" in words else next(iter(words), None)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every packed layer, each once; the parts of a fused one are one layer unless an adapter
    stands around one of them."""
    modules = list(model.modules())
    fused = [m for m in modules if isinstance(m, FusedSlabLinear) and not m.wrapped]
    inside = {id(part) for layer in fused for part in layer.parts}
    alone = [m for m in modules if isinstance(m, SlabLinear) and id(m) not in inside]
    return [*fused, *alone]


def _prepare(
    layers: list[Layer], dtype: torch.dtype, prefill: str | None, activations: str | None
) -> None:
    check_words(prefill, activations)
    words = [dense_copy.named(layer._prefill if prefill is None else prefill) for layer in layers]
    told = list(zip(layers, words, strict=True))
    weighed = [layer for layer, word in told if word == "auto"]
    room = {place: _has_room(place, weighed, dtype) for place in map(_place, weighed)}
    for layer, word in told:
        if word != "auto":
            layer._prepare(dtype, prefill, word, activations=activations)
            continue
        # A layer that is prepared again later must not find room where the model found none.
        word = "auto" if room[_place(layer)] else "packed"
        layer._prepare(dtype, word, word, room=True, activations=activations)


def _has_room(place: torch.device, layers: list[Layer], dtype: torch.dtype) -> bool:
    here = [layer for layer in layers if _place(layer) == place]
    without = [layer for layer in here if not copied_bytes(layer._linears.get(dtype, ()))]
    size = dense_copy.size_of([part.layout for layer in without for part in _parts(layer)])
    return dense_copy.fits(size, place)


def _parts(layer: Layer) -> list[SlabLinear]:
    return [layer] if isinstance(layer, SlabLinear) else list(layer._parts())


def _place(layer: Layer) -> torch.device:
    """Where the layer works."""
    part = _parts(layer)[0]
    return part._home or part.values.device
