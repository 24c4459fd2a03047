"""The most memory that a piece of work took: a GPU's by its allocator, else the process's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Peak:
    """bytes: the most that was held; 0 until it is known."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Yields a Peak that is known once the `with` block is left.

    On a CUDA device it is what was allocated there, otherwise what the process had resident. Linux
    can reset a process's peak first (proc(5), clear_refs); elsewhere it is that of the whole run.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError):
        CLEAR.write_text("5")
    yield peak
    peak.bytes = _resident()


def _resident() -> int:
    """The most bytes that this process had resident, 0 where the system does not say."""
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
