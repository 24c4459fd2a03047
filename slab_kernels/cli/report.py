"""The command that shows what was measured: report."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import SlabError
from ..paths import expanded
from . import console, options
from .console import Outcome
from .progress import Progress

if TYPE_CHECKING:
    from ..models.hub import HubArguments
    from ..report.results import Report, Result

MOST_ROWS = 20  # of a plain table that are printed


def report(
    paths: options.ReportPaths,
    out: options.ReportOut = Path("report"),
    dense: options.Dense = None,
    dense_revision: options.DenseRevision = None,
    dense_subfolder: options.DenseSubfolder = None,
    token: options.Token = None,
    trust_remote_code: options.Trust = False,
    plots: options.Plots = True,
    json: options.Json = False,
) -> Outcome:
    """Tables and plots of runs: sizes, perplexity against bits per weight, error by layer, speed;
    PNG and one HTML page."""
    from ..models.hub import HubArguments
    from ..report import tables
    from ..report.headline import headline
    from ..report.measurements import read
    from ..report.write import rows, write

    if dense is None and (dense_revision, dense_subfolder) != (None, None):
        raise typer.BadParameter(
            "--dense-revision and --dense-subfolder are for --dense, which is not given"
        )
    out, hub = (
        expanded(out),
        HubArguments(dense_revision, dense_subfolder, token, trust_remote_code),
    )
    with Progress("report", "pictures") as progress:
        found = _with_weights(read(paths), dense, hub)
        written = [str(path) for path in write(found, out, plots, progress)]
    data = {
        "headline": " ".join(headline(found)),
        "results": rows(found),
        "bench": list(found.bench),
        "written": written,
        "tables": [asdict(table) for table in found.tables],
    }

    def show() -> None:
        if found.results:
            console.print_table(tables.columns(found), tables.table(found), found.model)
        for table in found.tables:
            console.print_table(table.columns, table.rows[:MOST_ROWS], table.title)
            if len(table.rows) > MOST_ROWS:
                print(f"and {len(table.rows) - MOST_ROWS} more rows on the page\n")
        for sentence in headline(found):
            print(sentence)
        console.print_pairs([(path, "") for path in written], "written")

    return Outcome(data, show)


def _with_weights(found: Report, dense: str | None, hub: HubArguments) -> Report:
    """What the weights of run folders add where they are still there: sizes, stored bits by part,
    and beside the dense model a corner of one weight."""
    from ..models.hub import ON_MAIN

    if any(_is_run_folder(r.folder) for r in found.results):
        found = replace(found, results=tuple(map(_with_folder, found.results)))
    if dense is not None:
        return _with_dense(found, dense, hub)
    measured = found.dense.folder if found.dense is not None and found.compressed else None
    if measured is None or not (Path(measured) / "config.json").is_file():
        return found
    try:
        return _with_dense(found, measured, ON_MAIN)
    except SlabError as error:  # nobody has asked for this folder
        console.say(f"warning: {measured} is not shown in full: {error}")
        return found


def _is_run_folder(folder: str | None) -> bool:
    names = ("config.json", "slab_run.json")
    return folder is not None and all((Path(folder) / name).is_file() for name in names)


def _with_folder(result: Result) -> Result:
    """A damaged folder is told of, and shown by its record alone."""
    from ..evaluate.inspect import inspect

    if result.folder is None or not _is_run_folder(result.folder):
        return result
    try:
        seen = inspect(result.folder)
    except SlabError as error:
        console.say(f"warning: {result.folder} is not shown in full: {error}")
        return result
    parts = {layer["name"]: layer["parts"] for layer in seen["layers"]}
    return replace(result, parts=parts, **_sizes(result, seen))


def _sizes(result: Result, seen: dict[str, Any]) -> dict[str, Any]:
    """What `inspect` has seen of a whole folder, unless the result knows its size already."""
    from ..report.measurements import SIZES

    names = (*SIZES, "dense_bytes")
    return {} if result.bytes is not None and result.dense_bytes else {n: seen[n] for n in names}


def _with_dense(found: Report, name: str, hub: HubArguments) -> Report:
    """The size of the dense model, and a corner of a weight of the main compressed one."""
    from ..evaluate.crop import weight_crop
    from ..evaluate.inspect import inspect
    from ..models.folder import hub_folder
    from ..report.results import DENSE, Result

    folder = hub_folder(name, hub)
    seen = inspect(folder)
    known = found.dense or Result(DENSE, label=DENSE)
    bits = known.bits_per_weight or seen["bits_per_weight"]
    dense = replace(known, bits_per_weight=bits, **_sizes(known, seen))
    main, compressed = found.main, found.compressed
    if main is not None and main.folder is not None and _is_run_folder(main.folder):
        if inspect(main.folder)["stored"] == "packed":
            shown = replace(
                main, crop=main.crop or weight_crop(main.folder, folder, hub=hub.found())
            )
            compressed = [shown if r is main else r for r in compressed]
    return replace(found, results=(dense, *compressed))
