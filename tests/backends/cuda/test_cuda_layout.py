"""The CUDA stream, number by number, against the rules in the head of csrc/cuda/params.h.

The rules are written down here once more, as numpy arrays of places; nothing of layout.py's
permutations is used. The weights are those of cycled.py: every place of a block meets every pattern
with every pair of signs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cycled import INPUTS, ROWS, cycled
from test_cuda_kernels import DTYPES

from slab_kernels.backends import factors
from slab_kernels.backends.cuda import layout, unpack
from slab_kernels.format import INTEGER_RANGES, PackedLayout, PackedWeight, bits, plane_unit
from slab_kernels.testing import random_packed

PAIRS, K_BLOCKS = ROWS // 32, INPUTS // 128
# A place of a block: tile, g, t, step, c, h and the half of register i = 2 c + h in lane 4 g + t.
TILE, G, T, STEP, C, H, HALF = np.indices((2, 8, 4, 4, 2, 2, 2))
LANE, I = 4 * G + T, 2 * C + H  # noqa: E741
ROW = 16 * TILE + G + 8 * H  # of the pair
GROUP = 8 * STEP + 4 * C + T  # of four inputs
ENTRY = 2 * GROUP + HALF  # kept or pruned entries of a row, two in each group
VALUE_BYTES = {layout.W16: 2048, layout.INT8: 1024, layout.INT4: 512, layout.DENSE: 4096}


def blocks(t: torch.Tensor, per_block: int) -> np.ndarray:
    """[rows, numbers of a row] -> [row pairs, K blocks, 32 rows, numbers of a row and block]."""
    return t.numpy().reshape(PAIRS, 32, K_BLOCKS, per_block).transpose(0, 2, 1, 3)


def words(stream: torch.Tensor, at: np.ndarray, kind: type = np.uint32) -> np.ndarray:
    """The numbers of a type that stand at these bytes of every block."""
    assert not (at % np.dtype(kind).itemsize).any()
    return stream.numpy().view(kind)[:, :, at // np.dtype(kind).itemsize]


def prepared(dtype, values, group_size=None, rank=1, planes=1):
    packed = cycled(PackedLayout(ROWS, INPUTS, values, group_size, rank, planes=planes))
    state = layout.prepare((packed,), dtype)
    return packed, state, 2 * VALUE_BYTES[state.values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["fp16", "bf16", "int8", "int4", "int3"])
def test_kept_values(values, dtype):
    packed, state, _ = prepared(dtype, values, None if values in ("fp16", "bf16") else 128)
    kept = bits.unpack_values(packed.values, values)
    if state.values == layout.W16:
        at = 2048 * TILE + 512 * STEP + 16 * LANE + 4 * I + 2 * HALF
        found, kept = words(state.stream, at, np.int16), kept.to(dtype).view(torch.int16)
    elif state.values == layout.INT8:
        word = 2 * (STEP % 2) + C
        at = 1024 * TILE + 512 * (STEP // 2) + 16 * LANE + 4 * word + 2 * HALF + H
        found = words(state.stream, at, np.uint8).astype(int) - 128
    else:
        word = words(state.stream, 512 * TILE + 16 * LANE + 4 * STEP).astype(np.uint64)
        bit = (2 + 4 * I + 16 * HALF) % 32
        found = (word | word << np.uint64(32)) >> bit.astype(np.uint64) & np.uint64(15)
        found = found.astype(int) - 8
    assert np.array_equal(found, blocks(kept, 64)[:, :, ROW, ENTRY])


@pytest.mark.parametrize("values, group_size", [("fp16", None), ("int8", 64), ("int4", None)])
def test_metadata(values, group_size):
    packed, state, values_end = prepared(torch.float16, values, group_size)
    half = STEP // 2  # Which word: selector 0 and 1 of this one are steps 2 half and 2 half + 1.
    holder = 4 * G + 2 * (STEP % 2) + GROUP % 8 // 4
    word = words(state.stream, values_end + 16 * holder + 8 * TILE + 4 * half)
    found = word >> (16 * H + 4 * (GROUP % 4)).astype(np.uint32) & 15
    nibbles = torch.stack((packed.metadata & 15, packed.metadata >> 4), -1).flatten(1)
    assert np.array_equal(found, blocks(nibbles, 32)[:, :, ROW, GROUP])
    assert set(np.unique(found)) == set(bits.LEGAL_NIBBLES)


@pytest.mark.parametrize("values, group_size", [("fp16", None), ("int8", 128), ("int4", 32)])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_signs(values, group_size, planes):
    packed, state, values_end = prepared(torch.float16, values, group_size, planes=planes)
    signs_at = values_end + 512
    if planes == 1:
        word = words(state.stream, signs_at + 8 * LANE + 4 * TILE)
        negative = word << (4 * STEP + I).astype(np.uint32) >> (15 + 16 * HALF).astype(np.uint32)
        level = 1.0 - 2.0 * (negative & 1)
    else:
        word = words(state.stream, signs_at + 16 * LANE + 8 * TILE + 4 * (STEP // 2))
        index = word >> (8 * (STEP % 2) + 2 * I + 16 * HALF).astype(np.uint32) & 3
        level = 1.5 - index
        if planes == 3:
            word = words(state.stream, signs_at + 512 + 8 * LANE + 4 * TILE)
            third = word >> (4 * STEP + C + 2 * H + 16 * HALF).astype(np.uint32) & 1
            level = 1.75 - index - 0.5 * third
    expected = bits.unpack_planes(packed.signs, planes) * plane_unit(planes)
    assert np.array_equal(level, blocks(expected, 64)[:, :, ROW, ENTRY])
    assert len(np.unique(level)) == 2**planes


@pytest.mark.parametrize("planes", [0, 1, 2, 3])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales(dtype, values, group_size, planes):
    """Those of int4 are divided by what its codes are too large by in the kernels."""
    rank, planes = min(1, planes), max(1, planes)
    packed, _, values_end = prepared(dtype, values, group_size, rank, planes)
    generator = torch.Generator().manual_seed(1)
    packed.scales.copy_(torch.randn(packed.scales.shape, generator=generator))
    state = layout.prepare((packed,), dtype)
    groups = 128 // (group_size or 128)
    scale, tile, g, h = np.indices((groups, 2, 8, 2))
    scales_at = values_end + 512 + rank * planes * 256
    assert state.stream.shape[2] == scales_at + 64 * groups
    found = words(state.stream, scales_at + 64 * scale + 8 * g + 4 * tile + 2 * h, np.uint16)
    found = (found.astype(np.uint32) << 16).view(np.float32)
    if values == "int4":
        found = found * np.where((dtype == torch.float16) & (h == 1), 64, 4)
    scales = packed.scales.float()
    scales = scales if group_size else scales.expand(-1, K_BLOCKS)
    assert np.array_equal(found, blocks(scales, groups)[:, :, 16 * tile + g + 8 * h, scale])


@pytest.mark.parametrize("rank, adapter_rank", [(1, 16), (3, 20), (16, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors(dtype, rank, adapter_rank):
    packed = random_packed(PackedLayout(ROWS, INPUTS, "fp16", None, rank, adapter_rank))
    state = layout.prepare((packed,), dtype)
    U, V = factors.sign(packed, dtype)
    both = state.U.view(torch.int16).view(dtype).view(ROWS, rank, 2)
    assert torch.equal(both[..., 0], U) and torch.equal(both[..., 1], U)
    assert torch.equal(state.V, V.T[None])
    P, Q = (t.float().numpy() for t in factors.adapter(packed, dtype))
    steps = -(-adapter_rank // 16)
    P = np.pad(P, ((0, 0), (0, 16 * steps - adapter_rank)))
    row_tile, step, g, t, c, h, half = np.indices((2 * PAIRS, steps, 8, 4, 2, 2, 2))
    expected = P[16 * row_tile + g + 8 * h, 16 * step + 2 * t + 8 * c + half]
    assert np.array_equal(state.P.view(dtype).float().numpy().ravel(), expected.ravel())
    pairs = -(-steps // 2)  # An odd number of tiles ends with one of zeros.
    Q = np.pad(Q.T, ((0, 32 * pairs - adapter_rank), (0, 0)))
    shape = (pairs, K_BLOCKS, 2, 8, 8, 4, 2, 2, 2)
    pair, k, tile, step, g, t, c, h, half = np.indices(shape)  # steps of 16 inputs
    expected = Q[32 * pair + 16 * tile + g + 8 * h, 128 * k + 16 * step + 2 * t + 8 * c + half]
    assert state.Q.shape == (pairs, K_BLOCKS, 8192)
    assert np.array_equal(state.Q.view(dtype).float().numpy().ravel(), expected.ravel())


@pytest.mark.parametrize("values", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_zero_with_legal_patterns(values, dtype):
    """Rows up to the pair's end and inputs up to the block's end: codes and scales of zero would
    still meet activations, so nothing there may be a NaN."""
    scaled = values in INTEGER_RANGES
    packed: PackedWeight = random_packed(PackedLayout(35, 140, values, 32 if scaled else None, 1))
    state = layout.prepare((packed,), dtype)
    assert state.stream.shape[:2] == (2, 2) and state.U.shape == (64, 1)
    whole = unpack.dense(state._replace(in_features=256, rows=(64,)))
    assert bool((whole[35:] == 0).all() and (whole[:, 140:] == 0).all())
    stored = state.stream.numpy()[:, :, 2 * VALUE_BYTES[state.values] :][:, :, :512]
    assert set(np.unique((stored & 15, stored >> 4))) <= set(bits.LEGAL_NIBBLES)
