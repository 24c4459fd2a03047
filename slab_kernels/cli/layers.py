"""The table of a model's layers, as compress and inspect print it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import console

SETTINGS = ("method", "pattern", "rank", "values", "planes", "group_size")
ERRORS = {"error": "calibration error", "heldout_error": "held-out error"}  # field -> heading


def show_layers(layers: Sequence[dict[str, Any]], title: str) -> None:
    """One row per layer; a setting that all layers share stands in the title instead."""
    differing = [name for name in SETTINGS if len({layer.get(name) for layer in layers}) > 1]
    common = [
        f"{name} {layers[0][name]}"
        for name in SETTINGS
        if layers and name not in differing and layers[0].get(name) is not None
    ]
    errors = [n for n in ERRORS if any(layer.get(n) is not None for layer in layers)]
    if layers and all(layer.get("heldout_error") is not None for layer in layers):
        errors = ["heldout_error"]  # the others flatter: a layer was fitted to that text
    head = ("layer", "shape", *differing, "bits/weight", *(ERRORS[name] for name in errors))
    rows = [
        (
            layer["name"],
            "×".join(map(str, layer["shape"])),
            *(_cell(layer.get(name)) for name in differing),
            f"{layer['bits_per_weight']:.3f}",
            *(_cell(layer[name]) for name in errors),
        )
        for layer in layers
    ]
    console.print_table(head, rows, ", ".join([title, *common]))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
