"""The gate on the machine code of the kernels for up to 16 tokens whose activations travel in the
ring: wide_* and adapter_*_t16.

A kernel has one loop for each number of stages of a K group of one warp, and one for groups of
several warps, which alone has barriers. What a block of 32 rows x 128 inputs costs is the shortest
way around a loop that multiplies everything and copies a whole K-block: a way for the last K-block
of x lies beside it.
"""

from __future__ import annotations

import collections
import functools
import itertools

import pytest

from sass import counter as sass
from sass.findings import Findings, excesses
from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda import cost
from slab_kernels.backends.cuda.layout import DENSE, INT4, INT8, W16
from slab_kernels.backends.cuda.tiles import DECODE_REGISTERS

ACTIVATIONS = ("fp16", "bf16")
PLANES = {"none": 0, "one": 1, "two": 2, "three": 3}
LOOPS = 4  # 2, 3 and 4 stages of one warp; several warps
FIRST_COPY = 125  # instructions before the first one that asks for weights
FOR_SEVERAL_WARPS = 25  # more instructions of the loop with barriers
MORE_ON_SM_120A = 10  # whose ptxas keeps less in uniform registers
EVERY = pytest.mark.parametrize("architecture", recipe.ARCHITECTURES)

# Instructions a block of fp16 kernels and of bf16 kernels, whose integers are harder to make; t16:
# of 16 tokens, any_t8: with all four tiles of columns. Kernels that are told the scale groups at
# run time have a way for each; theirs are of groups of 128 inputs.
BUDGET = {
    "w16_none_t16": (90, 90),
    "int8_none_t16": (165, 215),
    "int4_none_t16": (170, 190),
    "w16_one_t16": (225, 225),
    "int8_one_t16": (310, 355),
    "int4_one_t16": (315, 330),
}


def decode(kernels: dict[str, sass.Kernel]) -> dict[str, sass.Kernel]:
    return {
        name: kernel
        for name, kernel in kernels.items()
        if name.startswith("wide_") or (name.startswith("adapter_") and name.endswith("_t16"))
    }


def planes_of(name: str) -> int:
    """Of wide_fp16_int4_one_t16: 1."""
    return 0 if name.startswith("adapter") else PLANES[name.split("_")[3]]


def loops(kernel: sass.Kernel) -> list[sass.Loop]:
    """The loops that both multiply and copy."""
    return [
        loop
        for loop in kernel.loops
        if kernel.has(loop.blocks, "HMMA") and kernel.has(loop.blocks, "LDGSTS")
    ]


def way_around(kernel: sass.Kernel, loop: sass.Loop) -> list[sass.Instruction]:
    """The shortest way that passes every product and the copies of a whole K-block."""

    def whole(block: int) -> int:
        return sum(i.base == "LDGSTS" and ".ZFILL" not in i.opcode for i in kernel.blocks[block])

    def after(block: int) -> set[int]:
        seen, todo = set(), [block]
        while todo:
            for following in kernel.successors[todo.pop()]:
                if following in loop.blocks - seen - {loop.header}:
                    seen.add(following)
                    todo.append(following)
        return seen

    needed = {block for block in loop.blocks if kernel.has([block], "HMMA")}
    needed.add(max(loop.blocks, key=whole))
    order = sorted(needed, key=lambda block: -len(after(block) & needed))

    @functools.cache
    def best(block: int, met: int) -> tuple[float, tuple[int, ...]]:
        if block in needed:
            if order.index(block) != met:
                return float("inf"), ()
            met += 1
        ways = [(float("inf"), ())]
        for following in kernel.successors[block]:
            if following == loop.header and met == len(order):
                ways.append((0, ()))
            elif following in loop.blocks and following != loop.header:
                ways.append(best(following, met))
        length, rest = min(ways)
        return length + len(kernel.blocks[block]), (block, *rest)

    length, way = best(loop.header, 0)
    assert length < float("inf"), kernel.name
    return kernel.of(way)


@EVERY
def test_every_wide_kernel_is_there(machine_code, architecture):
    values, groups = ("w16", "int8", "int4"), ("int8_none", "int8_one", "int4_none", "int4_one")
    kinds = {f"{v}_{p}_t16" for v in values for p in PLANES}
    kinds |= {f"{v}_{p}_any_t8" for v in values for p in PLANES if PLANES[p]}
    kinds |= {f"{kind}_t16_groups" for kind in groups}
    expected = {f"wide_{a}_{kind}" for a in ACTIVATIONS for kind in kinds}
    expected |= {f"adapter_{a}_t16" for a in ACTIVATIONS}
    assert set(decode(machine_code(architecture)[1])) == expected


