"""What every plan of prefill.py promises, derived once more from what csrc/cuda/prefill.h says: it
fits the device, and its items cover every K block of every tile once."""

from __future__ import annotations

import itertools

from slab_kernels.backends.cuda.gpus import Gpu
from slab_kernels.backends.cuda.layout import INT4, INT8, W16
from slab_kernels.backends.cuda.prefill import Prefill
from slab_kernels.backends.cuda.tiles import CudaSizes

# Tokens of a CTA and whether any rank is served -> consumer warpgroups, CTAs a multiprocessor, CTAs
# of a cluster, registers of a thread at the launch.
FRAMES = {
    ("one", 64): (2, 2, 1, 80),
    ("one", 128): (2, 1, 1, 168),
    ("one", 256): (2, 1, 2, 168),
    ("both", 64): (2, 2, 1, 80),
    ("rebuild", 64): (2, 2, 1, 80),
    ("rebuild", 128): (4, 1, 1, 96),
    ("rebuild", 256): (2, 1, 2, 168),
    ("any", 64): (2, 2, 1, 80),
    ("any", 128): (2, 1, 1, 168),
}
BITS = {W16: 9, INT8: 5, INT4: 3}  # kept values and metadata, for each weight


def rounded_up(number: int, unit: int) -> int:
    return (number + unit - 1) // unit * unit


