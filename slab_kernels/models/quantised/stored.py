"""A weight that a checkpoint holds in several tensors, and what the formats have in common."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..shards import TensorEntry

Entries = Mapping[str, TensorEntry]  # by the stored name
WORD = 32  # bits of the integers into which codes are packed
WORDS, INDICES = (torch.int32,), (torch.int32, torch.int64)
SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e8m0fnu)


class Weight(NamedTuple):
    """A dense weight, and where it comes from.

    parts: the names under which its tensors are stored, the first of which holds the codes.
    shape: of the dense weight. make: the weight in fp32, from the tensors of `parts` in their
    order; it raises CheckpointError for numbers that no weight has.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., Tensor]


class Found(NamedTuple):
    """What a format finds in a folder.

    weights: by the names that the dense ones have. unused: tensors that belong to quantised layers
    and to no dense weight, such as scales of activations. said: the format in words, such as "fp8,
    blocks of 128x128".
    """

    weights: dict[str, Weight]
    unused: set[str]
    said: str


def part(
    entries: Entries,
    name: str,
    holder: str,
    shape: tuple[int, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = SCALES,
) -> str:
    """The stored name `name`, once it is known to be there.

    holder: the tensor that cannot be read without it. shape: that it must have; None: any. dtypes:
    those that it may have.

    Raises: CheckpointError.
    """
    if name not in entries:
        raise CheckpointError(
            f"tensor {holder!r} is quantised, and {name!r} that belongs to it is missing; copy or "
            "download the checkpoint again"
        )
    if shape is not None:
        check_shape(entries, name, shape)
    return check_dtype(entries, name, dtypes)


def check_dtype(entries: Entries, name: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """The stored name itself. Raises: CheckpointError if the tensor has none of `dtypes`."""
    if entries[name].dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"tensor {name!r} is {entries[name].dtype}, and the format that config.json names has "
            f"{wanted} there"
        )
    return name


def check_shape(entries: Entries, name: str, shape: tuple[int, ...]) -> None:
    """Raises: CheckpointError if the stored tensor has another shape."""
    found = entries[name].shape
    if found != shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(found)}, and the quantised weight that it belongs to "
            f"needs {list(shape)}"
        )


def integer(config: Mapping[str, Any], key: str, allowed: tuple[int, ...] = ()) -> int:
    """A setting of quantization_config that is an integer. allowed: the only ones; empty: any.

    Raises: CheckpointError.
    """
    value = config.get(key)
    if type(value) is not int or (allowed and value not in allowed):
        wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "an integer"
        raise CheckpointError(
            f"quantization_config has {key}={reprlib.repr(value)}, and {wanted} can be read"
        )
    return value


def groups(config: Mapping[str, Any], inputs: int) -> tuple[int, int]:
    """How many inputs share a scale by `group_size` (-1 for all), and how many such groups there
    are. Raises: CheckpointError."""
    size = integer(config, "group_size")
    if size == -1:
        size = inputs
    if size < 1:
        raise CheckpointError(
            f"quantization_config has group_size={size}; expected inputs that share a scale, or -1"
        )
    return size, -(-inputs // size)


def grouped(config: Mapping[str, Any]) -> str:
    """The groups of a quantization_config in words."""
    size = config.get("group_size")
    return "one scale per row" if size == -1 else f"groups of {size}"


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes [R, C * 32 / bits] int32 from int32 words [R, C], the lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def check_indices(name: str, index: Tensor, count: int) -> None:
    """Raises: CheckpointError if an input is in none of the `count` groups."""
    low, high = (int(end) for end in index.aminmax()) if index.numel() else (0, 0)
    if low < 0 or high >= count:
        raise CheckpointError(
            f"tensor {name!r} puts inputs into groups {low} to {high}, and the weight has {count} "
            "groups; copy or download the checkpoint again"
        )
