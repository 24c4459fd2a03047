"""The weights that `correct` multiplies by, with activations and exact results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slab_kernels.bench.correctness import GATE_ROWS
from slab_kernels.format import PackedLayout, PackedWeight
from slab_kernels.testing import oracle, random_packed

TOKENS = (1, 3, 4, 5, 8, 16)
MANY_TOKENS = (17, 33, 64, 65, 127, 128, 129, 256, 257, 1000)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
VALUES = (("fp16", None), ("int8", 128), ("int8", 64), ("int8", 32), ("int8", None),
          ("int4", 128), ("int4", 64), ("int4", 32), ("int3", 32))  # fmt: skip
MANY_VALUES = (("fp16", None), ("int8", 64), ("int8", None), ("int4", 128), ("int4", 32))
# rank, planes
SIGNS = ((0, 1), (1, 1), (2, 1), (7, 1), (16, 1), (1, 2), (3, 2), (1, 3), (7, 3))
# K, out_features of the parts, adapter's rank. Activations up to 2 and factors up to 3 give z that
# bf16 holds exactly, as long as K is small where there is an adapter.
SIZES = (
    (260, (70,), 4),
    (1030, (33,), 0),
    (128, (16, 40), 20),
    (388, (100, 24, 37), 0),
    (2176, (64,), 0),  # 17 K blocks: fewer than groups, then a second round for one of them
    (200, (5,), 16),
    (4096, (96, 32), 0),
)
LLAMA = ((6144, 4096), (4096, 14336))


class Weight(NamedTuple):
    """What a weight is made of."""

    dtype: str  # of the activations, a key of DTYPES
    values: str
    group_size: int | None
    rank: int
    planes: int
    K: int
    rows: tuple[int, ...]
    adapter_rank: int = 0
    integers: bool = True  # small ones, so that results are exact; else random numbers

    def __str__(self) -> str:
        group = f"/{self.group_size}" if self.group_size else ""
        rows = "+".join(map(str, self.rows))
        return (
            f"{self.dtype} {self.values}{group} rank {self.rank} planes {self.planes} "
            f"adapter {self.adapter_rank} {rows}x{self.K}"
        )

    def layouts(self) -> list[PackedLayout]:
        return [
            PackedLayout(
                rows,
                self.K,
                self.values,
                self.group_size,
                self.rank,
                self.adapter_rank,
                planes=self.planes,
            )
            for rows in self.rows
        ]


def small() -> list[Weight]:
    """Every value type and rank, with sizes that change from one to the next."""
    sizes = itertools.cycle(SIZES)
    found = []
    for dtype, (values, group), (rank, planes) in itertools.product(DTYPES, VALUES, SIGNS):
        K, rows, adapter_rank = next(sizes)
        rank = min(rank, *rows, K)
        adapter_rank = min(adapter_rank, *rows)
        found.append(Weight(dtype, values, group, rank, planes, K, rows, adapter_rank))
    return found


def many() -> list[Weight]:
    """The large ones, and the small ones but for some groups of scales."""
    return [*(each for each in small() if (each.values, each.group_size) in MANY_VALUES), *large()]


def large() -> list[Weight]:
    """Random numbers in the shapes of a model."""
    kinds = (("fp16", None), ("int8", 128), ("int4", 128))
    found = []
    for at, ((values, group), (N, K)) in enumerate(itertools.product(kinds, LLAMA)):
        dtype = tuple(DTYPES)[at % len(DTYPES)]
        found.append(Weight(dtype, values, group, 1, 1, K, (N,), integers=False))
    return found


class Problem(NamedTuple):
    """A weight, activations [tokens, K], a bias [N], and what they give [tokens, N] in fp64.

    The last three hold GATE_ROWS rows of a large weight. The weight is `rounded` if the
    activations' type does not hold all of it: kernels that rebuild it are not exact then.
    """

    parts: Sequence[PackedWeight]
    x: Tensor
    bias: Tensor
    exact: Tensor
    magnitude: Tensor  # that rounding errors scale with
    rounded: bool


def problem(weight: Weight, device: str, tokens: int = max(TOKENS)) -> Problem:
    """The same numbers every time, and the same for the first tokens of more."""
    dtype, generator = DTYPES[weight.dtype], torch.Generator().manual_seed(weight.rank)
    packed = [
        random_packed(layout, seed, weight.integers, device)
        for seed, layout in enumerate(weight.layouts())
    ]
    shape, N = (tokens, weight.K), sum(weight.rows)
    if weight.integers:
        x = torch.randint(-2, 3, shape, generator=generator)
        bias = torch.randint(-9, 10, (N,), generator=generator).float()
    else:
        x = torch.randn(shape, generator=generator)
        bias = torch.randn(N, generator=generator)
    x, bias = x.to(device, dtype), bias.to(device)
    checked = list(packed)
    if N > 4 * GATE_ROWS and len(packed) == 1:
        checked = [packed[0].narrow_out(N - GATE_ROWS, GATE_ROWS)]
    rows = sum(part.out_features for part in checked)
    exact, magnitude = (
        torch.cat(some, -1) for some in zip(*(oracle(x, part) for part in checked), strict=True)
    )
    tail = bias[-rows:].double()
    rounded = any(not torch.equal(W.to(dtype).to(W.dtype), W) for W in (p.dense() for p in checked))
    return Problem(packed, x, bias, exact + tail, magnitude + tail.abs(), rounded)
