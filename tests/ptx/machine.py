"""Execution of a grid (PTX ISA 2 "Programming Model", 9.7.12 control flow).

All CTAs of a chunk run together, one numpy lane per thread. Among lanes at different instructions
those at the lowest one go first, until they branch or reach the others: that reconverges structured
code. Parked (barrier) and exited lanes have program counters beyond the code, so they are never the
lowest."""

from collections import Counter

import numpy as np

from .async_races import AsyncRaces
from .bulk_copies import BulkCopies
from .clusters import CLUSTER_WAIT, Clusters
from .decode import PtxError, opcode
from .dependent import Dependence
from .loads import Copies
from .matrix import Fragments
from .mbarriers import MBARRIER, MBarriers
from .memory import Flat, Memory
from .races import Races
from .warpgroups import REGISTERS, WARPGROUP, Warpgroups
from .warps import Barriers
from .wgmma import Products

_PARKED, _EXITED = 1 << 30, (1 << 30) + 1
# per chunk: large enough to hide numpy's call cost, small enough for a register set to stay in the
# cache
_LANES = 8192
_BRANCHES = 5_000_000  # of one chunk: some minutes; a thread that spins on memory would never end
_SHARED = 1 << 24  # bytes of shared memory per chunk


@opcode("bra", "brx")
def branch(i):
    i.kind = i.parts[0]
    return None


@opcode("ret", "exit")
def leave(i):
    i.kind = "exit"
    return None


@opcode("trap", "brkpt")
def trap(i):
    def run(m, act):
        raise PtxError("trap", 0 if act is None else int(np.argmax(act)))

    return run


