"""A report as files: PNG pictures and one self-contained HTML page.

It needs neither torch nor the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ReportError
from ..paths import expanded
from . import figures, page, speed, stacks
from .headline import headline, key_numbers, title
from .style import DARK, LIGHT, png
from .tables import BENCH_COLUMNS, bench_table, cold, columns, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .results import Report
    from .style import Theme

MOST_POINTS = 24  # results that are drawn as points with labels; more would cover each other
MOST_BARS = 24  # timing rows that are drawn as bars


class Picture(NamedTuple):
    """A picture that the data allows, still to be drawn."""

    stem: str  # of its PNG file
    title: str
    caption: str
    draw: Callable[[Theme], Figure]


def pictures(report: Report) -> list[Picture]:
    """The pictures in the order of the page.

    A report of a benchmark begins with speed, one of a model with quality.
    """
    if report.is_benchmark:
        return [*_of_speed(report), *_of_quality(report), *_of_storage(report)]
    return [*_of_quality(report), *_of_storage(report), *_of_speed(report)]


def _of_speed(report: Report) -> list[Picture]:
    found = []
    rows = cold(report.bench)
    tokens = {r["m"] for r in rows}
    if len(tokens) > 1:
        found.append(
            Picture(
                "speed-by-tokens",
                "Speed-up against the number of tokens",
                "How many times as fast as torch's dense linear of the same shape, measured in the "
                "same run on the same machine. Below the dashed line ours is slower.",
                lambda theme: speed.speed_by_tokens(rows, theme),
            )
        )
    if rows and len(rows) <= MOST_BARS:
        found.append(
            Picture(
                "speed-layers",
                "Speed of one linear",
                "Median time; torch's dense linear stands beside ours, in the same run on the same "
                "machine.",
                lambda theme: speed.layer_speed(rows, theme),
            )
        )
    measured = speed.with_ceilings(rows)
    for number, (name, timed) in enumerate(measured.items(), 1):
        found.append(
            Picture(
                "roofline" if len(measured) == 1 else f"roofline-{number}",
                f"Roofline of {name}",
                "Each point is one number of tokens, the median over the shapes. The dashed lines "
                "are what this machine reached in the same run: its memory bandwidth on the left, "
                "torch's dense product on the right. Nearer to the line is better; a compressed "
                "weight has fewer bytes, so the same work lies further right.",
                partial(speed.roofline, timed),
            )
        )
    decoded = [r for r in (report.dense, report.main) if r is not None and r.decoding]
    if decoded:
        found.append(
            Picture(
                "decode-step",
                "Where the time of a decode step goes",
                "One step gives one token to each text that is generated at once. Every module is "
                "timed without those inside; what belongs to no module is Python and transformers.",
                lambda theme: stacks.decode_steps(decoded, theme),
            )
        )
    if any(r.tokens_per_second for r in report.compressed):
        found.append(
            Picture(
                "speed-model",
                "Speed of the whole model",
                "Greedy generation, one sequence, same prompt, same machine, same run. In a small "
                "model the framework's own overhead dominates.",
                lambda theme: speed.model_speed(report.results, theme),
            )
        )
    return found


def _of_quality(report: Report) -> list[Picture]:
    found = []
    points = figures.points(report.compressed)
    if points:
        found.append(
            Picture(
                "perplexity-by-bits",
                "Perplexity against stored bits per weight",
                "Lower and further left is better. Bits count everything stored for the compressed "
                "linears: values, metadata, signs, scales, factors.",
                lambda theme: figures.perplexity_by_bits(
                    report.compressed, report.dense, theme, named=len(points) <= MOST_POINTS
                ),
            )
        )
    with_errors = [r for r in report.compressed if r.errors]
    if with_errors:
        heldout = all(r.heldout for r in with_errors)
        measured = "held-out text" if heldout else "calibration inputs"
        found.append(
            Picture(
                "error-by-layer",
                "Error by layer",
                f"‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ of every compressed linear on {measured}; both weights see the "
                "compressed model's inputs.",
                lambda theme: figures.error_by_layer(with_errors, theme, measured),
            )
        )
    return found


def _of_storage(report: Report) -> list[Picture]:
    found = []
    main = report.main
    whole = [r for r in (report.dense, main) if r is not None and r.stored]
    if main is not None and main.stored:
        found.append(
            Picture(
                "folder-parts",
                "What the whole folder stores",
                "Megabytes of all tensors on disk by part, what is left dense beside what is "
                "packed.",
                lambda theme: stacks.folders(whole, theme),
            )
        )
    if main is not None and main.parts:
        found.append(
            Picture(
                "bits-by-layer",
                "What each layer stores",
                f"Bits per weight of every compressed linear of {main.label}, and in the legend "
                "the mean over the layers.",
                lambda theme: figures.bits_by_layer(main, theme),
            )
        )
    if main is not None and main.crop is not None:
        crop = main.crop
        rows, columns = crop["shape"]
        found.append(
            Picture(
                "heat-maps",
                "One weight and its parts",
                f"The first {rows} rows and {columns} columns of {crop['layer']}, compressed with "
                f"{main.label}: W ≈ S + signs × magnitudes. All panels share one scale of colours.",
                lambda theme: figures.heat_maps(crop, theme),
            )
        )
    return found


def write(
    report: Report,
    out: Path | str,
    plots: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes the PNG files and report.html into `out`; returns the paths written, the page last.

    progress: called with the pictures drawn and those in all.

    Raises: PlotsUnavailable when matplotlib is missing and `plots` is true; OSError when `out`
        cannot be written; ReportError where it holds a report.html of somebody else.
    """
    out = expanded(out)
    path = out / "report.html"
    if path.exists() and page.GENERATOR not in path.read_text(encoding="utf-8", errors="replace"):
        raise ReportError(
            f"{path} was not written by slab_kernels and would be lost; choose another folder, or "
            "delete it"
        )
    out.mkdir(parents=True, exist_ok=True)
    written, drawn = [], []
    shown = pictures(report) if plots else []
    for number, picture in enumerate(shown, 1):
        light, dark = png(picture.draw(LIGHT)), png(picture.draw(DARK))
        drawn.append(page.Drawn(picture.title, picture.caption, light, dark))
        file = out / f"{picture.stem}.png"
        file.write_bytes(light)
        written.append(file)
        if progress is not None:
            progress(number, len(shown))
    text = page.html(_page(report, drawn))
    path.write_text(text, encoding="utf-8", errors="replace")  # a name may hold half a character
    return [*written, path]


