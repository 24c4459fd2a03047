"""Results and timings as rows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .results import Report, Result

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


class Column(NamedTuple):
    """A column of the table of results."""

    name: str
    value: Callable[[Result], float | None]
    form: str
    always: bool = False  # also where nothing of it was measured


def _columns(report: Report) -> list[Column]:
    """The columns that have something to say."""
    measured = [r.heldout for r in report.results if r.layer_error is not None]
    error = "mean layer output error"
    if measured and all(measured):
        error += ", held out"
    every = [
        Column("stored bits per weight", lambda r: r.bits_per_weight, ".3f", True),
        Column("size in MB", lambda r: None if r.bytes is None else r.bytes / 1e6, ",.2f", True),
        Column("bits per parameter, whole folder", lambda r: r.bits_per_parameter, ".3f"),
        Column(error, lambda r: r.layer_error, ".4f", True),
        Column("held-out perplexity", lambda r: r.perplexity, ".3f", True),
        Column("perplexity ratio", lambda r: r.perplexity_ratio, ".4f"),
        Column("its standard error", lambda r: r.perplexity_ratio_stderr, ".4f"),
        Column("KL to dense, nats", lambda r: r.kl, ".5f"),
        Column("KL, 99th percentile", lambda r: r.kl_p99, ".4f"),
        Column("same top token", lambda r: r.top1, ".2%"),
        Column("tokens per second", lambda r: r.tokens_per_second, ".1f", True),
    ]
    return [c for c in every if c.always or any(c.value(r) is not None for r in report.results)]


def columns(report: Report) -> tuple[str, ...]:
    """The headings of `table`."""
    return ("method", *(column.name for column in _columns(report)))


def table(report: Report) -> list[tuple[str, ...]]:
    """The results as rows of text under `columns`; a dash where nothing was measured."""
    shown = _columns(report)
    return [
        (r.label, *(_number(column.value(r), column.form) for column in shown))
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
            r["dtype"] + (" as int8" if r.get("activations") == "int8" else ""),
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
    names = ("n", "k", "m", "dtype", "backend", "values", "rank", "adapter_rank", "activations")

    def problem(row: dict[str, Any]) -> tuple:
        return tuple(row.get(name) for name in names)

    twice = {problem(r) for r in bench if r.get("cache") == "cold"}
    return [r for r in bench if r.get("cache") != "warm" or problem(r) not in twice]
