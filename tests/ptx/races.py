"""Shared-memory race detector (PTX ISA 8 "Memory Consistency Model", 9.7.13 barriers, 9.7.9.25
"cp.async").

Every warp has a vector clock over the warps of its CTA. An access carries its warp's own epoch; a
barrier advances the epochs of the warps that take part and joins their clocks. Two accesses to one
cell, one of them a write, are ordered if the later one's warp has seen an epoch *newer* than the
earlier one's, or if both are by the same lane. The same rule orders the lanes of one warp, whose
epoch a barrier or bar.warp.sync advances; bar.warp.sync with a partial mask counts as a full one.

A cell is as wide as the kernel's narrowest shared access, so neighbours never look like a conflict.
A cp.async writes its cells when it is issued, they stay closed to everybody until the issuing
thread's wait, and from then on they count as that lane's write at that moment: other lanes may read
them only after a barrier that follows the wait.

Stores by several warps to one place in one instruction are a race, whatever they store, unless the
launch allows `equal_writes`: then they must store the same bytes. One of them counts as the write
and the others
as reads, so that a later write has to be ordered after all of them: one that lands late would undo
it. A store of the same bytes by another instruction is a race as any other."""

import numpy as np

from .decode import PtxError

WARP = 62  # an access by the warp as a whole (ldmatrix, stmatrix): no single lane
SEVERAL = 63  # read by several lanes since the last barrier
EPOCH = np.int32(6)  # an access is tagged epoch << 6 | lane


def _differing(at, data):
    """Index of a store that writes other bytes than another one of this instruction to its place,
    or None.
    """
    order = np.argsort(at, kind="stable")
    at, data = at[order], np.ascontiguousarray(data).view(np.uint8).reshape(len(at), -1)[order]
    other = (at[1:] == at[:-1]) & (data[1:] != data[:-1]).any(1)
    return int(order[1:][other][0]) if other.any() else None