def _page(report: Report, drawn: list[page.Drawn]) -> page.Page:
    main, dense = report.main, report.dense
    compared = [dense] if dense else []
    compared += [main] if main else []
    compared += [r for r in report.compressed if r is not main]
    return page.Page(
        title=title(report),
        model=report.model or "",
        headline=headline(report),
        numbers=key_numbers(report),
        prompt=report.prompt or "",
        texts=[page.Text(r.label, r.continuation) for r in compared if r.continuation is not None],
        pictures=drawn,
        tables=_tables(report),
        run=list(report.run),
        notes=list(report.notes),
        sources=list(report.sources),
    )


def _tables(report: Report) -> list[page.Table]:
    tables = []
    if report.results:
        kinds = [
            ("ours" if r is report.main else "dense" if r.is_dense else "") for r in report.results
        ]
        tables.append(page.Table("Results", columns(report), table(report), kinds))
    if report.bench:
        kinds = ["dense" if r["backend"] == "dense" else "" for r in report.bench]
        rows = bench_table(report.bench)
        tables.append(page.Table("Timings of single linears", BENCH_COLUMNS, rows, kinds))
    tables += [page.Table(t.title, t.columns, t.rows, [""] * len(t.rows)) for t in report.tables]
    return tables


def rows(report: Report) -> list[dict[str, Any]]:
    """The results as plain dicts, as `read` takes them back."""
    return [asdict(result) for result in report.results]
