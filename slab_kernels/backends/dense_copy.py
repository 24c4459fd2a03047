"""The dense copy of a weight: an option that costs 16 bits per weight of memory, for many tokens.

Decoding reads the packed weight, which is fewer bytes. From some number of tokens on a dense
product is faster than any packed one, and a layer that was prepared with prefill="dense" then
multiplies a copy of its weight as nn.Linear would. The words of that option, wherever it is given:

packed      no copy; the default
dense       a copy beside what is prepared, or a BackendError where the backend keeps none
auto        a copy where the backend keeps one and all copies on the device together take no more
            than AUTO_SHARE of what would be free there without them

The copy is [sum of rows, K] in the activations' type: W = S + (U V^T) * B + P Q^T, added in fp32
and rounded once. That is the weight of `SlabLinear.to_linear(dtype)`, to the bit.
"""

from __future__ import annotations

import os
import reprlib
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, BackendError, RangeError
from ..format import PackedLayout, PackedWeight, cast
from .base import Backend, LinearProblem, wait_until_written

PREFILLS = ("packed", "dense", "auto")
ENVIRONMENT = "SLAB_KERNELS_PREFILL"  # the word where no argument says one
AUTO_SHARE = 0.5  # of the free memory, for all copies on a device together
BITS = 16  # of a weight in a copy
NEVER = 1 << 62  # tokens: from so many on, where a copy is never faster
BAND_ROWS = 1024  # rows that are made at a time, since the way there takes several fp32 weights
_kept: dict[int, tuple[torch.device, int]] = {}  # id of a copy -> where it is, and its bytes


def named(prefill: str | None) -> str:
    """The word that holds: the argument, else the environment's, else "packed".

    Raises: ArgumentError for any other than PREFILLS.
    """
    told = prefill if prefill is not None else os.environ.get(ENVIRONMENT) or PREFILLS[0]
    if not isinstance(told, str) or told not in PREFILLS:
        origin = f" ({ENVIRONMENT} names it)" if prefill is None else ""
        known = ", ".join(PREFILLS)
        raise ArgumentError(f"prefill={reprlib.repr(told)}{origin} is unknown; use one of {known}")
    return told


def size_of(layouts: Sequence[PackedLayout]) -> int:
    """The bytes of one copy of weights of these layouts."""
    return sum(layout.out_features * layout.in_features for layout in layouts) * BITS // 8


def described(size: int, weights: int) -> str:
    """A copy of so many bytes, in words, for messages and for `repr`."""
    return f"dense copy of {size / 1e6:.2f} MB, {8 * size / weights:.2f} bits per weight"


def applied(
    backend: Backend,
    state: object,
    parts: Sequence[PackedWeight],
    dtype: torch.dtype,
    told: str,
    room: bool | None = None,
) -> object:
    """The state with a dense copy, or without one, as the word `told` wants it.

    parts: the weights that `state` was prepared from, on any device.
    room: whether there is memory for the copies that "auto" makes, where somebody has weighed those
        of a whole model; None: this one is weighed.

    Raises: BackendError if `told` is "dense" and the backend keeps no copy, RangeError if it is and
        a number does not fit `dtype`.
    """
    if told == "packed":
        return backend.without_dense(state)
    if backend.dense_bytes(state):
        return state
    device = backend.dense_device(state)
    if device is None:
        if told == "dense":
            raise _none_kept(backend, parts, dtype)
        return state
    if told == "dense":
        return backend.with_dense(state, parts)
    if room is None:
        room = fits(size_of([part.layout for part in parts]), device)
    if not room:
        return state
    try:
        return backend.with_dense(state, parts)
    except RangeError:  # of numbers that the packed kernels hold and a 16-bit weight does not
        return state


def _none_kept(backend: Backend, parts: Sequence[PackedWeight], dtype: torch.dtype) -> BackendError:
    first = parts[0]
    problem = LinearProblem.of(first.layout, 1, dtype, first.values.device.type)
    origin = f" ({ENVIRONMENT} names it)" if os.environ.get(ENVIRONMENT) == "dense" else ""
    return BackendError(
        f"prefill='dense'{origin} wants a dense copy, and the {backend.name} backend keeps none of "
        f"{problem.describe()}; use prefill='packed', or 'auto', which makes one where there can "
        "be one: for 16-bit activations on NVIDIA GPUs"
    )


def fits(size: int, device: torch.device) -> bool:
    """Whether "auto" makes copies of so many bytes on the device, beside those that are there."""
    kept = sum(nbytes for place, nbytes in list(_kept.values()) if place == device)
    return kept + size <= AUTO_SHARE * (free(device) + kept)


def free(device: torch.device) -> int:
    """The free bytes of a GPU, those that torch's allocator holds unused included; else 0."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def made(parts: Sequence[PackedWeight], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights below one another, [sum of rows, K] in `dtype` on `device`.

    It is written before this returns, on whatever stream.

    Raises: RangeError if a number does not fit `dtype`.
    """
    rows = sum(part.out_features for part in parts)
    copy = torch.empty(rows, parts[0].in_features, dtype=dtype, device=device)
    done = 0
    for part in parts:
        for start in range(0, part.out_features, BAND_ROWS):
            count = min(BAND_ROWS, part.out_features - start)
            band = part.narrow_out(start, count).to(device).dense()
            copy[done : done + count] = cast(band, dtype, "the weight")
            done += count
    wait_until_written((copy,))
    _kept[id(copy)] = copy.device, copy.nbytes
    weakref.finalize(copy, _kept.pop, id(copy), None).atexit = False
    return copy


def product(x: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias by torch, in x's type whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x, copy, None if bias is None else bias.to(x.dtype))
