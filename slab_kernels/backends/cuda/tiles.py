"""A linear's sizes as its CUDA kernels see them, and the tiles that a CTA may have.

The warps of a CTA share its tile along rows and tokens; those that remain are groups, each of which
takes every n-th K block and whose sums are added at the end. There are four main loops:

narrow  up to 16 tokens, as long as tokens x (1 + rank) are at most the 8 columns of one product: x
        and v * x of the CTA's share of K stand in shared memory before the loop, and each warp has
        a ring of weights of its own
wide    up to 16 tokens otherwise: x travels in the ring with the weights
many    17 tokens and more: kept pairs and signs are two products, both by sparse `mma.sync`
rebuild 17 tokens and more, where there are signs: the weight is rebuilt in registers for one dense
        product

Hopper has kernels of its own for 17 tokens and more (prefill.py).
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

NARROW, WIDE, MANY, REBUILD = LOOPS = ("narrow", "wide", "many", "rebuild")
DECODE, FEW = 16, 64  # tokens up to which regimes reach: narrow and wide, the others, the others
MOST_RANK = 16  # Every stage of the wide loop holds this many rows of V beside the activations.
LEAST_STAGES, MOST_STAGES = 2, 4
TOKEN_ROW_BYTES = 2 * BLOCK_INPUTS  # of one token's activations, or of a row of V, per K block
SELECTOR_BYTES = 128  # of the table that the loop which rebuilds keeps
COLUMNS = 8  # of one tensor-core product: tokens, or a token's products with a row of V
COLUMN_BYTES = TOKEN_ROW_BYTES + 16  # a column's row of the narrow loop: no bank conflicts
# Of a CTA of the wide loop where the rank is above 1: a column for each token and rank.
MOST_SIGN_COLUMNS = 32
# The registers that a thread takes at most. In narrow and wide loops all kernels may take:
DECODE_REGISTERS = 128
# In the loop for many tokens, by the tokens of a warp: one family of kernels each.
REGISTERS = {32: 192, 64: 255}
TALL_REGISTERS = {32: 208, 64: 255}  # 64 rows per warp
# Kernels with several sign planes keep the sums of the planes apart, so 64 tokens do not fit.
PLANES_REGISTERS = {32: 248}
# The loop that rebuilds the weight holds the sums of all tokens of a warp, and nothing twice.
REBUILD_REGISTERS = {64: 255, 128: 255}
# By value type and rank, the tokens of a warp for which a kernel with 64 rows per warp exists.
TALL = {(W16, 1): (32,), (W16, 0): (64,)}


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

    @property
    def most_narrow_tokens(self) -> int:
        """The tokens up to which the narrow loop serves; 0 if it never does."""
        return 0 if self.values == DENSE else COLUMNS // (1 + self.rank)

    @property
    def wide_tokens(self) -> int:
        """The tokens of a CTA in the wide loop at most: all of decoding, if the rank is at most
        1."""
        return DECODE if self.rank <= 1 else min(COLUMNS, MOST_SIGN_COLUMNS // self.rank)

    def warp_tokens(self, tall: bool = False) -> tuple[int, ...]:
        """The tokens of a warp in the kernels for many; tall: those of 64 rows per warp."""
        if self.planes > 1:
            return () if tall else tuple(PLANES_REGISTERS)
        return TALL.get((self.values, self.rank), ()) if tall else tuple(REGISTERS)

    def registers(self, tile: Tile, tokens: int) -> int:
        """The registers of a thread. tokens: of a warp."""
        if tile.loop == REBUILD:
            return REBUILD_REGISTERS[tokens]
        if tile.loop != MANY:
            return DECODE_REGISTERS
        if tile.tall:
            return TALL_REGISTERS[tokens]
        return (PLANES_REGISTERS if self.planes > 1 else REGISTERS)[tokens]

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
    """The warps of a CTA along rows, tokens and K (its groups).

    In the loop for many tokens they are at most eight, and a warp holds 32 or 64 rows and 32 or 64
    tokens; where the weight is rebuilt, too, but 32 rows and 64 or 128 tokens. In narrow and wide
    they are at most sixteen, and each holds 32 rows and all tokens of the CTA.
    """

    warp_rows: int
    warp_tokens: int
    warp_inputs: int
    reason: str
    row_tiles: int = 2  # of 16 rows that a warp holds
    loop: str = MANY

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
    def warps(self) -> int:
        return self.warp_rows * self.warp_tokens * self.warp_inputs

    @property
    def threads(self) -> int:
        return 32 * self.warps


# fmt: off
DECODE_WARPS = (  # along rows and K, up to 16 tokens, for both loops
    (1, 16, "32 rows, sixteen K groups: most warps, where few output features make few CTAs"),
    (2, 8, "64 rows, sixteen warps: activations are read half as often"),
    (4, 4, "128 rows, sixteen warps: a quarter of the activation reads"),
    (8, 2, "256 rows, sixteen warps: an eighth of the activation reads"),
    (1, 8, "32 rows, eight K groups: two CTAs a multiprocessor, or half the shared memory"),
    (2, 4, "64 rows, eight warps: the same with half the activation reads"),
    (4, 2, "128 rows, eight warps: a quarter of the activation reads"),
    (8, 1, "256 rows, eight warps: an eighth of the activation reads, for many output features"),
    (1, 4, "32 rows, four warps: four CTAs a multiprocessor, or little shared memory"),
    (2, 2, "64 rows, four warps: the same with half the activation reads"),
    (4, 1, "128 rows, four warps: the same with a quarter of the activation reads"),
    (2, 1, "64 rows, two warps: the least shared memory"),
)
NARROW_TILES, WIDE_TILES = (
    tuple(Tile(rows, 1, inputs, reason, loop=loop) for rows, inputs, reason in DECODE_WARPS)
    for loop in (NARROW, WIDE)
)
# In the tables below t stands for the tokens of a warp.
SPLIT_TILES = (  # 17 to 64 tokens
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
REBUILD_SPLIT_TILES = (  # 17 to 64 tokens, with warps of 64
    Tile(1, 1, 8, "32 rows: most CTAs, for few output features", 2, REBUILD),
    Tile(2, 1, 4, "64 rows: activations are read half as often", 2, REBUILD),
    Tile(4, 1, 2, "128 rows: a quarter of the activation reads", 2, REBUILD),
    Tile(1, 1, 4, "32 rows, four warps: two CTAs a multiprocessor", 2, REBUILD),
    Tile(2, 1, 2, "64 rows, four warps: the same with half the activation reads", 2, REBUILD),
    Tile(4, 1, 1, "128 rows, four warps: a quarter of the activation reads", 2, REBUILD),
)
REBUILD_WHOLE_TILES = (  # above 64 tokens; t is 64 or 128
    Tile(4, 2, 1, "128 rows x 2 t tokens: most products per byte of shared memory", 2, REBUILD),
    Tile(8, 1, 1, "256 rows x t tokens: half the activation reads", 2, REBUILD),
    Tile(4, 1, 1, "128 rows x t tokens, four warps: two CTAs a multiprocessor", 2, REBUILD),
    Tile(2, 2, 1, "64 rows x 2 t tokens, four warps: for few output features", 2, REBUILD),
    Tile(2, 1, 1, "64 rows x t tokens, two warps: most CTAs", 2, REBUILD),
)
# fmt: on


def stage_bytes(sizes: CudaSizes, tile: Tile, tokens: int) -> int:
    """Bytes of shared memory for one K block of a ring.

    tokens: of a warp. A ring of the narrow loop is a warp's and holds nothing but weights; the
    others are a K group's and hold activations and V, too. The wide loop reads rows of tokens that
    do not exist, so they lie within the stage (csrc/cuda/wide_stage.cuh).
    """
    if tile.loop == NARROW:
        return sizes.block_bytes
    activations = (tile.warp_tokens * tokens + sizes.rank) * TOKEN_ROW_BYTES
    unit = 128 if tile.loop == WIDE else 256
    stage = ceil_div(activations + tile.row_pairs * sizes.block_bytes, unit) * unit
    if tile.loop == WIDE:
        stage = max(stage, TOKEN_ROW_BYTES * (DECODE if sizes.rank <= 1 else COLUMNS))
    return stage


def rings(tile: Tile) -> int:
    """The rings of a CTA."""
    return tile.warps if tile.loop == NARROW else tile.warp_inputs


def factors_bytes(sizes: CudaSizes, tile: Tile) -> int:
    """Bytes of u of a CTA's rows, which narrow and wide keep beside everything else. Where the
    weight is rebuilt, the rows' powers and a table of selectors are with it
    (csrc/cuda/rebuild.cuh)."""
    if tile.loop == REBUILD:
        return SELECTOR_BYTES + 4 * tile.rows * (1 + sizes.rank)
    return 0 if tile.loop == MANY else 4 * tile.rows * sizes.rank


def columns_bytes(sizes: CudaSizes, tile: Tile, tokens: int, splits: int) -> int:
    """Bytes of x and v * x of a CTA's whole share of K, in the narrow loop alone."""
    if tile.loop != NARROW:
        return 0
    return ceil_div(sizes.k_blocks, splits) * tokens * (1 + sizes.rank) * COLUMN_BYTES


def sums_bytes(sizes: CudaSizes, tile: Tile, tokens: int) -> int:
    """Bytes of the sums that a CTA's groups add at the end, in the memory of rings and columns.

    Narrow and wide keep the sums of each rank's signs apart.
    """
    apart = 1 if tile.loop in (MANY, REBUILD) else 1 + sizes.rank
    columns = tokens * tile.warp_tokens * apart
    return tile.warp_inputs * columns * (tile.rows + 4) * 4
