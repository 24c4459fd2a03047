"""Tables and plots of compression runs: PNG files and one self-contained HTML page.

What it shows, in any mixture, `measurements.read` gathers. It needs neither torch nor the weights.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ReportError
from ..paths import expanded
from .measurements import Report, Result, Table, read

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Report", "ReportError", "Result", "Table", "read"]

COLUMNS = (
    "method",
    "stored bits per weight",
    "mean layer output error",
    "held-out perplexity",
    "tokens per second",
)


def table(report: Report) -> list[tuple[str, ...]]:
    """The results as rows of text under COLUMNS; a dash where nothing was measured."""
    show = lambda value, form: "–" if value is None else format(value, form)  # noqa: E731
    return [
        (
            r.label,
            show(r.bits_per_weight, ".3f"),
            show(r.layer_error, ".4f"),
            show(r.perplexity, ".3f"),
            show(r.tokens_per_second, ".1f"),
        )
        for r in report.results
    ]


BENCH_COLUMNS = (
    "linear",
    "backend",
    "values",
    "activations",
    "weights from",
    "median µs",
    "against dense",
    "GB/s",
    "roofline",
)
WEIGHTS_FROM = {"cold": "memory", "warm": "cache"}
MOST_POINTS = 24  # results that are drawn as points with their labels; more would cover each other
MOST_BARS = 24  # timing rows that are drawn as bars; more become lines over the number of tokens


def bench_table(bench: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """`bench` rows as rows of text under BENCH_COLUMNS; roofline: how near the limit that is nearer, and which it is."""
    return [
        (
            f"{r['n']}×{r['k']}, m={r['m']}",
            r["backend"],
            (r["values"] or "–")
            + (f" + adapter {r['adapter_rank']}" if r.get("adapter_rank") else ""),
            r["dtype"],
            WEIGHTS_FROM.get(r.get("cache"), "–"),
            f"{r['median_us']:,.0f}" if r["median_us"] >= 100 else f"{r['median_us']:.3g}",
            f"{r['speedup_vs_dense']:.2f}×",
            f"{r['gbytes_per_s']:.3g}",
            f"{r['roofline']:.0%} of {r['bound']}" if "roofline" in r else "–",
        )
        for r in bench
    ]


def cold(bench: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those from cache that were also timed from memory: what a picture shows."""
    what = lambda r: tuple(
        r.get(c) for c in ("n", "k", "m", "dtype", "backend", "values", "rank", "adapter_rank")
    )
    twice = {what(r) for r in bench if r.get("cache") == "cold"}
    return [r for r in bench if r.get("cache") != "warm" or what(r) not in twice]


def rows(report: Report) -> list[dict[str, Any]]:
    """The results as plain dicts, as `read` takes them back."""
    return [asdict(result) for result in report.results]


def headline(report: Report) -> str:
    """One sentence: what ours gains against the paper's at the same format, or what was measured."""
    methods = [r.method for r in report.results]
    by_method = {
        r.method: r for r in report.results if methods.count(r.method) == 1
    }  # else they are of several formats
    ours, paper, dense = (by_method.get(m) for m in ("slab", "slab-paper", "dense"))
    if (
        ours
        and paper
        and dense
        and None not in (ours.perplexity, paper.perplexity, dense.perplexity)
    ):
        gap = paper.perplexity - dense.perplexity
        if gap > 0:
            sentence = (
                f"{(paper.perplexity - ours.perplexity) / gap:.0%} of the perplexity gap between the paper's SLaB and the dense model "
                f"closed: {paper.perplexity:.2f} → {ours.perplexity:.2f}, dense {dense.perplexity:.2f}"
            )
            if ours.layer_error and paper.layer_error:
                sentence += f"; mean layer error {paper.layer_error:.4f} → {ours.layer_error:.4f}"
            return sentence + "."
    compressed = [r for r in report.compressed if r.perplexity is not None]
    if compressed and dense and dense.perplexity is not None:
        best = min(compressed, key=lambda r: r.perplexity)
        return f"Best: {best.label}, perplexity {best.perplexity:.2f} where the dense model has {dense.perplexity:.2f}."
    other = f", {len(report.tables)} other table(s)" if report.tables else ""
    return (
        f"{len(report.compressed)} compressed model(s), {len(report.bench)} timing row(s){other}."
    )


def draw(report: Report) -> dict[str, tuple[str, str, Any]]:
    """file stem -> (title, caption, function of a theme that draws it), for what the data allows."""
    from . import figures

    drawn: dict[str, tuple[str, str, Any]] = {}
    with_errors = [r for r in report.compressed if r.errors]
    if with_errors:
        measured = "held-out text" if all(r.heldout for r in with_errors) else "calibration inputs"
        drawn["error-by-layer"] = (
            "Error by layer",
            f"‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ of every compressed linear on {measured}; both weights see the compressed model's inputs.",
            lambda theme: figures.error_by_layer(with_errors, theme, measured),
        )
    points = [
        r for r in report.compressed if r.perplexity is not None and r.bits_per_weight is not None
    ]
    if 0 < len(points) <= MOST_POINTS:
        drawn["perplexity-by-bits"] = (
            "Perplexity against stored bits per weight",
            "Lower and further left is better. Bits count everything stored for the compressed linears: values, metadata, signs, scales, factors.",
            lambda theme: figures.perplexity_by_bits(report.compressed, report.dense, theme),
        )
    if any(r.tokens_per_second for r in report.results):
        drawn["speed-model"] = (
            "Speed of the whole model",
            "Greedy generation, one sequence, same prompt, same machine, same run. In a small model the framework's own overhead dominates.",
            lambda theme: figures.model_speed(report.results, theme),
        )
    if report.bench:
        rows = cold(report.bench)
        draw_speed = figures.layer_speed if len(rows) <= MOST_BARS else figures.speed_by_tokens
        drawn["speed-layers"] = (
            "Speed of one linear",
            "Median time, torch's dense linear beside ours in the same run on the same machine.",
            lambda theme: draw_speed(rows, theme),
        )
    return drawn


def write(report: Report, out: Path | str, plots: bool = True) -> list[Path]:
    """Writes the PNG files and report.html into `out`; returns the paths written.

    Raises figures.PlotsUnavailable when matplotlib is missing and `plots` is true, OSError when `out` cannot be written.
    """
    from . import figures, page

    out = expanded(out)
    out.mkdir(parents=True, exist_ok=True)
    written, pictures = [], []
    for stem, (title, caption, function) in draw(report).items() if plots else ():
        light = figures.png(function(figures.LIGHT))
        pictures.append((title, caption, light, figures.png(function(figures.DARK))))
        path = out / f"{stem}.png"
        path.write_bytes(light)
        written.append(path)
    path = out / "report.html"
    kinds = {"slab": "ours", "dense": "dense"}
    tables = []
    if report.results:
        rows = [
            (cells, kinds.get(r.method, ""))
            for cells, r in zip(table(report), report.results, strict=True)
        ]
        tables.append(("Results", COLUMNS, rows))
    if report.bench:
        rows = [
            (cells, kinds.get(r["backend"], ""))
            for cells, r in zip(bench_table(report.bench), report.bench, strict=True)
        ]
        tables.append(("Timings of single linears", BENCH_COLUMNS, rows))
    tables += [
        (table.title, table.columns, [(cells, "") for cells in table.rows])
        for table in report.tables
    ]
    html = page.html(report.model or "", headline(report), tables, pictures, report.notes)
    path.write_text(html, encoding="utf-8", errors="replace")  # a name may hold half a character
    return [*written, path]
