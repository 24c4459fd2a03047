"""What decides how long the kernels for many tokens take and no GPU has told yet.

So a prediction of theirs has two ends. `assumed` is the pessimistic one, by which plans are chosen:
a kernel that was never timed has to win clearly before it takes the place of one that was. `BEST`
is the other. `benchmarks/fit_plans.py fit` fits the three constants to times, once there are some.
"""

from __future__ import annotations

from typing import NamedTuple

# At their pessimistic ends until they are fitted:
COPY_WRITES = 1.0  # the share of the bytes of bulk copies that take the shared-memory port: 0 to 1
TABLE_WAVEFRONTS = 2.0  # of a look-up in the selector table, an LDS.64 within 128 bytes: 1 or 2
# Clocks beside those of issuing until a consumer warp may issue again. With cost.ISSUE_CYCLES for
# each of two warps of a scheduler an instruction takes 4.9.
CONSUMER_WAIT = 2.13


class Unknowns(NamedTuple):
    """One way that it may be."""

    copy_writes: float
    table_wavefronts: float
    consumer_wait: float
    overlap: float  # the p of the p-norm that joins the bounds


# Copies write for free, a look-up is one wavefront, a warp issues again at once, and resources do
# not hold each other up.
BEST = Unknowns(0.0, 1.0, 0.0, 60.0)


def assumed(overlap: float) -> Unknowns:
    """The constants, with the p of the p-norm."""
    return Unknowns(COPY_WRITES, TABLE_WAVEFRONTS, CONSUMER_WAIT, overlap)


def joined(bounds: dict[str, float], overlap: float) -> float:
    """The p-norm of bounds: nearly the largest of them."""
    most = max(bounds.values())
    return most * sum((us / most) ** overlap for us in bounds.values()) ** (1 / overlap)
