"""Layers told which of them is called next: an option that is off unless somebody calls this."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from .fused import FusedSlabLinear
from .linear import SlabLinear

MOST_BYTES = 8 << 20  # the L2 cache of an A100 holds 40 MB, of an H100 50


def prefetch_in_order(
    modules: Iterable[SlabLinear | FusedSlabLinear],
    dtype: torch.dtype,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Each layer, while it runs, has the first `most_bytes` of the next one's weight brought near.

    The CUDA backend prefetches them into the L2 cache; others do nothing. Memory then works on
    while norms and attention run, if the cache has room. Nobody has measured what it gains. No
    result changes. `modules` are in the order in which they are called; they are prepared for
    activations of `dtype`. A layer that is prepared anew is linked no more.
    """
    prepared = [module._prepared(dtype) for module in modules]
    for one, following in itertools.pairwise(prepared):
        if one.backend is following.backend:
            one.backend.prefetch_next(one.state, following.state, most_bytes)
