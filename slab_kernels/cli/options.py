"""Options that commands share, and what their text means."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; progress stays on stderr.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if there is one.")]
Folder = Annotated[
    str,
    typer.Argument(metavar="DIR", help="A folder written by compress; a dense model works too."),
]
Packed = Annotated[str, typer.Argument(metavar="DIR", help="A folder written by compress.")]
Backend = Annotated[
    str | None, typer.Option(help="Force a backend; fails with every reason if it cannot run.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the activations: fp32, bf16 or fp16; default: the checkpoint's, fp32 on a CPU."
    ),
]
Shape = Annotated[str, typer.Option(help="out_features x in_features, for example 11008x4096.")]
Values = Annotated[str, typer.Option(help="fp16, bf16, int8 or int4.")]
Text = Annotated[
    str, typer.Option(help="A text file, a folder of them, a datasets name, or stdlib.")
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code in the model's folder; nothing asks for it later.",
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare what is read with its checksums.")
]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def finite(value: float | None) -> float | None:
    """For typer, to which NaN lies in every range."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def torch_dtype(name: str) -> Any:
    """ "bf16" -> torch.bfloat16."""
    import torch

    if name not in DTYPES:
        raise typer.BadParameter(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def parse_shape(text: str) -> tuple[int, int]:
    """ "11008x4096" -> (11008, 4096): out_features, in_features."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(
            f"--shape {text} must be out_features x in_features, for example 11008x4096"
        )
    return int(parts[0]), int(parts[1])


def method_options(options: list[str]) -> dict[str, Any]:
    """["rounds=3"] -> {"rounds": 3}: numbers and booleans as such, the rest as text."""
    parsed: dict[str, Any] = {}
    for entry in options:
        name, separator, value = entry.partition("=")
        if not separator or not name.isidentifier():
            raise typer.BadParameter(
                f"--option {entry} must be name=value, for example --option rounds=3"
            )
        for kind in (int, float):
            try:
                parsed[name] = kind(value)
                break
            except ValueError:
                continue
        else:
            parsed[name] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return parsed