@EVERY
def test_a_block_costs_no_more_than_its_budget(machine_code, architecture):
    wrong = Findings()
    for name, kernel in decode(machine_code(architecture)[1]).items():
        ways = [way_around(kernel, loop) for loop in loops(kernel)]
        if len(ways) != LOOPS:
            wrong[f"{len(ways)} loops instead of {LOOPS}"].append(name)
        most = BUDGET.get(name.split("_", 2)[2])
        if most is None or name.startswith("adapter"):
            continue
        for way in ways:
            barriers = any(i.base == "BAR" for i in way)
            allowed = most["bf16" in name] + FOR_SEVERAL_WARPS * barriers
            allowed += MORE_ON_SM_120A * (architecture == "sm_120a")
            if len(way) > allowed:
                wrong[f"{len(way)} instructions a block instead of {allowed}"].append(name)
    wrong.check()


@EVERY
def test_a_mask_and_its_constant_are_one_instruction(machine_code, architecture):
    """One LOP3 each for the signs and the nibbles of a register; two where the compiler has put
    both constants into immediates. Some more choose what is copied."""
    wrong = Findings()
    signs, complement, copies = 32, 8, 12  # of a register; of a metadata word, four times
    for name, kernel in decode(machine_code(architecture)[1]).items():
        if not name.endswith("_one_t16") or "bf16" in name:
            continue
        most = signs + complement + copies + (32 if "int4" in name else 0)
        for loop in loops(kernel):
            counted = sum(i.base == "LOP3" for i in way_around(kernel, loop))
            if counted > most:
                wrong[f"{counted} LOP3 a block instead of {most}"].append(name)
    wrong.check()


@EVERY
def test_nothing_is_called_or_spilled_and_registers_suffice(machine_code, architecture):
    wrong = Findings()
    for name, kernel in decode(machine_code(architecture)[1]).items():
        for what in excesses(kernel, DECODE_REGISTERS):
            wrong[what].append(name)
    wrong.check()


@EVERY
def test_each_product_is_one_tensor_instruction(machine_code, architecture):
    """Two row tiles, four steps; two token tiles of rank one, or one and four tiles of columns."""
    wrong = Findings()
    for name, kernel in decode(machine_code(architecture)[1]).items():
        suffix = ".BF16" if "bf16" in name else ""
        tiles = 1 + 4 if "_any_" in name else 2 + 2 * bool(planes_of(name))
        expected = {f"HMMA.SP.16832.F32{suffix}": 2 * 4 * tiles}
        if name.startswith("adapter"):
            expected = {f"HMMA.16816.F32{suffix}": 2 * 4 * 2 * tiles}
        for loop in loops(kernel):
            way = way_around(kernel, loop)
            counted = dict(collections.Counter(i.opcode for i in way if i.pipe == "tensor"))
            if counted != expected:
                wrong[f"{counted}, not {expected}"].append(name)
    wrong.check()


@EVERY
def test_a_group_of_one_warp_stands_at_no_barrier(machine_code, architecture):
    """And nothing is loaded past the ring, nothing converted; copies are 16 bytes past L1."""
    wrong = Findings()
    for name, kernel in decode(machine_code(architecture)[1]).items():
        ways = [way_around(kernel, loop) for loop in loops(kernel)]
        barriers = sorted(sum(i.base == "BAR" for i in way) for way in ways)
        if barriers != [0, 0, 0, 2]:
            wrong[f"{barriers} barriers in the loops"].append(name)
        if any(i.base in ("LDG", "ATOM") or i.pipe == "xu" for way in ways for i in way):
            wrong["a load past the ring, a conversion or a division in a loop"].append(name)
        copies = {i.opcode for i in kernel.instructions if i.base == "LDGSTS"}
        if any(".BYPASS" not in copy or ".128" not in copy for copy in copies):
            wrong[f"copies other than 16 bytes past L1: {copies}"].append(name)
    wrong.check()


@EVERY
def test_weights_are_asked_for_before_anything_else(machine_code, architecture):
    wrong = Findings()
    for name, kernel in decode(machine_code(architecture)[1]).items():
        before = list(itertools.takewhile(lambda i: i.base != "LDGSTS", kernel.instructions))
        if len(before) > FIRST_COPY:
            wrong[f"{len(before)} instructions before the first copy"].append(name)
        if any(i.base in ("LDG", "BAR") or i.pipe == "xu" for i in before):
            wrong["a load, a barrier or a division before the first copy"].append(name)
    wrong.check()


def test_the_cost_model_issues_what_the_machine_code_does(machine_code):
    """Of the fp16 kernels on sm_90a, within 10 %, with scale groups of 128 inputs; of any rank with
    four tiles of columns."""
    wrong = Findings()
    values_of = {"w16": W16, "int8": INT8, "int4": INT4}
    for name, kernel in decode(machine_code("sm_90a")[1]).items():
        if "fp16" not in name:
            continue
        planes = planes_of(name)
        values = DENSE if name.startswith("adapter") else values_of[name.split("_")[2]]
        if "_any_" in name:
            fixed, per_tile = cost.ANY_ISSUE[planes][values]
            modelled = fixed + 4 * per_tile
        else:
            modelled = cost.WIDE_ISSUE[planes][values]
        counted = min(len(way_around(kernel, loop)) for loop in loops(kernel))
        if abs(modelled / counted - 1) > 0.1:
            wrong[f"the cost model says {modelled}, the machine code {counted}"].append(name)
    wrong.check()
