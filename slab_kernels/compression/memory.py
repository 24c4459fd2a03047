"""The most memory that a stretch of work took: a GPU's by its allocator, otherwise the process's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds the peak in bytes once the block is left: allocated on a CUDA device, resident otherwise.

    On Linux the process's high-water mark is reset first (proc(5), clear_refs); elsewhere it is that of the whole run so far.
    """
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    try:
        CLEAR.write_text("5")
    except OSError:
        pass
    yield peak
    peak.append(_resident())


def _resident() -> int:
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
