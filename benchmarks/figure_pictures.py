"""The pictures of the documents, as SVG, each drawn from rows of files under benchmarks/results/.

A picture names its rows by a hash that is kept inside the SVG. `figures.py` compares that hash,
never pixels: fonts and matplotlib's version may change how a picture looks, not what it shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from figure_tables import H100, Row, cold_rows, matching, read

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE, INK, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#8c6bd1", "#1d2026", "#667080",
)  # fmt: skip
VALUE_STYLES = {"fp16": (BLUE, "o"), "int8": (ORANGE, "s"), "int4": (GREEN, "D")}


@dataclass(frozen=True)
class Picture:
    """What is drawn (`rows`, plain JSON) and how (`draw`, from rows to the text of an SVG)."""

    rows: Callable[[], Any]
    draw: Callable[[Any], str]

    def fingerprint(self) -> str:
        """The hash of the rows, as the SVG keeps it."""
        text = json.dumps(self.rows(), sort_keys=True, ensure_ascii=False)
        return "rows sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def svg(self) -> str:
        """The picture with the hash of its rows in a comment at its end."""
        body = self.draw(self.rows()).rstrip().removesuffix("</svg>")
        return f"{body}<!-- {self.fingerprint()} -->\n</svg>\n"


# ---- the decomposition, drawn by hand: five matrices of coloured cells ----

CELL, GAP, TOP = 9, 26, 8
# Shares of the largest weight; a cell is drawn in one of these steps, so that few paths are needed.
STEPS = 12


def colour(share: float) -> str:
    """White at 0, blue towards 1, orange towards -1."""
    end = (0, 0x72, 0xB2) if share > 0 else (0xD5, 0x5E, 0)
    return "#" + "".join(f"{round(255 + (c - 255) * abs(share)):02x}" for c in end)


def cells(matrix: Sequence[Sequence[float]], largest: float, left: float) -> str:
    """The cells of one matrix, those of one colour as one path, with a frame around them."""
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(matrix):
        for j, entry in enumerate(row):
            step = round(STEPS * max(-1.0, min(1.0, entry / largest)))
            if step:
                paths.setdefault(step, []).append(
                    f"M{left + CELL * j} {TOP + CELL * i}h{CELL}v{CELL}h-{CELL}z"
                )
    drawn = [
        f'<path fill="{colour(step / STEPS)}" d="{"".join(d)}"/>'
        for step, d in sorted(paths.items())
    ]
    width, height = CELL * len(matrix[0]), CELL * len(matrix)
    frame = (
        f'<rect x="{left}" y="{TOP}" width="{width}" height="{height}" fill="none" '
        f'stroke="{GREY}"/>'
    )
    return "\n".join([*drawn, frame])


def example_matrices() -> Row:
    """W and its parts, by name."""
    found = read("example-matrix.json")
    return {name: found[name] for name in ("W", "S", "signs", "magnitudes", "adapter")}


def decomposition(found: Row) -> str:
    """W = S + signs × magnitudes + P Qᵀ, every matrix on one colour scale but the signs."""
    largest = max(abs(entry) for row in found["W"] for entry in row)
    panels = (
        ("W", largest, "", ("W", "a trained weight")),
        ("S", largest, "=", ("S", "two of four kept")),
        ("signs", 1.0, "+", ("signs", "one bit where S is 0")),
        ("magnitudes", largest, "×", ("magnitudes", "U Vᵀ, rank 1")),
        ("adapter", largest, "+", ("P Qᵀ", "optional, low rank")),
    )
    panel_width, panel_height = CELL * len(found["W"][0]), CELL * len(found["W"])
    parts, left = [], 8
    for name, scale, sign, (title, below) in panels:
        if sign:
            parts.append(
                f'<text x="{left - GAP / 2}" y="{TOP + panel_height / 2 + 6}" font-size="18" '
                f'text-anchor="middle" fill="{INK}">{sign}</text>'
            )
        parts.append(cells(found[name], scale, left))
        middle = left + panel_width / 2
        for text, line, size, ink in ((title, 18, 14, INK), (below, 34, 11.5, GREY)):
            parts.append(
                f'<text x="{middle}" y="{TOP + panel_height + line}" font-size="{size}" '
                f'text-anchor="middle" fill="{ink}">{escape(text)}</text>'
            )
        left += panel_width + GAP
    width, height = left - GAP + 8, TOP + panel_height + 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" role="img" '
        'aria-label="W = S + signs × magnitudes + P Qᵀ">\n'
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


# ---- drawn by matplotlib ----


def figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure in inches without a display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained", facecolor="#ffffff")
    FigureCanvasAgg(drawn)
    axes = list(drawn.subplots(1, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#b9c0ca")
        ax.tick_params(which="both", colors=GREY, labelsize=9, length=0)
        ax.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        ax.set_axisbelow(True)
    return drawn, axes


def as_svg(drawn: Any) -> str:
    """The figure as the text of an SVG without a date and with the same names in every run."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "slab_kernels"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no XML declaration: the file is valid inside a page too
    # matplotlib writes every step of a path on a line of its own.
    return re.sub(r'\bd="[^"]*"', lambda path: " ".join(path[0].split()), text)


