"""The three things that decide how long the kernels for many tokens take and that no datasheet
tells (backends/cuda/unknowns.py), each measured by itself in a multiprocessor's own clocks.

    python -m on_gpu.unknowns FILE

copy writes  warps read shared memory as fast as it answers, while bulk copies write to it: what of
             the copied bytes delays the reads is the share that takes the port
look-ups     LDS.64 of 32 lanes within 128 bytes beside LDS.32 of one wavefront
issue        the instructions that rebuild a weight, by one, two and four warps of a scheduler

A row has the clocks of a warp and what follows from them, and its verdict names the constants that
`unknowns.py` would have: `fit_plans.py fit` finds them from the times of whole kernels, and both
should agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from on_gpu import hardware, machine, verdicts_many
from on_gpu.hardware import Stand
from on_gpu.rows import RESULTS, Row, Rows
from on_gpu.unit import CAPABILITY, HardwareParams
from on_gpu.verdicts import Verdict
from slab_kernels.backends.cuda import driver
from slab_kernels.backends.cuda.cost import ISSUE_CYCLES
from slab_kernels.format.bits import LEGAL_NIBBLES

SCHEDULERS = 4
PORT_BYTES = 128  # of shared memory a clock
READERS = 8  # warps that read 512 bytes at a time
LOADS, COPIES = 4096, 96  # of a reader; of 16 KiB, which take less time than the reads
COPY_BYTES, SOURCES = 16384, 16
RING_BYTES = 4 * COPY_BYTES + 512 + 32 + 1024  # copies, what is read, barriers, rounding up
LOOK_UP_WARPS = 16
ISSUE_WARPS = (4, 8, 16)
# SASS instructions of the loop of issue_clocks for each look-up; test_on_gpu_hardware.py counts.
ISSUE_INSTRUCTIONS = 13.5
TABLE_BYTES = 2048  # of shared memory
TIMES = 5  # The fastest of them counts.
BOTH_LANES = 11  # by which the nibbles of odd lanes differ in the table, so that no bank is shared


def clocks(
    stand: Stand, name: str, warps: int, shared: int, params: HardwareParams
) -> list[tuple[int, int]]:
    """When each warp began and ended, since the first began, of the fastest of some launches."""
    best: list[tuple[int, int]] = []
    for _ in range(TIMES):
        told = torch.zeros(2 * warps, dtype=torch.int32, device=stand.where)
        params.clocks = told.data_ptr()
        stand.launch(name, 1, 32 * warps, shared, params)
        spans = told.cpu().long().view(-1, 2)
        spans = (spans - spans[:, 0].min()) % (1 << 32)  # The counter has 32 bits.
        found = [(int(begin), int(end)) for begin, end in spans]
        if not best or max(end for _, end in found) < max(end for _, end in best):
            best = found
    return best


def port(stand: Stand) -> Iterator[Row]:
    """Reads alone, copies alone, both. Reads of 512 bytes hold the port for four clocks each."""
    source = torch.zeros(SOURCES * COPY_BYTES, dtype=torch.uint8, device=stand.where)
    for case, loads, copies in (
        ("reads alone", LOADS, 0),
        ("copies alone", 0, COPIES),
        ("reads and copies", LOADS, COPIES),
    ):
        params = HardwareParams()
        params.source, params.loads, params.copies = source.data_ptr(), loads, copies
        found = clocks(stand, "port_clocks", READERS + 1, RING_BYTES, params)
        yield {
            "case": case,
            "point": "port",
            "read_clocks": max(end for _, end in found[:-1]),
            "copy_clocks": found[-1][1],
            "read_bytes": READERS * loads * 512,
            "copied_bytes": copies * COPY_BYTES,
        }


def table_offsets() -> torch.Tensor:
    """Where 32 lanes look up random legal nibbles in the table of the kernels that rebuild."""
    generator = torch.Generator().manual_seed(1)
    legal = torch.tensor(LEGAL_NIBBLES)
    nibbles = legal[torch.randint(len(legal), (32,), generator=generator)]
    return 8 * (nibbles ^ BOTH_LANES * (torch.arange(32) % 2))


def look_ups(stand: Stand) -> Iterator[Row]:
    lane = torch.arange(32)
    for case, kernel, offsets in (
        ("LDS.32 of 128 bytes", "look_up_32_clocks", 4 * lane),
        ("LDS.64 of 256 bytes", "look_up_64_clocks", 8 * lane),
        ("LDS.64 of 128 bytes, two lanes each", "look_up_64_clocks", 8 * (lane % 16)),
        ("LDS.64 of 128 bytes, as in the table", "look_up_64_clocks", table_offsets()),
    ):
        held = offsets.to(torch.int32).to(stand.where)
        params = HardwareParams()
        params.source, params.loads = held.data_ptr(), LOADS
        found = clocks(stand, kernel, LOOK_UP_WARPS, TABLE_BYTES, params)
        took = max(end for _, end in found) / (LOOK_UP_WARPS * LOADS)
        yield {"case": case, "point": "look-ups", "clocks": took}


def issue(stand: Stand) -> Iterator[Row]:
    for warps in ISSUE_WARPS:
        params = HardwareParams()
        params.loads = LOADS
        found = clocks(stand, "issue_clocks", warps, TABLE_BYTES, params)
        took = max(end for _, end in found) / (LOADS * ISSUE_INSTRUCTIONS)
        yield {
            "case": f"{warps // SCHEDULERS} warps a scheduler",
            "point": "issue",
            "warps": warps // SCHEDULERS,
            "clocks": took,
        }


POINTS: tuple[Callable[[Stand], Iterator[Row]], ...] = (look_ups, port, issue)


def constants(rows: list[Row]) -> dict[str, float]:
    """What the rows say of the constants of backends/cuda/unknowns.py, by their names there."""
    by_case = {row["case"]: row for row in rows}
    found = {}
    alone, both = by_case.get("reads alone"), by_case.get("reads and copies")
    if alone and both:
        more = both["read_clocks"] - alone["read_clocks"]
        share = more * PORT_BYTES / both["copied_bytes"]
        found["COPY_WRITES"] = min(1.0, max(0.0, share))
    one = by_case.get("LDS.32 of 128 bytes")
    if one and (table := by_case.get("LDS.64 of 128 bytes, as in the table")):
        found["TABLE_WAVEFRONTS"] = table["clocks"] / one["clocks"]
    if two := by_case.get("2 warps a scheduler"):
        found["CONSUMER_WAIT"] = max(0.0, two["clocks"] - 2 * ISSUE_CYCLES)
    return found


def main(file: str) -> int:
    if driver.capability(torch.cuda.current_device()) != CAPABILITY:
        Verdict("no Hopper GPU, nothing was measured", True).say()
        return 0
    rows, stand = Rows(Path(file), machine.head(), (RESULTS,)), hardware.stand_here()
    try:
        for point in POINTS:
            rows.add(*point(stand))
    finally:
        own = [row for row in rows.rows if "point" in row]
        found = constants(own)
        rows.save(constants=found)
        verdict = verdicts_many.unknowns(own, found)
        verdict.say()
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
