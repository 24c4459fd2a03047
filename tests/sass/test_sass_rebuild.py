"""The gate on the machine code of the kernels that rebuild W in registers (rebuild.cuh)."""

from __future__ import annotations

import collections
import itertools

import pytest

from sass import counter as sass
from sass.findings import Findings, excesses
from sass.instruction_budget import LANE_WEIGHTS
from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda import cost
from slab_kernels.backends.cuda.launch import VALUE_NAMES

ACTIVATIONS, VALUES = ("fp16", "bf16"), ("w16", "int8", "int4")
TOKENS = (64, 128)  # of a warp
MOST_REGISTERS = 255  # of a thread; a CTA has at most 256
WITHIN = 0.10  # of the cost model's tables
ROW_TILES, K16 = 2, 8  # of a warp, of a K-block
GROUPS = 32  # of four inputs that a lane rebuilds in a K-block
EVERY = pytest.mark.parametrize("architecture", recipe.ARCHITECTURES)

# Instructions a weight of rank one with scale groups of 128 inputs, with 64 and 128 tokens a warp,
# of fp16 kernels and of bf16 ones, whose integers are harder to make.
BUDGET = {
    "w16": {"fp16": (5.3, 7.0), "bf16": (5.3, 7.0)},
    "int8": {"fp16": (6.3, 8.1), "bf16": (6.8, 8.6)},
    "int4": {"fp16": (6.3, 8.1), "bf16": (6.6, 8.4)},
}


def rebuilding(kernels: dict[str, sass.Kernel]) -> dict[str, sass.Kernel]:
    return {name: kernel for name, kernel in kernels.items() if name.startswith("rebuild_")}


def tokens_of(name: str) -> int:
    return int(name.rsplit("_t", 1)[1])


def products(instructions: list[sass.Instruction]) -> collections.Counter[str]:
    return collections.Counter(i.opcode for i in instructions if i.pipe == "tensor")


@EVERY
def test_every_kernel_is_there_once(machine_code, architecture):
    kinds = itertools.product(ACTIVATIONS, VALUES, ("one", "any"), TOKENS)
    expected = {f"rebuild_{a}_{v}_{rank}_t{tokens}" for a, v, rank, tokens in kinds}
    assert set(rebuilding(machine_code(architecture)[1])) == expected


@EVERY
def test_registers_suffice_and_nothing_is_called_or_spilled(machine_code, architecture):
    wrong = Findings()
    for name, kernel in rebuilding(machine_code(architecture)[1]).items():
        for excess in excesses(kernel, MOST_REGISTERS):
            wrong[excess].append(name)
    wrong.check()


@EVERY
def test_each_product_is_one_dense_tensor_instruction(machine_code, architecture):
    """Of 16 x 8 x 16 with fp32 sums, whatever the rank; one step of the adapter is behind them."""
    wrong = Findings()
    for name, kernel in rebuilding(machine_code(architecture)[1]).items():
        tiles = tokens_of(name) // 8 * ROW_TILES
        product = "HMMA.16816.F32" + (".BF16" if "bf16" in name else "")
        main = products(kernel.of(kernel.main.blocks))
        counted = dict(main), dict(products(kernel.instructions) - main)
        if counted != (expected := ({product: tiles * K16}, {product: tiles})):
            wrong[f"{counted}, not {expected}"].append(name)
    wrong.check()


@EVERY
def test_loads_and_selections_of_the_main_loop(machine_code, architecture):
    """A fragment of x is one load of 8 bytes. A group takes one load of its selectors, and one PRMT
    for each half of it and for its factors. Nothing is converted but the scales of fp16 kernels."""
    wrong = Findings()
    for name, kernel in rebuilding(machine_code(architecture)[1]).items():
        opcodes = kernel.executed()
        loads = tokens_of(name) // 8 * K16 + GROUPS + K16  # K16: v
        some = opcodes["LDS.64"]
        if "_one_" in name and not loads <= some <= loads + 5:  # signs, and groups of scales
            wrong[f"{some} loads of 8 bytes, not {loads} and a few"].append(name)
        if any(opcode.startswith("LDSM") for opcode in opcodes):
            wrong["ldmatrix"].append(name)
        if "_one_" in name and "w16" in name and opcodes["PRMT"] != 3 * GROUPS:
            wrong[f"{opcodes['PRMT']} PRMT, not {3 * GROUPS}"].append(name)
        converted = sum(count for opcode, count in opcodes.items() if opcode.startswith("F2F"))
        if converted > (2 * ROW_TILES if "_fp16_int" in name else 0):
            wrong[f"{converted} conversions"].append(name)
    wrong.check()


@EVERY
def test_copies_pass_the_registers(machine_code, architecture):
    """16 bytes past L1, the first stages' before the main loop. The rows of x that a warp copies
    where four share them are one run: no loop."""
    wrong = Findings()
    for name, kernel in rebuilding(machine_code(architecture)[1]).items():
        main = kernel.of(kernel.main.blocks)
        before = [i for i in kernel.instructions if i.address < main[0].address]
        copies = {i.opcode for i in kernel.instructions if i.base == "LDGSTS"}
        if bad := {c for c in copies if ".BYPASS" not in c or ".128" not in c}:
            wrong[f"copies other than 16 bytes past L1: {bad}"].append(name)
        if not any(i.base == "LDGSTS" for i in before):
            wrong["the first stages are not copied asynchronously"].append(name)
        inner = [loop for loop in kernel.inner if not loop.blocks <= kernel.edge]
        trips = [kernel.trips(loop, tokens_of(name)) for loop in inner]
        if max(trips, default=1) > 1:
            wrong[f"inner loops of {trips} trips"].append(name)
    wrong.check()


@EVERY
def test_the_budget_of_instructions(machine_code, architecture):
    """What ptxas fills up with for sm_120a, NOP, is not counted."""
    wrong, kernels = Findings(), machine_code(architecture)[1]
    for values, activation, (at, tokens) in itertools.product(
        VALUES, ACTIVATIONS, enumerate(TOKENS)
    ):
        name = f"rebuild_{activation}_{values}_one_t{tokens}"
        counts = kernels[name].executed()
        taken = (counts.total() - counts["NOP"]) / LANE_WEIGHTS
        if taken > (most := BUDGET[values][activation][at]):
            wrong[f"{taken:.2f} instructions a weight, not {most}"].append(name)
    wrong.check()


def test_the_cost_model_issues_what_the_machine_code_does(machine_code):
    """Of sm_80, whose devices have no other kernels of this kind; any rank counted with one."""
    wrong, kernels = Findings(), machine_code("sm_80")[1]
    codes = {name: code for code, name in VALUE_NAMES.items()}
    tables = {"one": cost.REBUILD_ISSUE, "any": cost.REBUILD_ANY_ISSUE}
    for (rank, table), values, tokens in itertools.product(tables.items(), VALUES, TOKENS):
        name = f"rebuild_fp16_{values}_{rank}_t{tokens}"
        counted = sum(kernels[name].by_pipe().values())
        fixed, per_tile = table[codes[values]]
        modelled = fixed + per_tile * tokens / 8
        if abs(modelled / counted - 1) > WITHIN:
            wrong[f"cost.py says {modelled:.0f}, the machine code {counted:.0f}"].append(name)
    wrong.check()
