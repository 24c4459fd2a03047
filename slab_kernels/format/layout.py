"""What a packed weight looks like: sizes, types, errors, and the check that everything read from outside passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from reprlib import repr as short

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
    ValueTypeError,
)
from . import bits

FORMAT_VERSION = 2
GROUP_SIZES = (32, 64, 128)
VALUE_TYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8, "int3": torch.uint8,
}  # fmt: skip
VALUE_BYTES = {
    "fp16": 8,
    "bf16": 8,
    "int8": 8,
    "int4": 4,
    "int3": 3,
}  # of the stored tensor's entries, for 16 inputs
FACTOR_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ADAPTER_TYPES = (
    "int8",
)  # of P and Q beside the factors' own: a row's codes, then the exponent they share
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of dense weights
INTEGER_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "int3": (-4, 3)}
MAX_PLANES = 3  # signs that a pruned entry may have
TENSOR_NAMES = ("values", "metadata", "signs", "scales", "U", "V", "P", "Q")
MAX_FEATURES = (
    1 << 24
)  # far above any layer; keeps every byte count inside 63 bits on hostile input


def plane_unit(planes: int) -> float:
    """What the last of `planes` signs is worth in magnitudes: 1, 1/2, 1/4. B holds odd multiples of it."""
    return 2.0 ** (1 - planes)


@dataclass(frozen=True)
class PackedLayout:
    """Sizes and types of one packed weight: everything needed to allocate or check its tensors.

    K is padded to `padded_in_features`, a multiple of `slice_multiple`; slicing along K is exact at that multiple.
    """

    out_features: int
    in_features: int
    values: str = "fp16"
    group_size: int | None = None  # integers only; None = one scale a row
    rank: int = 0  # columns of U, V; 0 = no sign term
    adapter_rank: int = 0  # columns of P, Q; 0 = no adapter
    factors: str = "fp16"
    planes: int = 1  # signs of a pruned entry
    adapter_values: str | None = None  # "int8", or None: P and Q are stored as U and V are

    def __post_init__(self):
        if not isinstance(self.values, str) or self.values not in VALUE_TYPES:
            raise ValueTypeError(
                f"values={short(self.values)} is unknown; choose one of {', '.join(VALUE_TYPES)}"
            )
        if not isinstance(self.factors, str) or self.factors not in FACTOR_TYPES:
            raise ValueTypeError(
                f"factors={short(self.factors)} is unknown; choose one of {', '.join(FACTOR_TYPES)}"
            )
        takes_groups = (
            self.values in INTEGER_RANGES
            and type(self.group_size) is int
            and self.group_size in GROUP_SIZES
        )
        if self.group_size is not None and not takes_groups:
            raise ValueTypeError(
                f"group_size={short(self.group_size)} with values={short(self.values)}: int8, int4 and "
                "int3 take 32, 64, 128 or None (one scale a row), fp16 and bf16 only None"
            )
        for name in ("out_features", "in_features"):
            size = getattr(self, name)
            if type(size) is not int or not 0 < size <= MAX_FEATURES:
                raise ShapeError(
                    f"{name}={short(size)} must be an integer between 1 and {MAX_FEATURES}"
                )
        for name in ("rank", "adapter_rank"):
            size = getattr(self, name)
            if type(size) is not int or not 0 <= size <= MAX_FEATURES:
                raise ShapeError(
                    f"{name}={short(size)} must be an integer between 0 and {MAX_FEATURES}"
                )
        if type(self.planes) is not int or not 1 <= self.planes <= MAX_PLANES:
            raise ShapeError(
                f"planes={short(self.planes)} must be an integer between 1 and {MAX_PLANES}"
            )
        if not self.rank:
            object.__setattr__(self, "planes", 1)
        if self.adapter_values is not None and self.adapter_values not in ADAPTER_TYPES:
            raise ValueTypeError(
                f"adapter_values={short(self.adapter_values)} is unknown; "
                "int8, or None for the type of the factors"
            )
        if not self.adapter_rank:
            object.__setattr__(self, "adapter_values", None)
        if not self.rank and (not self.adapter_rank or self.adapter_values):
            object.__setattr__(
                self, "factors", "fp16"
            )  # there are none: layouts that mean the same compare equal

    @property
    def slice_multiple(self) -> int:
        """Inputs per indivisible slice along K: a byte of signs covers 16, a scale covers group_size."""
        return math.lcm(16, self.group_size or 16)

    @property
    def padded_in_features(self) -> int:
        return -(-self.in_features // self.slice_multiple) * self.slice_multiple

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of this layout."""
        N, Kp, factor = self.out_features, self.padded_in_features, FACTOR_TYPES[self.factors]
        table = {
            "values": (VALUE_TYPES[self.values], (N, Kp * VALUE_BYTES[self.values] // 16)),
            "metadata": (torch.uint8, (N, Kp // 8)),
        }
        if self.values in INTEGER_RANGES:
            table["scales"] = (torch.bfloat16, (N, Kp // self.group_size if self.group_size else 1))
        if self.rank:
            table["signs"] = (torch.uint8, (N, Kp // 16 * self.planes))
            table["U"] = (factor, (N, self.rank))
            table["V"] = (factor, (Kp, self.rank))
        if self.adapter_rank:
            dtype, width = (
                (torch.int8, self.adapter_rank + 1)
                if self.adapter_values
                else (factor, self.adapter_rank)
            )
            table["P"], table["Q"] = (dtype, (N, width)), (dtype, (Kp, width))
        return table

    def bits_per_weight(self, factors: bool = True) -> float:
        """Stored bits over N*K weights, scales and padding included; with or without U, V (P, Q always count)."""
        size = sum(
            dtype.itemsize * math.prod(shape)
            for name, (dtype, shape) in self.tensors().items()
            if factors or name not in ("U", "V")
        )
        return 8 * size / (self.out_features * self.in_features)

    def to_dict(self) -> dict:
        """Plain JSON form, as `config.json` holds it for every module."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, entries: dict) -> PackedLayout:
        """From `to_dict`; unknown keys are ignored (a later version may add some)."""
        names = {f.name for f in fields(cls)}
        missing = {"out_features", "in_features"} - entries.keys()
        if missing:
            raise ShapeError(f"packed layout {short(entries)} lacks {', '.join(sorted(missing))}")
        return cls(**{k: v for k, v in entries.items() if k in names})


def weight_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`dtype`, or the one that it names, such as "float16", if dense weights can have it.

    Raises: DtypeError.
    """
    known = {str(d).removeprefix("torch."): d for d in WEIGHT_DTYPES}
    named = isinstance(dtype, torch.dtype | str)
    found = known.get(str(dtype).removeprefix("torch.")) if named else None
    if found is None:
        raise DtypeError(f"dtype={short(dtype)} is none of weights; use {', '.join(known)}")
    return found


def cast(t: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`t` rounded to `dtype`.

    Raises: RangeError that calls it `name` if a number does not fit, with the dtypes that hold it.
    """
    rounded = t.to(dtype)
    if rounded.is_floating_point() and not bool(rounded.isfinite().all()):
        most = float(t.abs().max())
        wide = [d for d in WEIGHT_DTYPES if most <= torch.finfo(d).max]
        fitting = [str(d).removeprefix("torch.") for d in wide]
        raise RangeError(
            f"{name} reaches {most:.4g}, which {str(dtype).removeprefix('torch.')} does not hold; "
            + (f"dtype {' or '.join(fitting)} does" if fitting else "the weights are damaged")
        )
    return rounded


def check_range(name: str, start: int, length: int, size: int, multiple: int = 1) -> None:
    """Refuse a slice start .. start+length that is not inside a dimension of `size`, or that cuts
    one of its units of `multiple`.

    Raises: ShapeError.
    """
    for what, number in (("start", start), ("length", length)):
        if type(number) is not int:
            kind = type(number).__name__
            raise ShapeError(f"cannot slice {name}: {what}={number!r} must be an int, not a {kind}")
    last = start + length
    asked = f"cannot slice {name} {start}..{last} of {size}"
    if not 0 <= start < last <= size:
        raise ShapeError(f"{asked}: it must begin at 0 or later, hold one and end by {size}")
    if start % multiple or (last % multiple and last != size):
        raise ShapeError(f"{asked}: start and length must be multiples of {multiple}")


def check_tensors(tensors: dict[str, Tensor], layout: PackedLayout) -> None:
    """Refuse anything that is not exactly `layout`.

    Raises: MissingTensorError, UnknownTensorError, DtypeError, ShapeError, MetadataError, RangeError, PaddingError.
    """
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
    if tensors["metadata"].is_meta:
        return
    if bad := bits.illegal_nibbles(tensors["metadata"]):
        raise MetadataError(
            f"metadata holds {bad} nibbles that are not two ascending positions (legal: 4 8 C 9 D E); the file is corrupt"
        )
    if layout.values == "int8" and bool((tensors["values"] == -128).any()):
        raise RangeError("values holds -128, but int8 values are symmetric: -127 .. 127")
    for name in table:
        if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all()):
            raise RangeError(f"{name} holds NaN or infinite numbers")
    if layout.adapter_values:
        for name in ("P", "Q"):
            codes, exponents = tensors[name][:, :-1], tensors[name][:, -1]
            if (
                bool((codes == -128).any())
                or bool((exponents > 120).any())
                or bool((exponents < -126).any())
            ):
                raise RangeError(
                    f"{name} holds the code -128 or an exponent beyond -126 .. 120; the file is corrupt"
                )
        tensors = tensors | {name: bits.unpack_shared(tensors[name]) for name in ("P", "Q")}
    _check_products(tensors)
    _check_padding(tensors, layout)


def _check_products(tensors: dict[str, Tensor]) -> None:
    """Finite parts whose product overflows fp32 would come out as NaN."""
    most = torch.finfo(torch.float32).max
    for left, right in (("U", "V"), ("P", "Q")):
        if left in tensors:
            worst = tensors[left].double().abs().amax(0) @ tensors[right].double().abs().amax(0)
            if float(worst) > most:
                raise RangeError(f"{left} {right}^T reaches {float(worst):.3g}, beyond fp32")
    if "scales" in tensors:
        low, high = float(tensors["scales"].float().min()), float(tensors["scales"].float().max())
        if low <= 0 or high * 128 > most:
            raise RangeError(
                f"scales range from {low:.3g} to {high:.3g}; they must be positive and far below fp32's end"
            )


def _check_padding(tensors: dict[str, Tensor], layout: PackedLayout) -> None:
    K, Kp = layout.in_features, layout.padded_in_features
    if K == Kp:
        return
    i0, i1 = bits.kept_positions(tensors["metadata"])
    entries = bits.unpack_values(tensors["values"], layout.values)
    first = -(-K // 4)  # groups from here on hold padding alone
    dirty = bool(((i0 != 0) | (i1 != 1))[:, first:].any())
    if K % 4:  # the last real group keeps padding only where it has fewer than two real inputs
        dirty = dirty or bool((i1[:, first - 1] >= max(2, K % 4)).any())
    dirty = dirty or bool((bits.scatter_positions(entries, i0, i1)[:, K:] != 0).any())
    for name in ("V", "Q"):
        dirty = dirty or (name in tensors and bool((tensors[name][K:] != 0).any()))
    if "signs" in tensors:
        most = 2**layout.planes - 1  # what padding holds: every sign positive
        lower = most - bits.unpack_planes(tensors["signs"], layout.planes)
        dirty = dirty or bool(
            bits.scatter_positions(lower, *bits.pruned_positions(i0, i1))[:, K:].any()
        )
    if dirty:
        raise PaddingError(f"padding beyond in_features={K} must be zero (nibble 4, sign bits 0)")
