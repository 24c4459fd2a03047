"""Clusters of CTAs (PTX ISA 2.2.2 "Cluster of Cooperative Thread Arrays", 5.1.7 "shared::cluster",
9.7.9 "mapa", 9.7.13.3 "barrier.cluster").

The size of a cluster is a directive of the kernel (.reqnctapercluster); the CTAs of one always run
in one chunk, side by side. An address of shared::cluster carries the rank of its CTA, plus one, in
the bits from PEER on; without it, it is the executing CTA's own, as the ISA has it."""

import numpy as np

from .decode import DTYPE, PtxError, array, destination, lanes_of, opcode, whole_warps

PEER = 24  # the rank lies above all offsets
CLUSTER_WAIT = 18  # parking place


class Clusters:
    """Ranks, the barrier of every cluster, and what other CTAs still do to a CTA."""

    def __init__(self, m, size):
        self.size = size
        self.rank = m.cta % self.size
        self.threads = m.n // m.ctas * self.size  # lanes of a cluster
        clusters = m.ctas // self.size
        self.arrivals, self.waits = np.zeros(m.n, np.int64), np.zeros(m.n, np.int64)
        self.phase = np.zeros(clusters, np.int64)
        self.busy = False
        columns = m.races.columns if m.races is not None else 0
        self.open, self.done = (np.zeros((clusters, columns), np.int32) for _ in range(2))
        self.needs = [{} for _ in range(m.ctas)]

    def locate(self, m, lanes, at):
        """CTAs and offsets of shared::cluster addresses."""
        peer = at >> PEER
        if not peer.any():
            return m.cta[lanes], at
        bad = (peer < 0) | (peer > self.size)
        if bad.any():
            k = int(np.argmax(bad))
            raise PtxError(f"no shared::cluster address: {int(at[k]):#x}", int(lanes[k]))
        cta = np.where(peer > 0, m.cta[lanes] - self.rank[lanes] + peer - 1, m.cta[lanes])
        return cta, at & ((1 << PEER) - 1)

    def arrive(self, m, lanes, releases):
        again = self.arrivals[lanes] > self.waits[lanes]
        if again.any():
            text = "barrier.cluster.arrive twice without a wait between"
            raise PtxError(text, int(lanes[np.argmax(again)]))
        self.arrivals[lanes] += 1
        if m.races is not None and releases:
            for own in np.split(lanes, np.flatnonzero(np.diff(lanes // self.threads)) + 1):
                cluster = own[0] // self.threads
                clock = m.races.release(own)
                self.open[cluster] = np.maximum(self.open[cluster], clock)
        self.busy = True
        return self.complete(m)

    def complete(self, m):
        """Open the barriers at which every thread that has not exited has arrived."""
        ahead = (self.arrivals > np.repeat(self.phase, self.threads)).reshape(-1, self.threads)
        there = ahead | m.exited().reshape(-1, self.threads)
        full = np.flatnonzero(there.all(1) & ahead.any(1))
        if not full.size:
            return False
        self.phase[full] += 1
        self.done[full] = np.maximum(self.done[full], self.open[full])
        self.open[full] = 0
        m.free(np.flatnonzero((m.parked == CLUSTER_WAIT) & np.isin(m.lanes // self.threads, full)))
        return True

    def wait(self, m, lanes, acquires):
        """Returns whether some have to wait."""
        early = self.arrivals[lanes] == self.waits[lanes]
        if early.any():
            text = "barrier.cluster.wait without an arrive before it"
            raise PtxError(text, int(lanes[np.argmax(early)]))
        cluster = lanes // self.threads
        over = self.phase[cluster] >= self.arrivals[lanes]
        passed = lanes[over]
        self.waits[passed] += 1
        if m.races is not None and acquires and passed.size:
            warps = np.unique(passed // 32)
            m.races.acquire(warps, self.done[warps * 32 // self.threads])
        if not over.all():
            m.park(lanes[~over], CLUSTER_WAIT, again=True)
        return not over.all()

    def expect(self, cta, key, *seen):
        """CTA `cta` must not end before it has seen one of these (column, epoch)."""
        self.needs[cta][key] = seen

    def ended(self, m):
        """Whether each CTA lived as long as others used its shared memory."""
        for cta, needs in enumerate(self.needs):
            if not needs:
                continue
            clock = m.races.clock[cta * m.warps : (cta + 1) * m.warps].max(0)
            for (what, lane), seen in needs.items():
                if not any(clock[column] > epoch for column, epoch in seen):
                    raise PtxError(f"CTA {m.ids[cta]} may end before {what}", lane)


@opcode("mapa")
def map_address(i):
    """mapa{.shared::cluster}.{u32, u64} d, a, rank: the same place in the CTA of that rank."""
    put, at, rank = (
        destination(i.operands[0], i.type),
        array(i.operands[1], i.type),
        array(i.operands[2], "u32"),
    )
    one, shift = DTYPE[i.type].type(1), DTYPE[i.type].type(PEER)

    def run(m, act):
        lanes, ranks = lanes_of(m, act), rank(m)
        if (ranks[lanes] >= m.clusters.size).any():
            k = int(lanes[np.argmax(ranks[lanes] >= m.clusters.size)])
            raise PtxError(f"mapa to CTA {int(ranks[k])} of a cluster of {m.clusters.size}", k)
        put(m, act, at(m) | (ranks.astype(one.dtype) + one) << shift)

    return run


def cluster_barrier(i):
    """barrier.cluster.{arrive{.release, .relaxed}, wait{.acquire}}{.aligned}."""
    what, aligned = i.parts[2], "aligned" in i.parts
    if what not in ("arrive", "wait"):
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    i.kind = "barrier"
    ordered = "relaxed" not in i.parts

    def run(m, act):
        if aligned and act is not None:
            some = np.repeat(act.reshape(-1, 32).any(1), 32)
            whole_warps(m, act | (some & ~m.present), "barrier.cluster")
        lanes = np.flatnonzero(m.present if act is None else act)
        if what == "arrive":
            return m.clusters.arrive(m, lanes, ordered)
        return m.clusters.wait(m, lanes, ordered)

    return run
