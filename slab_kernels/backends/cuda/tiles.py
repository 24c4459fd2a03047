"""A linear's sizes as its CUDA kernels see them, and the tiles that a CTA may have.

A CTA has at most eight warps. They share its tile along rows and tokens; those that remain are
groups, each of which takes every n-th K block and whose sums are added at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...format import ceil_div
from .layout import (
    BLOCK_INPUTS,
    BLOCK_ROWS,
    DENSE,
    INT4,
    INT8,
    METADATA_BYTES,
    SIGN_BYTES,
    TILE_ROWS,
    VALUE_BYTES,
    W16,
    CudaState,
)

MOST_RANK = 16  # Every stage holds this many rows of V beside the activations.
MOST_STAGES = 4
TOKEN_ROW_BYTES = 2 * BLOCK_INPUTS  # of one token's activations, or of a row of V, per K block
# The registers that a thread takes at most, by the tokens of a warp: one family of kernels each.
REGISTERS = {8: 128, 16: 128, 32: 192, 64: 255}
TALL_REGISTERS = {8: 160, 16: 208, 32: 208, 64: 255}  # 64 rows per warp
# Kernels with several sign planes keep the sums of the planes apart, so 64 tokens do not fit.
PLANES_REGISTERS = {8: 128, 32: 248}
# By value type and rank, the tokens of a warp for which a kernel with 64 rows per warp exists.
TALL = {(INT8, 1): (8, 16), (INT4, 1): (8, 16), (W16, 1): (32,), (W16, 0): (64,)}


class CudaSizes(NamedTuple):
    """A linear as its kernels see it."""

    K: int
    rows: tuple[int, ...]  # out_features of each fused part
    values: int  # W16, INT8, INT4, or DENSE for the adapter's Q
    group_steps: int  # steps of 32 inputs that a scale covers
    rank: int
    adapter_steps: int  # rank of the adapter / 16, rounded up
    planes: int = 1  # sign planes

    @property
    def N(self) -> int:
        """out_features of all parts."""
        return sum(self.rows)

    @property
    def k_blocks(self) -> int:
        return ceil_div(self.K, BLOCK_INPUTS)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the stream, 32 rows x 128 inputs."""
        scales = 4 // self.group_steps * 2 * BLOCK_ROWS if self.values in (INT8, INT4) else 0
        metadata = 0 if self.values == DENSE else METADATA_BYTES
        signs = self.planes * SIGN_BYTES if self.rank else 0
        return VALUE_BYTES[self.values] + metadata + signs + scales

    @property
    def stream_bytes(self) -> int:
        return sum(self.row_tiles(BLOCK_ROWS)) * self.k_blocks * self.block_bytes

    def row_tiles(self, rows: int) -> list[int]:
        """How many tiles of `rows` rows each part takes."""
        return [ceil_div(part, rows) for part in self.rows]

    def warp_tokens(self, tall: bool = False) -> tuple[int, ...]:
        """The tokens of a warp in the compiled kernels; tall: those of 64 rows per warp."""
        if self.planes > 1:
            return () if tall else tuple(PLANES_REGISTERS)
        return TALL.get((self.values, self.rank), ()) if tall else tuple(REGISTERS)

    def registers(self, tall: bool) -> dict[int, int]:
        """The registers of a thread by the tokens of a warp."""
        if tall:
            return TALL_REGISTERS
        return PLANES_REGISTERS if self.planes > 1 else REGISTERS

    def adapter(self) -> CudaSizes:
        """The sizes of z = x Q, the linear that comes first where there is an adapter."""
        return CudaSizes(self.K, (16 * self.adapter_steps * len(self.rows),), DENSE, 4, 0, 0)


def sizes_of(state: CudaState) -> CudaSizes:
    """The sizes of a prepared weight, as plans want them."""
    return CudaSizes(
        K=state.in_features,
        rows=tuple(state.rows),
        values=state.values,
        group_steps=state.group_steps,
        rank=0 if state.V is None else state.V.shape[1],
        adapter_steps=0 if state.P is None else state.P.shape[1],
        planes=state.planes,
    )


