"""Tables and plots of compression runs: PNG files and one self-contained HTML page.

What it reads, in any mixture: folders written by `compress` (or folders of such folders), the JSON of `eval --json` and
`bench --json`, and the results file of the demo. It needs neither torch nor the weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

RUN_RECORD = "slab_run.json"


class ReportError(ValueError):
    """A path that holds nothing a report can show."""


@dataclass(frozen=True)
class Result:
    """One model, compressed or dense: a row of the table. None where nothing was measured."""

    method: str
    pattern: str | None = None
    rank: int | None = None
    values: str | None = None
    bits_per_weight: float | None = None  # of the compressed linears, factors and scales included
    perplexity: float | None = None
    layer_error: float | None = None  # mean over the layers
    tokens_per_second: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # layer -> relative output error
    heldout: bool = False  # the errors are of held-out text, not of the calibration inputs
    folder: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    results: tuple[Result, ...] = ()
    bench: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    notes: tuple[str, ...] = ()  # device, versions, text and window: printed under the tables

    @property
    def dense(self) -> Result | None:
        return next((r for r in self.results if r.method == "dense"), None)

    @property
    def compressed(self) -> list[Result]:
        return [r for r in self.results if r.method != "dense"]


def read(paths: list[Path | str]) -> Report:
    """Gathers run folders, folders of run folders and JSON files. Raises ReportError for a path with nothing in it."""
    found: dict[str, Result] = {}
    bench: list[dict[str, Any]] = []
    notes: list[str] = []
    model = None
    for path in map(Path, paths):
        for file in _files(path):
            data = _json(file)
            if "layers" in data:
                _merge(found, _from_record(data, file.parent))
                model = model or data.get("model")
            elif "results" in data:
                model = data.get("model") or model
                notes += data.get("notes", [])
                for row in data["results"]:
                    _merge(found, _from_row(row))
                bench += data.get("bench", [])
            elif "rows" in data:
                bench += data["rows"]
                notes += [data["device"]] if isinstance(data.get("device"), str) else []
            elif "perplexity" in data:
                _merge(found, _from_row(data))
            else:
                raise ReportError(f"{file} is no run record, eval, bench or results file: it has none of their keys")
    if not found and not bench:
        raise ReportError(f"nothing to report in {', '.join(map(str, paths))}: no {RUN_RECORD}, no result rows")
    return Report(tuple(_labelled(list(found.values()))), tuple(bench), model, tuple(dict.fromkeys(notes)))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ReportError(f"{path} does not exist: give a folder written by compress, or a JSON file of eval or bench")
    files = [f for f in (path / RUN_RECORD, path / "results.json") if f.is_file()]
    files = files or sorted(path.glob(f"*/{RUN_RECORD}"))
    if not files:
        raise ReportError(f"{path} holds no {RUN_RECORD}, neither itself nor in its folders: was it written by compress?")
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ReportError(f"{file} holds a JSON {type(data).__name__}, not an object")
    return data


def _from_record(data: dict[str, Any], folder: Path) -> Result:
    settings = data.get("settings", data)
    layers = data["layers"]
    heldout = bool(layers) and all(layer.get("heldout_error") is not None for layer in layers)
    errors = {
        layer["name"]: layer["heldout_error" if heldout else "error"] for layer in layers if layer.get("error") is not None
    }
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    bits = sum(layer["shape"][0] * layer["shape"][1] * layer["bits_per_weight"] for layer in layers)
    return Result(
        method=settings["method"],
        pattern=settings.get("pattern"),
        rank=settings.get("rank"),
        values=settings.get("values"),
        bits_per_weight=bits / weights if weights else None,
        layer_error=sum(errors.values()) / len(errors) if errors else None,
        errors=errors,
        heldout=heldout,
        folder=str(folder.resolve()),
    )


def _from_row(row: dict[str, Any]) -> Result:
    known = {name: row[name] for name in Result.__dataclass_fields__ if row.get(name) is not None and name != "label"}
    known.setdefault("method", "dense")
    if "folder" in known:
        known["folder"] = str(Path(known["folder"]).resolve())
    return Result(**known)


def _merge(found: dict[str, Result], new: Result) -> None:
    """A record and the evaluation of the same folder are one row; measured values win over absent ones."""
    key = new.folder or f"{new.method}/{new.pattern}/{new.rank}/{new.values}"
    old = found.get(key)
    if old is not None:
        kept = {name: getattr(old, name) for name in Result.__dataclass_fields__ if getattr(new, name) in (None, {}, "")}
        if old.heldout and not new.heldout:  # held-out errors are the honest ones: a record's calibration errors never replace them
            kept |= {name: getattr(old, name) for name in ("errors", "layer_error", "heldout")}
        new = replace(new, **kept)
    found[key] = new


def _labelled(results: list[Result]) -> list[Result]:
    """Labels by method, and by what differs where a method stands there twice. Dense first."""
    results.sort(key=lambda r: r.method != "dense")
    labelled, seen = [], set()
    for result in results:
        same = [r for r in results if r.method == result.method]
        parts = [result.method]
        for name, prefix in (("pattern", ""), ("values", ""), ("rank", "rank ")):
            if len({getattr(r, name) for r in same}) > 1:
                parts.append(f"{prefix}{getattr(result, name)}")
        label = " ".join(parts)
        while label in seen:
            label += f" ({Path(result.folder).name})" if result.folder and "(" not in label else "'"
        seen.add(label)
        labelled.append(replace(result, label=label))
    return labelled


COLUMNS = ("method", "stored bits per weight", "mean layer output error", "held-out perplexity", "tokens per second")


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


BENCH_COLUMNS = ("linear", "backend", "values", "activations", "weights from", "median µs", "against dense", "GB/s", "roofline")
WEIGHTS_FROM = {"cold": "memory", "warm": "cache"}
MOST_BARS = 24  # timing rows that are drawn as bars; more become lines over the number of tokens


def bench_table(bench: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """`bench` rows as rows of text under BENCH_COLUMNS; roofline: how near the limit that is nearer, and which it is."""
    return [
        (
            f"{r['n']}×{r['k']}, m={r['m']}",
            r["backend"],
            (r["values"] or "–") + (f" + adapter {r['adapter_rank']}" if r.get("adapter_rank") else ""),
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
    what = lambda r: tuple(r.get(c) for c in ("n", "k", "m", "dtype", "backend", "values", "rank", "adapter_rank"))  # noqa: E731
    twice = {what(r) for r in bench if r.get("cache") == "cold"}
    return [r for r in bench if r.get("cache") != "warm" or what(r) not in twice]


def rows(report: Report) -> list[dict[str, Any]]:
    """The results as plain dicts, as `read` takes them back."""
    return [asdict(result) for result in report.results]


def headline(report: Report) -> str:
    """One sentence: what ours gains against the paper's at the same format, or what was measured."""
    by_method = {r.method: r for r in report.results}
    ours, paper, dense = (by_method.get(m) for m in ("slab", "slab-paper", "dense"))
    if ours and paper and dense and None not in (ours.perplexity, paper.perplexity, dense.perplexity):
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
    return f"{len(report.compressed)} compressed model(s), {len(report.bench)} timing row(s)."


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
    if any(r.perplexity is not None and r.bits_per_weight is not None for r in report.compressed):
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

    out = Path(out)
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
        rows = [(cells, kinds.get(r.method, "")) for cells, r in zip(table(report), report.results, strict=True)]
        tables.append(("Results", COLUMNS, rows))
    if report.bench:
        rows = [(cells, kinds.get(r["backend"], "")) for cells, r in zip(bench_table(report.bench), report.bench, strict=True)]
        tables.append(("Timings of single linears", BENCH_COLUMNS, rows))
    path.write_text(page.html(report.model or "", headline(report), tables, pictures, report.notes), encoding="utf-8")
    return [*written, path]
