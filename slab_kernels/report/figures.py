"""The pictures of compressed models: error by layer, perplexity against bits, bits by part, heat
maps.

Each function takes plain rows and a `Theme` and returns a matplotlib figure. Bars start at zero,
every axis has its unit, a logarithmic axis says so.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .style import DASHES, LABEL, STYLES, Theme, figure, grid, legend, styles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .results import Result
    from .style import Style

# The parts that a layer stores, each with its colour, are stacked in this order from the bottom.
PART_COLOURS = {
    "values": "#4aa3df",
    "metadata": "#8c6bd1",
    "signs": "#00a37a",
    "scales": "#b0a712",
    "factors": "#e69f00",
    "adapters": "#d55e00",
}
MOST_NAMED = 30  # layers whose names fit under their bars
CROP_TITLES = {
    "weight": "weight W",
    "sparse": "S, two of four kept",
    "signs": "signs × magnitudes",
    "adapter": "adapter P Qᵀ",
    "left": "what is left",
}


class Place(NamedTuple):
    """Where a layer stands in its model: ("model.layers.3.mlp.up_proj") is (3, "mlp.up_proj")."""

    block: int
    projection: str


def place_of(name: str) -> Place | None:
    """None for a name without a block number."""
    match = re.match(r"^.*?\.(\d+)\.(.+)$", "." + name)
    return Place(int(match[1]), match[2]) if match else None


def error_by_layer(results: Sequence[Result], theme: Theme, measured: str) -> Figure:
    """Relative output error of every linear: one panel per projection, blocks along x, one line per
    method. measured: what the errors are of, for the axis."""
    styled = styles((r.label, r.method) for r in results)
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for result in results:
        for position, (name, error) in enumerate(result.errors.items()):
            block, projection = place_of(name) or Place(position, "layers")
            panels.setdefault(projection, {}).setdefault(result.label, []).append((block, error))
    rows, columns = grid(len(panels))
    fig, axes = figure(1.1 + 1.5 * rows, theme, rows, columns, sharey=True)
    from matplotlib.ticker import MaxNLocator  # figure() says it where matplotlib is missing

    every_point = (e for panel in panels.values() for line in panel.values() for _, e in line)
    top = max(every_point, default=1.0)
    handles = {}
    for ax, (projection, lines) in zip(axes, panels.items(), strict=False):
        for label, points in lines.items():
            handles[label] = _line(ax, sorted(points), styled[label], label)
        ax.set_title(projection.split(".")[-1], loc="left", color=theme.ink, fontsize=10)
        ax.set_ylim(0, top * 1.06)
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        ax.margins(x=0.05)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[(rows - 1) * columns : len(panels)]:
        ax.set_xlabel("block", color=theme.muted, fontsize=LABEL)
    labels = [r.label for r in results if r.label in handles]
    legend(fig, [handles[label] for label in labels], labels, theme)
    fig.supylabel(f"relative output error, {measured}", color=theme.muted, fontsize=LABEL)
    return fig


def _line(ax: Axes, points: Sequence[tuple[float, float]], style: Style, label: str) -> Any:
    """Points joined by a line, about twelve of them marked; returns its handle for a legend."""
    (handle,) = ax.plot(
        *zip(*points, strict=True),
        color=style.colour,
        marker=style.marker,
        markersize=4,
        markevery=max(1, len(points) // 12),
        linewidth=1.6,
        label=label,
    )
    return handle


class Point(NamedTuple):
    """A result whose bits and perplexity are both known."""

    label: str
    method: str
    bits: float
    perplexity: float


def points(results: Sequence[Result]) -> list[Point]:
    """The results of which `perplexity_by_bits` can be drawn."""
    return [
        Point(r.label, r.method, r.bits_per_weight, r.perplexity)
        for r in results
        if r.perplexity is not None and r.bits_per_weight is not None
    ]


def perplexity_by_bits(
    results: Sequence[Result], dense: Result | None, theme: Theme, named: bool = True
) -> Figure:
    """Held-out perplexity against stored bits per weight, the dense model's as a dashed line.

    named: write each result's label beside its point; otherwise a legend names the methods.
    """
    shown = points(results)
    names = [point.label if named else point.method for point in shown]
    styled = styles(zip(names, (point.method for point in shown), strict=True))
    fig, (ax,) = figure(3.7 if named else 4.4, theme)
    perplexities = [point.perplexity for point in shown]
    if dense is not None and dense.perplexity is not None:
        _dense_line(ax, dense.perplexity, dense.bits_per_weight, theme)
        perplexities.append(dense.perplexity)
    logarithmic = _perplexity_axis(ax, min(perplexities), max(perplexities))
    bits = [point.bits for point in shown]
    span = max(1.0, max(bits) - min(bits))
    room = 0.65 if named else 0.1  # of the span, on the right for the labels
    ax.set_xlim(min(bits) - 0.2 * span, max(bits) + room * span)
    handles = {}
    for name, point in zip(names, shown, strict=True):
        handles[name] = ax.scatter(
            point.bits,
            point.perplexity,
            s=64 if named else 36,
            color=styled[name].colour,
            marker=styled[name].marker,
            edgecolor=theme.background,
            zorder=3,
        )
    if named:
        _label_points(fig, ax, shown, styled, theme)
    else:
        legend(fig, handles.values(), list(handles), theme)
    scale = " (log scale)" if logarithmic else ""
    ax.set_xlabel("stored bits per weight, factors included", color=theme.muted, fontsize=LABEL)
    ax.set_ylabel(f"held-out perplexity per token{scale}", color=theme.muted, fontsize=LABEL)
    return fig


def _dense_line(ax: Axes, perplexity: float, bits: float | None, theme: Theme) -> None:
    """A dashed line at the dense model's perplexity, and what it says."""
    ax.axhline(perplexity, color=theme.muted, linewidth=1.2, linestyle=DASHES, zorder=2)
    ax.annotate(
        f"dense{f', {bits:g} bits' if bits else ''}: {perplexity:.4g}",
        (0.0, perplexity),
        xycoords=("axes fraction", "data"),
        xytext=(4, -4),
        textcoords="offset points",
        color=theme.muted,
        fontsize=9,
        va="top",
    )