def plain_numbers(axis: Any, ticks: Sequence[float]) -> None:
    """A logarithmic axis with these ticks, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def speedup_rows(name: str, backend: str) -> list[Row]:
    """Shape, tokens, value type and speed-up of one backend's rows from memory."""
    columns = ("n", "k", "m", "values", "speedup_vs_dense")
    return [{c: row[c] for c in columns} for row in matching(cold_rows(name), backend=backend)]


def speed(rows: list[Row], title: str) -> str:
    """Speed-up against tokens: a line through the geometric mean, a band over the shapes."""
    drawn, (ax,) = figure(7.6, 3.6)
    tokens = sorted({row["m"] for row in rows})
    top = 1.05 * max(row["speedup_vs_dense"] for row in rows)
    ax.axhspan(0, 1, color="#b9c0ca", alpha=0.35, linewidth=0)
    ax.axhline(1, color=GREY, linewidth=1.2)
    for values, (ink, marker) in VALUE_STYLES.items():
        by_tokens = [
            [row["speedup_vs_dense"] for row in matching(rows, values=values, m=m)] for m in tokens
        ]
        low, high = [min(found) for found in by_tokens], [max(found) for found in by_tokens]
        means = [math.exp(sum(map(math.log, found)) / len(found)) for found in by_tokens]
        ax.fill_between(tokens, low, high, color=ink, alpha=0.15, linewidth=0)
        ax.plot(tokens, means, color=ink, marker=marker, markersize=5, linewidth=1.8, label=values)
    ax.set_xscale("log", base=2)
    plain_numbers(ax.xaxis, tokens)
    ax.set_ylim(0, top)
    ax.text(
        tokens[0], 0.06, "torch's dense fp16 linear is faster down here", color=GREY, fontsize=9
    )
    ax.set_xlabel("tokens at once, M (log scale)", color=GREY, fontsize=9.5)
    ax.set_ylabel("times as fast as dense", color=GREY, fontsize=9.5)
    ax.set_title(title, loc="left", color=INK, fontsize=10.5)
    ax.legend(title="kept values", frameon=False, fontsize=9.5, labelcolor=INK)
    return as_svg(drawn)


def demo_rows() -> list[Row]:
    """Method, bits and perplexity of the demo's results."""
    columns = ("method", "bits_per_weight", "perplexity")
    return [{c: row[c] for c in columns} for row in read("demo-shipped-cpu.json")["results"]]


