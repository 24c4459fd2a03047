"""mbarrier objects in shared memory (PTX ISA 9.7.13.15 "mbarrier").

An mbarrier counts the arrivals that its present phase still lacks and, signed, the bytes of copies:
expect_tx adds what is to come, a copy that lands takes away what came, also ahead of expect_tx. The
phase is over when both are zero. try_wait.parity p succeeds if and only if the phase of parity p is
over, which is so at first for p = 1. A try_wait whose phase is not over is false the first time
that a lane asks, so that a program that does not ask again goes on too early; the second time the
lane is parked, and asks once more when the phase has ended.

For the race detector an arrival releases what the arriving lanes' warp has done (races.Races.
release), and a completed wait acquires what the phases so far have released. The bytes of a copy
belong to the phase that they complete (races.Races.land)."""

import numpy as np

from .clusters import PEER
from .decode import Imm, PtxError, address, array, destination, lanes_of, opcode

MBARRIER = 17  # parking place of try_wait
_MOST_BYTES = (1 << 20) - 1
_PHASES = 32  # bits of a phase's number


class MBarrier:
    """One mbarrier: `phase` counts those that are over. For the race detector: the epoch of its
    initialisation, its column of the clocks and the epoch there of its first phase, and the clocks
    that were released into this phase and into those that are over.
    """

    def __init__(self, identity, cta, at, count, lane, cluster_phase):
        self.identity, self.cta, self.at = identity, cta, at
        self.count = self.pending = count
        self.phase = self.bytes = 0
        self.lane, self.cluster_phase = lane, cluster_phase  # of the initialisation
        self.fenced = False  # copies know of it
        self.epoch = self.column = self.first = 0
        self.open = self.done = None

    def __str__(self):
        return f"mbarrier at {self.at:#x}"

    def missing(self, whose):
        lacks = f"{self.pending} of {self.count} arrivals and {self.bytes} bytes"
        return f"phase {self.phase} of the {self}{whose} lacks {lacks}"


