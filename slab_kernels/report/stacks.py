"""Stacked bars that lie: where the time of a decode step goes, what a whole folder stores."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from .style import LABEL, Theme, figure, legend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from .results import Result

# The parts of a step as `evaluate.decoding` calls them, and of a folder: name and colour.
STEP_PARTS = {
    "linears": ("linears of the blocks", "#00a37a"),
    "head": ("output head", "#4aa3df"),
    "attention": ("attention", "#e69f00"),
    "modules": ("norms and other modules", "#cc6fa8"),
    "overhead": ("Python and transformers", "#8a8f98"),
}
FOLDER_PARTS = {
    "packed linears": "#00a37a",
    "packed head": "#4aa3df",
    "dense linears": "#9b8579",
    "embeddings": "#e69f00",
    "dense head": "#2f6fdb",
    "norms": "#cc6fa8",
    "other": "#8a8f98",
}


class Stack(NamedTuple):
    """One bar: its name, the length of each of its parts, and its text at the end."""

    name: str
    parts: dict[str, float]
    text: str


def decode_steps(results: Sequence[Result], theme: Theme) -> Figure:
    """One bar for each model and number of texts at once, in milliseconds, split into parts."""
    batches = sorted({step["batch"] for r in results for step in r.decoding})
    shown = []
    for batch in batches:
        for result in results:
            for step in result.decoding:
                if step["batch"] == batch:
                    many = "1 text" if batch == 1 else f"{batch} texts"
                    shown.append(_step(f"{result.label}, {many}", step))
    known = {**STEP_PARTS}
    for part in chain.from_iterable(stack.parts for stack in shown):
        known.setdefault(part, (part, theme.bar))
    return _stacked(shown, known, "milliseconds of a step (shorter is faster)", theme)


def _step(name: str, step: dict[str, Any]) -> Stack:
    whole = 1e3 * step["seconds_per_step"]
    parts = {part: max(0.0, share) * whole for part, share in step["split"].items()}
    return Stack(name, parts, f"{whole:.3g} ms, {step['tokens_per_second']:.3g} tokens/s")


def folders(results: Sequence[Result], theme: Theme) -> Figure:
    """One bar for each folder, in megabytes, split into what is packed and what is dense."""
    shown = []
    for result in results:
        parts = {part: size / 1e6 for part, size in result.stored.items()}
        bits = result.bits_per_parameter
        each = "" if bits is None else f", {bits:.3g} bits/param."
        shown.append(Stack(result.label, parts, f"{sum(parts.values()):.3g} MB{each}"))
    known = {part: (part, colour) for part, colour in FOLDER_PARTS.items()}
    for part in chain.from_iterable(stack.parts for stack in shown):
        known.setdefault(part, (part, theme.bar))
    return _stacked(shown, known, "megabytes on disk", theme)


def _stacked(
    shown: Sequence[Stack], known: dict[str, tuple[str, str]], unit: str, theme: Theme
) -> Figure:
    """The bars, the first at the top. known: part -> its name in the legend and its colour."""
    fig, (ax,) = figure(1.35 + 0.38 * len(shown), theme)
    positions = range(len(shown))
    left = [0.0] * len(shown)
    handles, labels = [], []
    for part, (name, colour) in known.items():
        lengths = [stack.parts.get(part, 0.0) for stack in shown]
        if not any(lengths):
            continue
        handles.append(ax.barh(positions, lengths, 0.7, left=left, color=colour))
        labels.append(name)
        left = [before + length for before, length in zip(left, lengths, strict=True)]
    for position, end, stack in zip(positions, left, shown, strict=True):
        ax.annotate(
            stack.text,
            (end, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center_baseline",
            color=theme.ink,
            fontsize=LABEL,
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.0},
        )
    ax.set_yticks(positions, [stack.name for stack in shown])
    ax.tick_params(axis="y", labelcolor=theme.ink, labelsize=LABEL)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlim(0, max([*left, 1e-12]) * 1.75)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.grid(visible=False, axis="y")
    ax.spines["bottom"].set_visible(False)
    ax.set_xlabel(unit, color=theme.muted, fontsize=LABEL)
    legend(fig, handles, labels, theme)
    return fig
