"""What the text of an option means."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def finite(value: float | None) -> float | None:
    """The value itself. typer alone would accept NaN, which lies in every range."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def folder(name: str) -> Path:
    """The folder of that name. An empty name, such as an unset variable gives, would be the current
    folder.

    Raises: typer.BadParameter.
    """
    if not name:
        raise typer.BadParameter("the name is empty; give the name of a folder, or . for this one")
    return Path(name)


def access_token(value: str | None) -> str | None:
    """The value itself. A number is none: who gives one means --tokens.

    Raises: typer.BadParameter.
    """
    if value is not None and value.strip().isdecimal():
        raise typer.BadParameter(
            "--token takes what opens private models of the hub, and a number is no such token; "
            f"for so many new tokens give --tokens {value.strip()}"
        )
    return value


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a short name: "bf16" is torch.bfloat16.

    Raises: typer.BadParameter for a name that is none of DTYPES.
    """
    import torch

    if name not in DTYPES:
        raise typer.BadParameter(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def parse_shape(text: str) -> tuple[int, int]:
    """out_features and in_features of "11008x4096".

    Raises: typer.BadParameter for text of another form.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(
            f"--shape {text} must be out_features x in_features, for example 11008x4096"
        )
    return int(parts[0]), int(parts[1])


def stored_group(text: str) -> int | str | None:
    """What `compress` calls the group size of "auto", "64" or "0", which is one scale per row.

    Raises: typer.BadParameter for text that is neither "auto" nor a number.
    """
    if text == "auto":
        return text
    if not text.isdecimal():
        raise typer.BadParameter(
            f"--group-size {text} must be 32, 64, 128, 0 (one scale per row) or auto"
        )
    return int(text) or None


def method_options(options: list[str]) -> dict[str, Any]:
    """The settings of a method from "name=value" each: numbers and booleans as such, else text.

    Raises: typer.BadParameter for an entry of another form.
    """
    parsed: dict[str, Any] = {}
    for entry in options:
        name, separator, value = entry.partition("=")
        if not separator or not name.isidentifier():
            raise typer.BadParameter(
                f"--option {entry} must be name=value, for example --option rounds=3"
            )
        parsed[name] = _plain_value(value)
    return parsed


def settings_by_pattern(entries: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """What `compress` calls so, from "pattern:name=value,name=value" each.

    What follows the last colon are settings.

    Raises: typer.BadParameter for an entry of another form.
    """
    found = []
    for entry in entries:
        pattern, _, listed = entry.rpartition(":")
        parts = [part.partition("=") for part in listed.split(",")]
        if not pattern or not all(name.isidentifier() and value for name, _, value in parts):
            raise typer.BadParameter(
                f"--set {entry} must be PATTERN:NAME=VALUE, for example --set "
                "'mlp.down_proj:values=int8,planes=1'"
            )
        settings = {name: _plain_value(value) for name, _, value in parts}
        if settings.get("group_size") == 0:  # one scale per row, as --group-size has it
            settings["group_size"] = None
        found.append((pattern, settings))
    return found


def _plain_value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
