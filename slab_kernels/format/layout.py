"""What a packed weight looks like: the sizes and types of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from reprlib import repr as short

import torch

from ..errors import ShapeError, ValueTypeError

FORMAT_VERSION = 3  # the newest that is read; models.packed_config says which is written
GROUP_SIZES = (32, 64, 128)
AUTO = "auto"  # the group size that fits the weight: see `fitting_group_size`
VALUE_TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "int3": torch.uint8,
}
# Entries of the stored tensor for 16 inputs of a row; an entry is of the type above.
VALUE_ENTRIES = {"fp16": 8, "bf16": 8, "int8": 8, "int4": 4, "int3": 3}
FACTOR_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# What P and Q may be stored as instead of the factors' type: the codes of a row, then their
# exponent.
ADAPTER_TYPES = ("int8",)
INTEGER_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "int3": (-4, 3)}
MAX_PLANES = 3  # signs that a pruned entry may have
TENSOR_NAMES = ("values", "metadata", "signs", "scales", "U", "V", "P", "Q")
# Far above any layer; it keeps every byte count inside 63 bits on hostile input.
MAX_FEATURES = 1 << 24


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def fitting_group_size(in_features: int, multiple: int = 1) -> int | None:
    """The group size that suits K inputs: the largest of 128, 64 and 32 that divides K.

    Where none of them does, it is the one that pads K least, the larger of equals.
    multiple: what the size has to be a multiple of. None where no size is.
    """
    sizes = [size for size in GROUP_SIZES if size % multiple == 0]
    return min(sizes, key=lambda size: (-in_features % size, -size), default=None)


def plane_unit(planes: int) -> float:
    """What the last of `planes` signs is worth in magnitudes: 1, 1/2, 1/4. B counts in such
    units."""
    return 2.0 ** (1 - planes)


@dataclass(frozen=True)
class PackedLayout:
    """Sizes and types of one packed weight: everything needed to allocate or check its tensors.

    out_features: N. in_features: K, padded to `padded_in_features`, a multiple of `slice_multiple`.
    values: the type of the kept values, a key of VALUE_TYPES.
    group_size: inputs that share a scale, for integers; None means one scale per row.
    rank: columns of U and V; 0 means no sign term.
    adapter_rank: columns of P and Q; 0 means no adapter.
    factors: the type of U and V, a key of FACTOR_TYPES.
    planes: signs of a pruned entry.
    adapter_values: "int8", or None where P and Q are stored as U and V are.

    Raises on construction: ValueTypeError or ShapeError. Settings of absent parts take their
    defaults, so that layouts that mean the same compare equal.
    """

    out_features: int
    in_features: int
    values: str = "fp16"
    group_size: int | None = None
    rank: int = 0
    adapter_rank: int = 0
    factors: str = "fp16"
    planes: int = 1
    adapter_values: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_size("out_features", 1, MAX_FEATURES)
        self._check_size("in_features", 1, MAX_FEATURES)
        self._check_size("rank", 0, MAX_FEATURES)
        self._check_size("adapter_rank", 0, MAX_FEATURES)
        self._check_size("planes", 1, MAX_PLANES)
        if not self.rank:
            object.__setattr__(self, "planes", 1)
        if not self.adapter_rank:
            object.__setattr__(self, "adapter_values", None)
        if not self.rank and (not self.adapter_rank or self.adapter_values):
            object.__setattr__(self, "factors", "fp16")

    def _check_types(self) -> None:
        for name, known in (("values", VALUE_TYPES), ("factors", FACTOR_TYPES)):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise ValueTypeError(
                    f"{name}={short(given)} is unknown; choose one of {', '.join(known)}"
                )
        takes_groups = self.values in INTEGER_RANGES and type(self.group_size) is int
        if self.group_size is not None and not (takes_groups and self.group_size in GROUP_SIZES):
            raise ValueTypeError(
                f"group_size={short(self.group_size)} with values={short(self.values)}: int8, int4 "
                "and int3 take 32, 64, 128 or None (one scale per row), fp16 and bf16 only None"
            )
        if self.adapter_values is not None and self.adapter_values not in ADAPTER_TYPES:
            raise ValueTypeError(
                f"adapter_values={short(self.adapter_values)} is unknown; "
                "int8, or None for the type of the factors"
            )

    def _check_size(self, name: str, least: int, most: int) -> None:
        size = getattr(self, name)
        if type(size) is not int or not least <= size <= most:
            raise ShapeError(f"{name}={short(size)} must be an integer between {least} and {most}")

    @property
    def slice_multiple(self) -> int:
        """Inputs of an indivisible slice: a byte of signs covers 16, a scale covers group_size."""
        return math.lcm(16, self.group_size or 16)

    @property
    def padded_in_features(self) -> int:
        """Kp: K, rounded up to a multiple of `slice_multiple`."""
        return ceil_div(self.in_features, self.slice_multiple) * self.slice_multiple

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of this layout."""
        N, Kp, factor = self.out_features, self.padded_in_features, FACTOR_TYPES[self.factors]
        table: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "values": (VALUE_TYPES[self.values], (N, Kp * VALUE_ENTRIES[self.values] // 16)),
            "metadata": (torch.uint8, (N, Kp // 8)),
        }
        if self.values in INTEGER_RANGES:
            table["scales"] = (torch.bfloat16, (N, Kp // self.group_size if self.group_size else 1))
        if self.rank:
            table["signs"] = (torch.uint8, (N, Kp // 16 * self.planes))
            table["U"] = (factor, (N, self.rank))
            table["V"] = (factor, (Kp, self.rank))
        if self.adapter_rank:
            dtype, width = factor, self.adapter_rank
            if self.adapter_values:
                dtype, width = torch.int8, self.adapter_rank + 1
            table["P"], table["Q"] = (dtype, (N, width)), (dtype, (Kp, width))
        return table

    def bits_per_weight(self, factors: bool = True) -> float:
        """Stored bits over N * K weights, scales and padding included.

        factors: whether U and V count; P and Q always do.
        """
        return self._bits(factors) / (self.out_features * self.in_features)

    def padding_bits_per_weight(self) -> float:
        """What of `bits_per_weight` is there only because K is padded to Kp."""
        unit = self.slice_multiple
        one, two = (replace(self, in_features=n * unit)._bits() for n in (1, 2))
        of_an_input = (two - one) / unit
        extra = of_an_input * (self.padded_in_features - self.in_features)
        return extra / (self.out_features * self.in_features)

    def _bits(self, factors: bool = True) -> int:
        """The bits of all tensors; see `bits_per_weight`."""
        return 8 * sum(
            dtype.itemsize * math.prod(shape)
            for name, (dtype, shape) in self.tensors().items()
            if factors or name not in ("U", "V")
        )

    def to_dict(self) -> dict:
        """The plain JSON form that `config.json` holds for every module."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, entries: dict) -> PackedLayout:
        """The layout of a `to_dict`. Unknown keys are ignored, since a later version may add some.

        Raises: ShapeError for missing sizes, and as construction does.
        """
        names = {f.name for f in fields(cls)}
        missing = {"out_features", "in_features"} - entries.keys()
        if missing:
            raise ShapeError(f"packed layout {short(entries)} lacks {', '.join(sorted(missing))}")
        return cls(**{k: v for k, v in entries.items() if k in names})
