"""What was found, in plain words: the title of a report, its first sentences, its key numbers."""

from __future__ import annotations

from pathlib import PurePath
from statistics import median
from typing import NamedTuple

from .results import OURS, PAPERS, Report, Result
from .tables import OURS_BACKENDS, cold

NOTHING = 0.0005  # of a ratio: what is nearer to 1 is called equal
MANY_TIMES = 2.0  # a perplexity that grew this much is told as a multiple


class KeyNumber(NamedTuple):
    """One of the numbers below the headline, before and after compression."""

    name: str
    value: str
    beside: str  # what it compares with


def title(report: Report) -> str:
    """What kind of report this is, and of what if it is a benchmark."""
    if not report.is_benchmark:
        return "Compression report"
    named = ", ".join(PurePath(source.name).stem for source in report.sources[:3])
    return f"Benchmark report: {named}" if named else "Benchmark report"


def headline(report: Report) -> list[str]:
    """Sentences from the data alone; what was not measured is said to be so."""
    if report.compares_methods:
        return _of_methods(report)
    main = report.main
    if main is not None:
        sentences = [_of_model(main, report.dense, alone=len(report.compressed) == 1)]
        more = (_distance(main), _speed(main, report.dense), _closed_gap(report))
        sentences += [line for line in more if line]
        return sentences + (_of_timings(report) if report.bench else [])
    if report.bench:
        return _of_timings(report)
    if report.dense is not None:
        return ["Only a dense model was measured; nothing is compared with it."]
    rows = sum(len(table.rows) for table in report.tables)
    return [f"{rows:,} rows of measurements in {_count(len(report.tables), 'table')}."]


def key_numbers(report: Report) -> list[KeyNumber]:
    """Size, bits, perplexity, distance and speed of the main model, as far as they are known."""
    main, dense = report.main, report.dense
    if main is None or report.is_benchmark:
        return []
    found = []
    for name, attribute, form in (
        ("Size, embeddings included", "bytes", _megabytes),
        ("Bits per parameter, whole folder", "bits_per_parameter", "{:.2f}".format),
        ("Stored bits per weight", "bits_per_weight", "{:.2f}".format),
        ("Held-out perplexity", "perplexity", "{:.2f}".format),
        ("Tokens per second", "tokens_per_second", "{:.0f}".format),
    ):
        value = getattr(main, attribute)
        before = getattr(dense, attribute) if dense else None
        if value is not None:
            beside = "dense: not measured" if before is None else f"dense: {form(before)}"
            found.append(KeyNumber(name, form(value), beside))
    return found + _distances(main)


def _distances(main: Result) -> list[KeyNumber]:
    """How far the predictions are from the dense model's, where that was measured."""
    found = []
    if main.kl is not None:
        tail = "" if main.kl_p99 is None else f"99th percentile: {main.kl_p99:.3g}"
        found.append(KeyNumber("KL to dense, nats per token", f"{main.kl:.3g}", tail))
    if main.top1 is not None:
        found.append(KeyNumber("Same most probable token", f"{main.top1:.1%}", "as the dense"))
    return found


def _of_model(main: Result, dense: Result | None, alone: bool) -> str:
    """Size and loss of one model against the dense one."""
    subject = "This model" if alone else f"Compressed with {main.label}, this model"
    if main.perplexity is not None and main.perplexity_ratio:
        before = main.perplexity / main.perplexity_ratio
        loss = _loss(main.perplexity, before, main.perplexity_ratio_stderr)
    elif dense is not None and main.perplexity is not None and dense.perplexity is not None:
        loss = _loss(main.perplexity, dense.perplexity)
    else:
        loss = "its loss of perplexity against the dense model was not measured"
    return f"{subject} {_size(main, dense)}, and {loss}."


def _size(main: Result, dense: Result | None) -> str:
    if dense is not None and main.bytes and dense.bytes:
        here, there = _megabytes(main.bytes), _megabytes(dense.bytes)
        ratio = dense.bytes / main.bytes
        return f"{_smaller(ratio)} ({here} instead of {there}, embeddings included)"
    if dense is not None and main.bits_per_weight and dense.bits_per_weight:
        ratio = dense.bits_per_weight / main.bits_per_weight
        return (
            f"{_smaller(ratio)} in its compressed linears ({main.bits_per_weight:.2f} instead of "
            f"{dense.bits_per_weight:g} bits per weight)"
        )
    if main.bits_per_weight:
        return f"stores {main.bits_per_weight:.2f} bits per weight of its compressed linears"
    return "has a size that was not measured"


def _smaller(ratio: float) -> str:
    if abs(ratio - 1) < NOTHING:
        return "is as large as the dense one"
    return f"is {ratio:.1f}× smaller" if ratio > 1 else f"is {1 / ratio:.1f}× larger"


