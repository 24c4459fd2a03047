"""The pictures of speed: bars of whole models and of linears, speed-up against tokens, roofline."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from .style import DASHES, LABEL, SPARE_STYLES, STYLES, Theme, figure, grid, legend, styles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .results import Result
    from .style import Style

MARKED = [*reversed(STYLES.values()), *SPARE_STYLES]  # in the order in which lines take them
CEILINGS = ("measured_gbytes_per_s", "measured_tflops")  # of a row: what the machine reached


@dataclass(frozen=True)
class Bar:
    """One bar, with its text at the end."""

    name: str
    length: float
    colour: str
    text: str
    group: str = ""  # a heading above the first bar of each group


def bars(shown: Sequence[Bar], unit: str, theme: Theme) -> Figure:
    """Horizontal bars from zero, the first at the top."""
    positions: list[float] = []
    headings: list[tuple[float, str]] = []
    at, group = 0.0, ""
    for bar in shown:
        if bar.group != group:
            gap = 0.35 if positions else 0.0
            headings.append((at + gap, bar.group))
            at += 0.8 + gap
            group = bar.group
        positions.append(at)
        at += 1.0
    fig, (ax,) = figure(0.7 + 0.31 * at, theme)
    lengths, colours = [b.length for b in shown], [b.colour for b in shown]
    ax.barh(positions, lengths, color=colours, height=0.7)
    for position, bar in zip(positions, shown, strict=True):
        _beside(ax, bar.text, (bar.length, position), 5, theme)
    for position, heading in headings:
        _beside(ax, heading, (0, position), 4, theme, fontweight="bold")
    ax.set_yticks(positions, [b.name for b in shown])
    ax.tick_params(axis="y", labelcolor=theme.ink, labelsize=LABEL)
    ax.set_ylim(at - 0.3, -0.6)
    ax.set_xlim(0, max(lengths) * 1.32)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.grid(visible=False, axis="y")
    ax.spines["bottom"].set_visible(False)
    ax.set_xlabel(unit, color=theme.muted, fontsize=LABEL)
    return fig


def _beside(
    ax: Axes, text: str, point: tuple[float, float], right: int, theme: Theme, **font: Any
) -> None:
    """Text to the right of a point, on the background's colour so that grid lines end at it."""
    ax.annotate(
        text,
        point,
        xytext=(right, 0),
        textcoords="offset points",
        va="center_baseline",
        color=theme.ink,
        fontsize=LABEL,
        bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.0},
        **font,
    )


def model_speed(results: Sequence[Result], theme: Theme) -> Figure:
    """Tokens per second while generating: the dense model and each compressed one."""
    rows = [r for r in results if r.tokens_per_second]
    dense = next((r.tokens_per_second for r in rows if r.is_dense), None)
    styled = styles((r.label, r.method) for r in rows if not r.is_dense)
    shown = []
    for r in rows:
        speed = r.tokens_per_second or 0.0
        colour, text = theme.bar, f"{speed:.3g}"
        if not r.is_dense:
            colour = styled[r.label].colour
            text += f"  ({speed / dense:.2f}× dense)" if dense else ""
        shown.append(Bar(r.label, speed, colour, text))
    return bars(shown, "tokens per second, one sequence (longer is faster)", theme)


