"""The machine code of the Triton kernels: every shipped configuration, compiled for every
architecture without a GPU.

`python tests/backends/triton/triton_code.py` writes how many warp instructions a weight
takes, for the documents.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parents[2]
# pytest puts these folders on the path itself; a plain `python` does not.
sys.path[:0] = [str(TESTS), str(TESTS / "backends" / "cuda")]

import sparse_code  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from sass import counter as sass  # noqa: E402
from triton_programs import Compiled, Emulated  # noqa: E402

from slab_kernels.backends.triton import configs, kernels, launch, rows  # noqa: E402
from slab_kernels.backends.triton.rows import DEFAULTS, Row, TritonDevice, TritonSizes  # noqa: E402
from slab_kernels.format import PackedLayout  # noqa: E402
from slab_kernels.testing import random_packed  # noqa: E402

RESULT = TESTS.parent / "benchmarks" / "results" / "triton-instructions.json"
DEVICES = {
    80: TritonDevice("A100", 108, 166912, 80),
    86: TritonDevice("RTX 3090", 82, 101376, 86),
    89: TritonDevice("RTX 4090", 128, 101376, 89),
    90: TritonDevice("H100", 132, 232448, 90),
    120: TritonDevice("RTX 5090", 170, 101376, 120),
}
# With 16-bit activations; bf16 values compile to fp16's instructions, int8 does not: it goes
# through fp32 in bf16.
VALUES = {"fp16": torch.float16, "int8": torch.bfloat16, "int4": torch.float16}
N, K = 256, 1024  # whole tiles of every configuration: nothing is masked, as in models
MANY = 4096  # tokens of a row without a limit


@dataclass(frozen=True)
class Case:
    """A row of DEFAULTS at its most tokens, for one kind of weight on one device."""

    row: Row
    arch: int
    values: str
    rank: int
    dtype: torch.dtype
    planes: int = 1

    @property
    def sizes(self) -> TritonSizes:
        return TritonSizes(
            K, (N,), self.values, 128 if self.values in rows.INTEGERS else 0, self.rank, 0
        )

    @property
    def tokens(self) -> int:
        return self.row.tokens or MANY

    def __str__(self) -> str:
        c = self.row.config
        tile = f"{c.block_n}x{c.block_m}x{c.block_k}-w{c.warps}-s{c.stages}"
        dtype = str(self.dtype).removeprefix("torch.")
        weight = f"{self.values}-rank{self.rank}-planes{self.planes}"
        return f"sm{self.arch}-{tile}-{weight}-{dtype}"


def cases() -> Iterator[Case]:
    """Each row with a kind of weight that gets it: value types apart, rank 1 if that gets it,
    else 4."""
    seen = set()
    for arch, device in DEVICES.items():
        for row in DEFAULTS:
            for values in VALUES:
                for rank in (1, 4):
                    bits = row.bits or 32
                    case = Case(
                        row, arch, values, rank, VALUES[values] if bits == 16 else torch.float32
                    )
                    if not row.fits(case.sizes, case.tokens, bits, device):
                        continue
                    chosen = configs.choose(case.sizes, case.tokens, bits, device)
                    if chosen == row.config and not chosen.rebuild:
                        c = chosen
                        code = (
                            arch,
                            c.block_m,
                            c.block_n,
                            c.block_k,
                            c.warps,
                            c.stages,
                            values,
                            rank,
                            bits,
                        )
                        if code not in seen:
                            seen.add(code)
                            yield case
                        break


@functools.cache
def compiled(case: Case) -> Compiled:
    """The linear's kernel, by the calls that would launch it."""
    config, device = case.row.config, DEVICES[case.arch]
    layout = PackedLayout(
        N, K, case.values, case.sizes.group_size or None, case.rank, planes=case.planes
    )
    recorder = Emulated(kernels.linear_kernel, ("y_ptr",), case.arch, execute=False)
    nothing = Emulated(kernels.sum_kernel, ("y_ptr",), case.arch, execute=False)
    state = launch.prepare((random_packed(layout),), case.dtype)
    x = torch.zeros(case.tokens, K, dtype=case.dtype)
    with (
        mock.patch.object(kernels, "linear_kernel", recorder),
        mock.patch.object(kernels, "sum_kernel", nothing),
        mock.patch.object(launch, "speaks_ptx", lambda device: True),
    ):
        launch.linear(
            x, state, None, config, configs.splits(case.sizes, case.tokens, config, device), 1
        )
    return recorder.launched[0][0]


def planes_cases() -> Iterator[Case]:
    """More planes: decoding everywhere, every other tile with three where code differs (sm_86
    and sm_89 get sm_80's but for 1 %).

    All of cases() with two and three planes, compiled once by hand, spilled nothing and kept
    to their rows' shared memory.
    """
    for case in cases():
        decoding = case.tokens == 16 and case.dtype.itemsize == 2 and case.rank == 1
        if decoding:
            yield replace(case, planes=3 if case.values == "int8" else 2)
        if case.values == "fp16" and (decoding or case.arch in (80, 90, 120)):
            yield replace(case, planes=3)


def instructions_a_weight(case: Case) -> float:
    """Instructions of the main loop that a lane issues for each weight of the tile."""
    kernel = compiled(case)
    usage = {kernel.name: sass.Usage(kernel.registers, kernel.stack, kernel.local)}
    parsed = sass.parse(kernel.sass, usage)[kernel.name]
    config = case.row.config
    return (
        len(parsed.of(parsed.main.blocks)) * 32 * config.warps / (config.block_n * config.block_k)
    )


def record() -> dict[str, object]:
    """What the documents show: instructions per weight of every case of rank 1, of the kernel for
    sparse tensor cores too, and their origin."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    rows = []
    for case in (*cases(), *planes_cases()):
        if case.rank == 1:
            tile = case.row.config
            rows.append(
                {
                    "architecture": f"sm_{case.arch}",
                    "block_n": tile.block_n,
                    "block_m": tile.block_m,
                    "block_k": tile.block_k,
                    "values": case.values,
                    "activations": names[case.dtype],
                    "planes": case.planes,
                    "per_weight": round(instructions_a_weight(case), 3),
                }
            )
    command = "python tests/backends/triton/triton_code.py"
    sparse = sparse_code.records()
    return {"command": command, "triton": triton.__version__, "rows": rows, "sparse": sparse}


def main() -> None:
    text = json.dumps(record()).replace("}, {", "},\n {") + "\n"
    RESULT.write_text(text, encoding="utf-8")
    print(RESULT)


if __name__ == "__main__":
    main()
