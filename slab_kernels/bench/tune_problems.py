"""What `slab-kernels tune` tunes: linears at token counts that one row serves, and candidates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..backends.triton import bits_of, configs, launch
from ..backends.triton.rows import SIXTEEN_BITS, Row, TileConfig, TritonDevice, TritonSizes
from ..format import PackedLayout, ceil_div

# These tiles lie around the defaults in every direction. Each is block_n, block_k, warps, stages.
FEW_TOKENS = (
    (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 64, 4, 4), (64, 256, 8, 3),
    (32, 128, 4, 4), (32, 128, 2, 4), (32, 256, 4, 3), (16, 256, 4, 4), (128, 64, 4, 4),
    (128, 128, 8, 3),
)  # fmt: skip
# The same for more than 64 tokens, where each begins with its block_m.
MANY_TOKENS = (
    (64, 64, 128, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3),
    (128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 32, 8, 4),
    (128, 256, 32, 8, 3), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3), (256, 128, 32, 8, 4),
)  # fmt: skip
FILLS = (0, 1, 2, 4)  # programs per multiprocessor; those that split K alike are timed once
SPLIT_UP_TO = 256  # tokens: more of them fill any GPU without splitting K


@dataclass(frozen=True)
class Problem:
    """A linear y[m,N] = x[m,K] W.T at token counts that one row serves."""

    layout: PackedLayout
    dtype: torch.dtype  # of the activations
    tokens: tuple[int, ...]  # those timed, ascending
    above: int  # The row serves more tokens than this,
    up_to: int | None  # and at most this many; None: any.

    @property
    def sizes(self) -> TritonSizes:
        layout = self.layout
        return TritonSizes(
            K=layout.in_features,
            rows=(layout.out_features,),
            values=launch.held_as(layout.values, self.dtype),
            group_size=layout.group_size or 0,
            rank=layout.rank,
            adapter_rank=ceil_div(layout.adapter_rank, 16) * 16,
        )

    def row(self, config: TileConfig) -> Row:
        """`config` as a row for this problem."""
        bits, values = bits_of(self.dtype), self.sizes.values
        # Stored values become the activations' type, so that one row serves both types.
        served = SIXTEEN_BITS if bits == 16 and values in SIXTEEN_BITS else (values,)
        return Row(
            config,
            tokens=self.up_to,
            bits=bits,
            values=served,
            rank=self.layout.rank,
            N=self.layout.out_features,
            K=self.layout.in_features,
            above=self.above,
        )

    def __str__(self) -> str:
        layout, tokens = self.layout, ",".join(map(str, self.tokens))
        return f"{layout.out_features}×{layout.in_features} {layout.values} m={tokens}"


def candidates(sizes: TritonSizes, M: int, bits: int, device: TritonDevice) -> list[TileConfig]:
    """Configurations worth timing at M tokens of `bits`-bit activations.

    Each is another program or another split of K.
    """
    if M <= 64:
        block_m = 16 if M <= 16 else 32 if M <= 32 else 64
        tiles = [(block_m, *tile) for tile in FEW_TOKENS]
    else:
        tiles = list(MANY_TOKENS)
    if bits == 32:  # An input takes twice the room.
        halved = [(m, n, max(32, k // 2), *rest) for m, n, k, *rest in tiles]
        tiles = list(dict.fromkeys(halved))  # type: ignore[arg-type]  # rest is warps and stages
    fills = FILLS if M <= SPLIT_UP_TO else FILLS[:1]
    found: dict[tuple, TileConfig] = {}
    for (m, n, k, warps, stages), fill in itertools.product(tiles, fills):
        config = TileConfig(m, n, k, warps, stages, fill)
        program = (m, n, k, warps, stages, configs.splits(sizes, M, config, device))
        found.setdefault(program, config)
    if bits == 16 and M > 64:  # For fp32 torch's matmul may use TF32.
        return [*found.values(), TileConfig(rebuild=True)]
    return list(found.values())
