"""The check that every packed weight read from outside passes: is it exactly its layout, to the
bit?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import (
    DtypeError,
    MetadataError,
    MissingTensorError,
    PaddingError,
    RangeError,
    ShapeError,
    UnknownTensorError,
)
from . import bits
from .layout import PackedLayout, ceil_div


def check_tensors(tensors: dict[str, Tensor], layout: PackedLayout) -> None:
    """Refuse anything that is not exactly `layout`. On the meta device, numbers are not looked at.

    Raises: MissingTensorError, UnknownTensorError, DtypeError, ShapeError, MetadataError,
        RangeError or PaddingError.
    """
    _check_table(tensors, layout)
    if tensors["metadata"].is_meta:
        return
    if bad := bits.illegal_nibbles(tensors["metadata"]):
        raise MetadataError(
            f"metadata holds {bad} nibbles that are not two ascending positions "
            "(legal: 4 8 C 9 D E); the file is corrupt"
        )
    if layout.values == "int8" and bool((tensors["values"] == -128).any()):
        raise RangeError("values holds -128, but int8 values are symmetric: -127 .. 127")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RangeError(f"{name} holds NaN or infinite numbers")
    if layout.adapter_values:
        for name in ("P", "Q"):
            _check_codes(name, tensors[name])
        tensors = tensors | {name: bits.unpack_shared(tensors[name]) for name in ("P", "Q")}
    _check_products(tensors)
    _check_padding(tensors, layout)


def _check_table(tensors: dict[str, Tensor], layout: PackedLayout) -> None:
    """Names, dtypes and shapes."""
    table = layout.tensors()
    for name in table.keys() - tensors.keys():
        raise MissingTensorError(
            f"tensor {name!r} is missing from a packed weight with {sorted(tensors)}"
        )
    for name in tensors.keys() - table.keys():
        raise UnknownTensorError(
            f"tensor {name!r} does not belong to a packed weight with {sorted(table)}"
        )
    for name, (dtype, shape) in table.items():
        if tensors[name].dtype != dtype:
            raise DtypeError(f"{name} is {tensors[name].dtype}, expected {dtype}")
        if tuple(tensors[name].shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")


def _check_codes(name: str, stored: Tensor) -> None:
    """The int8 codes of rows [n, r + 1] with their exponents."""
    codes, exponents = stored[:, :-1], stored[:, -1]
    outside = (exponents > bits.MOST_EXPONENT) | (exponents < bits.LEAST_EXPONENT)
    if bool((codes == -128).any()) or bool(outside.any()):
        raise RangeError(
            f"{name} holds the code -128 or an exponent beyond {bits.LEAST_EXPONENT} .. "
            f"{bits.MOST_EXPONENT}; the file is corrupt"
        )


def _check_products(tensors: dict[str, Tensor]) -> None:
    """Refuse finite parts whose product overflows fp32, since it would come out as NaN."""
    most = torch.finfo(torch.float32).max
    for left, right in (("U", "V"), ("P", "Q")):
        if left in tensors:
            worst = tensors[left].double().abs().amax(0) @ tensors[right].double().abs().amax(0)
            if float(worst) > most:
                raise RangeError(f"{left} {right}^T reaches {float(worst):.3g}, beyond fp32")
    if "scales" in tensors:
        least, largest = (float(end) for end in tensors["scales"].float().aminmax())
        if least <= 0 or largest * 128 > most:
            raise RangeError(
                f"scales range from {least:.3g} to {largest:.3g}; they must be positive and "
                "far below fp32's end"
            )


def _check_padding(tensors: dict[str, Tensor], layout: PackedLayout) -> None:
    """Refuse anything but zeros (nibble 4, sign bits 0) beyond in_features."""
    K = layout.in_features
    if K == layout.padded_in_features:
        return
    i0, i1 = bits.kept_positions(tensors["metadata"])
    entries = bits.unpack_values(tensors["values"], layout.values)
    first = ceil_div(K, 4)  # groups from here on hold padding alone
    dirty = bool(((i0 != 0) | (i1 != 1))[:, first:].any())
    if K % 4:  # the last real group keeps padding only where it has fewer than two real inputs
        dirty = dirty or bool((i1[:, first - 1] >= max(2, K % 4)).any())
    dirty = dirty or bool((bits.scatter_positions(entries, i0, i1)[:, K:] != 0).any())
    for name in ("V", "Q"):
        dirty = dirty or (name in tensors and bool((tensors[name][K:] != 0).any()))
    if "signs" in tensors:
        most = 2**layout.planes - 1  # the level of padding: every sign is positive
        lower = most - bits.unpack_planes(tensors["signs"], layout.planes)
        pruned = bits.scatter_positions(lower, *bits.pruned_positions(i0, i1))
        dirty = dirty or bool(pruned[:, K:].any())
    if dirty:
        raise PaddingError(f"padding beyond in_features={K} must be zero (nibble 4, sign bits 0)")
