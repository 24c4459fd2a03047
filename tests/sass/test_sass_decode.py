"""The gate on the machine code of the kernels for up to 16 tokens.

A warp goes through its loop once for each block of 32 rows x 128 inputs, so the loop's length is
what a block costs: its budget is held here, kernel by kernel. A kernel has one loop for each number
of stages.
"""

from __future__ import annotations

import collections
import itertools

import pytest

from sass import counter as sass
from sass.findings import Findings, excesses
from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda import cost
from slab_kernels.backends.cuda.layout import INT4, INT8, W16

ACTIVATIONS, VALUES = ("fp16", "bf16"), ("w16", "int8", "int4")
PLANES = {"none": 0, "one": 1, "two": 2, "three": 3}
STAGES = (2, 3, 4)
MOST_REGISTERS = 96  # 512 threads then leave a quarter of a multiprocessor's registers free
FIRST_COPY = 85  # instructions before the first one that asks for weights
EVERY = pytest.mark.parametrize("architecture", recipe.ARCHITECTURES)

# Instructions a block, with scale groups of 128 inputs: of fp16 kernels and of bf16 kernels, whose
# integers are harder to make. Kernels that are told the scale groups at run time (several planes,
# groups) have a way for each; theirs are upper bounds.
BUDGET = {
    "w16_none": (55, 55),
    "int8_none": (125, 175),
    "int4_none": (125, 145),
    "w16_one": (145, 145),
    "int8_one": (220, 265),
    "int4_one": (220, 235),
    "w16_two": (165, 165),
    "int8_two": (300, 345),
    "int4_two": (300, 330),
    "w16_three": (220, 220),
    "int8_three": (350, 400),
    "int4_three": (350, 380),
    "int8_none_groups": (190, 240),
    "int4_none_groups": (190, 210),
    "int8_one_groups": (285, 335),
    "int4_one_groups": (285, 305),
}


# On 12.0 ptxas joins the third plane's bit to the first two by two LOP3 a register instead of one.
THIRD_PLANE_OF_SM_120A = 32


def kind_of(name: str) -> str:
    """int4_one_groups of narrow_fp16_int4_one_groups."""
    return name.split("_", 2)[2]


def planes_of(name: str) -> int:
    return PLANES[kind_of(name).split("_")[1]]


def narrow(kernels: dict[str, sass.Kernel]) -> dict[str, sass.Kernel]:
    return {name: kernel for name, kernel in kernels.items() if name.startswith("narrow_")}


def loops(kernel: sass.Kernel) -> list[list[sass.Instruction]]:
    """The loops that both multiply and copy: one for each number of stages."""
    found = [
        loop
        for loop in kernel.loops
        if kernel.has(loop.blocks, "HMMA") and kernel.has(loop.blocks, "LDGSTS")
    ]
    return [kernel.of(loop.blocks) for loop in found]


@EVERY
def test_every_narrow_kernel_is_there(machine_code, architecture):
    found = set(narrow(machine_code(architecture)[1]))
    assert found == {f"narrow_{a}_{kind}" for a in ACTIVATIONS for kind in BUDGET}


@EVERY
def test_a_block_costs_no_more_than_its_budget(machine_code, architecture):
    wrong = Findings()
    for name, kernel in narrow(machine_code(architecture)[1]).items():
        most = BUDGET[kind_of(name)]["bf16" in name]
        if architecture == "sm_120a" and planes_of(name) == 3:
            most += THIRD_PLANE_OF_SM_120A
        counts = [len(loop) for loop in loops(kernel)]
        if len(counts) != len(STAGES):
            wrong[f"{len(counts)} loops instead of one for each of {STAGES} stages"].append(name)
        if max(counts) > most:
            wrong[f"{max(counts)} instructions a block instead of {most}"].append(name)
    wrong.check()


