"""Bulk asynchronous copies into shared memory (PTX ISA 9.7.9.25.4 "cp.async.bulk", 9.7.9.27
"cp.async.bulk.tensor").

The destination is poisoned when a copy is issued, and its bytes land as late as they may: when
nobody can run without them, the oldest copy first. Then they are taken from the mbarrier's count.
The source is read at the issue, under the rules of a dependent launch (dependent.py)."""

import numpy as np

from .decode import PtxError, address, array, lanes_of
from .memory import count_global
from .tensor_maps import Tile

_PARAM = 3  # state space of a generic address (decode.WINDOW)


class _Copy:
    """Bytes on their way into one CTA."""

    def __init__(self, lane, barrier, flat, data):
        self.lane, self.barrier, self.flat, self.data = lane, barrier, flat, data


class BulkCopies:
    """Copies that have not landed, the oldest first."""

    def __init__(self):
        self.pending = []

    def issue(self, m, lane, cta, places, data, barrier_at):
        """A copy of 16-byte pieces `data` to the offsets `places` of a CTA."""
        lanes = np.full(places.size, lane)
        flat = m.shared.locate(np.full(places.size, cta), places, 16, lanes)
        barrier = m.mbarriers.find(m, lanes[:1], cta, barrier_at)
        if not barrier.fenced:
            text = "fence.mbarrier_init or fence.proxy.async since its initialisation"
            raise PtxError(f"a bulk copy with the {barrier}, with no {text}", lane)
        if m.races is not None:
            m.races.issue_bulk(flat, 16, lanes)
        view = m.shared.bytes.reshape(-1, 16)
        view[flat // 16] = 0xFF
        self.pending.append(_Copy(lane, barrier, flat, data))

    def land(self, m):
        """Land the oldest copy; returns whether there was one."""
        if not self.pending:
            return False
        copy = self.pending.pop(0)
        b = copy.barrier
        if m.ended(b.cta):
            text = f"a bulk copy lands in the shared memory of CTA {m.ids[b.cta]}, which has exited"
            raise PtxError(text, copy.lane)
        m.shared.bytes.reshape(-1, 16)[copy.flat // 16] = copy.data
        if m.races is not None:
            epoch = b.first + b.phase
            m.races.land(copy.flat, 16, b.column, epoch)
            what = f"it has waited for a bulk copy at its {b}"
            m.clusters.expect(b.cta, (what, copy.lane), (b.column, epoch))
        m.mbarriers.expect(b, -copy.data.size, copy.lane)
        m.mbarriers.complete(m, b)
        return True


def bulk_copy(i):
    """cp.async.bulk{.tensor.2d}.shared::{cluster, cta}.global{.tile}.mbarrier::complete_tx::bytes
    {.multicast::cluster}{.L2::cache_hint}.
    """
    tensor = "tensor" in i.parts
    expected = {"cp", "async", "bulk", "shared::cluster", "global", "mbarrier::complete_tx::bytes"}
    expected |= {"tensor", "2d"} if tensor else set()
    optional = {"multicast::cluster", "L2::cache_hint", *(("tile",) if tensor else ())}
    parts = {"shared::cluster" if p == "shared" else p for p in i.parts}
    if not expected <= parts or parts - expected - optional:
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    i.width = 16
    mask = None
    if "multicast::cluster" in parts:
        mask = array(i.operands[3 if tensor else 4], "u16")
    return (_tensor_copy if tensor else _plain_copy)(i, mask)


def _targets(m, lane, to, barrier, mask):
    """(CTA, destination, mbarrier) of a copy by one lane."""
    one = np.array([lane])
    ctas, offsets = m.clusters.locate(m, np.repeat(one, 2), np.array([to, barrier]))
    if ctas[0] != ctas[1]:
        raise PtxError("destination and mbarrier are in different CTAs", lane)
    if mask is None:
        return [(int(ctas[0]), int(offsets[0]), int(offsets[1]))]
    chosen = int(mask[lane])
    if chosen >> m.clusters.size or not chosen:
        raise PtxError(f"multicast mask {chosen:#x} in a cluster of {m.clusters.size}", lane)
    first = int(m.cta[lane] - m.clusters.rank[lane])
    ranks = [r for r in range(m.clusters.size) if chosen >> r & 1]
    return [(first + r, int(offsets[0]), int(offsets[1])) for r in ranks]


def _read(m, at, lane, size):
    """Check and count a copy's source, addresses `at`."""
    lanes = np.full(at.size, lane)
    if m.dependence is not None:
        m.dependence.read(m, at, 1, lanes, False)
    count_global(m.stats, "read", at, lanes, size)


def _plain_copy(i, mask):
    to, of, barrier = address(i.operands[0]), address(i.operands[1]), address(i.operands[3])
    size = array(i.operands[2], "u32")

    def run(m, act):
        where, start, sizes, at = to(m), of(m), size(m), barrier(m)
        masks = None if mask is None else mask(m)
        for lane in lanes_of(m, act).tolist():
            n, source = int(sizes[lane]), int(start[lane])
            if n % 16 or not n or source % 16 or int(where[lane]) % 16:
                text = f"{n} bytes from {source:#x} to {int(where[lane]):#x}"
                raise PtxError(f"a bulk copy of {text}: all must be multiples of 16", lane)
            pieces = np.arange(0, n, 16)
            lanes = np.full(pieces.size, lane)
            data = m.memory.read(source + pieces, 16, lanes).view(np.uint8).reshape(-1, 16)
            _read(m, source + pieces, lane, n)
            for cta, place, b in _targets(m, lane, int(where[lane]), int(at[lane]), masks):
                m.bulk_copies.issue(m, lane, cta, place + pieces, data, b)

    return run


def _map_bytes(m, at, lane):
    """The 128 bytes of the map at a generic address."""
    if at % 64:
        raise PtxError(f"the tensor map at {at:#x} is not aligned to 64 bytes", lane)
    if at >> 60 == _PARAM:
        at &= (1 << 60) - 1
        if at + 128 > len(m.params):
            raise PtxError("the tensor map is outside the parameters", lane)
        return m.params[at : at + 128]
    return m.memory.read(at + np.arange(128), 1, np.full(128, lane))


def _tensor_copy(i, mask):
    to, tile, barrier = address(i.operands[0]), i.operands[1], address(i.operands[2])
    map_at, (column, row) = address(tile.map), (array(c, "s32") for c in tile.coordinates)

    def run(m, act):
        where, maps, at = to(m), map_at(m), barrier(m)
        columns, rows = column(m), row(m)
        masks = None if mask is None else mask(m)
        for lane in lanes_of(m, act).tolist():
            try:
                box = Tile(
                    _map_bytes(m, int(maps[lane]), lane), int(columns[lane]), int(rows[lane])
                )
                source, data = box.bytes_of(m.memory, lane)
                if source.size:
                    _read(m, source, lane, int(np.count_nonzero(box.some)) * 16)
                for cta, place, b in _targets(m, lane, int(where[lane]), int(at[lane]), masks):
                    m.bulk_copies.issue(m, lane, cta, box.places(place), data, b)
            except PtxError as error:
                error.lane = lane if error.lane is None else error.lane
                raise

    return run
