"""Programmatic dependent launch (PTX ISA 9.7.13.13 "griddepcontrol"; CUDA C++ Programming Guide,
"Programmatic Dependent Launch and Synchronization").

A kernel that is launched so may start while the kernel before it still runs, which may still write
all memory but what was mapped as `early`, and still read all memory. Therefore a thread may, before
its own griddepcontrol.wait, read early memory only and write nothing. Later it may read everything,
but not through the read-only cache (ld.global.nc) what was written while the kernel ran. Bringing
other memory into L2 is allowed at any time, since L2 is where the SMs' writes meet. Some CTA has to
wait: a grid that ends without is complete while the kernel before it is not, and whoever waits for
this grid would miss that one's results. A CTA that has nothing to do may end at once."""

from .decode import PtxError, opcode


class Dependence:
    """Which threads of a dependent launch have waited for the kernel before it."""

    def __init__(self, m):
        self.waited = ~m.present
        self.begun = False  # some have waited
        self.over = False  # all have

    def wait(self, act):
        self.waited |= True if act is None else act
        self.begun, self.over = True, bool(self.waited.all())

    def read(self, m, address, width, lanes, read_only):
        """Check a load's or a copy's source before it is read."""
        if read_only:
            some = m.memory.late(address, width, lanes)
            text = "read through the read-only cache (.nc) of memory that the kernel before may "
            self._refuse(some, lanes, text + "have written while this one ran")
        elif not self.over:
            some = ~self.waited[lanes]
            if some.any():
                some[some] = m.memory.late(address[some], width, lanes[some])
                text = "read of memory that the kernel before may still write"
                self._refuse(some, lanes, f"{text}, ahead of griddepcontrol.wait")

    def write(self, lanes):
        if not self.over:
            text = "global write ahead of griddepcontrol.wait, while the kernel before may still"
            self._refuse(~self.waited[lanes], lanes, f"{text} use the memory")

    @staticmethod
    def _refuse(bad, lanes, text):
        if bad.any():
            raise PtxError(text, int(lanes[bad.argmax()]))


@opcode("griddepcontrol")
def grid_dependency(i):
    """griddepcontrol.{launch_dependents, wait}: the interpreter runs one grid at a time, so the
    first does nothing; the machine counts it."""
    if i.parts[1:] == ["launch_dependents"]:
        return lambda m, act: None
    if i.parts[1:] != ["wait"]:
        raise PtxError(f"{'.'.join(i.parts)} is not implemented")

    def run(m, act):
        if m.dependence is not None:
            m.dependence.wait(act)

    return run
