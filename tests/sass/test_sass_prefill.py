"""The gate on the machine code of the kernels for many tokens on Hopper (prefill.cu, sm_90a).

A kernel's main loop is the innermost one with at least a block's products: a K-block of 16 rows x
128 inputs a warp, so 64 weights a lane. Its waits ask again in blocks of their own, which begin
with YIELD and are not counted: a wait that has nothing to wait for does not pass them.
"""

from __future__ import annotations

import collections
import functools
import re

import pytest

from sass import counter as sass
from sass.findings import Findings
from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda import prefill_cost
from slab_kernels.backends.cuda.launch import VALUE_NAMES

UNIT, ARCHITECTURE = "prefill", "sm_90a"
ACTIVATIONS = ("fp16", "bf16")
VALUES = ("w16", "int8", "int4")
WEIGHTS = 64  # of a lane in a K-block
STEPS = 4
FRAMES = {"one": (64, 128, 256), "both": (64,), "rebuild_one": (64, 128, 256), "any": (64, 128)}
# setmaxnreg: of the threads that multiply and of those that fetch, by tokens and warpgroups.
LIMITS = {64: (96, 40), 128: (232, 40), 256: (232, 40), "four": (112, 24)}

# Instructions a weight of fp16 and of bf16 kernels, whose integers are harder to make; and more of
# them where scales change within a K-block.
BUDGET = {
    ("one", "w16"): (1.55, 1.55),
    ("one", "int8"): (2.4, 2.7),
    ("one", "int4"): (2.45, 2.5),
    ("both", "w16"): (2.65, 2.65),
    ("both", "int8"): (3.5, 3.85),
    ("both", "int4"): (3.55, 3.6),
    ("rebuild", "w16"): (5.45, 5.45),
    ("rebuild", "int8"): (6.35, 6.65),
    ("rebuild", "int4"): (6.4, 6.4),
}
MORE_WITH_GROUPS = 0.45
WITHIN = 0.10  # of the instructions in prefill_cost.py, and half as much again of the ALU's


@functools.cache
def compiled() -> tuple[list[str], dict[str, sass.Kernel]]:
    """What ptxas warns of, and the kernels."""
    try:
        said = sass.warnings(ARCHITECTURE, UNIT)
        return said, sass.disassemble(sass.image(ARCHITECTURE, unit=UNIT))
    except recipe.Impossible as reason:
        pytest.fail(str(reason), pytrace=False)


def products() -> dict[str, sass.Kernel]:
    """The kernels that multiply."""
    return {name: k for name, k in compiled()[1].items() if not name.startswith("prefill_reduce")}


def names() -> set[str]:
    found = {f"prefill_reduce_{a}" for a in ACTIVATIONS}
    for a in ACTIVATIONS:
        for v in VALUES:
            for kind, tokens in FRAMES.items():
                family, _, rank = kind.partition("_")
                middle = f"{v}_{rank}" if rank else v
                if kind == "any":
                    family, middle = "rebuild", f"{v}_any"
                for t in tokens:
                    found.add(f"prefill_{family}_{a}_{middle}_t{t}")
                    if v != "w16" and kind != "any":
                        found.add(f"prefill_{family}_{a}_{middle}_t{t}_groups")
    return found


def tokens_of(name: str) -> int:
    return int(re.search(r"_t(\d+)", name)[1])


def has_four_warpgroups(name: str) -> bool:
    return "_one_t128" in name and "rebuild" in name


def main_loop(kernel: sass.Kernel) -> list[sass.Instruction]:
    loops = [
        x for x in kernel.loops if sum(i.base == "HGMMA" for i in kernel.of(x.blocks)) >= STEPS
    ]
    innermost = [x for x in loops if not any(other.blocks < x.blocks for other in loops)]
    assert len(innermost) == 1, f"{kernel.name}: {len(innermost)} loops over K-blocks"
    body = innermost[0].blocks
    waits = {b for b in body if kernel.blocks[b][0].base == "YIELD"}
    # Behind a wait that had to ask again, only the way back.
    back = {s for b in waits for s in kernel.successors[b] if len(kernel.blocks[s]) == 1}
    return kernel.of(body - waits - (back & body))


