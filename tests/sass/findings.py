"""What is wrong with many kernels, told at once."""

from __future__ import annotations

import collections

import pytest

from sass import counter as sass


def excesses(kernel: sass.Kernel, most_registers: int) -> list[str]:
    """Too many registers, spilled ones, and calls, as sentences; none of a decode kernel may be."""
    usage, found = kernel.usage, []
    if usage.registers > most_registers:
        found.append(f"{usage.registers} registers instead of {most_registers}")
    if usage.stack or usage.local or {i.base for i in kernel.instructions} & {"LDL", "STL"}:
        found.append(f"spills: {usage.stack} bytes of stack")
    # ptxas leaves some long loops by CALL.REL.NOINC to the next label, on sm_80 to 89: a jump.
    calls = [i for i in kernel.instructions if i.base in ("CALL", "RET")]
    if any("`(.L_x_" not in i.operands for i in calls):
        found.append("a call of a subroutine: a division, or lanes that may diverge")
    return found


class Findings(collections.defaultdict):
    """What is wrong -> the kernels of which that is true."""

    def __init__(self):
        super().__init__(list)

    def check(self) -> None:
        if self:
            lines = [f"{what}: {', '.join(kernels)}" for what, kernels in self.items()]
            pytest.fail("\n".join(lines), pytrace=False)
