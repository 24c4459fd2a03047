"""backends/cuda/prefill_launch.py on a device that only remembers: which matrices get a tensor map,
and what every launch is told."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import FAMILIES, H100, Family, activations, dealt, forced

from slab_kernels.backends.cuda import layout, prefill, sizes_of
from slab_kernels.backends.cuda.device import CudaDevice
from slab_kernels.backends.cuda.launch import LinearParams, linear
from slab_kernels.backends.cuda.prefill_launch import PrefillParams
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed


class Remembered:
    """A device, all that was queued on it, and the matrices that were described to it."""

    def __init__(self):
        self.queued: list[tuple] = []
        self.maps: list[tuple] = []
        self.device = CudaDevice(H100, self._queue, self._map)

    def _queue(self, name, grid, block, shared_bytes, params, dependent):
        assert dependent
        kept = type(params).from_buffer_copy(params)
        self.queued.append((name, grid, block, shared_bytes, kept))

    def _map(self, *asked) -> bytes:
        self.maps.append(asked)
        return bytes([len(self.maps)] * 128)


def prepared(family: Family, adapter_rank: int, rows: tuple[int, ...] = (277, 40)):
    shapes = [
        PackedLayout(n, 390, "int4", 64, family.rank, adapter_rank, planes=family.planes)
        for n in rows
    ]
    parts = [random_packed(shape, seed=shape.out_features) for shape in shapes]
    return layout.prepare(parts, torch.float16)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("adapter_rank", [0, 20])
def test_what_a_call_is_told(family, adapter_rank):
    state, remembered, M = prepared(family, adapter_rank), Remembered(), 150
    x, bias = activations(390, M, torch.float16, False), torch.randn(317).bfloat16()
    with forced(family, "both", None):
        y = linear(x, state, bias, remembered.device)
        plan = dealt(sizes_of(state), M, family, "both", None)
    *before, (name, grid, block, shared, params), added = remembered.queued
    assert name.startswith(f"prefill_{family.kind}_fp16_int4") and y.shape == (M, 317)
    assert (grid, block, shared) == (plan.grid, plan.block, plan.shared_bytes)
    assert grid[0] == plan.clusters * params.cluster_ctas and shared <= H100.shared_limit
    # x has rows of 390 numbers, which no box could begin at: it is copied to rows of 392.
    maps = [(*asked[1:], asked[0] % 16) for asked in remembered.maps]
    box = family.tokens // plan.pair
    assert maps[0] == (390, M, 784, box, torch.float16, 0)
    assert bytes(params.x_map) == bytes([1] * 128)
    if adapter_rank:
        assert maps[1:] == [(64, M, 128, box, torch.float16, 0)]  # two parts of 32
        assert bytes(params.z_map) == bytes([2] * 128) and params.adapter_p == state.P.data_ptr()
        made = before[0][-1]
        assert isinstance(made, LinearParams) and made.y == remembered.maps[1][0]
        assert made.bias_type == 0 and made.tokens == M and made.out_features == 64
    else:
        assert not any(params.z_map) and not before and len(maps) == 1
    assert (params.tokens, params.out_features, params.num_k_blocks) == (M, 317, 4)
    assert (params.tile_tokens, params.tile_rows) == (family.tokens, plan.rows)
    assert (params.stream, params.y) == (state.stream.data_ptr(), y.data_ptr())
    assert (params.bias, params.bias_type) == (bias.data_ptr(), 3)
    assert params.powers == state.powers.data_ptr()
    assert bool(params.u and params.v) == bool(family.rank)
    tiles = [-(-n // plan.rows) for n in (277, 40)]
    assert list(params.part_tile) == [0, tiles[0], *[sum(tiles)] * 3]
    assert list(params.part_pair) == [0, 9, 11, 11, 11] and list(params.part_row)[:3] == [
        0,
        277,
        317,
    ]
    units = params.clusters * params.tail_share + params.tail_more
    assert units == (plan.tiles - params.whole_tiles) * 4 and params.partial % 16 == 0
    assert added[0] == "prefill_reduce_fp16" and bytes(added[-1]) == bytes(params)
    row_tiles = plan.tail_tiles * plan.pair * plan.rows // 16
    assert added[1:4] == ((row_tiles, -(-family.tokens // 64), 1), (128, 1, 1), 0)


def test_calls_share_nothing_that_a_kernel_writes():
    """So that streams may overlap and graphs may be replayed: maps and pointers are each call's
    own, and what follows from sizes is made once."""
    family = Family("one", 64, 0, 1)
    state, remembered = prepared(family, 20), Remembered()
    xs = [activations(390, 40, torch.float16, integers) for integers in (True, False)]
    with forced(family, "tail"):
        results = [linear(x, state, None, remembered.device) for x in xs]
    products = [params for name, *_, params in remembered.queued if name.startswith("prefill_one")]
    assert results[0].data_ptr() != results[1].data_ptr()
    assert [params.y for params in products] == [y.data_ptr() for y in results]
    assert bytes(products[0].x_map) != bytes(products[1].x_map)
    after = PrefillParams.tokens.offset
    assert bytes(products[0])[after:] == bytes(products[1])[after:]


def test_a_plan_is_worked_out_once(monkeypatch):
    """The second call with so many tokens asks nothing of the plan's arithmetic."""
    family, remembered = Family("one", 64, 0, 1), Remembered()
    state, x = prepared(family, 0), activations(390, 40, torch.float16, False)
    with forced(family, "tail"):
        linear(x, state, None, remembered.device)
        for name in ("ceil_div", "head_bytes", "token_stage_bytes", "weight_stage_bytes"):
            monkeypatch.delattr(prefill, name)
        linear(x, state, None, remembered.device)
    half = len(remembered.queued) // 2
    for first, second in zip(remembered.queued[:half], remembered.queued[half:], strict=True):
        assert first[:4] == second[:4]
