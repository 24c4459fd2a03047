"""What the cost model knows of GPUs: a row for each known name, and the row for a device."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ...errors import ArgumentError


@dataclass(frozen=True)
class Gpu:
    """A device's rates, from its datasheet, and its sizes.

    mma_rate is that of `mma.sync`; gemm_rate is what cuBLAS reaches on large matrices, by `wgmma`
    where the device has it. Both count dense fp16 multiply-adds per clock of one multiprocessor,
    with fp32 accumulation. l2_rate is what each multiprocessor gets while all of them read L2.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    bandwidth: float  # GB/s of memory
    clock: float  # GHz, boost
    mma_rate: int
    gemm_rate: int
    l2_port: int = 64  # bytes per clock from L2 into one multiprocessor
    l2_rate: int = 16  # of them
    shared_limit: int = 101376  # bytes of shared memory that a CTA may have

    @property
    def shared_total(self) -> int:
        """Bytes of shared memory of a multiprocessor; the driver takes 1 KB for each CTA."""
        return self.shared_limit + 1024


GPUS = (
    Gpu("A100", (8, 0), 108, 1555, 1.41, 1024, 900, l2_rate=26, shared_limit=166912),
    Gpu("RTX 3090", (8, 6), 82, 936, 1.70, 256, 235),
    Gpu("RTX 4090", (8, 9), 128, 1008, 2.52, 256, 235),
    # On an H100 mma.sp reached 550 in our loops, by two warps per scheduler. mma.sync of dense
    # operands is said to reach 1330, wgmma 2048.
    Gpu("H100", (9, 0), 132, 3350, 1.76, 650, 1650, l2_rate=24, shared_limit=232448),
    Gpu("H200", (9, 0), 132, 4800, 1.76, 650, 1650, l2_rate=24, shared_limit=232448),
    Gpu("RTX 5090", (12, 0), 170, 1792, 2.41, 256, 235),
)


def gpu_named(name: str) -> Gpu:
    """The table's row of that name, in any case.

    Raises: ArgumentError with the known names.
    """
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise ArgumentError(f"no figures for the GPU {name!r}; known: {known}")


def gpu_like(
    name: str, capability: tuple[int, int], multiprocessors: int, shared_limit: int
) -> Gpu:
    """The table's row for a device, with the device's own name and sizes.

    A name that the table lacks gets the newest row that is not newer than the device.
    """
    models = _models(name)
    named = [gpu for gpu in GPUS if models & _models(gpu.name)]
    older = [gpu for gpu in GPUS if gpu.capability <= capability] or [GPUS[0]]
    row = named[0] if named else max(older, key=lambda gpu: gpu.capability)
    return replace(
        row,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_limit=shared_limit,
    )


def is_model(gpu: Gpu, name: str) -> bool:
    """Whether a device is of the model of that name: an "NVIDIA H100 80GB HBM3" is an "H100"."""
    return _models(name) <= _models(gpu.name)


def _models(name: str) -> set[str]:
    """The words of a GPU's name that hold a number: "NVIDIA H100 80GB HBM3" -> h100, 80gb, hbm3."""
    return set(re.findall(r"[a-z]*\d+\w*", name.lower()))
