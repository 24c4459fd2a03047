"""The gate on machine code: each kernel of csrc/cuda, on every architecture, has the instructions
that were meant and no others. Those for up to 16 tokens are held by test_sass_decode.py, those that
rebuild W by test_sass_rebuild.py.

Nothing is skipped: without nvcc or a disassembler these tests fail, in one sentence. Compiling
takes about 15 seconds an architecture, once for each version of the sources.
"""

from __future__ import annotations

import collections
import itertools
import re

import pytest

from sass import counter as sass
from sass import instruction_budget
from sass.findings import Findings
from slab_kernels.backends.cuda import compile as recipe
from slab_kernels.backends.cuda.cost import ISSUE, PLANES_ISSUE, TALL_ISSUE
from slab_kernels.backends.cuda.gpus import GPUS
from slab_kernels.backends.cuda.layout import INT4, INT8, W16
from slab_kernels.backends.cuda.tiles import PLANES_REGISTERS, REGISTERS, TALL, TALL_REGISTERS

MOST_BYTES = 9_500_000  # of a cubin; sm_90a takes 6.6, sm_120a 8.8
LARGEST_FAMILY = (
    12  # linear kernels of a token tile: two activation types, three values, one rank or any
)
SIMPLE_REGISTERS, ANY_REGISTERS = (
    64,
    128,
)  # reduce and dense: four CTAs of 256 threads; dense of any rank: two
ROW_TILES, STEPS = 2, 4  # of a warp, of a K-block
KEPT_PAIRS = 32  # registers of kept values that a lane has of a K-block
WITHIN = 0.10  # of cost.ISSUE
PLANES_WITHIN = 0.02  # of cost.PLANES_ISSUE: two tiles, a line through both
PLANES_NAMES = {2: "two", 3: "three"}
EVERY = pytest.mark.parametrize("architecture", recipe.ARCHITECTURES)


def tokens_of(name: str) -> int:
    """Of a warp; 0 for a kernel without products."""
    found = re.search(r"_t(\d+)$", name)
    return int(found[1]) if found else 0


def many(kernels: dict[str, sass.Kernel]) -> dict[str, sass.Kernel]:
    """Without the kernels for up to 16 tokens, and those that rebuild W."""
    return {
        name: kernel
        for name, kernel in kernels.items()
        if not name.startswith(("narrow_", "wide_", "rebuild_")) and not name.endswith("_t16")
    }


def products(instructions: list[sass.Instruction]) -> collections.Counter[str]:
    return collections.Counter(i.opcode for i in instructions if i.pipe == "tensor")


@EVERY
def test_every_kernel_is_there_once_and_the_image_is_small(machine_code, architecture):
    size, kernels = machine_code(architecture)
    activations, values = ("fp16", "bf16"), ("w16", "int8", "int4")
    kinds = [f"linear_{a}_{v}_{r}" for a in activations for v in values for r in ("one", "any")]
    linears = {f"{kind}_t{t}" for kind in kinds for t in REGISTERS}
    adapters = {f"adapter_{a}_t{t}" for a in activations for t in REGISTERS}
    simple = {f"reduce_{a}" for a in activations} | {
        f"dense_{a}_{v}" for a in activations for v in values
    }
    simple |= {f"dense_{a}_{v}_any" for a in activations for v in values}
    which = ("two", "three", "any")
    planes = {
        f"planes_{a}_{v}_{w}_t{t}"
        for a in activations
        for v in values
        for w in which
        for t in PLANES_REGISTERS
    }
    names = {W16: "w16", INT8: "int8", INT4: "int4"}
    kinds = [
        (f"{names[v]}_{'one' if rank else 'none'}", tokens) for (v, rank), tokens in TALL.items()
    ]
    tall = {f"tall_{a}_{kind}_t{t}" for a in activations for kind, tokens in kinds for t in tokens}
    assert len(tall) <= LARGEST_FAMILY
    assert set(many(kernels)) == linears | adapters | simple | tall | planes
    families = collections.Counter(tokens_of(name) for name in linears)
    assert max(families.values()) <= LARGEST_FAMILY
    assert size < MOST_BYTES


@EVERY
def test_registers_suffice_and_nothing_is_called_or_spilled(machine_code, architecture):
    wrong = Findings()
    for name, kernel in many(machine_code(architecture)[1]).items():
        families = {"tall": TALL_REGISTERS, "planes": PLANES_REGISTERS}
        simple = ANY_REGISTERS if name.endswith("_any") else SIMPLE_REGISTERS
        most = families.get(name.split("_")[0], REGISTERS).get(tokens_of(name), simple)
        everything = {i.base for i in kernel.instructions}
        if kernel.usage.registers > most:
            wrong[f"{kernel.usage.registers} registers, where tiles.py counts on {most}"].append(
                name
            )
        if kernel.usage.stack or kernel.usage.local or everything & {"LDL", "STL"}:
            wrong[f"spills: {kernel.usage.stack} bytes of stack"].append(name)
        # ptxas leaves some loops by CALL.REL.NOINC to the next label, on sm_80 to 89: a jump
        calls = [i for i in kernel.instructions if i.base in ("CALL", "RET")]
        if any("`(.L_x_" not in i.operands for i in calls):
            wrong["a call of a subroutine: a 64-bit division or an emulated instruction"].append(
                name
            )
    wrong.check()