@dataclass(frozen=True)
class Tile:
    """The warps of a CTA along rows, tokens and K (its groups): at most eight.

    A warp holds 32 or 64 rows and 8, 16, 32 or 64 tokens.
    """

    warp_rows: int
    warp_tokens: int
    warp_inputs: int
    reason: str
    row_tiles: int = 2  # of 16 rows that a warp holds

    @property
    def tall(self) -> bool:
        """Whether a warp holds 64 rows."""
        return self.row_tiles == 4

    @property
    def rows(self) -> int:
        return TILE_ROWS * self.row_tiles * self.warp_rows

    @property
    def row_pairs(self) -> int:
        """The row pairs of a CTA: blocks of the stream that it reads per K block."""
        return self.rows // BLOCK_ROWS

    @property
    def threads(self) -> int:
        return 32 * self.warp_rows * self.warp_tokens * self.warp_inputs


# In the tables below t stands for the tokens of a warp.
# fmt: off
SPLIT_TILES = (  # up to 64 tokens
    Tile(1, 1, 8, "32 rows: most CTAs, so that few output features still fill the device"),
    Tile(2, 1, 4, "64 rows: activations are read half as often"),
    Tile(4, 1, 2, "128 rows: a quarter of the activation reads, for many features and tokens"),
    Tile(1, 1, 4, "32 rows, four warps: fits 99 KB of shared memory, or two CTAs a multiprocessor"),
    Tile(2, 1, 2, "64 rows, four warps: the same with half the activation reads"),
    Tile(4, 1, 1, "128 rows, four warps: many tokens in 99 KB of shared memory"),
    Tile(1, 2, 4, "32 rows x 2 t tokens: more warps for many tokens"),
    Tile(2, 2, 2, "64 rows x 2 t tokens, more warps for many tokens"),
    Tile(2, 1, 1, "64 rows, two warps: the least shared memory"),
)
WHOLE_TILES = (  # above 64 tokens; t is 32 or 64
    Tile(4, 2, 1, "128 rows x 2 t tokens: most products per byte of shared memory"),
    Tile(8, 1, 1, "256 rows x t tokens: half the activations in shared memory, where it is small"),
    Tile(2, 4, 1, "64 rows x 4 t tokens: for few output features"),
    Tile(4, 1, 1, "128 rows x t tokens, four warps: two CTAs a multiprocessor"),
    Tile(2, 2, 1, "64 rows x 2 t tokens, four warps: more CTAs for few output features"),
    Tile(2, 1, 1, "64 rows x t tokens, two warps: most CTAs"),
)
TALL_TILES = (  # 64 rows per warp: half the reads of activations
    Tile(1, 1, 8, "64 rows, one tall warp each K group", 4),
    Tile(1, 1, 4, "64 rows, four tall warps: two CTAs a multiprocessor", 4),
    Tile(2, 1, 4, "128 rows: activations are staged half as often", 4),
    Tile(2, 1, 2, "128 rows, four tall warps", 4),
    Tile(1, 2, 4, "64 rows x 2 t tokens", 4),
    Tile(1, 2, 2, "64 rows x 2 t tokens, four tall warps", 4),
    Tile(2, 2, 2, "128 rows x 2 t tokens", 4),
    Tile(2, 2, 1, "128 rows x 2 t tokens, four tall warps", 4),
    Tile(4, 2, 1, "256 rows x 2 t tokens: for many output features", 4),
    Tile(4, 1, 1, "256 rows x t tokens: where shared memory is small", 4),
)
# fmt: on


def stage_bytes(sizes: CudaSizes, tile: Tile, tokens: int, M: int) -> int:
    """Bytes of shared memory for one K block, as `plan_stage` of csrc/cuda/plan.cuh has it.

    tokens: of a warp. Kernels of fewer than 32 stage no more tokens than there are.
    """
    staged = tile.warp_tokens * tokens
    if tokens < 32:
        staged = min(staged, M)
    activations = (staged + sizes.rank) * TOKEN_ROW_BYTES
    return ceil_div(activations + tile.row_pairs * sizes.block_bytes, 256) * 256


def sums_bytes(tile: Tile, tokens: int) -> int:
    """Bytes of the sums that a CTA's groups add at the end, in the memory of the stages."""
    return tile.warp_inputs * tokens * tile.warp_tokens * (tile.rows + 4) * 4