def _loss(perplexity: float, dense: float, error: float | None = None) -> str:
    """error: the standard error of the ratio of the two, where it is known."""
    ratio = perplexity / dense if dense else float("inf")
    change = f"({dense:.2f} → {perplexity:.2f})"
    if abs(ratio - 1) < NOTHING:
        return f"keeps its perplexity {change}"
    if error is not None and abs(ratio - 1) < error:
        return f"keeps its perplexity within the standard error of {100 * error:.2g} % {change}"
    if ratio >= MANY_TIMES:
        return f"its perplexity is {ratio:,.1f}× as high {change}"
    spread = "" if error is None else f" ± {100 * error:.1g}"
    percent = f"{abs(ratio - 1) * 100:.2g}{spread} %"
    return f"{'loses' if ratio > 1 else 'gains'} {percent} of perplexity {change}"


def _distance(main: Result) -> str | None:
    """How far the predictions are from the dense model's; None where that was not measured."""
    if main.kl is None:
        return None
    tail = "" if main.kl_p99 is None else f", {main.kl_p99:.3g} at the 99th percentile"
    same = ""
    if main.top1 is not None:
        same = f"; the most probable token is the same for {main.top1:.1%} of them"
    return (
        f"Its predictions lie {main.kl:.3g} nats (KL) from the dense model's per token{tail}{same}."
    )


def _speed(main: Result, dense: Result | None) -> str | None:
    """How fast the whole model generates; None where that was not measured."""
    if dense is None or not main.tokens_per_second or not dense.tokens_per_second:
        return None
    ratio = main.tokens_per_second / dense.tokens_per_second
    rates = (
        f"({main.tokens_per_second:.0f} instead of {dense.tokens_per_second:.0f} tokens per second)"
    )
    if ratio >= 1:
        return f"It generates {ratio:.2f}× as fast {rates}."
    return f"It generates more slowly here, at {ratio:.2f}× the speed {rates}."


def _closed_gap(report: Report) -> str | None:
    """What ours gains against the paper's method at the same format.

    None unless each method stands there once, else they are of several formats.
    """
    methods = [r.method for r in report.results]
    once = {r.method: r for r in report.results if methods.count(r.method) == 1}
    ours, papers, dense = once.get(OURS), once.get(PAPERS), report.dense
    if ours is None or papers is None or dense is None:
        return None
    if ours.perplexity is None or papers.perplexity is None or dense.perplexity is None:
        return None
    gap = papers.perplexity - dense.perplexity
    closed = papers.perplexity - ours.perplexity
    if gap <= 0 or closed <= 0:
        return None
    return (
        f"{closed / gap:.0%} of the perplexity gap between the paper's SLaB and the dense model is "
        f"closed: {papers.perplexity:.2f} → {ours.perplexity:.2f}, dense {dense.perplexity:.2f}."
    )


def _of_methods(report: Report) -> list[str]:
    """The best and the smallest of many settings."""
    settings = _count(len(report.compressed), "setting")
    methods = _count(len({r.method for r in report.compressed}), "method")
    measured = [r for r in report.compressed if r.perplexity is not None]
    if not measured:
        return [f"{settings} of {methods}; no perplexity was measured."]
    best = min(measured, key=lambda r: r.perplexity or 0.0)
    dense = report.dense
    beside = "" if dense is None or dense.perplexity is None else f"; dense {dense.perplexity:.2f}"
    sentences = [
        f"Of {settings} of {methods}, the lowest perplexity is that of {_place(best)}{beside}."
    ]
    sized = [r for r in measured if r.bits_per_weight is not None]
    if sized:
        smallest = min(sized, key=lambda r: (r.bits_per_weight or 0.0, r.perplexity or 0.0))
        sentences.append(f"The fewest bits are those of {_place(smallest)}.")
    return sentences


def _place(result: Result) -> str:
    bits = (
        ""
        if result.bits_per_weight is None
        else f" at {result.bits_per_weight:.2f} bits per weight"
    )
    return f"{result.label}, {result.perplexity:.2f}{bits}"


def _of_timings(report: Report) -> list[str]:
    """How fast the fastest of our kernels is per case, for the fewest and for the most tokens."""
    rows = [r for r in cold(report.bench) if r["backend"] in OURS_BACKENDS]
    if not rows:
        return [f"{_count(len(report.bench), 'timing')} of torch's dense linear; none of ours."]
    tokens = sorted({r["m"] for r in rows})
    sentences = []
    for m in dict.fromkeys((tokens[0], tokens[-1])):
        fastest: dict[tuple, float] = {}
        for r in rows:
            if r["m"] == m:
                problem = (r["n"], r["k"], r["dtype"], r["values"])
                fastest[problem] = max(r["speedup_vs_dense"], fastest.get(problem, 0.0))
        least, middle, most = min(fastest.values()), median(fastest.values()), max(fastest.values())
        at = "one token at a time" if m == 1 else f"{m:,} tokens at once"
        pace = "are slower than torch's dense one" if middle < 1 else "outrun torch's dense one"
        spread = ""
        if len(fastest) > 1:
            spread = f" in the median of {len(fastest)} cases, {least:.2f}× to {most:.2f}×"
        sentences.append(
            f"With {at}, our compressed linears {pace}: {middle:.2f}× its speed{spread}."
        )
    return sentences


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _megabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
