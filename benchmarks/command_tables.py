"""The command line's options as Markdown tables, read from the commands themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from figure_tables import markdown

COMMANDS = (
    "compress", "train", "eval", "check", "generate", "bench", "inspect", "explain", "info", "tune",
    "decompress", "report",
)  # fmt: skip
EVERYWHERE = {"json", "help"}  # said once for all commands


@functools.cache
def group() -> Any:
    """The click group that `slab-kernels` runs."""
    import typer

    from slab_kernels.cli.main import app

    return typer.main.get_command(app)


def sentence(text: str | None) -> str:
    """One line for a cell; what would end the cell is escaped."""
    return " ".join((text or "").split()).replace("|", "\\|")


def flags(parameter: Any) -> str:
    """An option's names, or an argument's name in capitals."""
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name.upper()).strip('[]{}')}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def default(parameter: Any) -> str:
    """The default where it says something: none, off and empty lists do not."""
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(value, bool) or value is None or callable(value) or value in ((), [], ""):
        return ""
    return f"`{value}`" if isinstance(value, str | int | float) else ""


def options(name: str) -> str:
    """Arguments and options of one command."""
    rows = [
        (flags(parameter), sentence(getattr(parameter, "help", "")), default(parameter))
        for parameter in group().commands[name].params
        if parameter.name.strip("_") not in EVERYWHERE and not getattr(parameter, "hidden", False)
    ]
    return markdown(("argument or option", "meaning", "default"), rows)


def commands() -> str:
    """Every command with the first sentence of its help."""
    rows = []
    for name, command in sorted(group().commands.items()):
        first = (command.help or "").strip().split("\n\n")[0]
        rows.append((f"[`{name}`](#{name})", sentence(first)))
    return markdown(("command", "what it does"), rows)


COMMAND_TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    **{f"options of {name}": functools.partial(options, name) for name in COMMANDS},
}
