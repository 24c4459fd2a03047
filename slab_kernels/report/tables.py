"""Results and timings as rows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .results import Report

COLUMNS = (
    "method",
    "stored bits per weight",
    "size in MB",
    "mean layer output error",
    "held-out perplexity",
    "tokens per second",
)
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
OURS_BACKENDS = ("cuda", "triton", "cpu", "reference")  # the others are other libraries'


def table(report: Report) -> list[tuple[str, ...]]:
    """The results as rows of text under COLUMNS; a dash where nothing was measured."""
    return [
        (
            r.label,
            _number(r.bits_per_weight, ".3f"),
            _number(None if r.bytes is None else r.bytes / 1e6, ",.2f"),
            _number(r.layer_error, ".4f"),
            _number(r.perplexity, ".3f"),
            _number(r.tokens_per_second, ".1f"),
        )
        for r in report.results
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def bench_table(bench: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """`bench` rows as rows of text under BENCH_COLUMNS.

    The last column says how near a time is to the limit that is nearer, and which limit it is.
    """
    return [
        (
            f"{r['n']}×{r['k']}, m={r['m']}",
            r["backend"],
            (r["values"] or "–")
            + (f" + adapter {r['adapter_rank']}" if r.get("adapter_rank") else ""),
            r["dtype"],
            WEIGHTS_FROM.get(r.get("cache", ""), "–"),
            _three_digits(r["median_us"]),
            f"{r['speedup_vs_dense']:.2f}×",
            _three_digits(r["gbytes_per_s"]),
            f"{r['roofline']:.0%} of {r['bound']}" if "roofline" in r else "–",
        )
        for r in bench
    ]


def _three_digits(value: float) -> str:
    """Three digits, or more before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cold(bench: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those from cache that were also timed from memory: what a picture shows."""
    names = ("n", "k", "m", "dtype", "backend", "values", "rank", "adapter_rank")

    def problem(row: dict[str, Any]) -> tuple:
        return tuple(row.get(name) for name in names)

    twice = {problem(r) for r in bench if r.get("cache") == "cold"}
    return [r for r in bench if r.get("cache") != "warm" or problem(r) not in twice]
