"""--help: examples that the command line takes as they stand, and hints that can be pasted."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import typer

from slab_kernels.cli import examples
from slab_kernels.cli import main as cli

LINES = [(name, line) for name, lines in examples.EXAMPLES.items() for line in lines]


def test_every_command_has_examples():
    assert list(examples.EXAMPLES) != [] and set(examples.EXAMPLES) == set(cli.COMMANDS)


@pytest.mark.parametrize(("name", "line"), LINES, ids=[line for _, line in LINES])
def test_an_example_is_valid(name, line):
    """It parses, and what it says of methods, types and shapes is known."""
    assert len(line) <= 74, "a line of 80 columns shows it whole"
    words = shlex.split(line.partition(" > ")[0])
    assert words[:2] == ["slab-kernels", name]
    group = typer.main.get_command(cli.app)
    command = group.get_command(
        group.make_context("slab-kernels", ["--version"], resilient_parsing=True), name
    )
    context = command.make_context(name, words[2:])
    values = context.params
    known = {"fp16", "bf16", "int8", "int4", "int3"}
    given = values.get("values") or []
    assert set([given] if isinstance(given, str) else given) <= known
    for shape in values.get("shape") or []:
        if isinstance(values["shape"], list):
            from slab_kernels.cli.meanings import parse_shape

            parse_shape(shape)


def test_examples_are_lines_of_their_own_under_help():
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "slab_kernels", "compress", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    shown = [line.strip() for line in done.stdout.splitlines()]
    for line in examples.EXAMPLES["compress"]:
        assert f"$ {line}" in shown


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, capsys):
    """A folder with a space and a quote in its name."""
    from slab_kernels.compression import model
    from slab_kernels.models import totals

    class Record:
        def to_dict(self):
            errors = {"mean_error": 0.1, "mean_heldout_error": 0.12}
            return {"layers": [], "bits_per_weight": 9.5, "seconds": 2.0} | errors

    monkeypatch.setattr(model, "compress", lambda *given, **named: Record())
    whole = totals.Totals(9, 8, 9, 8, {})
    monkeypatch.setattr(totals, "read_totals", lambda folder: whole)
    out = tmp_path / "my 'best' model"
    assert cli.run(["compress", "model", str(out)]) == 0
    hint = capsys.readouterr().out.partition("next: ")[2].strip()
    assert shlex.split(hint) == ["slab-kernels", "eval", str(out)]


def test_json_of_a_measurement_says_when_and_by_which_command(capsys):
    arguments = ["bench", "--shape", "64x32", "--seconds", "0", "--device", "cpu", "--json"]
    assert cli.run(arguments) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["command"] == "slab-kernels " + " ".join(arguments)
    assert run["seconds"] > 0 and run["date"][:2] == "20"
