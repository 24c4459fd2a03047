"""The pictures of a report: error by layer, perplexity against stored bits per weight, speed.

Each function takes plain rows and a `Theme` and returns a matplotlib figure. Bars start at zero, every axis has its
unit, a logarithmic axis says so. matplotlib is loaded on first use, with its Agg canvas only: no display, no global
state, no style file.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from itertools import count, cycle
from typing import TYPE_CHECKING

from ..errors import PlotsUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .tables import Result


@dataclass(frozen=True)
class Theme:
    """Colours of one page background."""

    background: str
    ink: str
    muted: str
    grid: str
    bar: str  # what is compared with: dense


LIGHT = Theme(background="#ffffff", ink="#1d2026", muted="#667080", grid="#e4e7eb", bar="#b9c0ca")
DARK = Theme(background="#181b20", ink="#e8eaed", muted="#98a1ae", grid="#2c3138", bar="#5b6472")

# Okabe and Ito's colours, told apart by colour-blind readers and on both backgrounds; markers differ too.
STYLES = {
    "magnitude": ("#9b8579", "v"),
    "wanda": ("#e69f00", "s"),
    "sparsegpt": ("#4aa3df", "^"),
    "slab-paper": ("#cc6fa8", "D"),
    "slab": ("#00a37a", "o"),
}
SPARE_STYLES = (
    ("#8c6bd1", "P"),
    ("#d55e00", "X"),
    ("#b0a712", "h"),
    ("#5d8aa8", "<"),
    ("#a0522d", ">"),
)
WIDTH = 5.3  # inches; a phone shows it about 330 pixels wide: 9.5-point type is 8 pixels high there


def figure(
    height: float, theme: Theme, rows: int = 1, columns: int = 1, **options
) -> tuple[Figure, list[Axes]]:
    """An empty figure in the report's style and its axes, row by row. Raises PlotsUnavailable without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailable(
            f"the plots need matplotlib ({error}): pip install 'slab_kernels[report]', or ask for tables only"
        ) from error
    fig = Figure(figsize=(WIDTH, height), facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(fig)
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = list(fig.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.set_facecolor(theme.background)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.grid)
        ax.tick_params(which="both", colors=theme.muted, labelsize=9, length=0)
        ax.grid(axis="y", color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes, 200 dots an inch, without a time stamp: equal data gives equal bytes."""
    buffer = io.BytesIO()
    fig.savefig(
        buffer, format="png", dpi=200, facecolor=fig.get_facecolor(), metadata={"Software": None}
    )
    return buffer.getvalue()


def styles(labels: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """label -> (colour, marker) for (label, method) pairs: a method's own style once, spare ones after that."""
    chosen: dict[str, tuple[str, str]] = {}
    spare = count()
    for label, method in labels:
        style = STYLES.get(method)
        if style is None or style in chosen.values():
            style = SPARE_STYLES[next(spare) % len(SPARE_STYLES)]
        chosen[label] = style
    return chosen


def block_and_projection(name: str) -> tuple[int, str] | None:
    """("model.layers.3.mlp.up_proj") -> (3, "mlp.up_proj"); None for a name without a block number."""
    match = re.match(r"^.*?\.(\d+)\.(.+)$", "." + name)
    return (int(match[1]), match[2]) if match else None


def error_by_layer(results: Sequence[Result], theme: Theme, measured: str) -> Figure:
    """Relative output error of every linear: one panel a projection, blocks along x, one line a method."""
    styled = styles((r.label, r.method) for r in results)
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for result in results:
        for position, (name, error) in enumerate(result.errors.items()):
            block, projection = block_and_projection(name) or (position, "layers")
            panels.setdefault(projection, {}).setdefault(result.label, []).append((block, error))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    fig, axes = figure(1.1 + 1.5 * rows, theme, rows, columns, sharey=True)
    top = max(
        (error for panel in panels.values() for line in panel.values() for _, error in line),
        default=1.0,
    )
    for ax, (projection, lines) in zip(axes, panels.items(), strict=False):
        for label, points in lines.items():
            colour, marker = styled[label]
            points = sorted(points)
            every = max(1, len(points) // 12)
            ax.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=4,
                markevery=every,
                linewidth=1.6,
                label=label,
            )
        ax.set_title(projection.split(".")[-1], loc="left", color=theme.ink, fontsize=10)
        ax.set_ylim(0, top * 1.06)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.margins(x=0.05)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[(rows - 1) * columns : len(panels)]:
        ax.set_xlabel("block", color=theme.muted, fontsize=9.5)
    handles = {}
    for ax in axes[: len(panels)]:
        handles.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
    labels = [r.label for r in results if r.label in handles]
    fig.legend(
        [handles[label] for label in labels], labels, loc="outside upper left", ncols=min(5, len(labels)), frameon=False,
        labelcolor=theme.ink, fontsize=9.5, handlelength=1.1, handletextpad=0.5, columnspacing=1.1, borderpad=0.1,
    )  # fmt: skip
    fig.supylabel(f"relative output error, {measured}", color=theme.muted, fontsize=9.5)
    return fig


def perplexity_by_bits(results: Sequence[Result], dense_row: Result | None, theme: Theme) -> Figure:
    """Held-out perplexity against stored bits per weight, the dense model's as a dashed line."""
    points = [r for r in results if r.perplexity is not None and r.bits_per_weight is not None]
    dense = dense_row.perplexity if dense_row else None
    styled = styles((r.label, r.method) for r in points)
    fig, (ax,) = figure(3.7, theme)
    xs, ys = [r.bits_per_weight for r in points], [r.perplexity for r in points]
    low, high = min([*ys, dense or ys[0]]), max([*ys, dense or ys[0]])
    logarithmic = high > 6 * low
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylim(low / 1.35, high * 1.35)
    else:
        spread = (high - low) or 0.1 * high
        ax.set_ylim(max(0.0, low - 0.18 * spread), high + 0.14 * spread)
    span = max(1.0, max(xs) - min(xs))
    ax.set_xlim(min(xs) - 0.2 * span, max(xs) + 0.65 * span)  # room on the right for the labels
    for r in points:
        colour, marker = styled[r.label]
        ax.scatter(
            r.bits_per_weight,
            r.perplexity,
            s=64,
            color=colour,
            marker=marker,
            edgecolor=theme.background,
            zorder=3,
        )
    if dense is not None:
        ax.axhline(dense, color=theme.muted, linewidth=1.2, linestyle=(0, (5, 4)), zorder=2)
        ax.annotate(
            "dense" + (f", {dense_row.bits_per_weight:g} bits" if dense_row.bits_per_weight else "") + f": {dense:.4g}", (0.0, dense), xycoords=("axes fraction", "data"), xytext=(4, -4),
            textcoords="offset points", color=theme.muted, fontsize=9, va="top",
        )  # fmt: skip
    _label_points(ax, points, styled, theme)
    ax.set_xlabel("stored bits per weight, factors included", color=theme.muted, fontsize=9.5)
    ax.set_ylabel(
        "held-out perplexity per token" + (" (log scale)" if logarithmic else ""),
        color=theme.muted,
        fontsize=9.5,
    )
    return fig


def _label_points(ax: Axes, points: Sequence[Result], styled: dict, theme: Theme) -> None:
    """A name beside each point; a name that would cover another name or point moves up or down to the next free line."""
    ax.figure.draw_without_rendering()
    dot = ax.figure.dpi / 72  # one point of type in display units
    places = [ax.transData.transform((r.bits_per_weight, r.perplexity)) for r in points]
    taken = [(x - 5 * dot, y - 5 * dot, x + 5 * dot, y + 5 * dot) for x, y in places]
    for r, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: pair[1][1]):
        text = f"{r.label}  {r.perplexity:.4g}"
        left, width, half = x + 9 * dot, 6 * dot * len(text), 6.5 * dot
        for shift in (0, 1, -1, 2, -2, 3, -3, 4):
            box = (left, y + (2 * shift - 1) * half, left + width, y + (2 * shift + 1) * half)
            if not any(
                box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
            ):
                break
        taken.append(box)
        ax.annotate(
            text, (r.bits_per_weight, r.perplexity), xytext=(9, 2 * shift * half / dot), textcoords="offset points",
            color=theme.ink, fontsize=9.5, va="center_baseline",
            arrowprops={"arrowstyle": "-", "color": styled[r.label][0], "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4} if shift else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Bar:
    name: str
    length: float
    colour: str
    text: str  # at its end
    group: str = ""  # a heading above the first bar of each group


def _bars(bars: Sequence[Bar], unit: str, theme: Theme) -> Figure:
    """Horizontal bars from zero, first at the top."""
    positions, headings, at, group = [], [], 0.0, ""
    for bar in bars:
        if bar.group != group:
            headings.append((at + 0.35 * bool(positions), bar.group))
            at += 0.8 + 0.35 * bool(positions)
            group = bar.group
        positions.append(at)
        at += 1.0
    fig, (ax,) = figure(0.7 + 0.31 * at, theme)
    ax.barh(positions, [b.length for b in bars], color=[b.colour for b in bars], height=0.7)
    longest = max(b.length for b in bars)
    for position, bar in zip(positions, bars, strict=True):
        ax.annotate(
            bar.text, (bar.length, position), xytext=(5, 0), textcoords="offset points", va="center_baseline",
            color=theme.ink, fontsize=9.5, bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    for position, heading in headings:
        ax.annotate(
            heading, (0, position), xytext=(4, 0), textcoords="offset points", va="center_baseline", color=theme.ink,
            fontsize=9.5, fontweight="bold", bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    ax.set_yticks(positions, [b.name for b in bars])
    ax.tick_params(axis="y", labelcolor=theme.ink, labelsize=9.5)
    ax.set_ylim(at - 0.3, -0.6)
    ax.set_xlim(0, longest * 1.32)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.grid(visible=False, axis="y")
    ax.spines["bottom"].set_visible(False)
    ax.set_xlabel(unit, color=theme.muted, fontsize=9.5)
    return fig


def model_speed(results: Sequence[Result], theme: Theme) -> Figure:
    """Tokens per second while generating: the dense model and each compressed one."""
    rows = [r for r in results if r.tokens_per_second]
    dense = next((r.tokens_per_second for r in rows if r.method == "dense"), None)
    styled = styles((r.label, r.method) for r in rows if r.method != "dense")
    bars = []
    for r in rows:
        times = (
            f"  ({r.tokens_per_second / dense:.2f}× dense)" if dense and r.method != "dense" else ""
        )
        colour = theme.bar if r.method == "dense" else styled[r.label][0]
        bars.append(Bar(r.label, r.tokens_per_second, colour, f"{r.tokens_per_second:.3g}{times}"))
    return _bars(bars, "tokens per second, one sequence (longer is faster)", theme)


def layer_speed(rows: Sequence[dict], theme: Theme) -> Figure:
    """Median time of one linear, from `bench` rows: torch's dense linear and each backend, shape by shape."""
    backends = list(dict.fromkeys(r["backend"] for r in rows if r["backend"] != "dense"))
    colours = dict(
        zip(
            backends,
            cycle(
                (
                    STYLES["slab"][0],
                    STYLES["sparsegpt"][0],
                    STYLES["wanda"][0],
                    *(c for c, _ in SPARE_STYLES),
                )
            ),
            strict=False,
        )
    )
    bars = []
    for row in rows:
        group = f"{row['n']}×{row['k']}, m={row['m']}, {row['dtype']} activations"
        time = (
            f"{row['median_us']:,.0f} µs"
            if row["median_us"] >= 100
            else f"{row['median_us']:.3g} µs"
        )
        if row["backend"] == "dense":
            bars.append(Bar("torch dense", row["median_us"], theme.bar, time, group))
        else:
            text = f"{time}  ({row['speedup_vs_dense']:.2f}× dense)"
            name = f"{row['backend']}, {row['values']}" + (
                f" + adapter {row['adapter_rank']}" if row.get("adapter_rank") else ""
            )
            bars.append(Bar(name, row["median_us"], colours[row["backend"]], text, group))
    return _bars(bars, "median time of one linear in µs (shorter is faster)", theme)


def speed_by_tokens(rows: Sequence[dict], theme: Theme) -> Figure:
    """Speed-up over torch's dense linear against the number of tokens: one panel a shape, one line a backend and value type."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in rows:
        title = f"{r['n']}×{r['k']}" + (f", {r['dtype']}" if len(dtypes) > 1 else "")
        line = f"{r['backend']}, {r['values']}" + (
            f" + adapter {r['adapter_rank']}" if r.get("adapter_rank") else ""
        )
        lines = panels.setdefault(title, {})
        if r["backend"] != "dense":
            lines.setdefault(line, []).append((r["m"], r["speedup_vs_dense"]))
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    styled = dict(zip(labels, cycle((*reversed(STYLES.values()), *SPARE_STYLES)), strict=False))
    columns = 2 if len(panels) > 1 else 1
    count_rows = -(-len(panels) // columns)
    fig, axes = figure(1.2 + 1.7 * count_rows, theme, count_rows, columns, sharex=True, sharey=True)
    tokens = sorted({r["m"] for r in rows})
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        ax.axhline(1.0, color=theme.muted, linewidth=1.2, linestyle=(0, (5, 4)), label="dense")
        for label, points in lines.items():
            colour, marker = styled[label]
            ax.plot(
                *zip(*sorted(points), strict=True),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.6,
                label=label,
            )
        ax.set_title(title, loc="left", color=theme.ink, fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_xticks(tokens[:: -(-len(tokens) // 6)])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0, 1.08 * max([1.0, *(r["speedup_vs_dense"] for r in rows)]))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.tick_params(
            labelbottom=True
        )  # the last of its column, which shared axes leave to a hidden panel
    handles: dict = {}
    for ax in axes[: len(panels)]:
        handles.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
    fig.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=min(4, len(handles)), frameon=False,
        labelcolor=theme.ink, fontsize=9.5, handlelength=1.3, handletextpad=0.5, columnspacing=1.1, borderpad=0.1,
    )  # fmt: skip
    fig.supxlabel("tokens at once (log scale)", color=theme.muted, fontsize=9.5)
    fig.supylabel("times as fast as torch's dense linear", color=theme.muted, fontsize=9.5)
    return fig
