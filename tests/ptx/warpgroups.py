"""Warpgroups: four consecutive warps that execute one instruction together (PTX ISA 9.7.15.1
"Warpgroup", 9.7.19.5 "setmaxnreg").

An instruction with .sync.aligned for warpgroups runs when all 128 threads of a group are there; the
lanes that come first are parked and execute it with the last."""

import numpy as np

from .decode import PtxError, opcode

WARPGROUP, REGISTERS = 19, 20  # parking places: for the rest of the group, for free registers


class Warpgroups:
    """The whole warpgroups of a chunk, and the registers that their CTAs have."""

    def __init__(self, m):
        per_cta = 32 * m.warps
        whole = m.threads // 128
        first = (np.arange(m.ctas)[:, None] * per_cta + 128 * np.arange(whole)).reshape(-1)
        self.lanes = first[:, None] + np.arange(128)
        self.ctas = np.repeat(np.arange(m.ctas), whole)
        self.per_cta = whole
        self.everybody = np.arange(first.size)
        self.covers = self.lanes.size == m.n
        # registers of a thread at the launch, by warpgroup, if the kernel's directives say it
        self.allocated = m.kernel.directives.registers(m.threads)
        self.registers = np.full(first.size, self.allocated or 0)
        self.pool = np.zeros(m.ctas, np.int64)  # free ones, in threads' worth of a warpgroup

    def meet(self, m, act):
        """Groups all of whose threads execute, and whether others of these have to wait."""
        if act is None and self.covers:
            return self.everybody, False
        here = m.present if act is None else act
        rows = here[self.lanes]
        whole = rows.all(1)
        rest = here.copy()
        rest[self.lanes[whole]] = False
        if not rest.any():
            return np.flatnonzero(whole), False
        m.park(np.flatnonzero(rest), WARPGROUP, again=True)
        complete = (m.parked[self.lanes] == WARPGROUP).all(1)
        complete &= (m.resume[self.lanes] == m.pc).all(1)
        m.free(self.lanes[complete].reshape(-1))
        return np.flatnonzero(whole), True


def by_warpgroups(i, work):
    """Make `work(m, groups)` the action of an instruction that whole warpgroups execute."""
    i.kind = "barrier"

    def run(m, act):
        groups, wait = m.warpgroups.meet(m, act)
        return bool(groups.size and work(m, groups)) or wait

    return run


@opcode("setmaxnreg")
def set_registers(i):
    """setmaxnreg.{inc, dec}.sync.aligned.u32 n: inc waits until other groups of the CTA have given
    back enough. Without .maxntid and .minnctapersm the instruction is ignored, as ptxas does.
    """
    number, more = i.operands[0].bits, i.parts[1] == "inc"
    if number % 8 or not 24 <= number <= 256:
        raise PtxError(f"setmaxnreg of {number} registers")

    def work(m, groups):
        w, waits = m.warpgroups, False
        if not w.allocated:
            return False
        for g in groups:
            lane, cta = int(w.lanes[g, 0]), w.ctas[g]
            step = number - w.registers[g]
            if (step < 0) if more else (step > 0):
                text = f"from {w.registers[g]} registers to {number}"
                raise PtxError(f"setmaxnreg.{i.parts[1]} {text}", lane)
            if step > w.pool[cta]:
                m.park(w.lanes[g], REGISTERS, again=True)
                waits = True
                continue
            w.registers[g] = number
            w.pool[cta] -= step
            if step < 0:
                m.free(np.flatnonzero((m.parked == REGISTERS) & (m.cta == cta)))
                waits = True
        return waits

    return by_warpgroups(i, work)
