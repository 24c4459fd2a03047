"""Directives between a kernel's parameters and its body (PTX ISA 11.4 "Performance-Tuning
Directives", 11.5 "Cluster Dimension Directives")."""

import re

import numpy as np

from .decode import PtxError

_DIRECTIVE = re.compile(
    r"\.(maxntid|reqntid|minnctapersm|reqnctapercluster)\s+(\d+(?:\s*,\s*\d+)*)"
)
_REGISTERS = 65536  # of a multiprocessor
_MOST_REGISTERS = 248  # of a thread, in whole eights


class Directives:
    """What they say of threads, CTAs of a multiprocessor, and CTAs of a cluster."""

    def __init__(self, text):
        known = {
            name: [int(n) for n in numbers.split(",")] for name, numbers in _DIRECTIVE.findall(text)
        }
        self.cluster = tuple((*known.get("reqnctapercluster", ()), 1, 1, 1)[:3])
        self.cluster_size = int(np.prod(self.cluster))
        self._most, self._exactly = known.get("maxntid"), known.get("reqntid")
        self._ctas = known.get("minnctapersm")

    def check(self, grid, block):
        """Refuse a launch that the driver refuses."""
        threads = int(np.prod(block))
        if self._most and threads > int(np.prod(self._most)):
            raise PtxError(f"{threads} threads of a CTA, .maxntid is {self._most}")
        if self._exactly and tuple(block) != tuple((*self._exactly, 1, 1)[:3]):
            raise PtxError(f"a block of {block}, .reqntid is {self._exactly}")
        if any(n % c for n, c in zip(grid, self.cluster, strict=True)):
            raise PtxError(f"a grid of {grid} in clusters of {self.cluster}")

    def registers(self, threads):
        """Registers of a thread at the launch, as ptxas allocates them to a kernel that hands them
        over (setmaxnreg): those of .minnctapersm CTAs fill a multiprocessor. None if the directives
        do not say it.
        """
        if not self._ctas or not self._most or int(np.prod(self._most)) != threads:
            return None
        return min(_REGISTERS // (self._ctas[0] * threads) // 8 * 8, _MOST_REGISTERS)