@EVERY
def test_a_mask_and_its_constant_are_one_instruction(machine_code, architecture):
    """One LOP3 each for the signs and the nibbles of a register; two where the compiler has put
    both constants into immediates."""
    wrong = Findings()
    signs, complement = 32, 8  # of a register; of a metadata word, four times
    for name, kernel in narrow(machine_code(architecture)[1]).items():
        kind = kind_of(name)
        if kind not in ("w16_one", "int8_one", "int4_one") or "bf16" in name:
            continue
        most = signs + complement + (32 if kind.startswith("int4") else 0) + 2
        for loop in loops(kernel):
            counted = sum(i.base == "LOP3" for i in loop)
            if counted > most + (2 if kind.startswith("int") else 0):
                wrong[f"{counted} LOP3 a block instead of {most}"].append(name)
    wrong.check()


@EVERY
def test_nothing_is_called_or_spilled_and_registers_suffice(machine_code, architecture):
    wrong = Findings()
    for name, kernel in narrow(machine_code(architecture)[1]).items():
        for what in excesses(kernel, MOST_REGISTERS):
            wrong[what].append(name)
    wrong.check()


@EVERY
def test_each_product_is_one_tensor_instruction(machine_code, architecture):
    """Two row tiles and four steps, kept values and signs; one step of the adapter after them."""
    wrong = Findings()
    for name, kernel in narrow(machine_code(architecture)[1]).items():
        suffix = ".BF16" if "bf16" in name else ""
        expected = {f"HMMA.SP.16832.F32{suffix}": 8 * (2 if planes_of(name) else 1)}
        for loop in loops(kernel):
            counted = collections.Counter(i.opcode for i in loop if i.pipe == "tensor")
            if counted != expected:
                wrong[f"{dict(counted)}, not {expected}"].append(name)
        dense = [i for i in kernel.instructions if i.opcode == f"HMMA.16816.F32{suffix}"]
        if len(dense) != 2:
            wrong[f"{len(dense)} dense products for the adapter, not 2"].append(name)
    wrong.check()


@EVERY
def test_a_warp_stands_at_no_barrier_in_its_loop(machine_code, architecture):
    """And reads its columns by four ldmatrix, converts nothing, copies 16 bytes past L1."""
    wrong = Findings()
    for name, kernel in narrow(machine_code(architecture)[1]).items():
        for loop in loops(kernel):
            if any(i.base in ("BAR", "LDG", "ATOM") for i in loop):
                wrong["a barrier or a load past the ring in the loop"].append(name)
            if sum(i.base == "LDSM" for i in loop) != 4:
                wrong["other than four ldmatrix a block"].append(name)
            if any(i.pipe == "xu" for i in loop):
                wrong["a conversion or division in the loop"].append(name)
        copies = {i.opcode for i in kernel.instructions if i.base == "LDGSTS"}
        if any(".BYPASS" not in copy or ".128" not in copy for copy in copies):
            wrong[f"copies other than 16 bytes past L1: {copies}"].append(name)
    wrong.check()


@EVERY
def test_weights_are_asked_for_before_anything_else(machine_code, architecture):
    wrong = Findings()
    for name, kernel in narrow(machine_code(architecture)[1]).items():
        before = list(itertools.takewhile(lambda i: i.base != "LDGSTS", kernel.instructions))
        if len(before) > FIRST_COPY:
            wrong[f"{len(before)} instructions before the first copy"].append(name)
        if any(i.base in ("LDG", "BAR") or i.pipe == "xu" for i in before):
            wrong["a load, a barrier or a division before the first copy"].append(name)
    wrong.check()


def test_the_cost_model_issues_what_the_machine_code_does(machine_code):
    """Of the fp16 kernels on sm_90a, within 10 %."""
    wrong = Findings()
    values_of = {"w16": W16, "int8": INT8, "int4": INT4}
    for name, kernel in narrow(machine_code("sm_90a")[1]).items():
        values, planes, *groups = kind_of(name).split("_")
        modelled = cost.NARROW_ISSUE[PLANES[planes]][values_of[values]]
        # These have ways for scale groups of 32 and 64 inputs, which are counted, too.
        told = groups or (PLANES[planes] > 1 and values != "w16")
        modelled += cost.GROUPS_ISSUE if told else 0
        counted = len(loops(kernel)[0])
        if "fp16" in name and abs(modelled / counted - 1) > 0.1:
            wrong[f"cost.NARROW_ISSUE says {modelled}, the machine code {counted}"].append(name)
    wrong.check()