@EVERY
def test_each_product_is_one_tensor_instruction(machine_code, architecture):
    """S and signs as HMMA.SP of 16 x 8 x 32, adapters as dense HMMA, all with fp32 sums, none left
    out.
    """
    wrong = Findings()
    for name, kernel in many(machine_code(architecture)[1]).items():
        if not (tiles := tokens_of(name) // 8):
            continue
        suffix = ".BF16" if "bf16" in name else ""
        sparse, dense = f"HMMA.SP.16832.F32{suffix}", f"HMMA.16816.F32{suffix}"
        tall = name.startswith("tall")  # twice the row tiles
        half = tiles * ROW_TILES * (1 + tall) * STEPS
        main = kernel.of(kernel.main.blocks)
        both = half if "_none_" in name else 2 * half
        expected = {"main loop": {dense if name.startswith("adapter") else sparse: both}}
        counted = {"main loop": dict(products(main))}
        if "_any_" in name:  # the signs of one rank in the rank loops, S outside them
            inside = products([i for loop in kernel.rank_loops for i in kernel.of(loop.blocks)])
            expected["rank loops"], counted["rank loops"] = {sparse: half}, dict(inside)
        if not name.startswith("adapter"):  # one step of the adapter
            after = products(kernel.instructions) - products(main)
            expected["adapter loop"], counted["adapter loop"] = (
                {dense: tiles * ROW_TILES * (1 + tall)},
                dict(after),
            )
        if counted != expected:
            wrong[f"{counted}, not {expected}"].append(name)
    wrong.check()


@EVERY
def test_the_main_loop_copies_past_the_registers_and_converts_nothing(machine_code, architecture):
    wrong = Findings()
    for name, kernel in many(machine_code(architecture)[1]).items():
        if not (tiles := tokens_of(name) // 8):
            continue
        main = kernel.of(kernel.main.blocks)
        before = [i for i in kernel.instructions if i.address < main[0].address]
        copies = {i.opcode for i in kernel.instructions if i.base == "LDGSTS"}
        matrices = collections.Counter(i.opcode for i in main if i.base == "LDSM")
        if bad := {c for c in copies if ".BYPASS" not in c or ".128" not in c}:
            wrong[f"copies other than 16 bytes past L1: {bad}"].append(name)
        if not all(any(i.base == "LDGSTS" for i in part) for part in (before, main)):
            wrong["the first stages or the main loop copy nothing asynchronously"].append(name)
        if any(not m.endswith(".M88.4") for m in matrices) or matrices.total() < tiles * STEPS:
            wrong[
                f"ldmatrix {dict(matrices)}, where {tiles * STEPS} of four matrices read x"
            ].append(name)
        if conversions := sorted({i.opcode for i in main if i.pipe == "xu"}):
            wrong[f"conversions or divisions in the main loop: {conversions}"].append(name)
    wrong.check()


@EVERY
def test_a_code_is_converted_once_whatever_the_number_of_tokens(machine_code, architecture):
    """In fp16 the last instruction of a conversion is an HADD2, of which there are no others."""
    kernels, wrong = machine_code(architecture)[1], Findings()
    for values, ranks, tokens in itertools.product(("int8", "int4"), ("one", "any"), REGISTERS):
        kernel = kernels[f"linear_fp16_{values}_{ranks}_t{tokens}"]
        found = sum(i.base == "HADD2" for i in kernel.of(kernel.main.blocks))
        if found != KEPT_PAIRS:
            wrong[f"{found} conversions of {KEPT_PAIRS} pairs"].append(kernel.name)
    wrong.check()


@EVERY
def test_no_selector_of_bytes_is_masked(machine_code, architecture):
    """`__byte_perm` masks a selector that only run time knows; an inline PRMT does not."""
    wrong = Findings()
    for kernel in machine_code(architecture)[1].values():
        if any("0x7777" in i.operands for i in kernel.instructions):
            wrong["a mask of a PRMT's selector"].append(kernel.name)
    wrong.check()


def test_the_cost_model_issues_what_the_machine_code_does(machine_code):
    wrong = Findings()
    for name, values in instruction_budget.KINDS.items():
        fitted, counts = instruction_budget.issue_line(machine_code("sm_90a")[1], name)
        fixed, per_tile = ISSUE[values]
        for tokens, counted in counts.items():
            modelled = fixed + per_tile * instruction_budget.tiles_of(name, tokens)
            if abs(modelled / counted - 1) > WITHIN:
                wrong[
                    f"cost.ISSUE of {name} is {ISSUE[values]}, the machine code says {fitted}"
                ].append(f"t{tokens}: {modelled:.0f} for {counted:.0f}")
    wrong.check()


def test_the_cost_model_knows_the_tall_kernels(machine_code):
    for (values, rank), tiles in TALL.items():
        if rank:
            name = {W16: "w16", INT8: "int8", INT4: "int4"}[values]
            fixed, per_tile = TALL_ISSUE[values]
            for tokens in tiles:
                counted = sum(
                    machine_code("sm_90a")[1][f"tall_fp16_{name}_one_t{tokens}"].by_pipe().values()
                )
                assert fixed + per_tile * tokens / 8 == pytest.approx(counted, rel=WITHIN), (
                    name,
                    tokens,
                )


def test_the_cost_model_knows_the_kernels_of_several_planes(machine_code):
    """Of rank one; a higher rank repeats the signs' share, as with one plane."""
    wrong = Findings()
    for planes, name in itertools.product(PLANES_ISSUE, instruction_budget.VALUES):
        fixed, per_tile = PLANES_ISSUE[planes][instruction_budget.VALUES[name]]
        for tokens in PLANES_REGISTERS:
            kernel = f"planes_fp16_{name}_{PLANES_NAMES[planes]}_t{tokens}"
            counted = sum(machine_code("sm_90a")[1][kernel].by_pipe().values())
            modelled = fixed + per_tile * tokens / 8
            if abs(modelled / counted - 1) > PLANES_WITHIN:
                wrong[
                    f"cost.PLANES_ISSUE says {modelled:.0f}, the machine code {counted:.0f}"
                ].append(kernel)
    wrong.check()


@EVERY
def test_every_instruction_of_the_main_loops_has_a_pipe(machine_code, architecture):
    for kernel in many(machine_code(architecture)[1]).values():
        if tokens_of(kernel.name):
            assert sum(kernel.by_pipe().values()) == pytest.approx(kernel.executed().total())


# ---- the reader itself, on text that is small enough to count by hand ---------------------------

LISTING = """\
.text.linear_x_one_t16:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   MOV R1, R2 ;
        /*0020*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0038*/              @!P1 LDGSTS.E.BYPASS.128 [R1+0x100], desc[UR4][R2.64] ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   HMMA.SP.16832.F32 R4, R8, R12, R4, R1, 0x0 ;
        /*0060*/              @!PT LDS RZ, [RZ] ;
        /*0070*/                   FFMA R1, R2, R3, R4 ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   LDGSTS.E.BYPASS.128.ZFILL [R1], desc[UR4][R2.64], P3 ;
        /*00b0*/                   UMOV UR4, URZ ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


def read(text: str) -> sass.Kernel:
    return sass.parse(text, {"linear_x_one_t16": sass.Usage(80, 0, 0)})["linear_x_one_t16"]


def test_main_loop_is_found_although_a_part_lies_outside_its_addresses():
    kernel = read(LISTING)
    addresses = [i.address for i in kernel.of(kernel.main.blocks)]
    assert addresses == [0x10, 0x20, 0x30, 0x38, *range(0x40, 0x90, 0x10), 0xA0, 0xB0, 0xC0]
    assert [kernel.blocks[loop.header][0].address for loop in kernel.inner] == [0x30]
    # two warps move 8 of 16 token rows a trip; the copy at an edge never runs; one load is only an
    # issue slot
    opcodes = {
        "MOV": 1,
        "LDGSTS.E.BYPASS.128": 4,
        "HMMA.SP.16832.F32": 1,
        "@!PT": 1,
        "FFMA": 1,
        "BRA": 4,
    }
    pipes = {"tensor": 1, "alu": 1, "fma": 1, "shared": 4, "control": 5}
    assert kernel.executed() == opcodes
    assert kernel.by_pipe() == dict.fromkeys(sass.PIPES, 0) | pipes


def test_a_kernel_without_main_loop_and_an_unknown_opcode_are_named():
    with pytest.raises(ValueError, match="no loop has both"):
        _ = read(LISTING.replace("HMMA", "HADD2")).main
    with pytest.raises(KeyError, match="FROB"):
        read(LISTING.replace("MOV R1", "FROB R1")).by_pipe()


def test_a_missing_tool_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        recipe.Impossible, match=r"^no nvdisasm here: pip install nvidia-cuda-nvdisasm$"
    ):
        sass.tool("nvdisasm")


def test_budget_at_full_bandwidth():
    """H200, 3.625 bits: 4096 weights are 1856 bytes; 132 x 4 schedulers at 1.76 GHz against 4800
    GB/s.
    """
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200")
    assert instruction_budget.bits(INT4) == 3.625
    assert instruction_budget.clocks_of_memory(gpu, INT4) == pytest.approx(
        4 * 132 * 1.76 * 1856 / 4800
    )
