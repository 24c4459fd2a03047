"""The command line `slab-kernels`. Every command takes --json: then stdout holds one JSON object
and nothing else.

A command builds an `Outcome`; `console.run` prints it and turns failures into one sentence and an
exit code. torch and transformers load inside the commands, so that --help is instant.
"""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from .. import __version__
from . import compression, console, generation, kernels, machine, models, report
from .examples import epilog
from .threads import wait_passively

app = typer.Typer(
    name="slab-kernels",
    help="Compress language models to 2:4 sparse values plus low-rank signs, and run them from "
    "the packed weights.",
    epilog=console.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., console.Outcome]] = {
    "compress": compression.compress,
    "eval": models.evaluate,
    "generate": generation.generate,
    "bench": kernels.bench,
    "tune": kernels.tune,
    "info": machine.info,
    "explain": kernels.explain,
    "train": compression.train,
    "inspect": models.inspect,
    "check": models.check,
    "decompress": compression.decompress,
    "report": report.report,
}
TIMED = ("bench", "tune")  # commands that time kernels as other programs run them
MEASURING = (
    "compress",
    "eval",
    "generate",
    "bench",
)  # commands whose JSON says when and how it was made
TOKEN = "--token"  # the option whose value nobody is shown


def main() -> None:
    """The console script `slab-kernels`: runs the command line and ends the process."""
    if not sys.argv[1:2] or sys.argv[1] not in TIMED:
        wait_passively()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One command line; returns its exit code."""
    command = typer.main.get_command(app)

    def carry_out() -> console.Outcome | int | None:
        began = time.monotonic()
        found = command.main(arguments, prog_name="slab-kernels", standalone_mode=False)
        if isinstance(found, console.Outcome) and arguments[0] in MEASURING:
            return replace(found, data=found.data | {"run": _run(arguments, began)})
        return found

    return console.run(carry_out, as_json="--json" in arguments)


def _run(arguments: list[str], began: float) -> dict[str, Any]:
    """When and by which command something was measured, and how long it took."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": shlex.join(["slab-kernels", *without_token(arguments)]),
        "seconds": time.monotonic() - began,
    }


def without_token(arguments: list[str]) -> list[str]:
    """A command line as it may be shown: with three stars for the value of --token."""
    shown = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        hidden = "***" if before == TOKEN else word
        shown.append(f"{TOKEN}=***" if word.startswith(f"{TOKEN}=") else hidden)
    return shown


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slab-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


for name, command in COMMANDS.items():
    app.command(name, epilog=epilog(name, console.EXIT_CODES))(command)
