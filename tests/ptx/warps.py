"""Instructions by which threads meet: barriers, warp synchronisation, shuffles and votes (PTX ISA
9.7.13, 9.7.9.6 "shfl").

A blocked lane is parked by the machine (m.park) with the place where it goes on, and freed when the
last participant arrives. Deadlock is noticed by the machine: nobody can run, somebody is parked."""

import re

import numpy as np

from .clusters import cluster_barrier
from .decode import Imm, Pair, PtxError, array, destination, lanes_of, opcode, source

_WARP_SYNC = 16  # parking place of bar.warp.sync, after the 16 barriers of a CTA


class Barriers:
    """The 16 barriers of every CTA: threads arrived, threads expected, and the clocks of those who
    arrived."""

    def __init__(self, m):
        shape = m.ctas * 16
        self.arrived = np.zeros(shape, np.int64)
        self.expected = np.zeros(shape, np.int64)
        self.clock = np.zeros((shape, m.races.columns if m.races else 0), np.int32)
        # A ragged last warp counts as 32 threads, as the hardware counts warps.
        self.weight = np.ones(m.n, np.int64)
        absent = 32 * m.warps - m.threads
        if absent:
            self.weight[m.present & (m.lanes % (32 * m.warps) == 32 * (m.warps - 1))] += absent
        self.busy = False

    def arrive(self, m, lanes, number, count, wait):
        """Threads `lanes` arrive at barrier `number` (per lane) for `count` threads; with `wait`
        they are parked until it opens.
        """
        key = m.cta[lanes] * 16 + number
        before = self.expected[key]
        clash = (before != 0) & (before != count)
        if clash.any():
            k = int(np.flatnonzero(clash)[0])
            counts = f"{int(count[k])} threads and with {int(before[k])}"
            raise PtxError(f"barrier {int(number[k])} is used with {counts}", int(lanes[k]))
        self.expected[key] = count
        clash = self.expected[key] != count
        if clash.any():
            raise PtxError(
                "one barrier is used with two thread counts", int(lanes[np.flatnonzero(clash)[0]])
            )
        self.arrived += np.bincount(key, self.weight[lanes], self.arrived.size).astype(np.int64)
        if m.races is not None:
            first = np.flatnonzero(np.diff(lanes // 32, prepend=-1))  # one lane of each warp
            warps = lanes[first] // 32
            m.races.advance(warps)
            np.maximum.at(self.clock, key[first], m.races.clock[warps])
        if wait:
            m.park(lanes, number)
        over = self.arrived > self.expected
        if over.any():
            k = int(np.argmax(over))
            arrived, expected = int(self.arrived[k]), int(self.expected[k])
            text = f"barrier {k % 16}: {arrived} threads arrived, {expected} expected"
            raise PtxError(text, int(lanes[key == k][0]))
        full = (self.arrived == self.expected) & (self.expected > 0)
        if full.any():
            self._open(m, full)
        self.busy = bool(self.arrived.any())

    def _open(self, m, full):
        """Free those who wait at the barriers `full`."""
        key = m.cta * 16 + np.minimum(m.parked, 15)
        freed = (m.parked >= 0) & (m.parked < _WARP_SYNC) & full[key]
        rows = freed.reshape(-1, 32)
        some = rows.any(1)
        short = some & (rows != m.present.reshape(-1, 32)).any(1)
        if short.any():
            lane = int(np.argmax(short)) * 32
            raise PtxError(f"barrier {key[lane] % 16} executed by a partial warp", lane)
        if m.races is not None:
            warps = np.flatnonzero(some)
            m.races.clock[warps] = np.maximum(m.races.clock[warps], self.clock[key[warps * 32]])
        self.arrived[full] = self.expected[full] = 0
        self.clock[full] = 0
        m.free(np.flatnonzero(freed))


@opcode("bar", "barrier")
def barrier(i):
    """bar{.sync,.arrive} a{, b}; barrier{.sync,.arrive}{.aligned}; bar.warp.sync mask (ISA
    9.7.13.1, 9.7.13.2).
    """
    if i.parts[1] == "warp":
        return _warp_sync(i)
    if i.parts[1] == "cluster":
        return cluster_barrier(i)
    if i.parts[1] not in ("sync", "arrive"):
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")
    wait = i.parts[1] == "sync"
    number = source(i.operands[0], "u32")
    count = source(i.operands[1], "u32") if len(i.operands) > 1 else None
    if not wait and count is None:
        raise PtxError("bar.arrive needs a thread count")
    i.kind = "barrier"
    constant = isinstance(i.operands[0], Imm) and (count is None or isinstance(i.operands[1], Imm))
    fixed = i.operands[1].bits if constant and count else None

    def run(m, act):
        everybody = 32 * m.warps
        if act is None and wait and constant and not m.barriers.busy and fixed in (None, everybody):
            if m.races is not None:
                m.races.barrier_all()
            return False
        lanes = lanes_of(m, act)
        numbers = np.broadcast_to(number(m), m.n).astype(np.int64)[lanes]
        counts = np.full(lanes.size, everybody)
        if count is not None:
            counts = np.broadcast_to(count(m), m.n).astype(np.int64)[lanes]
        odd = (numbers > 15) | (counts % 32 != 0) | (counts == 0)
        if odd.any():
            k = int(np.flatnonzero(odd)[0])
            raise PtxError(
                f"barrier {int(numbers[k])} with {int(counts[k])} threads", int(lanes[k])
            )
        m.barriers.arrive(m, lanes, numbers, counts, wait)
        return True

    return run


def _warp_sync(i):
    mask = source(i.operands[0], "u32")
    constant = isinstance(i.operands[0], Imm) and i.operands[0].bits & 0xFFFFFFFF == 0xFFFFFFFF
    i.kind = "barrier"

    def run(m, act):
        if constant:
            rows = (m.present if act is None else act).reshape(-1, 32)
            some = rows.any(1)
            if (some == rows.all(1)).all():  # whole warps: nobody has to wait
                if m.races is not None:
                    m.races.advance(np.flatnonzero(some))
                return False
        lanes = lanes_of(m, act)
        m.warp_mask[lanes] = np.broadcast_to(mask(m), m.n)[lanes]
        m.park(lanes, np.full(lanes.size, _WARP_SYNC))
        for warp in np.unique(lanes // 32):
            own = slice(warp * 32, warp * 32 + 32)
            here = m.parked[own] == _WARP_SYNC
            wanted = int(m.warp_mask[own][here][0])
            members = (wanted >> np.arange(32) & 1).astype(bool) & m.present[own]
            if (here & ~members).any():
                raise PtxError(
                    f"bar.warp.sync mask {wanted:#x} lacks an executing lane",
                    int(warp) * 32 + int(np.argmax(here)),
                )
            if (here == members).all():
                if m.races is not None:
                    m.races.advance(np.array([warp]))
                m.free(np.flatnonzero(here) + own.start)
        return True

    return run


def _members(m, act, mask, what):
    """Refuse a warp instruction whose member mask names lanes that do not execute it, or lacks ones
    that do.
    """
    mask = np.broadcast_to(mask(m), m.n)
    mine = (mask >> (m.lanes & 31).astype(np.uint32) & np.uint32(1)).astype(bool)
    active = np.ones(m.n, bool) if act is None else act
    if (active & ~mine).any():
        raise PtxError(
            f"{what}: an executing lane is not in the member mask", int(np.argmax(active & ~mine))
        )
    rows = active.reshape(-1, 32)
    runs = (rows.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1, dtype=np.uint64)
    want = mask.astype(np.uint64) & (
        m.present.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    ).sum(1, dtype=np.uint64).repeat(32)
    missing = active & (want != runs.repeat(32))
    if missing.any():
        raise PtxError(
            f"{what} executed by a partial warp: lanes of the member mask are elsewhere",
            int(np.argmax(missing)),
        )


@opcode("shfl")
def shuffle(i):
    """shfl.sync.{up,down,bfly,idx}.b32 d{|p}, a, b, c, mask: c holds the clamp and the segment
    mask.
    """
    if i.parts[1] != "sync":
        raise PtxError("shfl without .sync")
    mode = i.parts[2]
    to, flag = i.operands[0] if isinstance(i.operands[0], Pair) else (i.operands[0], None)
    put, put_flag = destination(to, "b32"), destination(flag, "pred")
    a, b, c, mask = (array(o, "b32") for o in i.operands[1:5])
    always = isinstance(i.operands[4], Imm) and i.operands[4].bits & 0xFFFFFFFF == 0xFFFFFFFF

    def run(m, act):
        if act is not None or not always:
            _members(m, act, mask, "shfl.sync")
        lane = m.lanes & 31
        offset, control = (b(m) & np.uint32(31)).astype(np.int64), c(m).astype(np.int64)
        clamp, segment = control & 31, control >> 8 & 31
        top = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            j = lane - offset
            valid = j >= top
        elif mode == "down":
            j = lane + offset
            valid = j <= top
        elif mode == "bfly":
            j = lane ^ offset
            valid = j <= top
        else:
            j = (lane & segment) | (offset & ~segment)
            valid = j <= top
        j = np.where(valid, j, lane) + (m.lanes - lane)
        if act is not None and not act[j[act]].all():
            raise PtxError(
                "shfl.sync reads a lane that does not execute it",
                int(np.flatnonzero(act)[~act[j[act]]][0]),
            )
        value = a(m)[j]
        put(m, act, value)
        put_flag(m, act, valid)

    return run


@opcode("vote")
def vote(i):
    mode = i.parts[2]
    put = destination(i.operands[0], i.type)
    p, mask = array(i.operands[1], "pred"), array(i.operands[2], "b32")

    def run(m, act):
        _members(m, act, mask, "vote.sync")
        active = np.ones(m.n, bool) if act is None else act
        rows, value = active.reshape(-1, 32), p(m).reshape(-1, 32)
        yes, no = (value & rows).any(1), (~value & rows).any(1)
        if mode == "ballot":
            result = (
                ((value & rows).astype(np.uint64) << np.arange(32, dtype=np.uint64))
                .sum(1)
                .astype(np.uint32)
            )
        else:
            result = {"any": yes, "all": ~no, "uni": ~(yes & no)}[mode]
        put(m, act, result.repeat(32))

    return run


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@opcode("redux")
def reduce(i):
    """redux.sync.op d, a, mask: one integer of all members; and, or, xor of .b32, the others .u32
    or .s32.
    """
    name = ".".join(i.parts)
    if not re.fullmatch(r"redux\.sync\.((add|min|max)\.[us]32|(and|or|xor)\.b32)", name):
        raise PtxError(f"{name} is not implemented")
    function = _REDUCTIONS[i.parts[2]]
    put, a = destination(i.operands[0], i.type), array(i.operands[1], i.type)
    mask = array(i.operands[2], "b32")

    def run(m, act):
        _members(m, act, mask, "redux.sync")
        active = (m.present if act is None else act).reshape(-1, 32)
        value = a(m).reshape(-1, 32)
        if i.parts[2] in ("add", "xor"):
            spare = value.dtype.type(0)
        else:  # the other operations do not mind a member twice
            spare = np.take_along_axis(value, active.argmax(1)[:, None], 1)
        result = function.reduce(np.where(active, value, spare), 1, dtype=value.dtype)
        put(m, act, result.repeat(32))

    return run


@opcode("activemask")
def activemask(i):
    put = destination(i.operands[0], "b32")

    def run(m, act):
        rows = (np.ones(m.n, bool) if act is None else act).reshape(-1, 32)
        put(
            m,
            act,
            (rows.astype(np.uint64) << np.arange(32, dtype=np.uint64))
            .sum(1)
            .astype(np.uint32)
            .repeat(32),
        )

    return run


@opcode("elect")
def elect(i):
    """elect.sync d|p, mask: the lowest member is the leader (the ISA lets the hardware choose,
    always the same one).
    """
    to, flag = i.operands[0]
    put, put_flag, mask = (
        destination(to, "b32"),
        destination(flag, "pred"),
        array(i.operands[1], "b32"),
    )

    def run(m, act):
        _members(m, act, mask, "elect.sync")
        value = mask(m)
        low = np.log2((value & (~value + np.uint32(1))).astype(np.float64)).astype(np.uint32)
        put(m, act, low)
        put_flag(m, act, (m.lanes & 31) == low)

    return run