def shared_bytes(chosen: Prefill, sizes: CudaSizes) -> int:
    """Dynamic shared memory: what rounding takes, the head, and two rings."""
    integers = sizes.values in (INT8, INT4)
    block = 32 * 128 * BITS[sizes.values] // 8
    block += sizes.planes * 32 * 64 // 8 if sizes.rank else 0
    block += 4 // sizes.group_steps * 64 if integers else 0
    head = rounded_up(128 + 5 * 8 * 8 + 768 * 4 * chosen.groups, 1024)
    assert head == {2: 7168, 4: 13312}[chosen.groups]
    weights = rounded_up(chosen.rows // 32 * block + 256 * sizes.rank, 128)
    tokens = chosen.tokens * 128 * (2 if chosen.kind == "both" else 1)
    return 1024 + head + chosen.token_stages * tokens + chosen.weight_stages * weights


def check_prefill(chosen: Prefill, sizes: CudaSizes, M: int, gpu: Gpu) -> None:
    where = (sizes, M, gpu.name, chosen)
    assert gpu.capability == (9, 0) and (chosen.sizes, chosen.M, chosen.gpu) == (sizes, M, gpu)
    assert chosen.any_rank == (chosen.kind == "rebuild" and (sizes.rank > 1 or sizes.planes > 1))
    assert (chosen.kind == "one") == (sizes.rank == 0), where
    assert chosen.kind != "both" or (sizes.rank, sizes.planes, chosen.tokens) == (1, 1, 64), where
    groups, resident, pair, registers = FRAMES[
        "any" if chosen.any_rank else chosen.kind, chosen.tokens
    ]
    assert (chosen.groups, chosen.resident, chosen.pair) == (groups, resident, pair), where
    assert M > 64 or chosen.tokens == 64, where
    assert chosen.tokens == 64 or chosen.tokens < 2 * M, where
    # the device holds them
    assert chosen.block == (128 * (groups + 1), 1, 1)
    assert chosen.block[0] * registers * resident <= 65536, where
    assert 2 <= chosen.weight_stages <= 8 and 2 <= chosen.token_stages <= 8, where
    assert chosen.shared_bytes == shared_bytes(chosen, sizes), where
    assert chosen.shared_bytes <= gpu.shared_limit, where
    assert (chosen.shared_bytes + 1024) * resident <= gpu.shared_total, where
    # tiles cover rows and tokens, and clusters are no more than the device holds at once
    assert chosen.rows == 64 * groups
    assert chosen.row_tiles == sum(-(-part // chosen.rows) for part in sizes.rows), where
    assert chosen.token_tiles * chosen.tokens >= M > (chosen.token_tiles - 1) * chosen.tokens, where
    assert chosen.tiles == -(-chosen.row_tiles // pair) * chosen.token_tiles, where
    assert chosen.grid == (chosen.clusters * pair, 1, 1), where
    assert 1 <= chosen.clusters <= gpu.multiprocessors * resident // pair, where
    # every cluster has work, and what is dealt is at most one tile's K blocks and a slot's worth
    tail = chosen.tail_tiles * sizes.k_blocks
    assert 0 <= chosen.whole_tiles <= chosen.tiles, where
    assert chosen.tail_share * chosen.clusters + chosen.tail_more == tail, where
    assert 0 <= chosen.tail_more < chosen.clusters, where
    if tail:
        assert chosen.tail_tiles < chosen.clusters and chosen.tail_share >= 4, where
        assert chosen.whole_tiles % chosen.clusters == 0, where
        assert chosen.tail_share + (chosen.tail_more > 0) <= sizes.k_blocks, where
    else:
        assert chosen.clusters <= chosen.tiles and chosen.partial_floats == 0, where
    whole = -(-chosen.whole_tiles // chosen.clusters) * sizes.k_blocks
    assert chosen.most_k_blocks == whole + chosen.tail_share + bool(chosen.tail_more), where
    low, high = chosen.range_us
    assert 1 < low <= high == chosen.microseconds < 1e9, where


def items(chosen: Prefill) -> list[list[tuple[int, int, int]]]:
    """Of each cluster (tile, first K block, behind the last), as the kernels walk them."""
    k_blocks, clusters = chosen.sizes.k_blocks, chosen.clusters
    found = []
    for cluster in range(clusters):
        mine = [(tile, 0, k_blocks) for tile in range(cluster, chosen.whole_tiles, clusters)]
        at, end = (i * chosen.tail_share + min(i, chosen.tail_more) for i in (cluster, cluster + 1))
        while at < end:
            tile, first = divmod(at, k_blocks)
            count = min(k_blocks - first, end - at)
            mine.append((chosen.whole_tiles + tile, first, first + count))
            at += count
        found.append(mine)
    return found


def check_items(chosen: Prefill) -> None:
    """Every K block of every tile once, at most two items of a cluster for the tail, each part of a
    tile in a slot of its own, and every place of rows and tokens once."""
    k_blocks, seen, slots = chosen.sizes.k_blocks, {}, []
    for cluster, mine in enumerate(items(chosen)):
        assert sum(tile >= chosen.whole_tiles for tile, *_ in mine) <= 2, chosen
        for tile, first, end in mine:
            seen.setdefault(tile, []).append((first, end))
            if end - first < k_blocks:
                slots.append(2 * cluster + (0 if first > 0 else 1))
    assert sorted(seen) == list(range(chosen.tiles)), chosen
    for parts in seen.values():
        ends = [0, *itertools.chain.from_iterable(sorted(parts)), k_blocks]
        assert all(a == b for a, b in zip(ends[::2], ends[1::2], strict=True)), chosen
    assert len(set(slots)) == len(slots), chosen
    floats = chosen.rows * chosen.tokens * chosen.pair
    assert (max(slots, default=-1) + 1) * floats <= chosen.partial_floats, chosen
    assert bool(slots) == (chosen.partial_floats > 0), chosen
    places = {place_of(chosen, tile) for tile in range(chosen.tiles)}
    rows, tokens = -(-chosen.row_tiles // chosen.pair), chosen.token_tiles
    assert places == set(itertools.product(range(rows), range(tokens))), chosen


def place_of(chosen: Prefill, tile: int) -> tuple[int, int]:
    """The group of row tiles and the token tile of a tile, in bands of eight token tiles."""
    row_groups = -(-chosen.row_tiles // chosen.pair)
    band = tile // (8 * row_groups)
    rest = tile - band * 8 * row_groups
    width = min(8, chosen.token_tiles - 8 * band)
    return rest // width, 8 * band + rest % width
