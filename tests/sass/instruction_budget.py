"""What a K-block of the fused linear issues, by pipe, against what each GPU can issue while its
memory streams the weights.

Counts are those of counter.py: exact for the code, an upper bound where a branch has two sides.
Budgets are arithmetic on the datasheet figures of gpus.GPUS (peak bandwidth, boost clock), and no
prediction of a time: latencies, bank conflicts and the limits of DRAM (about 92 % of peak) are not
in them. `python tests/sass/counter.py` prints the tables of the README.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sass import counter as sass
from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda.gpus import GPUS, Gpu
from slab_kernels.backends.cuda.layout import DENSE, INT4, INT8, W16
from slab_kernels.backends.cuda.tiles import REGISTERS, CudaSizes

RESULT = sass.ROOT / "benchmarks" / "results" / "instruction-budget.json"
VALUES = {"w16": W16, "int8": INT8, "int4": INT4}
KINDS = {**VALUES, "dense": DENSE}  # of cost.ISSUE
WEIGHTS = (
    32 * 128
)  # of a K-block; a warp instruction does 32 lanes' work, so 128 of them are one a weight
LANE_WEIGHTS = WEIGHTS // 32
SHOWN = ("sm_80", "sm_89", "sm_90a")
# The kernel of one rank by the number of tokens up to which it serves.
KERNELS = {
    4: "narrow_fp16_{}_one",
    16: "wide_fp16_{}_one_t16",
    32: "linear_fp16_{}_one_t32",
    64: "linear_fp16_{}_one_t64",
}
SHOWN_TOKENS = (4, 16, 64)
SCHEDULERS = 4  # a multiprocessor; each issues one warp instruction a clock

# Clocks for which a warp instruction holds its pipe in one scheduler, from "Throughput of Native
# Arithmetic Instructions" of the CUDA programming guide (results a clock and multiprocessor: logic,
# shift, compare, integer add and IMAD 64; fp32 64 on 8.0, 128 above; half2 128 on 8.0 and 9.0, 64
# on the others). 12.0 may add integers twice as fast; not assumed. Taken as one pipe: fp32, half2
# and IMAD, though 8.0 and 9.0 may overlap them.
ALU_CLOCKS, IMAD_CLOCKS, XU_CLOCKS = 2, 2, 8
HALF_CLOCKS = {(8, 0): 1, (9, 0): 1}  # others 2
FP32_CLOCKS = {(8, 0): 2}  # others 1
SPARSE_PRODUCTS = 16 * 8 * 16  # multiply-adds, at plan's dense rate, of one HMMA.SP.16832
# Passes through shared memory's 128 bytes a clock; a row of v is read by eight lanes at once, still
# one pass a matrix.
PASSES = {"LDSM": 4, "LDGSTS": 4, "STS.128": 4, "LDS.128": 4, "LDS.64": 2, "LDS": 1}


class Limit(NamedTuple):
    """Clocks a scheduler spends on a K-block in each resource, and those in which memory delivers
    it.
    """

    clocks: float
    used: dict[str, float]

    @property
    def bound(self) -> str:
        name = max(self.used, key=self.used.__getitem__)
        return name if self.used[name] > self.clocks else "bytes"


def architecture_of(gpu: Gpu) -> str:
    return recipe.RUNS[gpu.capability][0]


def block_bytes(values: int) -> int:
    """Of 32 rows x 128 inputs in the stream: rank 1, one scale for 128 inputs."""
    return CudaSizes(128, (32,), values, 4, 1, 0).block_bytes


def bits(values: int) -> float:
    return block_bytes(values) * 8 / WEIGHTS


def clocks_of_memory(gpu: Gpu, values: int) -> float:
    """Clocks of one scheduler in which memory brings it a K-block, at full bandwidth."""
    return SCHEDULERS * gpu.multiprocessors * gpu.clock * block_bytes(values) / gpu.bandwidth


def limit(kernel: sass.Kernel, gpu: Gpu, values: int) -> Limit:
    pipes, opcodes = kernel.by_pipe(), kernel.executed()
    fma = passes = 0.0
    for opcode, count in opcodes.items():
        base, _, _ = opcode.partition(".")
        if base == "IMAD":
            fma += IMAD_CLOCKS * count
        elif base in ("HFMA2", "HADD2", "HMUL2"):
            fma += HALF_CLOCKS.get(gpu.capability, 2) * count
        elif base in ("FFMA", "FMUL", "FADD"):
            fma += FP32_CLOCKS.get(gpu.capability, 1) * count
        elif base in ("LDSM", "LDGSTS", "LDS", "STS"):
            wide = f"{base}.{opcode.rsplit('.', 1)[-1]}"
            passes += PASSES.get(wide, PASSES.get(base, 1)) * count
    used = {
        "issue": sum(pipes.values()),
        "ALU": ALU_CLOCKS * pipes["alu"],
        "FMA": fma,
        "XU": XU_CLOCKS * pipes["xu"],
        "tensor cores": pipes["tensor"] * SPARSE_PRODUCTS / (gpu.mma_rate / SCHEDULERS),
        "shared memory": SCHEDULERS * passes,
    }
    return Limit(clocks_of_memory(gpu, values), used)


def tiles_of(name: str, tokens: int) -> float:
    """Token tiles as plan counts them: (1 + rank) / 2 of one, which is a half for the adapter's
    product.
    """
    return tokens / 8 * (0.5 if name == "dense" else 1.0)


def issue_line(
    kernels: dict[str, sass.Kernel], name: str
) -> tuple[tuple[int, int], dict[int, float]]:
    """(fixed, per token tile) for cost.ISSUE by least squares of relative errors, and the counts by
    tokens of a warp.

    Of the fp16 kernels. bf16 issues the same for w16 and a few per cent more for integers.
    """
    kernel = "adapter_fp16_t{}" if name == "dense" else f"linear_fp16_{name}_one_t{{}}"
    counts = {
        tokens: sum(kernels[kernel.format(tokens)].by_pipe().values()) for tokens in REGISTERS
    }
    rows = np.array(
        [[1 / counted, tiles_of(name, tokens) / counted] for tokens, counted in counts.items()]
    )
    fixed, per_tile = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    return (round(fixed), round(per_tile)), counts


# ---- tables -------------------------------------------------------------------------------------


def counts_table(machine_code: dict[str, dict[str, sass.Kernel]]) -> list[str]:
    """Instructions a weight of the one-rank fp16 kernels, a column a pipe, architectures side by
    side.
    """
    columns = ("tensor", "alu", "fma", "shared")
    lines = [
        f"Instructions a weight on {' / '.join(SHOWN)}; fp16, rank 1, "
        "every token of the tile present.",
        "",
        "| values | tokens | tensor | ALU | FMA pipe | shared memory | all issued |",
        "|---|---|---|---|---|---|---|",
    ]
    for values in VALUES:
        for tokens in SHOWN_TOKENS:
            name = KERNELS[tokens].format(values)
            found = [machine_code[a][name].by_pipe() for a in SHOWN]
            cells = [[pipes[c] for pipes in found] for c in columns] + [
                [sum(pipes.values()) for pipes in found]
            ]
            text = [
                " / ".join(
                    f"{n / LANE_WEIGHTS:.2f}" for n in (cell[:1] if len(set(cell)) == 1 else cell)
                )
                for cell in cells
            ]
            lines.append(f"| {values} | {tokens} | {' | '.join(text)} |")
    return lines


def budget_table(machine_code: dict[str, dict[str, sass.Kernel]]) -> list[str]:
    """What each GPU may issue a weight at full bandwidth, and what decode kernels take of it."""
    lines = [
        "Instructions a weight that a GPU can issue while its memory streams the weights at full "
        "bandwidth"
        " (all / of them ALU), and"
        " the share that the kernel of up to 4 tokens takes of its nearest limit besides bytes.",
        "",
        "| GPU | "
        + " | ".join(f"{name}, {bits(values):g} bits" for name, values in VALUES.items())
        + " |",
        "|---|" + "---|" * len(VALUES),
    ]
    for gpu in GPUS:
        cells = []
        for name, values in VALUES.items():
            kernel = KERNELS[4].format(name)
            found = limit(machine_code[architecture_of(gpu)][kernel], gpu, values)
            nearest = max(found.used, key=found.used.__getitem__)
            share = found.used[nearest] / found.clocks
            issued = found.clocks / LANE_WEIGHTS
            room = f"{issued:.1f} / {issued / ALU_CLOCKS:.1f}"
            says = f"{nearest} {share:.0%}"
            cells.append(f"{room}: " + (f"bytes, {says}" if share <= 1 else f"**{says}**"))
        lines.append(f"| {gpu.name} | {' | '.join(cells)} |")
    return lines


def record(machine_code: dict[str, dict[str, sass.Kernel]]) -> dict[str, object]:
    """Everything counted, for a file: by architecture and kernel, by GPU and value type, and its
    origin.
    """
    git = ["git", "-C", str(sass.ROOT), "describe", "--always", "--dirty"]
    kernels = [
        {
            "architecture": architecture,
            "kernel": name,
            "registers": kernel.usage.registers,
            "per_k_block": {**kernel.by_pipe(), "all": sum(kernel.by_pipe().values())},
            "per_weight": round(sum(kernel.by_pipe().values()) / LANE_WEIGHTS, 3),
        }
        for architecture, kernels in machine_code.items()
        for name, kernel in sorted(kernels.items())
        if ("_one" in name and "_groups" not in name) or name.startswith("adapter")
    ]
    budgets = []
    for gpu in GPUS:
        for name, values in VALUES.items():
            for tokens, kernel in KERNELS.items():
                code = machine_code[architecture_of(gpu)][kernel.format(name)]
                found = limit(code, gpu, values)
                budgets.append(
                    {
                        "gpu": gpu.name,
                        "values": name,
                        "bits_per_weight": bits(values),
                        "tokens": tokens,
                        "clocks_of_memory": round(found.clocks, 1),
                        "clocks_used": {
                            resource: round(clocks, 1) for resource, clocks in found.used.items()
                        },
                        "bound": found.bound,
                    }
                )
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "command": "python tests/sass/counter.py",
        "nvcc": recipe.run([recipe.find_nvcc(), "--version"]).strip().splitlines()[-1],
        "k_block": "32 rows x 128 inputs of one warp",
        "kernels": kernels,
        "budgets": budgets,
    }


def main(target: str = str(RESULT)) -> None:
    machine_code = {a: sass.disassemble(sass.image(a)) for a in recipe.ARCHITECTURES}
    print(
        "### Instruction budget",
        "",
        *counts_table(machine_code),
        "",
        *budget_table(machine_code),
        "",
        sep="\n",
    )
    for name in KINDS:
        line, counts = issue_line(machine_code["sm_90a"], name)
        print(f"cost.ISSUE of {name}: {line}, counted {counts}")
    found = record(machine_code)
    lists = {
        key: "[\n  " + ",\n  ".join(map(json.dumps, found.pop(key))) + "\n ]"
        for key in ("kernels", "budgets")
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    lines += [
        f"{json.dumps(key)}: {rows}" for key, rows in lists.items()
    ]  # a row a line, for readable differences
    Path(target).write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