def demo(rows: list[Row]) -> str:
    """Perplexity of the demo's methods as bars above the dense model's."""
    drawn, (ax,) = figure(7.6, 2.6)
    (dense,) = (row["perplexity"] for row in rows if row["method"] == "dense")
    rest = [row for row in rows if row["method"] != "dense"]
    names = [f"{row['method']}, {row['bits_per_weight']:.2f} bits" for row in rest]
    above = [row["perplexity"] - dense for row in rest]
    inks = [GREEN if row["method"] == "slab" else "#b9c0ca" for row in rest]
    ax.barh(names, above, color=inks, height=0.7)
    for place, row in enumerate(rest):
        ax.annotate(
            f"{row['perplexity']:.2f}", (above[place], place), xytext=(5, 0), va="center_baseline",
            textcoords="offset points", color=INK, fontsize=9.5,
        )  # fmt: skip
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 1.12 * max(above))
    ax.set_xlabel(f"perplexity above the dense model's {dense:.2f}", color=GREY, fontsize=9.5)
    return as_svg(drawn)


FAMILIES = {
    "rtn": ("dense, round to nearest", "0.6", "o", "--"),
    "gptq": ("dense, GPTQ", "0.15", "s", "-"),
    "gptq, matched": ("dense, GPTQ, matched", "0.15", "*", ""),
    "2:4, published": ("2:4 methods as published", ORANGE, "x", ""),
    "2:4, polished": ("2:4 methods, polished", GREEN, "+", ""),
    "2:4, matched": ("3BASiL, matched", GREEN, "*", ""),
    "slab": ("slab", BLUE, "D", ""),
    "slab, searched": ("slab --bits", BLUE, "v", "--"),
    "slab, matched": ("slab, matched", PURPLE, "D", ""),
}  # family in the file -> name, colour, marker, line


def method_rows(model: str) -> dict[str, Any]:
    """The dense perplexity, and family, bits and perplexity of every row."""
    found = read(f"methods-{model}.json")
    columns = ("family", "bits_per_weight", "perplexity")
    return {"dense": found["dense"], "rows": [{c: r[c] for c in columns} for r in found["rows"]]}


def methods(found: dict[str, Any]) -> str:
    """Perplexity above the dense model's, in per cent of it, against stored bits."""
    drawn, axes = figure(9.6, 4.4, columns=2, width_ratios=(3, 2), sharey=True)
    dense = found["dense"]
    for ax, (low, high) in zip(axes, ((2.0, 6.6), (8.0, 11.2)), strict=True):
        for family, (name, ink, marker, line) in FAMILIES.items():
            rows = [r for r in found["rows"] if r["family"] == family]
            rows = [r for r in rows if low <= r["bits_per_weight"] < high]
            rows.sort(key=lambda r: r["bits_per_weight"])
            bits = [r["bits_per_weight"] for r in rows]
            above = [max(100 * (r["perplexity"] / dense - 1), 0.05) for r in rows]
            ax.plot(
                bits, above, linestyle=line or "none", color=ink, marker=marker, label=name,
                linewidth=1.2, markersize=6,
            )  # fmt: skip
        ax.set_yscale("log")
        plain_numbers(ax.yaxis, (0.1, 0.3, 1, 3, 10, 30, 100, 1000))
        ax.set_ylim(0.04, 1.5 * max(100 * (r["perplexity"] / dense - 1) for r in found["rows"]))
        ax.set_xlim(low, high)
        ax.set_xlabel("stored bits per weight", color=GREY, fontsize=9.5)
    axes[0].set_ylabel(
        f"perplexity above dense ({dense:.2f}), % (log scale)", color=GREY, fontsize=9.5
    )
    axes[0].legend(fontsize=8.5, frameon=False, labelcolor=INK)
    return as_svg(drawn)