class Races:
    """`columns` of the clocks, `readers` of them of agents that read; a cluster's CTAs share
    theirs (async_races.py). By itself, one for each warp of a CTA.
    """

    def __init__(
        self, ctas, warps, stride, cell, equal_writes, cluster=1, readers=None, columns=None
    ):
        self.per_cta, self.cluster, self.warps = warps, cluster, cluster * warps
        self.readers, self.columns = readers or warps, columns or warps
        self.cell, self.equal_writes = cell, equal_writes
        cells = ctas * -(-stride // cell)
        # Zero pages are not touched before the first access, so the size costs nothing by itself.
        self.written = np.zeros(cells, np.int32)
        self.writer = np.zeros(cells, np.uint16)
        self.read_ = np.zeros((cells, self.readers), np.int32)
        self.in_flight = np.zeros(cells, np.uint8)
        # epoch 0 is "never": every clock has seen past it
        self.clock = np.ones((ctas * warps, self.columns), np.int32)
        self._own = np.arange(ctas * warps), np.arange(ctas * warps) % self.warps
        self.clock[self._own] = 2
        # Of each warp and of each lane, looked up, since numpy divides slowly.
        self._local = np.arange(ctas * warps) % self.warps
        self._lane = np.arange(ctas * warps * 32, dtype=np.int32) & 31

    def advance(self, warps):
        """Begin a new epoch of these warps."""
        self.clock[warps, warps % self.warps] += 1

    def barrier_all(self):
        """Every warp of every CTA meets at one barrier."""
        self.clock[self._own] += 1
        joined = self.clock.reshape(-1, self.per_cta, self.columns).max(1)
        self.clock = np.repeat(joined, self.per_cta, 0)

    def seen(self, warp):
        """Epochs of all readers that these warps have seen the end of."""
        return self.clock[warp]

    def places(self, at, width):
        """The cells of accesses at flat byte offsets `at`."""
        n, cells = max(width // self.cell, 1), at // self.cell
        return (cells[:, None] + np.arange(n)).reshape(-1) if n > 1 else cells

    def _cells(self, at, width, lanes, whole):
        cells = self.places(at, width)
        if len(cells) > len(at):
            lanes = np.repeat(lanes, len(cells) // len(at))
        lane = np.full(len(lanes), WARP, np.int32) if whole else self._lane[lanes]
        warp = lanes >> 5
        return cells, lane, warp, self._local[warp], lanes

    def access(self, at, width, lanes, write, whole=False, data=None):
        """Check and record accesses at flat byte offsets `at`;

        `whole`: made by the warp, not by the lane; `data`: what a store writes there.
        """
        cells, lane, warp, local, lanes = self._cells(at, width, lanes, whole)
        closed = self.in_flight[cells]
        if closed.any():
            kind = "write to" if write else "read of"
            closed = closed > 0
            what = "a cp.async that has not been waited for"
            if self.in_flight[cells].max() > 1:
                closed, what = self.in_flight[cells] > 1, "an mbarrier"
            self._fail(f"{kind} bytes of {what}", cells, closed, lanes)
        tag = self.written[cells]
        writer = self.writer[cells].astype(np.intp)
        unseen = self.clock[warp, writer] <= tag >> EPOCH
        if unseen.any():
            unseen &= (writer != local) | ((tag & 63) != lane)
            if unseen.any():
                self._explain(
                    "write" if write else "read", "write", cells, unseen, lanes, writer, tag
                )
        mine = self.clock[warp, local] << EPOCH | lane
        if write:
            reads = self.read_[cells]
            unseen = self.seen(warp) <= reads >> EPOCH
            if unseen.any():
                own = reads == mine[:, None]  # the same lane read it in the same epoch
                unseen &= ~(own & (np.arange(self.readers) == local[:, None]))
                if unseen.any():
                    k, other = np.argwhere(unseen)[0]
                    self._explain("write", "read", cells, k, lanes, other, reads[k, other])
            self.written[cells] = mine
            self.writer[cells] = local
            lost = (self.written[cells] != mine) | (self.writer[cells] != local)
            if lost.any() or whole:
                self._together(at, data, cells, lanes)
            if lost.any():
                self._note(cells[lost], local[lost], mine[lost])
            return
        self._note(cells, local, mine)

    def _note(self, cells, local, mine):
        """Record accesses that a later write must not overtake."""
        before = self.read_[cells, local]
        several = ((before >> EPOCH) == (mine >> EPOCH)) & (before != mine)
        mine = np.where(several, mine | SEVERAL, mine)
        self.read_[cells, local] = mine
        lost = self.read_[cells, local] != mine  # several lanes of this very instruction
        if lost.any():
            self.read_[cells[lost], local[lost]] |= SEVERAL

    def _together(self, at, data, cells, lanes):
        """Stores of one instruction to the same place: which of them lands last is undefined."""
        clash = self.writer[cells] != lanes // 32 % self.warps
        if clash.any() and not (self.equal_writes and data is not None):
            self._fail("two warps write the same bytes at once", cells, clash, lanes)
        k = None if data is None else _differing(at, data)
        if k is not None:
            here = np.arange(len(cells)) == k * (len(cells) // len(at))
            who = "two warps" if (clash & (cells == cells[here])).any() else "two lanes of a warp"
            self._fail(f"{who} write different bytes to one place at once", cells, here, lanes)

    def issue(self, at, width, lanes):
        """A cp.async into these bytes: a write now, closed until arrive()."""
        self.access(at, width, lanes, True)
        self.in_flight[self.places(at, width)] = 1

    def arrive(self, at, width, lanes):
        cells, lane, warp, local, _ = self._cells(at, width, lanes, False)
        self.in_flight[cells] = 0
        self.written[cells] = self.clock[warp, local] << EPOCH | lane
        self.writer[cells] = local

    def _explain(self, kind, other, cells, bad, lanes, warp, tag):
        k = int(bad) if np.ndim(bad) == 0 else int(np.flatnonzero(bad)[0])
        warp = int(warp if np.ndim(warp) == 0 else warp[k])
        tag = int(tag if np.ndim(tag) == 0 else tag[k])
        mine = int(lanes[k]) // 32 % self.warps
        if warp == mine:
            who = {WARP: "the warp's ldmatrix or stmatrix", SEVERAL: "other lanes"}.get(
                tag & 63, f"lane {tag & 63}"
            )
            who += " of the same warp, with no bar.sync or bar.warp.sync between"
        else:
            who = f"{self._who(warp)}, with no barrier between that both take part in"
        self._fail(
            f"{kind} by {self._who(mine)} after a {other} by {who}",
            cells,
            np.arange(len(cells)) == k,
            lanes,
        )

    def _who(self, column):
        return f"warp {column}"

    def _fail(self, text, cells, bad, lanes):
        k = int(np.flatnonzero(bad)[0])
        raise PtxError(
            f"shared-memory race: {text} (flat offset {int(cells[k]) * self.cell:#x})",
            int(lanes[k]),
        )
