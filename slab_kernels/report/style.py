"""How a picture of a report looks: its colours on both backgrounds, its size, its PNG bytes.

matplotlib is loaded on first use, with its Agg canvas only: no display, no global state, no style
file.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from ..errors import PlotsUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


@dataclass(frozen=True)
class Style:
    """How one line or point is told from the others."""

    colour: str
    marker: str


# Okabe and Ito's colours, told apart by colour-blind readers and on both backgrounds; markers
# differ too.
STYLES = {
    "magnitude": Style("#9b8579", "v"),
    "wanda": Style("#e69f00", "s"),
    "sparsegpt": Style("#4aa3df", "^"),
    "slab-paper": Style("#cc6fa8", "D"),
    "slab": Style("#00a37a", "o"),
}
SPARE_STYLES = (
    Style("#8c6bd1", "P"),
    Style("#d55e00", "X"),
    Style("#b0a712", "h"),
    Style("#5d8aa8", "<"),
    Style("#a0522d", ">"),
    Style("#d6336c", "^"),
    Style("#2f6fdb", "p"),
    Style("#6b8e23", "d"),
    Style("#17becf", "8"),
    Style("#7a7a7a", "H"),
)
WIDTH = 5.3  # inches; a phone shows it about 330 pixels wide: 9.5-point type is 8 pixels high there
LABEL = 9.5  # points: names of axes, legends, labels
DASHES = (0, (5, 4))  # of the line that stands for the dense model


def figure(
    height: float, theme: Theme, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure in the report's style and its axes, row by row.

    height: in inches. options: as matplotlib's `subplots` takes them.

    Raises: PlotsUnavailable without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise PlotsUnavailable(
            f"the plots need matplotlib ({error}): pip install 'slab_kernels[report]', "
            "or ask for tables only"
        ) from error
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    fig = Figure(figsize=(WIDTH, height), facecolor=theme.background, layout=layout)
    FigureCanvasAgg(fig)
    axes = list(fig.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.set_facecolor(theme.background)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.grid)
        ax.tick_params(which="both", colors=theme.muted, labelsize=9, length=0)
        ax.grid(axis="y", color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def grid(panels: int) -> tuple[int, int]:
    """Rows and columns for so many panels: two beside each other, as a phone can show them."""
    columns = 2 if panels > 1 else 1
    return (panels + columns - 1) // columns, columns


def legend(fig: Figure, handles: Iterable[Any], labels: Sequence[str], theme: Theme) -> None:
    """One legend above all panels, in as many columns as fit."""
    longest = max(map(len, labels), default=1)
    fig.legend(
        list(handles),
        list(labels),
        loc="outside upper left",
        ncols=max(1, min(len(labels), 5, 75 // (longest + 5))),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=LABEL,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.1,
        borderpad=0.1,
    )


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes, 200 dots per inch, without a time stamp: equal data gives equal
    bytes."""
    buffer = io.BytesIO()
    fig.savefig(
        buffer, format="png", dpi=200, facecolor=fig.get_facecolor(), metadata={"Software": None}
    )
    return buffer.getvalue()


def styles(labels: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """The style of each label, for (label, method) pairs: a method's own once, spare ones after
    that."""
    chosen: dict[str, Style] = {}
    spare = count()
    for label, method in dict(labels).items():
        style = STYLES.get(method)
        if style is None or style in chosen.values():
            style = SPARE_STYLES[next(spare) % len(SPARE_STYLES)]
        chosen[label] = style
    return chosen