def _perplexity_axis(ax: Axes, low: float, high: float) -> bool:
    """Room around the points, on a logarithmic axis if they lie far apart; returns whether they
    do."""
    if high <= 6 * low:
        spread = (high - low) or 0.1 * high
        ax.set_ylim(max(0.0, low - 0.18 * spread), high + 0.14 * spread)
        return False
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(low / 1.35, high * 1.35)
    return True


class Box(NamedTuple):
    """A rectangle in display units."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )


def _label_points(
    fig: Figure, ax: Axes, shown: Sequence[Point], styled: dict[str, Style], theme: Theme
) -> None:
    """A name beside each point; a name that would cover another name or point moves up or down to
    the next free line."""
    fig.draw_without_rendering()
    dot = fig.dpi / 72  # one point of type in display units
    half = 6.5 * dot  # of a line of text
    places = [ax.transData.transform((point.bits, point.perplexity)) for point in shown]
    taken = [Box(x - 5 * dot, y - 5 * dot, x + 5 * dot, y + 5 * dot) for x, y in places]
    for point, (x, y) in sorted(zip(shown, places, strict=True), key=lambda pair: pair[1][1]):
        text = f"{point.label}  {point.perplexity:.4g}"
        left, width = x + 9 * dot, 6 * dot * len(text)
        for shift in (0, 1, -1, 2, -2, 3, -3, 4):
            middle = y + 2 * shift * half
            box = Box(left, middle - half, left + width, middle + half)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        leader = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4}
        ax.annotate(
            text,
            (point.bits, point.perplexity),
            xytext=(9, 2 * shift * half / dot),
            textcoords="offset points",
            color=theme.ink,
            fontsize=LABEL,
            va="center_baseline",
            arrowprops=leader | {"color": styled[point.label].colour} if shift else None,
        )


def bits_by_layer(result: Result, theme: Theme) -> Figure:
    """What every compressed linear stores, stacked: one bar per layer, one colour per part."""
    layers = list(result.parts)
    named = len(layers) <= MOST_NAMED
    fig, (ax,) = figure(4.4 if named else 3.4, theme)
    positions = range(len(layers))
    below = [0.0] * len(layers)
    handles, labels = [], []
    for part, colour in PART_COLOURS.items():
        heights = [result.parts[layer].get(part, 0.0) for layer in layers]
        if not any(heights):
            continue
        width = 0.8 if named else 1.0
        handles.append(ax.bar(positions, heights, width, bottom=below, color=colour))
        labels.append(f"{part} {sum(heights) / len(heights):.2g}")
        below = [b + h for b, h in zip(below, heights, strict=True)]
    ax.set_ylim(0, 1.05 * max(below, default=1.0))
    ax.margins(x=0.01)
    if named:
        ax.set_xticks(positions, [_short(layer) for layer in layers], rotation=90, fontsize=8)
    else:
        ax.set_xlabel("layer, in the model's order", color=theme.muted, fontsize=LABEL)
    ax.set_ylabel("stored bits per weight", color=theme.muted, fontsize=LABEL)
    legend(fig, handles, labels, theme)
    return fig


def _short(layer: str) -> str:
    """ "model.layers.3.mlp.up_proj" as "3 up_proj"."""
    place = place_of(layer)
    return layer if place is None else f"{place.block} {place.projection.split('.')[-1]}"


def heat_maps(crop: dict[str, Any], theme: Theme) -> Figure:
    """A corner of a weight, its parts and what they leave, all in the same colours and scale.

    crop: as `evaluate.crop.weight_crop` returns it.
    """
    import numpy

    parts = {
        name: numpy.frombuffer(base64.b64decode(text), numpy.int8).reshape(crop["shape"])
        * crop["step"]
        for name, text in crop["parts"].items()
    }
    # A few outliers would leave everything else pale.
    largest = float(numpy.quantile(numpy.abs(parts["weight"]), 0.995)) or 1.0
    rows, columns = grid(len(parts))
    fig, axes = figure(0.5 + 2.65 * rows, theme, rows, columns)
    from matplotlib.colors import LinearSegmentedColormap

    ramp = [STYLES["sparsegpt"].colour, theme.background, "#d55e00"]
    colours = LinearSegmentedColormap.from_list("weights", ramp)
    energy = float(numpy.square(parts["weight"]).sum()) or 1.0
    for ax, (name, part) in zip(axes, parts.items(), strict=False):
        image = ax.imshow(
            part, cmap=colours, vmin=-largest, vmax=largest, interpolation="nearest", aspect="auto"
        )
        title = CROP_TITLES.get(name, name)
        if name == "left":
            share = (float(numpy.square(part).sum()) / energy) ** 0.5
            title += f", {share:.0%} of W's norm"
        ax.set_title(title, loc="left", color=theme.ink, fontsize=10)
        ax.grid(visible=False)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color(theme.grid)
    for ax in axes[len(parts) :]:
        ax.set_visible(False)
    bar = fig.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    return fig