# What stands for each family in the picture of SmolLM2: name, colour, marker, line.
KL_FAMILIES = {
    "rtn": ("dense, round to nearest", "0.6", "o", "--"),
    "gptq": ("dense, GPTQ", "0.15", "s", "-"),
    "gptq, matched": ("dense, GPTQ, matched", "0.15", "*", ""),
    "2:4, published": ("other 2:4 methods, as published", ORANGE, "x", ""),
    "2:4, polished": ("other 2:4 methods, with our refit", GREEN, "+", ""),
    "2:4, matched": ("3BASiL with our refit, matched", GREEN, "*", ""),
    "slab": ("slab", BLUE, "D", ""),
    "slab, searched": ("slab --bits", BLUE, "v", ""),
    "slab, matched": ("slab, matched", PURPLE, "*", ""),
    "preset": ("slab --preset", BLUE, "P", ""),
}


def kl_rows() -> dict[str, Any]:
    """Label, family, bits and KL of every row of SmolLM2."""
    columns = ("label", "family", "bits_per_weight", "kl")
    found = read("methods-smollm2.json")
    return {"model": found["model"], "rows": [{c: r[c] for c in columns} for r in found["rows"]]}


def divergences(found: dict[str, Any]) -> str:
    """KL to the dense model against stored bits; presets are named beside their markers."""
    drawn, axes = figure(9.6, 5.0, columns=2, width_ratios=(3, 2), sharey=True)
    for ax, (low, high) in zip(axes, ((2.9, 5.9), (8.8, 10.9)), strict=True):
        for family, (name, ink, marker, line) in KL_FAMILIES.items():
            rows = matching(found["rows"], family=family)
            here = [row for row in rows if low <= row["bits_per_weight"] < high]
            here.sort(key=lambda row: row["bits_per_weight"])
            if not rows:
                continue
            large = family == "preset" or marker == "*"
            ax.plot(
                [row["bits_per_weight"] for row in here], [row["kl"] for row in here],
                linestyle=line or "none", color=ink, marker=marker, label=name, linewidth=1.2,
                markersize=9 if large else 6,
            )  # fmt: skip
            for row in here:
                if family != "preset" or "," in row["label"]:
                    continue
                ax.annotate(
                    row["label"].removeprefix("preset "), (row["bits_per_weight"], row["kl"]),
                    xytext=(7, 5), textcoords="offset points", color=BLUE, fontsize=9,
                )  # fmt: skip
        ax.set_yscale("log")
        plain_numbers(ax.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10))
        divergence = [row["kl"] for row in found["rows"]]
        ax.set_ylim(0.8 * min(divergence), 1.25 * max(divergence))
        ax.set_xlim(low, high)
        ax.set_xticks([bits / 2 for bits in range(math.ceil(2 * low), math.ceil(2 * high))])
        ax.set_xlabel("stored bits per weight", color=GREY, fontsize=9.5)
    axes[0].set_ylabel("KL(dense ‖ compressed), log scale", color=GREY, fontsize=9.5)
    lines, names = axes[0].get_legend_handles_labels()
    drawn.legend(
        lines, names, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False,
        labelcolor=INK,
    )  # fmt: skip
    return as_svg(drawn)


PICTURES: dict[str, Picture] = {
    "decomposition.svg": Picture(example_matrices, decomposition),
    "speed-h100.svg": Picture(
        lambda: speedup_rows(H100, "cuda"),
        lambda rows: speed(rows, "The fused linears of Llama-3-8B on an H100, fp16 activations"),
    ),
    "speed-h100-triton.svg": Picture(
        lambda: speedup_rows(H100, "triton"),
        lambda rows: speed(rows, "The same linears by the Triton kernels' default tiles"),
    ),
    "perplexity-demo.svg": Picture(demo_rows, demo),
    "methods-smollm2.svg": Picture(kl_rows, divergences),
    "methods-shipped.svg": Picture(lambda: method_rows("shipped"), methods),
    "methods-stories260k.svg": Picture(lambda: method_rows("stories260k"), methods),
}  # file under docs/figures/ -> what is drawn
