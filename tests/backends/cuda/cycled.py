"""Packed weights of small integers in which every place of a block of the CUDA stream meets every
pattern with every pair of signs, every level, and every code of int4.
"""

from __future__ import annotations

import torch

from slab_kernels.backends.cuda.layout import BLOCK_INPUTS, BLOCK_ROWS
from slab_kernels.format import INTEGER_RANGES, PackedLayout, PackedWeight, bits
from slab_kernels.testing import random_packed

# Four row pairs and six K blocks: 24 blocks, as many as there are patterns times pairs of signs.
ROWS, INPUTS = 4 * BLOCK_ROWS, 6 * BLOCK_INPUTS


def cycled(layout: PackedLayout) -> PackedWeight:
    """A weight of `layout`, ROWS x INPUTS, with patterns, signs and codes that follow a count.

    The count of group s of row r grows by one with both, and from each of the 24 blocks to the
    next by one again: so every place meets 24 counts in a row.
    """
    assert (layout.out_features, layout.in_features) == (ROWS, INPUTS)
    row, group = torch.arange(ROWS)[:, None], torch.arange(INPUTS // 4)
    groups = BLOCK_INPUTS // 4
    block = row // BLOCK_ROWS + ROWS // BLOCK_ROWS * (group // groups)
    count = row % BLOCK_ROWS + group % groups + block  # [rows, groups of four inputs]
    packed = random_packed(layout, seed=layout.rank, integers=True)
    patterns = torch.tensor(bits.LEGAL_NIBBLES, dtype=torch.uint8)
    nibbles = patterns[count % len(patterns)]
    packed.metadata.copy_(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
    if packed.signs is not None:
        levels = 2**layout.planes
        pair = (count // 6, count // 12) if levels == 2 else (count, 3 * count + 1)
        odd = 2 * (torch.stack(pair, -1).flatten(1) % levels) - levels + 1
        packed.signs.copy_(bits.pack_planes(odd, layout.planes))
    if layout.values in INTEGER_RANGES:
        low, high = INTEGER_RANGES[layout.values]
        entry = torch.stack((count, count + 5), -1)
        if layout.values == "int8":  # 255 codes, too many for 24 blocks
            entry = 11 * entry + 3 * row[..., None] + group[:, None]
        q = (entry % (high - low + 1) + low).flatten(1).to(torch.int8)
        packed.values.copy_(bits.pack_values(q, layout.values))
    return packed
