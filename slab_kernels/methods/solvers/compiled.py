"""The steps of sweep and descent within a block of columns, compiled for the CPU (csrc/solver.h).

The torch code beside the calls of this file defines what the steps do, and runs on other devices,
for patterns other than 2:4, and where the library was not built. The compiled ones take a group of
four columns of 8 or 16 rows at once, in registers, and leave most of the time to the products of
whole matrices between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from ... import native
from ...format import INTEGER_RANGES
from .masks import Pattern
from .metric import once_per_gram
from .quantize import Grid

PATTERN = Pattern(2, 4)
MOST_COLUMNS = 128  # of a block, kMostColumns of csrc/solver.h
MOST_PLANES = 3
CACHE = 1 << 20  # numbers of a matrix [rows,K] that stay in a core's share of the cache: 4 MB
PAIRS = list(combinations(range(4), 2))
PRUNED = torch.tensor(PAIRS, device="cpu")
KEPT = torch.tensor([[i for i in range(4) if i not in pair] for pair in PAIRS], device="cpu")


def usable(W: Tensor, pattern: Pattern, planes: int, width: int) -> bool:
    """Whether the compiled steps can run a problem of a weight W [N,K] here.

    Raises: BackendError if SLAB_KERNELS_CPU_ISA names what cannot run here.
    """
    if W.device.type != "cpu" or W.dtype != torch.float32:
        return False
    if pattern != PATTERN or planes > MOST_PLANES or width > MOST_COLUMNS:
        return False
    return native.missing_library() is None


def row_ranges(N: int, K: int) -> Iterator[slice]:
    """Ranges of rows that are taken through all columns while they are in cache."""
    rows = max(64, CACHE // K // 16 * 16)
    for start in range(0, N, rows):
        yield slice(start, min(N, start + rows))


def column_ranges(K: int, width: int) -> Iterator[tuple[int, int]]:
    """The first column and the end of every block that the steps take at once."""
    for start in range(0, K, width):
        yield start, min(K, start + width)


def grid_numbers(grid: Grid | None, K: int) -> tuple[int, int, int]:
    """Inputs that share a scale, lowest and highest integer; zeros without a grid."""
    if grid is None:
        return 0, 0, 0
    low, high = INTEGER_RANGES[grid.values]
    return grid.group_size or K, low, high


def own_blocks(matrix: Tensor) -> Tensor:
    """[K/4,4,4] fp64: the blocks of four columns on the diagonal of a matrix [K,K]."""
    groups = len(matrix) // 4
    return matrix.view(groups, 4, groups, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()


def among(blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[K/4,6,2,2]: the part of every block [K/4,4,4] for every choice of two rows and columns."""
    return blocks[:, rows[:, :, None], columns[:, None, :]]


def _form(inverse: Tensor) -> Tensor:
    """[...,3] of a symmetric [...,2,2]: its diagonal, and twice the other entry."""
    return torch.stack([inverse[..., 0, 0], inverse[..., 1, 1], 2 * inverse[..., 0, 1]], -1)


@once_per_gram
def descent_groups(gram: Tensor) -> Tensor:
    """[K/4,92] fp32: `CpuDescentGroup` of every group of a Gram matrix [K,K]."""
    own = own_blocks(gram)
    inverse = torch.linalg.inv(own)
    of_kept = among(own, KEPT, KEPT)
    answer = -torch.linalg.solve(of_kept, among(own, KEPT, PRUNED))
    shift = -of_kept[..., 1, 0] / of_kept[..., 1, 1]
    first = of_kept[..., 0, 0] + of_kept[..., 0, 1] * shift
    choices = torch.cat(
        [
            _form(torch.linalg.inv(among(inverse, PRUNED, PRUNED))),
            answer.flatten(2),
            torch.stack([shift, first, of_kept[..., 1, 1]], -1),
        ],
        -1,
    )
    return torch.cat([own.flatten(1), inverse.flatten(1), choices.flatten(1)], 1).float()


def sweep_groups(factor: Tensor) -> Tensor:
    """[K/4,34] fp32: `CpuSweepGroup` of every group, of U [K,K] with U^T U = H^-1."""
    own = own_blocks(factor)
    covariance = own.transpose(1, 2) @ own
    inverse = torch.linalg.inv(covariance)
    of_pruned = _form(torch.linalg.inv(among(covariance, PRUNED, PRUNED)))
    return torch.cat([inverse.flatten(1), of_pruned.flatten(1)], 1).float()
