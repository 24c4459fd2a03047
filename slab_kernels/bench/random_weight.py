"""The random weight that is timed: that of `testing`, with a sign term as large as a real one's."""

from __future__ import annotations

import torch

from ..format import PackedLayout, PackedWeight, unpack
from ..testing import random_packed

# The mean magnitude of the two entries of four that are pruned by magnitude, over the root mean
# square of those that are kept, of Gaussian numbers.
PRUNED_TO_KEPT = 0.31
SPREAD = 0.3  # of U and V around it, to either side
LOOKED_AT = 64  # rows


def random_weight(
    layout: PackedLayout, seed: int = 0, device: torch.device | str = "cpu"
) -> PackedWeight:
    """The same packed weight every time, whose |U V^T| is what pruned entries are beside kept ones.

    `random_packed` has products of normal numbers there, some of them far larger than any kept
    value, as no decomposition has. int8 kernels give such rows a second grid, which takes longer.
    """
    packed = random_packed(layout, seed, device=device)
    if not layout.rank:
        return packed
    kept = unpack(packed.narrow_out(0, min(LOOKED_AT, layout.out_features))).S
    size = PRUNED_TO_KEPT * kept[kept != 0].float().square().mean().sqrt()
    generator = torch.Generator(device).manual_seed(seed + 1)
    for factor in (packed.U, packed.V):
        assert factor is not None
        around = torch.rand(factor.shape, generator=generator, device=device) * 2 - 1
        numbers = (1 + SPREAD * around) * (size / layout.rank).sqrt()
        factor.copy_(torch.where(factor == 0, 0.0, numbers))
    return packed
