"""What benchmarks/on_gpu asks hardware alone, without any: the PTX of its own kernels interpreted,
their machine code counted, and the verdicts_many.
"""

from __future__ import annotations

import collections
import ctypes

import pytest
import torch
from emulated_unit import stand
from on_gpu import hardware, unit, unknowns, verdicts_many
from sass import counter as sass

CASES = ("dense_product_fp16", "dense_product_bf16", "sparse_product_fp16", "sparse_product_bf16",
         "box of a CTA", "box of a pair")  # fmt: skip


@pytest.mark.parametrize("late_products", (True, False))
def test_the_interpreter_says_what_hardware_is_asked(late_products):
    with stand(late_products=late_products) as there:
        rows = hardware.outcomes(there)
    assert {row["case"]: row["wrong"] for row in rows} == {case: [] for case in CASES}


@pytest.mark.parametrize("sparse", (False, True))
def test_any_exchange_shows(sparse):
    """The numbers have no symmetry: a device that swaps rows, tokens or positions is found."""

    exchanges = (
        lambda sums: sums.roll(1, 0),
        lambda sums: sums.roll(1, 1),
        lambda sums: sums.view(128, 16, 2).flip(2).flatten(1),
    )
    kind, count = ("sparse" if sparse else "dense"), hardware.THREADS * 32
    with stand() as there:
        for exchange in exchanges:

            def launch(name, ctas, threads, shared, params, exchange=exchange):
                there.launch(name, ctas, threads, shared, params)
                memory = (ctypes.c_float * count).from_address(params.sums)
                sums = torch.frombuffer(memory, dtype=torch.float32).view(hardware.THREADS, 32)
                sums[:] = exchange(sums.clone())

            swapped = there._replace(launch=launch)
            name = f"{kind}_product_fp16"
            (wrong,) = hardware.product(swapped, name, sparse, torch.float16)
            assert "entries, the first at" in wrong


def test_each_unknown_is_measured_by_its_own_kernel(monkeypatch):
    """In the interpreter the clock stands still: that the kernels run to their ends, without races,
    is all that it tells."""
    monkeypatch.setattr(unknowns, "LOADS", 16)
    monkeypatch.setattr(unknowns, "COPIES", 9)
    monkeypatch.setattr(unknowns, "TIMES", 2)
    with stand() as there:
        rows = [row for point in unknowns.POINTS for row in point(there)]
    count = collections.Counter(row["point"] for row in rows)
    assert count == {"look-ups": 4, "port": 3, "issue": 3}
    assert len({row["case"] for row in rows}) == len(rows)


def test_clocks_become_constants():
    ports = {"point": "port", "copied_bytes": 128_000}
    rows = [
        {"case": "reads alone", "read_clocks": 10_000, **ports},
        {"case": "reads and copies", "read_clocks": 10_500, **ports},
        {"case": "LDS.32 of 128 bytes", "clocks": 1.0},
        {"case": "LDS.64 of 128 bytes, as in the table", "clocks": 1.9},
        {"case": "2 warps a scheduler", "clocks": 2 * unknowns.ISSUE_CYCLES + 0.5},
    ]
    found = unknowns.constants(rows)
    assert found == pytest.approx(
        {"COPY_WRITES": 0.5, "TABLE_WAVEFRONTS": 1.9, "CONSUMER_WAIT": 0.5}
    )
    assert unknowns.constants([]) == {}


def test_the_verdict_on_clocks():
    rows = [
        {"case": "reads alone", "point": "port", "read_clocks": 9, "copy_clocks": 0},
        {"case": "LDS.32", "point": "look-ups", "clocks": 1.0},
        {"case": "2 warps a scheduler", "point": "issue", "clocks": 3.0},
    ]
    some = {"COPY_WRITES": 0.5, "TABLE_WAVEFRONTS": 1.9}
    verdict = verdicts_many.unknowns(rows, some | {"CONSUMER_WAIT": 0.1})
    assert verdict.good and verdict.text == (
        "COPY_WRITES 0.50; TABLE_WAVEFRONTS 1.90; CONSUMER_WAIT 0.10; reads alone 9 clocks; "
        "LDS.32 1.00 clocks; 2 warps a scheduler 3.00 clocks an instruction"
    )
    assert not verdicts_many.unknowns(rows, some).good


def test_the_machine_code_is_what_the_clocks_are_divided_by():
    kernels = sass.disassemble(unit.compiled())
    for kernel in kernels.values():
        assert not kernel.usage.stack and not kernel.usage.local, kernel.name
    (loop,) = kernels["issue_clocks"].loops
    count = collections.Counter(i.base for i in kernels["issue_clocks"].of(loop.blocks))
    assert count["LDS"] == count["SHFL"] == 4
    assert count.total() / 4 == pytest.approx(unknowns.ISSUE_INSTRUCTIONS, rel=0.05)
    for name, opcode in (
        ("look_up_32_clocks", "LDS"), ("look_up_64_clocks", "LDS.64"), ("port_clocks", "LDS.128"),
    ):  # fmt: skip
        bodies = [kernels[name].of(loop.blocks) for loop in kernels[name].loops]
        assert any(sum(i.opcode == opcode for i in body) == 8 for body in bodies), name


def test_what_hardware_refutes_is_named():
    rows = [{"case": "a", "wrong": []}, {"case": "b", "wrong": ["1 of 9 entries"]}]
    verdict = verdicts_many.hardware(rows)
    assert not verdict.good and verdict.text == "1 of 2 are as the interpreter has them; not b"
    assert list(verdict.details) == ["WRONG b: 1 of 9 entries"]
    assert verdicts_many.hardware(rows[:1]).good and not verdicts_many.hardware([]).good
