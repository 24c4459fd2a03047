"""The gate on Triton's machine code: every shipped configuration on sm_80, 86, 89, 90 and 120,
under the triton that is here.

Any two of configuration, architecture, value type, rank and planes meet in some case; `pytest
--full` compiles all of them.

Registers, spills, shared memory, tensor instructions, and how many instructions a weight costs:
rows.py was chosen by them. Triton keeps what it has compiled.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton_code
from pairwise import subset
from sass import counter as sass
from triton_code import DEVICES, Case

from slab_kernels.backends.triton.rows import DEFAULTS

# Instructions a weight, measured (3.7.1 and 3.6) and a tenth. A tile of more tokens feeds more
# products.
MOST = {
    ("fp16", 16): 8.8, ("int8", 16): 11.5, ("int4", 16): 10.5,
    ("fp16", 64): 8.8, ("int8", 64): 12.0, ("int4", 64): 11.0,
}  # fmt: skip
BY_PLANES = {1: 0.0, 2: 0.7, 3: 1.7}  # instructions more, measured and a tenth
SPILLED = 16  # bytes of a thread that a sign term of rank 4, or three TF32 products, may spill
EVERY = [*triton_code.cases(), *triton_code.planes_cases()]


def test_every_default_is_reached_on_some_device():
    reached = {case.row for case in EVERY}
    # The last row is the net under all others, for a device with less shared memory than any that
    # has these kernels.
    same = [row for row in DEFAULTS[:-1] if not row.config.rebuild and row not in reached]
    tiles = {
        (c.block_m, c.block_n, c.block_k, c.warps, c.stages)
        for c in (row.config for row in reached)
    }
    assert all(
        (r.config.block_m, r.config.block_n, r.config.block_k, r.config.warps, r.config.stages)
        in tiles
        for r in same
    )


def settings(case: Case):
    return case.row.config, case.arch, case.values, case.rank, case.planes


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = EVERY if metafunc.config.getoption("full") else subset(EVERY, settings)
        metafunc.parametrize("case", cases, ids=str)


def test_registers_shared_memory_and_instructions(case: Case):
    kernel = triton_code.compiled(case)
    found = []
    plain = case.rank == 1 and case.dtype.itemsize == 2
    if kernel.local or kernel.stack > (0 if plain else SPILLED):
        found.append(f"spills {kernel.stack} bytes, {kernel.local} bytes of local memory")
    if (
        kernel.shared_bytes > case.row.shared
        or kernel.shared_bytes > DEVICES[case.arch].shared_limit
    ):
        found.append(
            f"takes {kernel.shared_bytes} bytes of shared memory, its row says {case.row.shared}"
        )
    usage = {kernel.name: sass.Usage(kernel.registers, kernel.stack, kernel.local)}
    code = sass.parse(kernel.sass, usage)[kernel.name]
    main = code.of(code.main.blocks)
    product = "HGMMA" if case.arch == 90 and case.row.config.block_n >= 64 else "HMMA"
    if not any(i.base == product for i in main):
        found.append(f"has no {product} in its main loop")
    # ptxas leaves the loop by CALL.REL.NOINC, a jump that nothing returns from.
    if plain and any(
        i.base in ("I2F", "F2F", "LDL", "STL") or (i.base == "CALL" and ".NOINC" not in i.opcode)
        for i in main
    ):
        found.append("converts, calls or spills in its main loop")
    if plain:
        class_ = next(tokens for tokens in (16, 64) if case.row.config.block_m <= tokens)
        cost = triton_code.instructions_a_weight(case)
        most = MOST[case.values, class_] + BY_PLANES[case.planes]
        if cost > most:
            found.append(f"takes {cost:.1f} instructions a weight, more than {most:.1f}")
    assert not found, f"{case}: {'; '.join(found)}"
