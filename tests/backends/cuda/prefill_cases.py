"""Problems and forced plans for the kernels for many tokens on Hopper, which tests run on the
emulated device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from emulation import Launched, run

from slab_kernels.backends.cuda import launch as launching
from slab_kernels.backends.cuda import layout, plan, prefill
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.format import PackedLayout, PackedWeight, ceil_div
from slab_kernels.testing import oracle, random_packed

H100, H200 = (gpu for gpu in GPUS if gpu.capability == prefill.CAPABILITY)
DTYPES = (torch.float16, torch.bfloat16)
TOKENS = (17, 33, 64, 65, 127, 128, 129, 256, 257, 1000)
DEALINGS = ("whole", "tail", "both")
LEAST = (2, 2)  # stages of both rings


class Family(NamedTuple):
    """A kernel, and the sign term of a weight that it runs."""

    kind: str
    tokens: int
    rank: int
    planes: int

    def __str__(self) -> str:
        return f"{self.kind}_t{self.tokens}_rank{self.rank}_planes{self.planes}"


FAMILIES = [
    Family("one", 64, 0, 1),
    Family("one", 128, 0, 1),
    Family("one", 256, 0, 1),
    Family("both", 64, 1, 1),
    Family("rebuild", 64, 1, 1),
    Family("rebuild", 128, 1, 1),
    Family("rebuild", 256, 1, 1),
    Family("rebuild", 64, 2, 1),
    Family("rebuild", 64, 1, 3),
    Family("rebuild", 128, 3, 2),
]


@functools.cache
def packed_of(shape: PackedLayout, integers: bool) -> PackedWeight:
    return random_packed(shape, seed=shape.out_features, integers=integers)


@functools.cache
def state_of(shape: PackedLayout, dtype: torch.dtype, integers: bool) -> layout.CudaState:
    return layout.prepare((packed_of(shape, integers),), dtype)


@functools.cache
def activations(K: int, M: int, dtype: torch.dtype, integers: bool) -> torch.Tensor:
    """x [M, K]: integers from -2 to 2, or normal numbers."""
    generator = torch.Generator().manual_seed(K + M)
    if integers:
        return torch.randint(-2, 3, (M, K), generator=generator).to(dtype)
    return torch.randn(M, K, generator=generator).to(dtype)


def bias_of(N: int) -> torch.Tensor:
    return torch.randint(-9, 10, (N,), generator=torch.Generator().manual_seed(N)).float()


def dealt(sizes, M: int, family: Family, dealing: str, stages: tuple[int, int] | None) -> Prefill:
    """A plan with that kernel. dealing: tiles whole, or by their K blocks, or some of each, if
    there are several; not as a plan would have it, but with few clusters and ragged shares.

    stages: None for as many as fit.
    """
    found = next(prefill.dealt(sizes, M, H100, family.kind, family.tokens))
    tiles, k_blocks = found.tiles, sizes.k_blocks
    if dealing == "whole":
        found = replace(found, clusters=ceil_div(2 * tiles, 3), whole_tiles=tiles)
    elif dealing == "tail" or tiles == 1:
        found = replace(found, clusters=min(tiles + 1, tiles * k_blocks), whole_tiles=0)
    else:
        whole = max(1, 2 * tiles // 3)
        found = replace(found, clusters=max(2, whole), whole_tiles=whole)
    if stages is not None:
        found = replace(found, weight_stages=stages[0], token_stages=stages[1])
    return found


@contextmanager
def forced(family: Family, dealing: str, stages: tuple[int, int] | None = LEAST) -> Iterator[None]:
    """Linears run by that kernel; what comes first for an adapter is chosen as ever."""

    def choose(sizes, M, gpu):
        if sizes.values == layout.DENSE:
            return plan.choose(sizes, M, gpu)
        return dealt(sizes, M, family, dealing, stages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "choose", choose)
        launching.launches.cache_clear()
        yield
    launching.launches.cache_clear()


def multiplied(x, state, bias=None, launched: Launched | None = None, late=True) -> torch.Tensor:
    return run(x, state, bias, H100, "compute_90", launched, late)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.view(torch.int16), b.view(torch.int16)
    )


@functools.cache
def exact_of(
    shape: PackedLayout, M: int, dtype: torch.dtype, integers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y without a bias in fp64, and the magnitude that errors scale with."""
    return oracle(activations(shape.in_features, M, dtype, integers), packed_of(shape, integers))