class MBarriers:
    """All mbarriers of a chunk, by CTA and offset."""

    def __init__(self, m):
        self.known, self.all = {}, []
        self.asked = np.full(m.n, -1)  # the mbarrier and phase that a lane last found not over
        self.numbers = [{} for _ in range(m.ctas)]  # of a CTA's mbarriers, by offset

    def start(self, m, lane, at, count):
        """mbarrier.init by one lane."""
        cta = int(m.cta[lane])
        flat = m.shared.locate(np.array([cta]), np.array([at]), 8, np.array([lane]))
        if (cta, at) in self.known:
            raise PtxError(f"the mbarrier at {at:#x} is initialised already", lane)
        if not 0 < count <= _MOST_BYTES:
            raise PtxError(f"an mbarrier of {count} arrivals", lane)
        phase = m.clusters.phase[cta // m.clusters.size]
        b = self.known[cta, at] = MBarrier(len(self.all), cta, at, count, lane, phase)
        self.all.append(b)
        if m.races is not None:
            m.races.access(flat, 8, np.array([lane]), True)
            m.races.close(flat, 8)
            # one column for each place, also when it is initialised again
            number = self.numbers[cta].setdefault(at, len(self.numbers[cta]))
            b.column = m.races.barrier_column(cta, number, lane)
            b.first = int(m.races.clock[:, b.column].max())
            b.epoch = m.races.epoch(lane // 32)
            b.open, b.done = (np.zeros(m.races.columns, np.int32) for _ in range(2))

    def end(self, m, lane, at):
        """mbarrier.inval."""
        b = self.find(m, np.array([lane]), m.cta[lane], at)
        del self.known[b.cta, at]
        if m.races is not None:
            flat = m.shared.locate(np.array([b.cta]), np.array([at]), 8, np.array([lane]))
            m.races.open_up(flat, 8)

    def find(self, m, lanes, cta, at):
        """The mbarrier there, which these lanes must know to be initialised."""
        b = self.known.get((int(cta), int(at)))
        if b is None:
            text = f"the mbarrier at {int(at):#x} is not initialised"
            raise PtxError(text, int(lanes[0]))
        if m.ended(b.cta):
            raise PtxError(f"the {b} is in a CTA that has exited", int(lanes[0]))
        met = b.fenced and m.clusters.phase[b.cta // m.clusters.size] > b.cluster_phase
        if m.races is not None and not met:
            seen = m.races.has_seen(lanes // 32, b.lane // 32, b.epoch)
            seen |= lanes // 32 == b.lane // 32
            if not seen.all():
                text = f"the {b} may not be initialised yet: no barrier since mbarrier.init"
                raise PtxError(text, int(lanes[np.argmin(seen)]))
        return b

    def fence(self, lanes):
        """A fence after which copies know the mbarriers that these lanes initialised."""
        for b in self.known.values():
            if not b.fenced and b.lane in lanes:
                b.fenced = True

    def arrive(self, m, lanes, ctas, at, counts, bytes_, releases):
        """Arrivals by these lanes; returns whether a phase ended."""
        over = False
        ends = np.flatnonzero((np.diff(ctas) != 0) | (np.diff(at) != 0)) + 1
        for some in np.split(np.arange(lanes.size), ends):
            own = lanes[some]
            b = self.find(m, own, ctas[some[0]], at[some[0]])
            if bytes_ is not None:
                self.expect(b, int(bytes_[some].sum()), own[0])
            if m.races is not None and releases:
                m.races.settle(own)
                if b.cta != m.cta[own[0]]:
                    self._outlive(m, b, int(own[0]))
            number = np.ones(own.size, np.int64) if counts is None else counts[some]
            # one by one if the phase ends among them: it has not the releases of the others
            steps = [slice(None)] if number.sum() <= b.pending else range(own.size)
            for step in steps:
                if m.races is not None and releases:
                    warps = np.unique(own[step] // 32)
                    b.open = np.maximum(b.open, m.races.clock[warps].max(0))
                if counts is not None and np.max(number[step]) > b.pending:
                    raise PtxError(f"more arrivals at the {b} than it counts", int(own[0]))
                if counts is not None:
                    b.pending -= int(np.sum(number[step]))
                over |= self.complete(m, b)
        return over

    @staticmethod
    def _outlive(m, b, lane):
        what = f"warp {lane // 32 % m.warps} of CTA {m.ids[m.cta[lane]]} has arrived at its {b}"
        m.clusters.expect(
            b.cta,
            (what, lane),
            m.races.last(lane // 32),
            (b.column, b.first + b.phase),
        )

    @staticmethod
    def expect(b, bytes_, lane):
        b.bytes += bytes_
        if abs(b.bytes) > _MOST_BYTES:
            raise PtxError(f"{b.bytes} bytes are more than an mbarrier counts", int(lane))

    def complete(self, m, b):
        """End the phase if nothing is missing, and wake who waits for it."""
        if b.pending or b.bytes:
            return False
        b.phase += 1
        b.pending = b.count
        if m.races is not None:
            b.done = np.maximum(b.done, b.open)
            b.done[b.column] = b.first + b.phase
            b.open = np.zeros_like(b.open)
        m.free(np.flatnonzero((m.parked == MBARRIER) & (self.asked >> _PHASES == b.identity)))
        return True

    def missing(self, m, lane):
        """What the parked threads of a lane's cluster wait for, in words."""
        mine = (m.parked == MBARRIER) & (
            m.lanes // m.clusters.threads == lane // m.clusters.threads
        )
        asked = [self.all[k] for k in dict.fromkeys((self.asked[mine] >> _PHASES).tolist())]
        several = m.clusters.size > 1
        return "; ".join(b.missing(f" of CTA {m.ids[b.cta]}" if several else "") for b in asked)

    def wait(self, m, lanes, at, over, acquires):
        """Which lanes find their phase over; those that ask again in vain are parked."""
        ctas = m.cta[lanes]
        changes = (np.diff(ctas) != 0) | (np.diff(at) != 0)
        passed = np.ones(lanes.size, bool)
        for some in np.split(np.arange(lanes.size), np.flatnonzero(changes) + 1):
            own = lanes[some]
            b = self.find(m, own, ctas[some[0]], at[some[0]])
            passed[some] = over(b, own)
            gone = own[passed[some]]
            if gone.size and m.races is not None and acquires:
                m.races.acquire(np.unique(gone // 32), b.done)
            if gone.size < own.size:
                stay = own[~passed[some]]
                now = b.identity << _PHASES | b.phase
                again = self.asked[stay] == now
                self.asked[stay] = now
                m.park(stay[again], MBARRIER, again=True)
        return passed


@opcode("mbarrier")
def mbarrier(i):
    """mbarrier.{init, inval, expect_tx, arrive{.expect_tx}, test_wait, try_wait{.parity}}."""
    what = i.parts[1]
    decode = {"init": _init, "inval": _inval, "arrive": _arrive, "expect_tx": _arrive}
    decode |= {"try_wait": _wait, "test_wait": _wait}
    if what not in decode or "noComplete" in i.parts:
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    i.kind, i.width = "barrier", 8
    return decode[what](i)


def _init(i):
    at, count = address(i.operands[0]), array(i.operands[1], "u32")

    def run(m, act):
        where, counts = at(m), count(m)
        for lane in lanes_of(m, act).tolist():
            m.mbarriers.start(m, lane, int(where[lane]) & _OFFSET, int(counts[lane]))
        return False

    return run


def _inval(i):
    at = address(i.operands[0])

    def run(m, act):
        where = at(m)
        for lane in lanes_of(m, act).tolist():
            m.mbarriers.end(m, lane, int(where[lane]) & _OFFSET)
        return False

    return run


_OFFSET = (1 << 60) - 1  # of a generic address


def _arrive(i):
    """mbarrier.arrive{.expect_tx} state, [a]{, count or bytes}; mbarrier.expect_tx [a], bytes."""
    alone = i.parts[1] == "expect_tx"
    operands = [None, *i.operands] if alone else i.operands
    state = destination(operands[0], "b64")
    at = address(operands[1])
    expects = "expect_tx" in i.parts
    number = array(operands[2], "u32") if len(operands) > 2 else None
    if expects and number is None:
        raise PtxError("expect_tx without a count of bytes")
    releases = "relaxed" not in i.parts

    def run(m, act):
        lanes = lanes_of(m, act)
        ctas, where = m.clusters.locate(m, lanes, at(m)[lanes] & _OFFSET)
        numbers = None if number is None else number(m)[lanes].astype(np.int64)
        if operands[0] is not None:
            token = np.zeros(m.n, np.uint64)
            for lane, cta, a in zip(lanes.tolist(), ctas, where, strict=True):
                token[lane] = m.mbarriers.find(m, np.array([lane]), cta, a).phase
            state(m, act, token)
        counts = np.ones(lanes.size, np.int64) if expects or numbers is None else numbers
        return m.mbarriers.arrive(
            m, lanes, ctas, where, None if alone else counts, numbers if expects else None, releases
        )

    return run


def _wait(i):
    """mbarrier.{test_wait, try_wait}{.parity} p, [a], state or parity{, time}."""
    put, at = destination(i.operands[0], "pred"), address(i.operands[1])
    parity = "parity" in i.parts
    of = array(i.operands[2], "u32" if parity else "u64")
    constant = isinstance(i.operands[2], Imm) and i.operands[2].bits not in (0, 1)
    if parity and constant:
        raise PtxError(f"parity {i.operands[2].bits}")
    acquires = "relaxed" not in i.parts

    def run(m, act):
        lanes = lanes_of(m, act)
        where = at(m)[lanes] & _OFFSET
        if (where >> PEER).any():
            raise PtxError(
                "a wait for another CTA's mbarrier", int(lanes[np.argmax(where >> PEER)])
            )
        want = of(m)

        def over(b, own):
            return b.phase & 1 != want[own] & 1 if parity else b.phase != want[own]

        passed = m.mbarriers.wait(m, lanes, where, over, acquires)
        if passed.all():
            put(m, act, np.ones(m.n, bool))
            return False
        done = np.zeros(m.n, bool)
        done[lanes[passed]] = True
        put(m, act, done)
        return True

    return run
