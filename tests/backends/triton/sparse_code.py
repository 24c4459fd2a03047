"""The machine code of the kernel for sparse tensor cores, compiled without a GPU.

Its main loop is one round: a warp multiplies one block of 32 rows x 128 inputs, 128 weights for
each lane.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from sass import counter as sass
from triton_programs import Compiled, Emulated

from slab_kernels.backends.cuda import layout
from slab_kernels.backends.triton import sparse, sparse_kernel
from slab_kernels.backends.triton.sparse import Configuration
from slab_kernels.format import PackedLayout
from slab_kernels.testing import random_packed

ARCHITECTURES = (80, 86, 89, 90, 120)
BLOCK_WEIGHTS = 128
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
K = 2 * 128 * 16


@dataclass(frozen=True)
class SparseCase:
    """A program for one kind of weight on one architecture."""

    arch: int
    values: str
    dtype: torch.dtype
    planes: int  # sign planes, 0 without signs
    tokens: int
    warps: int = 16
    rank: int = 1
    group: int | None = 128
    adapter: int = 0

    def __str__(self) -> str:
        term = f"rank{self.rank}-planes{self.planes}" if self.planes else "no-signs"
        return (
            f"sm{self.arch}-{self.values}-group{self.group}-{NAMES[self.dtype]}-{term}-"
            f"adapter{self.adapter}-{self.tokens}-tokens-{self.warps}-warps"
        )


def cases() -> Iterator[SparseCase]:
    """What the documents show: every kind of values and planes, decoding up to 8 and 16 tokens.

    sm_86, sm_89 and sm_120 get sm_80's instructions but for some per cent.
    """
    for arch in ARCHITECTURES:
        for values in ("fp16", "int8", "int4"):
            yield SparseCase(arch, values, torch.float16, 1, 8)
            if arch in (80, 90):
                yield SparseCase(arch, values, torch.float16, 1, 16)
                yield SparseCase(arch, values, torch.bfloat16, 1, 8)
                yield SparseCase(arch, values, torch.bfloat16, 1, 16)
                for planes in (0, 2, 3):
                    yield SparseCase(arch, values, torch.float16, planes, 8)


def other_cases() -> Iterator[SparseCase]:
    """Ranks, groups, adapters and 8 warps."""
    for arch in ARCHITECTURES:
        for dtype in NAMES:
            for warps in sparse.WARPS:
                yield SparseCase(arch, "int4", dtype, 1, 8, warps, group=32)
                yield SparseCase(arch, "int8", dtype, 1, 16, warps, group=64, adapter=64)
                yield SparseCase(arch, "fp16", dtype, 3, 1, warps, rank=8)
                yield SparseCase(arch, "int4", dtype, 1, 8, warps, rank=4)
                yield SparseCase(arch, "int8", dtype, 2, 2, warps, rank=16)


@functools.cache
def compiled(case: SparseCase) -> Compiled:
    """The linear's kernel, by the call that would launch it."""
    group = None if case.values == "fp16" else case.group
    rank = case.rank if case.planes else 0
    shape = PackedLayout(32, K, case.values, group, rank, case.adapter, planes=case.planes or 1)
    state = layout.prepare((random_packed(shape),), case.dtype)
    recorder = Emulated(sparse_kernel.decode_kernel, ("y_ptr",), case.arch, execute=False)
    x = torch.zeros(case.tokens, K, dtype=case.dtype)
    with (
        mock.patch.object(sparse_kernel, "decode_kernel", recorder),
        mock.patch.object(sparse, "overlaps", lambda device: case.arch >= 90),
    ):
        sparse.decode(x, state, None, Configuration(case.tokens, case.warps, 1, 1))
    return recorder.launched[-1][0]


def code(case: SparseCase) -> sass.Kernel:
    kernel = compiled(case)
    usage = {kernel.name: sass.Usage(kernel.registers, kernel.stack, kernel.local)}
    return sass.parse(kernel.sass, usage)[kernel.name]


def main_loop(case: SparseCase) -> list[sass.Instruction]:
    """The instructions of one round, in which every warp has a whole block."""
    program = code(case)
    (loop,) = (loop for loop in program.loops if program.has(loop.blocks, "HMMA"))
    return program.of(loop.blocks)


def records() -> list[dict[str, object]]:
    """Instructions per weight of every case of the documents."""
    return [
        {
            "architecture": f"sm_{case.arch}",
            "values": case.values,
            "activations": NAMES[case.dtype],
            "planes": case.planes,
            "tokens": case.tokens,
            "per_weight": round(len(main_loop(case)) / BLOCK_WEIGHTS, 3),
            "registers": compiled(case).registers,
        }
        for case in cases()
    ]
