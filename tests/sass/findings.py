"""What is wrong with many kernels, told at once."""

from __future__ import annotations

import collections

import pytest


class Findings(collections.defaultdict):
    """What is wrong -> the kernels of which that is true."""

    def __init__(self):
        super().__init__(list)

    def check(self) -> None:
        if self:
            lines = [f"{what}: {', '.join(kernels)}" for what, kernels in self.items()]
            pytest.fail("\n".join(lines), pytrace=False)