def layer_speed(rows: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    """Median time of one linear, from `bench` rows: torch's dense linear and each backend, shape by
    shape."""
    backends = list(dict.fromkeys(r["backend"] for r in rows if r["backend"] != "dense"))
    first = (STYLES["slab"], STYLES["sparsegpt"], STYLES["wanda"], *SPARE_STYLES)
    colours = dict(zip(backends, (style.colour for style in cycle(first)), strict=False))
    shown = []
    for row in rows:
        group = f"{row['n']}×{row['k']}, m={row['m']}, {row['dtype']} activations"
        us = row["median_us"]
        time = f"{us:,.0f} µs" if us >= 100 else f"{us:.3g} µs"
        if row["backend"] == "dense":
            shown.append(Bar("torch dense", us, theme.bar, time, group))
        else:
            text = f"{time}  ({row['speedup_vs_dense']:.2f}× dense)"
            shown.append(Bar(_contestant(row), us, colours[row["backend"]], text, group))
    return bars(shown, "median time of one linear in µs (shorter is faster)", theme)


def _contestant(row: dict[str, Any]) -> str:
    """The backend, the format and the accuracy mode of a row."""
    adapter = f" + adapter {row['adapter_rank']}" if row.get("adapter_rank") else ""
    rounded = ", int8 activations" if row.get("activations") == "int8" else ""
    return f"{row['backend']}, {row['values']}{adapter}{rounded}"


def speed_by_tokens(rows: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    """Speed-up over torch's dense linear against the number of tokens: one panel per shape, one
    line per backend and value type."""
    several = len({r["dtype"] for r in rows}) > 1
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in rows:
        title = f"{r['n']}×{r['k']}" + (f", {r['dtype']}" if several else "")
        lines = panels.setdefault(title, {})
        if r["backend"] != "dense":
            lines.setdefault(_contestant(r), []).append((r["m"], r["speedup_vs_dense"]))
    styled = _styled(label for lines in panels.values() for label in lines)
    down, across = grid(len(panels))
    fig, axes = figure(1.2 + 1.7 * down, theme, down, across, sharex=True, sharey=True)
    from matplotlib.ticker import FuncFormatter, NullLocator

    tokens = sorted({r["m"] for r in rows})
    handles: dict[str, Any] = {}
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        handles["dense"] = ax.axhline(1.0, color=theme.muted, linewidth=1.2, linestyle=DASHES)
        for label, points in lines.items():
            (handles[label],) = ax.plot(
                *zip(*sorted(points), strict=True),
                color=styled[label].colour,
                marker=styled[label].marker,
                markersize=4,
                linewidth=1.6,
            )
        ax.set_title(title, loc="left", color=theme.ink, fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_xticks(tokens[:: (len(tokens) + 5) // 6])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0, 1.08 * max([1.0, *(r["speedup_vs_dense"] for r in rows)]))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - across) : len(panels)]:
        # The last of its column, whose labels shared axes would leave to a hidden panel.
        ax.tick_params(labelbottom=True)
    legend(fig, handles.values(), list(handles), theme)
    fig.supxlabel("tokens at once (log scale)", color=theme.muted, fontsize=LABEL)
    fig.supylabel("times as fast as torch's dense linear", color=theme.muted, fontsize=LABEL)
    return fig


def _styled(labels: Any) -> dict[str, Style]:
    return dict(zip(dict.fromkeys(labels), cycle(MARKED), strict=False))


def with_ceilings(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of which a roofline can be drawn, those of a run that measured both ceilings, by
    activations and device: each of them has ceilings of its own."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        needed = [r.get(name) for name in (*CEILINGS, "tflops", "weight_bytes", "m")]
        if all(isinstance(value, int | float) and value > 0 for value in needed):
            name = f"{r['dtype']} on {r['device']}" if r.get("device") else r["dtype"]
            found.setdefault(name, []).append(r)
    return found


def roofline(rows: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    """The rate that each timing reached against its operations per byte of weight, below what the
    machine was seen to reach in memory bandwidth and in dense products.

    The points of one backend and value type at one number of tokens are drawn as their median over
    the shapes. rows: one entry of what `with_ceilings` returns.
    """
    fig, (ax,) = figure(3.9, theme)
    series: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        label = "torch dense" if r["backend"] == "dense" else _contestant(r)
        intensity = 2 * r["m"] * r["n"] * r["k"] / r["weight_bytes"]
        series[label][r["m"]].append((intensity, r["tflops"]))
    styled = _styled(label for label in series if label != "torch dense")
    handles: dict[str, Any] = {}
    seen: list[float] = []
    for label, by_tokens in series.items():
        points = [
            (median(x for x, _ in found), median(y for _, y in found))
            for _, found in sorted(by_tokens.items())
        ]
        seen += [x for x, _ in points]
        dense = label == "torch dense"
        (handles[label],) = ax.plot(
            *zip(*points, strict=True),
            color=theme.muted if dense else styled[label].colour,
            marker="s" if dense else styled[label].marker,
            markersize=4,
            linewidth=1.2,
        )
    bandwidth = median(r["measured_gbytes_per_s"] for r in rows) / 1e3
    matrix = median(r["measured_tflops"] for r in rows)
    low, ridge, high = min(seen) / 1.6, matrix / bandwidth, max([*seen, matrix / bandwidth]) * 1.6
    roof = ([low, ridge, high], [low * bandwidth, matrix, matrix])
    (handles["measured ceiling"],) = ax.plot(
        *roof, color=theme.ink, linewidth=1.4, linestyle=DASHES
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.set_xlabel("operations per byte of weight (log scale)", color=theme.muted, fontsize=LABEL)
    ax.set_ylabel("10¹² operations per second (log scale)", color=theme.muted, fontsize=LABEL)
    legend(fig, handles.values(), list(handles), theme)
    return fig