class Machine:
    """One chunk of CTAs."""

    def __init__(
        self,
        kernel,
        grid,
        block,
        ctas,
        params,
        memory,
        shared_bytes,
        check_races,
        equal_writes,
        dependent,
        late_products,
        stats,
    ):
        self.kernel, self.block, self.memory, self.stats = kernel, block, memory, stats
        self.ids, self.ctas = ctas, len(ctas)
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // 32)
        per_cta = 32 * self.warps
        self.n = per_cta * self.ctas
        self.lanes = np.arange(self.n)
        self.cta = self.lanes // per_cta
        self.present = self.lanes % per_cta < self.threads
        self.params = params
        self.shared = Flat(self.ctas, shared_bytes, "shared")
        self.local = Flat(self.n, kernel.local_bytes, "local")
        widths = [i.width for i in kernel.code if i.width]
        self.races = None
        if check_races and shared_bytes and widths:
            cells = self.ctas, self.warps, self.shared.stride, min(widths), equal_writes
            if kernel.asynchronous:
                self.races = AsyncRaces(*cells, kernel.directives.cluster_size)
            else:
                self.races = Races(*cells)
        self.copies, self.fragments = Copies(self.n), Fragments()
        self.barriers, self.mbarriers = Barriers(self), MBarriers(self)
        self.clusters, self.warpgroups = (
            Clusters(self, kernel.directives.cluster_size),
            Warpgroups(self),
        )
        self.bulk_copies, self.products = BulkCopies(), Products(self, late_products)
        self.dependence = Dependence(self) if dependent else None
        self.pcs = np.where(self.present, 0, _EXITED)
        self.parked = np.full(self.n, -1, np.int64)
        self.resume = np.zeros(self.n, np.int64)
        self.warp_mask = np.zeros(self.n, np.uint32)
        # Registers start poisoned; one array per width is shared by all until their first write.
        poison = {w: np.full(self.n, -1, f"i{w}").view(f"u{w}") for w in (1, 2, 4, 8)} | {
            0: np.ones(self.n, bool)
        }
        self.R = [poison[w] for w in kernel.widths]
        for name, slot in kernel.special.items():
            self.R[slot] = self._special(name, grid, shared_bytes)

    def _special(self, name, grid, shared_bytes):
        """Special registers (ISA 10)."""
        thread, lane = self.lanes % (32 * self.warps), (self.lanes % 32).astype(np.uint64)
        name, _, axis = name[1:].partition(".")
        d = "xyz".find(axis) if axis else 0
        x, y, _ = self.block
        one = np.uint64(1)
        cluster = self.kernel.directives.cluster
        value = {
            "cluster_ctarank": lambda: self.clusters.rank,
            "cluster_nctarank": lambda: self.clusters.size,
            "cluster_ctaid": lambda: np.array(self.ids)[self.cta, d] % cluster[d],
            "cluster_nctaid": lambda: cluster[d],
            "clusterid": lambda: np.array(self.ids)[self.cta, d] // cluster[d],
            "nclusterid": lambda: grid[d] // cluster[d],
            "tid": lambda: (thread % x, thread // x % y, thread // (x * y))[d],
            "ntid": lambda: self.block[d],
            "ctaid": lambda: np.array(self.ids)[self.cta, d],
            "nctaid": lambda: grid[d],
            "laneid": lambda: lane,
            "warpid": lambda: thread // 32,
            "nwarpid": lambda: self.warps,
            "lanemask_eq": lambda: one << lane,
            "lanemask_lt": lambda: (one << lane) - one,
            "lanemask_le": lambda: (np.uint64(2) << lane) - one,
            "lanemask_gt": lambda: ~((np.uint64(2) << lane) - one),
            "lanemask_ge": lambda: ~((one << lane) - one),
            "dynamic_smem_size": lambda: shared_bytes - self.kernel.dynamic_start,
            "total_smem_size": lambda: shared_bytes,
        }.get(name, lambda: 0)()
        width = np.uint64 if name == "clock64" else np.uint32
        return np.broadcast_to(np.asarray(value).astype(width), self.n).copy()

    def park(self, lanes, place, again=False):
        """Stop these lanes at a barrier; they go on after the present instruction, or execute it
        `again`.
        """
        resume = self.pc if again else self.pc + 1
        self.parked[lanes], self.pcs[lanes], self.resume[lanes] = place, _PARKED, resume

    def free(self, lanes):
        self.parked[lanes] = -1
        self.pcs[lanes] = self.resume[lanes]

    def exited(self):
        """Mask of the lanes that have no instruction left."""
        return self.pcs == _EXITED

    def ended(self, cta):
        """Whether all threads of a CTA have exited."""
        per_cta = 32 * self.warps
        return bool((self.pcs[cta * per_cta : (cta + 1) * per_cta] == _EXITED).all())

    def run(self):
        """Execute to the end; returns executed warp instructions by position."""
        code, end = self.kernel.code, len(self.kernel.code)
        counts, pcs, branches = [0] * (end + 1), self.pcs, 0
        self.pc, group, limit, warps = 0, None, 0, 0
        pc = 0
        while True:
            if pc >= limit:  # the others are due: choose the lowest lanes anew
                if group is not None:
                    pcs[group] = pc
                elif limit:
                    pcs[:] = pc
                pc = int(pcs.min())
                if pc >= _PARKED:
                    if self.bulk_copies.land(self):
                        group, limit, pc = _NOBODY, 0, 0
                        continue
                    if pc != _EXITED:
                        self._deadlock()
                    self.products.ended()
                    self.clusters.ended(self)
                    return counts
                mask = pcs == pc
                group, limit = (None, _EXITED) if mask.all() else (mask, int(pcs[~mask].min()))
                warps = self._warps(group)
            if pc >= end:
                raise PtxError("control runs past the last instruction")
            i = code[pc]
            self.pc = pc
            act = group
            if i.guard:
                slot, negated = i.guard
                p = ~self.R[slot] if negated else self.R[slot]
                act = p if group is None else p & group
                lanes = np.count_nonzero(act)
                if not lanes:
                    pc += 1
                    continue
                if lanes == self.n:
                    act = None
                counts[pc] += self._warps(act)
            else:
                counts[pc] += warps
            if i.kind is None:
                i.run(self, act)
                pc += 1
                continue
            branches += 1
            if branches > _BRANCHES:
                raise PtxError(f"no end after {_BRANCHES} branches")
            if i.kind == "bra" and (
                act is group or (act is None and group is None)
            ):  # everybody goes
                pc = i.targets[0]
                continue
            if i.kind == "barrier":
                if group is None:
                    pcs[:] = pc + 1
                else:
                    pcs[group] = pc + 1
                if not i.run(self, act):
                    pc += 1
                    continue
            else:
                everybody = slice(None) if group is None else group
                pcs[everybody] = pc + 1
                self._jump(i, slice(None) if act is None else act)
            group, limit, pc = _NOBODY, 0, 0

    def _jump(self, i, lanes):
        if i.kind == "bra":
            self.pcs[lanes] = i.targets[0]
        elif i.kind == "exit":
            self.pcs[lanes] = _EXITED
            if self.clusters.busy:
                self.clusters.complete(self)
        elif i.kind == "brx":
            index = self.R[i.operands[0].slot][lanes]
            if (index >= len(i.targets)).any():
                raise PtxError("brx.idx index is outside its table")
            self.pcs[lanes] = np.array(i.targets)[index]
        else:
            raise PtxError(f"unknown opcode {'.'.join(i.parts)}")

    def _warps(self, act):
        """Warps that have an executing lane."""
        if act is None:
            return self.n // 32
        eighths = act.view(np.uint64).reshape(-1, 4)  # Eight lanes, a byte each.
        halves = eighths[:, :2] | eighths[:, 2:]
        return int(np.count_nonzero(halves[:, 0] | halves[:, 1]))

    def _deadlock(self):
        # the others mostly wait for those who wait at one of these
        first = [self.parked == place for place in (MBARRIER, REGISTERS, WARPGROUP)]
        lane = int(np.argmax(next((p for p in first if p.any()), self.parked >= 0)))
        place = int(self.parked[lane])
        self.pc = int(self.resume[lane]) - (place <= 16)
        waiting = int((self.parked[self.cta == self.cta[lane]] >= 0).sum())
        whom = {
            16: "bar.warp.sync",
            CLUSTER_WAIT: "barrier.cluster",
            WARPGROUP: "an instruction of a warpgroup",
        }.get(place, f"barrier {place}")
        text = f"{whom} waits for threads that exited or wait elsewhere"
        if place == REGISTERS:
            text = "setmaxnreg waits for registers that no other warpgroup gives back"
        if place == MBARRIER:
            text = self.mbarriers.missing(self, lane)
        text = f"deadlock: {text} ({waiting} of {self.threads} threads of the CTA wait)"
        raise PtxError(text, lane)

    def where(self, lane):
        """CTA and thread of a lane, for messages."""
        x, y, _ = self.block
        t = lane % (32 * self.warps)
        cta = tuple(self.ids[lane // (32 * self.warps)])
        return f"CTA {cta}, thread {(t % x, t // x % y, t // (x * y))}"


_NOBODY = np.zeros(0, np.intp)


def _in_clusters(grid, cluster):
    """The CTAs of a grid, those of a cluster next to each other by rank; x changes fastest."""

    def points(shape):
        x, y, z = (range(n) for n in shape)
        return [(i, j, k) for k in z for j in y for i in x]

    if cluster == (1, 1, 1):
        return points(grid)
    inside = points(cluster)
    return [
        tuple(c * k + r for c, k, r in zip(at, cluster, rank, strict=True))
        for at in points([n // c for n, c in zip(grid, cluster, strict=True)])
        for rank in inside
    ]


def launch(
    kernel,
    grid,
    block,
    params,
    memory=None,
    shared_bytes=0,
    check_races=True,
    chunk=None,
    equal_writes=False,
    dependent=False,
    late_products=True,
):
    """Run a grid; returns a Counter of executed warp instructions by opcode class and of memory
    traffic.

    `params` is the raw parameter buffer, `shared_bytes` the dynamic shared memory, `chunk` how many
    CTAs run at once. `equal_writes` lets several warps store to one place of shared memory in one
    instruction if they store the same bytes; without it they may not. `dependent`: the launch may
    overlap the kernel ahead of it, under the rules of dependent.py. `late_products`: a wgmma
    computes when it is waited for, and not when it is issued (wgmma.py). Traffic:
    global_{read,write}_{bytes,sectors}; shared_wavefronts against shared_ideal (their ratio is the
    bank conflicts); prefetches of all threads."""
    grid, block = ((*d, 1, 1)[:3] for d in (grid, block))
    raw = np.frombuffer(bytes(params), np.uint8)
    if raw.size != kernel.parameter_bytes:
        raise PtxError(
            f"{kernel.name}: {raw.size} bytes of parameters, "
            f"the kernel takes {kernel.parameter_bytes}"
        )
    if dependent and kernel.module.target < 90:
        raise PtxError(f"{kernel.name}: a dependent launch of code for sm_{kernel.module.target}")
    threads = -(-block[0] * block[1] * block[2] // 32) * 32
    if not 0 < block[0] * block[1] * block[2] <= 1024 or min(*grid, *block) < 1:
        raise PtxError(f"{kernel.name}: grid {grid} of blocks {block}")
    kernel.directives.check(grid, block)
    shared = kernel.dynamic_start + shared_bytes
    if shared > 227 * 1024:
        raise PtxError(
            f"{kernel.name}: {shared} bytes of shared memory; no GPU has more than 227 KiB"
        )
    chunk = chunk or max(1, min(_LANES // threads, _SHARED // max(shared, 1)))
    together = kernel.directives.cluster_size
    chunk = -(-chunk // together) * together
    space = (memory or Memory()).with_data(kernel.module.data.values())
    ctas = _in_clusters(grid, kernel.directives.cluster)
    stats, waited = Counter(), not dependent
    for start in range(0, len(ctas), chunk):
        some = ctas[start : start + chunk]
        m = Machine(
            kernel, grid, block, some, raw, space, shared, check_races, equal_writes, dependent,
            late_products, stats,
        )  # fmt: skip
        try:
            with np.errstate(all="ignore"):
                counts = m.run()
        except PtxError as error:
            i = kernel.code[min(m.pc, len(kernel.code) - 1)]
            who = f" [{m.where(error.lane)}]" if error.lane is not None else ""
            raise PtxError(
                f"{kernel.name}: line {i.line}: {i.text}: {error}{who}", error.lane
            ) from error
        for i, n in zip(kernel.code, counts, strict=False):
            if n:
                stats[i.op] += n
        waited = waited or m.dependence.begun
    if not waited:
        raise PtxError(f"{kernel.name}: a dependent launch without griddepcontrol.wait")
    return stats
