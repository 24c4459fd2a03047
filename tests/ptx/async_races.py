"""The race detector for kernels with mbarriers, bulk copies, wgmma or clusters (PTX ISA 8 "Memory
Consistency Model", 8.4 "Proxies").

The clocks of all warps of a cluster have one column for each of its

  warps        epochs advanced by whatever the warp releases;
  warps        as readers of B: the groups of wgmma that each has waited for;
  warps        once more: what was seen of their stores and a proxy fence lay between;
  mbarriers    phases that are over: the bytes of a bulk copy belong to the phase they complete.

A wgmma's reads of B are noted for its warpgroup, and over for those who know that all four warps
have waited. An arrival of some lanes of a warp releases what the others of the warp did before the
last bar.warp.sync, and what these did: an epoch in which others have touched shared memory stays
open. A wait by some lanes counts for their whole warp."""

import numpy as np

from .decode import PtxError
from .races import EPOCH, WARP, Races

_MBARRIERS = 64  # of a CTA, that have columns
_COPY, _MBARRIER = 1, 2  # why a cell is closed


class AsyncRaces(Races):
    def __init__(self, ctas, warps, stride, cell, equal_writes, cluster):
        self.groups = -(-warps // 4)
        readers = cluster * (warps + self.groups)
        self.fenced = cluster * (warps + 4 * self.groups)
        self.mbarriers = self.fenced + cluster * warps
        columns = self.mbarriers + cluster * _MBARRIERS
        super().__init__(ctas, warps, stride, cell, equal_writes, cluster, readers, columns)
        self.touched = np.zeros(ctas * warps * 32, np.int32)  # epoch of a lane's last access

    # ---- what warps release and acquire ----

    def epoch(self, warp):
        return int(self.clock[warp, warp % self.warps])

    def has_seen(self, warps, other, epoch):
        return self.clock[warps, other % self.warps] > epoch

    def last(self, warp):
        """(column, epoch) of what this warp has done so far."""
        return warp % self.warps, self.epoch(warp)

    def settle(self, lanes):
        """End the epochs of the lanes' warps in which no other lane has touched shared memory."""
        warps = np.unique(lanes // 32)
        others = np.ones((warps.size, 32), bool)
        others[np.searchsorted(warps, lanes // 32), lanes % 32] = False
        now = self.clock[warps, warps % self.warps]
        open_ = ((self.touched.reshape(-1, 32)[warps] == now[:, None]) & others).any(1)
        self.advance(warps[~open_])
        return warps

    def release(self, lanes):
        """The clock that these lanes pass on."""
        return self.clock[self.settle(lanes)].max(0)

    def acquire(self, warps, clock):
        self.clock[warps] = np.maximum(self.clock[warps], clock)

    def fence(self, lanes):
        """fence.proxy.async by these lanes."""
        warps = self.settle(lanes)
        fenced = slice(self.fenced, self.fenced + self.warps)
        seen = self.clock[warps, : self.warps]
        self.clock[warps, fenced] = np.maximum(self.clock[warps, fenced], seen)

    def access(self, at, width, lanes, write, whole=False, data=None):
        super().access(at, width, lanes, write, whole, data)
        warps = lanes >> 5
        self.touched[lanes] = self.clock[warps, self._local[warps]]

    def seen(self, warp):
        parts = self.clock[:, self.warps : self.fenced].reshape(len(self.clock), -1, 4)
        return np.concatenate((self.clock[:, : self.warps], parts.min(2)), 1)[warp]

    # ---- mbarriers ----

    def barrier_column(self, cta, number, lane):
        if number >= _MBARRIERS:
            raise PtxError(f"more than {_MBARRIERS} mbarriers in a CTA", lane)
        return self.mbarriers + cta % self.cluster * _MBARRIERS + number

    def close(self, at, width):
        """From now on an mbarrier: no memory for other instructions."""
        self.in_flight[self.places(at, width)] = _MBARRIER

    def open_up(self, at, width):
        self.in_flight[self.places(at, width)] = 0

    # ---- bulk copies ----

    def issue_bulk(self, at, width, lanes):
        """A bulk copy into these bytes: a write now, closed until land()."""
        cells, _, warp, local, lanes_ = self._cells(at, width, lanes, False)
        tag, writer = self.written[cells] >> EPOCH, self.writer[cells].astype(np.intp)
        stored = (writer < self.warps) & (tag > 0) & (self.in_flight[cells] == 0)
        column = np.where(stored, self.fenced + writer, 0)
        known = (self.clock[warp, writer] > tag) | (writer == local)
        bad = stored & known & (self.clock[warp, column] <= tag)
        if bad.any():
            self._fail(
                "a bulk copy over stores with no fence.proxy.async between", cells, bad, lanes_
            )
        self.access(at, width, lanes, True)
        self.in_flight[cells] = _COPY

    def land(self, at, width, column, epoch):
        """The bytes are there, for those who have waited for this phase of the mbarrier."""
        cells = self.places(at, width)
        self.in_flight[cells] = 0
        self.written[cells] = epoch << EPOCH | WARP
        self.writer[cells] = column

    # ---- wgmma ----

    def _group(self, first):
        """Number within the cluster of the warpgroup whose first warp this is."""
        return first // self.per_cta % self.cluster * self.groups + first % self.per_cta // 4

    def read_products(self, places, first, epochs):
        """Warpgroups with these first warps begin to read 16-byte pieces, `places`, in their
        epochs: all four warps must have seen what was written there.
        """
        count = max(16 // self.cell, 1)
        cells = places.reshape(len(first), -1, 1) // self.cell + np.arange(count)
        cells = cells.reshape(len(first), -1)
        lanes = np.repeat(first * 32, cells.shape[1])
        if self.in_flight[cells].any():
            closed = self.in_flight[cells].reshape(-1) > 0
            text = "a wgmma reads bytes of a copy that has not been waited for"
            self._fail(text, cells.reshape(-1), closed, lanes)
        clock = self.clock[first[:, None] + np.arange(4)].min(1)
        tag, writer = self.written[cells] >> EPOCH, self.writer[cells].astype(np.intp)
        needed = np.where(writer < self.warps, self.fenced + writer, writer)
        unseen = (np.take_along_axis(clock, needed, 1) <= tag) | (tag == 0)
        if unseen.any():
            k = int(np.argmax(unseen.reshape(-1)))
            known = np.take_along_axis(clock, writer, 1).reshape(-1)[k] > tag.reshape(-1)[k]
            who = self._who(int(writer.reshape(-1)[k]))
            text = f"a wgmma reads what {who} wrote, with no "
            text += "fence.proxy.async" if known else "wait for it"
            text += " between" if known else " by all four warps"
            if not tag.reshape(-1)[k]:
                text = "a wgmma reads bytes that nobody has written"
            self._fail(text, cells.reshape(-1), unseen.reshape(-1), lanes)
        mine = (epochs << EPOCH | WARP).astype(np.int32)
        self.read_[cells, self.warps + self._group(first)[:, None]] = mine[:, None]

    def waited(self, first, done):
        """These warpgroups have waited for their first `done` groups of wgmma."""
        for k in range(4):
            at = first + k, self.warps + 4 * self._group(first) + k
            self.clock[at] = np.maximum(self.clock[at], done + 1)

    # ---- messages ----

    def _who(self, column):
        if column >= self.mbarriers:
            return "a bulk copy"
        if column >= self.warps:
            group = column - self.warps
            return f"a wgmma of warpgroup {group % self.groups}" + self._rank(group // self.groups)
        return super()._who(column % self.per_cta) + self._rank(column // self.per_cta)

    def _rank(self, rank):
        return f" of CTA {rank} of the cluster" if self.cluster > 1 else ""
