"""The support table: README has it, dispatch does what it says, and it follows the rules."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slab_kernels.backends import cuda, dispatch, support
from slab_kernels.backends.base import Backend, LinearProblem
from slab_kernels.backends.cuda import CudaBackend
from slab_kernels.backends.triton import TritonBackend
from slab_kernels.cli import main as cli

README = Path(__file__).resolve().parents[2] / "README.md"
COMMAND = "slab-kernels info --support"  # prints the table
# Compute capabilities of a column; None is the CPU.
COLUMNS = {
    "CPU": [None],
    "GPU below 8.0": [(6, 1), (7, 0), (7, 5)],
    "GPU from 8.0": [(8, 0), (8, 7), (9, 0), (10, 3), (12, 1)],
}
TYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
GROUPS = {
    "fp16": [None],
    "bf16": [None],
    **{name: [None, 32, 64, 128] for name in ("int8", "int4", "int3")},
}


def rows(table: str) -> list[dict[str, str]]:
    """Rows of a Markdown table, by its headings."""
    head, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )
    return [dict(zip(head, row, strict=True)) for row in body]


@pytest.fixture
def machine(monkeypatch):
    """A machine where nothing is missing, with a GPU of the capability asked for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in dispatch.ORDER:
        monkeypatch.setattr(dispatch.backend(name), "missing", lambda device: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda capability: monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda *_: capability
    )


def test_readme_has_the_generated_table():
    said = f"the backends' rules have changed; put what `{COMMAND}` prints into README.md"
    assert support.markdown() in README.read_text(encoding="utf-8"), said


@pytest.mark.parametrize(
    "row", rows(support.markdown()), ids=lambda row: f"{row['backend']} {row['S values']}"
)
def test_cells_are_what_dispatch_says(row, machine):
    backend = dispatch.backend(row["backend"].strip("`"))
    assert set(COLUMNS) <= set(row)
    for column, capabilities in COLUMNS.items():
        match = re.fullmatch(r"(?P<types>[\w, ]+)(?: \((?P<limits>[\w ≤,]+)\))?|–", row[column])
        types = (match["types"] or "").split(", ")
        limits = {
            name: int(size) for name, size in re.findall(r"(\w+) ≤ (\d+)", match["limits"] or "")
        }
        largest = {"rank": 1000, "planes": 3} | limits
        assert set(types) <= {"", *TYPES}
        for capability in capabilities:
            machine(capability)
            for values in row["S values"].split(", "):
                for group_size in GROUPS[values]:
                    for name, dtype in TYPES.items():
                        problem = LinearProblem(
                            5,
                            33,
                            100,
                            values,
                            group_size,
                            1,
                            0,
                            dtype,
                            "cuda" if capability else "cpu",
                        )
                        for other in (
                            problem,
                            replace(problem, M=1, rank=0, adapter_rank=64),
                            replace(problem, M=9999, **largest),
                        ):
                            assert (not backend.not_supported_reasons(other)) == (name in types), (
                                column,
                                other,
                            )
                        for limit, size in limits.items():
                            assert backend.not_supported_reasons(
                                replace(problem, **{limit: size + 1})
                            )


def test_every_backend_and_value_type_has_a_row():
    found = [
        (row["backend"].strip("`"), values)
        for row in rows(support.markdown())
        for values in row["S values"].split(", ")
    ]
    assert found == [(name, values) for name in dispatch.ORDER for values in GROUPS]


def test_a_rule_that_changes_changes_the_table(monkeypatch):
    before = support.markdown()
    monkeypatch.setattr(cuda, "MOST_RANK", 8)
    assert (
        support.markdown()
        == before.replace("bf16, fp16 (rank ≤ 16", "bf16, fp16 (rank ≤ 8", 1)
        != before
    )
    with pytest.raises(AssertionError, match=COMMAND):
        test_readme_has_the_generated_table()


def planted(monkeypatch, backend: type[Backend], refused) -> None:
    rule = backend.refusals
    monkeypatch.setattr(
        backend,
        "refusals",
        lambda self, p, capability=None: (
            rule(self, p, capability) + ["planted"] * bool(refused(p, capability))
        ),
    )


def cuda_cell(found: list[dict[str, str]], values: str) -> str:
    """What the newest GPUs run of these values, first in their row."""
    (cell,) = (
        row["GPU from 10.0"]
        for row in found
        if row["backend"] == "`cuda`" and row["S values"].startswith(values)
    )
    return cell


def test_rows_and_columns_split_where_a_backend_does(monkeypatch):
    planted(
        monkeypatch, CudaBackend, lambda p, _: p.values == "int4" and p.group_size in (32, None)
    )
    planted(
        monkeypatch,
        CudaBackend,
        lambda p, _: p.values == "int8" and p.M > 64 and p.dtype == torch.float16,
    )
    planted(
        monkeypatch,
        TritonBackend,
        lambda p, capability: capability and (9, 0) <= capability < (10, 0),
    )
    found = rows(support.markdown())
    assert list(found[0])[2:] == [
        "CPU",
        "GPU below 8.0",
        "GPU from 8.0, below 9.0",
        "GPU from 9.0, below 10.0",
        "GPU from 10.0",
    ]
    most = (
        cuda_cell(found, "fp16, bf16, int4 (groups of 64, groups of 128)")
        .removeprefix("bf16, fp16 (")
        .removesuffix(")")
    )
    assert (
        most.startswith("rank ≤ 16")
        and cuda_cell(found, "int4 (one scale per row, groups of 32)") == "–"
    )
    assert cuda_cell(found, "int8") == f"bf16 ({most}); fp16 ({most}, M ≤ 64)"
    triton = next(row for row in found if row["backend"] == "`triton`")
    assert (
        triton["GPU from 9.0, below 10.0"]
        == "–"
        != triton["GPU from 8.0, below 9.0"]
        == triton["GPU from 10.0"]
    )


def test_round_sizes_only_is_not_support(monkeypatch):
    planted(monkeypatch, CudaBackend, lambda p, _: p.N % 16)
    assert all(
        row["GPU from 8.0"] == "–" for row in rows(support.markdown()) if row["backend"] == "`cuda`"
    )


def test_the_machine_does_not_matter(monkeypatch):
    before = support.answers()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    for name in dispatch.ORDER:
        monkeypatch.setattr(dispatch.backend(name), "missing", lambda device: "everything")
    assert support.answers() == before
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_info_prints_it(capsys):
    assert cli.run(["info", "--support"]) == 0
    assert capsys.readouterr().out == support.markdown()
    assert cli.run(["info", "--support", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["support"]
    assert found == [answer.to_dict() for answer in support.answers()]
    (old,) = [
        a
        for a in found
        if (a["backend"], a["values"], a["activations"], a["architecture"])
        == ("cuda", "fp16", "bf16", "7.5")
    ]
    assert (
        old["reasons"] == ["compute capability must be 8.0 or above, not 7.5"] and old["most"] == {}
    )