def highest_register(kernel: sass.Kernel, block: int, at: int) -> int:
    """Of all that may run from here on."""
    highest, seen, todo = 0, set(), [(block, at)]
    while todo:
        block, at = todo.pop()
        for i in kernel.blocks[block][at:]:
            registers = [int(r) for r in re.findall(r"\bR(\d+)\b", i.operands)]
            if i.base == "HGMMA":  # half a register a row and token
                registers.append(registers[0] + int(re.search(r"x(\d+)x", i.operands)[1]) // 2 - 1)
            elif registers and re.search(r"\.(128|64|WIDE)\b", i.opcode):
                registers = [r + (3 if ".128" in i.opcode else 1) for r in registers]
            highest = max([highest, *registers])
        for following in kernel.successors[block]:
            if following not in seen:
                seen.add(following)
                todo.append((following, 0))
    return highest


def test_every_kernel_is_there():
    assert set(compiled()[1]) == names()


def test_ptxas_says_nothing_of_lost_performance():
    """C75xx: it would wait for every product before the next."""
    said = compiled()[0]
    assert not said, "\n".join(said)


def test_nothing_is_called_or_spilled():
    wrong = Findings()
    for name, kernel in compiled()[1].items():
        used = {i.base for i in kernel.instructions}
        if kernel.usage.stack or kernel.usage.local or used & {"LDL", "STL"}:
            wrong[f"{kernel.usage.stack} bytes of stack"].append(name)
        if used & {"CALL", "RET"}:
            wrong["a call of a subroutine"].append(name)
    wrong.check()


def test_registers_suffice_after_they_were_given_away_or_taken():
    wrong = Findings()
    for name, kernel in products().items():
        limits = LIMITS["four" if has_four_warpgroups(name) else tokens_of(name)]
        found = {}
        for number, block in enumerate(kernel.blocks):
            for at, i in enumerate(block):
                if i.base == "USETMAXREG":
                    limit = int(i.operands.rstrip(" ;").split()[-1], 0)
                    found[limit] = highest_register(kernel, number, at + 1)
        if sorted(found) != sorted(limits):
            wrong[f"setmaxnreg {sorted(found)}, not {sorted(limits)}"].append(name)
        for limit, highest in found.items():
            if highest >= limit:
                wrong[f"R{highest} where threads have {limit} registers"].append(name)
    wrong.check()


def test_the_main_loop_stays_within_its_budget():
    wrong = Findings()
    for name, kernel in products().items():
        if "_any_" in name:  # has a loop over ranks in it
            continue
        _, kind, activation, values, *rest = name.split("_")
        most = BUDGET[kind, values][activation == "bf16"]
        most += MORE_WITH_GROUPS * ("groups" in rest)
        counted = len(main_loop(kernel)) / WEIGHTS
        if counted > most:
            wrong[f"{counted:.2f} instructions a weight instead of {most:.2f}"].append(name)
    wrong.check()


def test_the_cost_model_issues_what_the_machine_code_does():
    """Instructions of a consumer warp and those of its ALU, of fp16 kernels."""
    wrong = Findings()
    codes = {name: code for code, name in VALUE_NAMES.items()}
    for name, kernel in products().items():
        _, kind, activation, values, *rest = name.split("_")
        if activation == "bf16":
            continue
        table = prefill_cost.ANY_WARP if "any" in rest else prefill_cost.WARP[kind]
        issued, alu, _ = table[codes[values]]
        issued += prefill_cost.GROUPS_WARP * ("groups" in rest)
        loop = main_loop(kernel)
        if abs(issued / len(loop) - 1) > WITHIN:
            wrong[f"prefill_cost.py says {issued}, the machine code {len(loop)}"].append(name)
        executed = sum(i.pipe == "alu" for i in loop)
        if "groups" not in rest and abs(alu / executed - 1) > 1.5 * WITHIN:
            wrong[f"prefill_cost.py says {alu} of the ALU, not {executed}"].append(name)
    wrong.check()


def test_each_product_is_one_tensor_instruction():
    """Four sparse ones of a K-block, twice that with signs, or eight dense ones."""
    wrong = Findings()
    for name, kernel in products().items():
        kind, suffix = name.split("_")[1], ".BF16" if "bf16" in name else ""
        counted = collections.Counter(
            (i.opcode.startswith("HGMMA.SP"), i.operands.split()[0])
            for i in main_loop(kernel)
            if i.base == "HGMMA"
        )
        shape = f"x{tokens_of(name)}x{16 if kind == 'rebuild' else 32}.F32{suffix}"
        if kind != "rebuild":
            shape = f"x{tokens_of(name)}x32.F32{suffix}"
        expected = {(kind != "rebuild", shape): STEPS if kind == "one" else 2 * STEPS}
        if dict(counted) != expected:
            wrong[f"{dict(counted)}, not {expected}"].append(name)
    wrong.check()


def test_a_wait_leaves_the_products_of_one_group_on_their_way():
    """WARPGROUP.DEPBAR of no group would let the tensor cores stand still."""
    wrong = Findings()
    for name, kernel in products().items():
        waits = [i for i in main_loop(kernel) if i.opcode.startswith("WARPGROUP.DEPBAR")]
        issues = 2 * STEPS if has_four_warpgroups(name) else STEPS
        if len(waits) != issues or any(i.operands.split()[1] != "0x1" for i in waits):
            wrong[f"waits {[i.operands for i in waits]}"].append(name)
    wrong.check()


def test_nothing_is_loaded_past_the_rings():
    """Of rank one: weights, scales and signs come through shared memory."""
    wrong = Findings()
    for name, kernel in products().items():
        loaded = {i.base for i in main_loop(kernel)} & {"LDG", "LD", "LDL", "ATOM", "MEMBAR"}
        if loaded - ({"LDG"} if "_any_" in name else set()):
            wrong[f"{loaded} in the main loop"].append(name)
    wrong.check()
