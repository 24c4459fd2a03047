"""Files of measurements, as `report` shows them: read, checked, and rows of one model merged.

They are told apart by what they hold: records of `compress`, the JSON of `eval`, `eval --tasks`,
`inspect` and `bench`, the results of the demo and of benchmarks/bench_methods.py, and, as plain
tables, any other results that say where they are from.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..errors import ReportError
from ..paths import expanded
from .plain import of_anything, of_tasks
from .results import Report, Result, Source, Table

RUN_RECORD = "slab_run.json"
KINDS = (
    "a run record, JSON of eval, generate, inspect or bench, results of the demo, or results that "
    "name their device, machine, command or commit"
)
ORIGIN = ("device", "machine", "command", "commit")  # of which the files of benchmarks/results tell
BENCH_ROW = {
    "n": int, "k": int, "m": int, "backend": str, "dtype": str, "median_us": float,
    "speedup_vs_dense": float, "gbytes_per_s": float,
}  # fmt: skip
MODEL_ROW = {
    "pattern": str, "rank": int, "values": str, "bits_per_weight": float, "perplexity": float,
    "layer_error": float, "tokens_per_second": float, "folder": str, "continuation": str,
}  # fmt: skip
SIZES = {
    "bytes": int, "parameters": int, "bits_per_parameter": float, "packed_bytes": int,
    "packed_head_bytes": int,
}  # fmt: skip
DISTANCES = {
    "kl": float, "kl_p99": float, "top1": float, "perplexity_ratio": float,
    "perplexity_ratio_stderr": float,
}  # fmt: skip
STEP = {"batch": int, "seconds_per_step": float, "tokens_per_second": float}
LARGEST = 1e300  # of a number: what is beyond overflows in a sum, and NaN is not below it
NUMBERS = {int: "an integer", float: "a number", str: "a text"}


def read(paths: Sequence[Path | str]) -> Report:
    """Gathers run folders, folders of run folders and JSON files.

    Raises: ReportError for a path with nothing in it.
    """
    gathered = _Gathered()
    for path in map(expanded, paths):
        for file in _files(path):
            gathered.add(file)
    found = gathered.report()
    if not found.results and not found.bench and not found.tables:
        where = ", ".join(map(str, paths))
        raise ReportError(f"nothing to report in {where}: no {RUN_RECORD}, no result rows")
    return found


class _Gathered:
    """What was found in the files so far."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.bench: list[dict[str, Any]] = []
        self.tables: list[Table] = []
        self.notes: list[str] = []
        self.run: list[tuple[str, str]] = []
        self.sources: list[Source] = []
        self.model: str | None = None
        self.prompt: str | None = None
        self.labelled = 0  # files of many settings, as benchmarks/bench_methods.py writes them

    def add(self, file: Path) -> None:
        """Raises: ReportError for a file that cannot be read, or is of no kind that is known."""
        text, data = _json(file)
        rows = _rows(data, file)
        if isinstance(data.get("layers"), list):
            _merge(self.results, _from_record(data, file))
        elif rows and all("method" in row for row in rows):
            for number, row in enumerate(rows, 1):
                _merge(self.results, _from_row(row, f"row {number} of {file}"))
            self.bench += _bench_rows(data.get("bench") or [], file)
        elif rows and all("label" in row and "perplexity" in row for row in rows):
            self.labelled += 1
            for result in _labelled_rows(rows, data, file):
                _merge(self.results, result)
        elif rows and all("backend" in row and "median_us" in row for row in rows):
            self.bench += _bench_rows(rows, file)
        elif "perplexity" in data:
            _merge(self.results, _from_row(data, str(file)))
            if "dense_perplexity" in data:
                _merge(self.results, _dense_beside(data, str(file)))
        elif isinstance(data.get("tasks"), dict):
            self.tables.append(of_tasks(data, file))
        elif any(name in data for name in ORIGIN):
            self.tables += of_anything(data, file)
        else:
            raise ReportError(f"{file} is none of the kinds that a report shows: {KINDS}")
        self._note(data, file, names_model=bool(rows))
        self.sources.append(Source(str(file), text))

    def _note(self, data: dict[str, Any], file: Path, names_model: bool) -> None:
        """The facts about the whole run. names_model: this file's name of the model is the best."""
        if isinstance(data.get("model"), str) and (names_model or self.model is None):
            self.model = data["model"]
        if isinstance(data.get("prompt"), str) and names_model:
            # The answer of a chat begins a line of its own.
            self.prompt = data["prompt"] + ("\n\n" if data.get("chat") is True else "")
        noted = data["notes"] if isinstance(data.get("notes"), list) else []
        noted = [*noted, data.get("device"), data.get("machine")]
        self.notes += [note for note in noted if isinstance(note, str)]
        self.run += _run_facts(data, file)

    def report(self) -> Report:
        return Report(
            results=tuple(_labelled(list(self.results.values()))),
            bench=tuple(self.bench),
            model=self.model,
            notes=tuple(dict.fromkeys(self.notes)),
            tables=tuple(self.tables),
            prompt=self.prompt,
            run=tuple(dict.fromkeys(self.run)),
            sources=tuple(self.sources),
            compares_methods=self.labelled > 0,
        )


def _run_facts(data: dict[str, Any], file: Path) -> list[tuple[str, str]]:
    """When, how long and by which command a file was made, where it says so."""
    made = data["run"] if isinstance(data.get("run"), dict) else {}
    known = data | made
    arguments = known.get("arguments")
    if isinstance(arguments, list) and "command" not in known:
        command = shlex.join(map(str, arguments))
        known["command"] = f"python benchmarks/bench_linear.py {command}"
    facts = [
        (name, known[key])
        for key, name in (("date", "measured"), ("command", "command"), ("commit", "commit"))
        if isinstance(known.get(key), str)
    ]
    seconds = known.get("seconds")
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        compressed = "layers" in data and not made
        what = f"compression into {file.parent.name}" if compressed else "run"
        facts.append((f"{what} took", f"{seconds:,.0f} s"))
    return facts


def _files(path: Path) -> list[Path]:
    """The files to read for one path: itself, or what a run folder or a folder of runs holds."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ReportError(
            f"{path} does not exist: give a folder written by compress, or a JSON file of eval or "
            "bench"
        )
    files = [f for f in (path / RUN_RECORD, path / "results.json") if f.is_file()]
    files = files or sorted(path.glob(f"*/{RUN_RECORD}"))
    if not files:
        raise ReportError(
            f"{path} holds no {RUN_RECORD}, neither itself nor in its folders: give a folder "
            "written by compress"
        )
    return files


def _json(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file, and the object that it holds."""
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=lambda _: None)  # NaN: nothing was measured
        json.dumps(data, ensure_ascii=False).encode()  # no page can hold half a character
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ReportError(f"{file} holds a JSON {type(data).__name__}, not an object")
    return text, data


def _rows(data: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    rows = data.get("results") or data.get("rows") or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ReportError(f"{file} has rows that are no list of objects: {short(rows)}")
    return rows


def _typed(row: dict[str, Any], kinds: dict[str, type], where: str, needed: bool) -> dict[str, Any]:
    """The entries of `row` that `kinds` names, checked.

    Absent ones are left out, or refused where they are needed.
    """
    found = {}
    for name, kind in kinds.items():
        value = row.get(name)
        if value is None and not needed:
            continue
        if not _is(value, kind):
            raise ReportError(f"{where} has {name}={short(value)}, expected {NUMBERS[kind]}")
        found[name] = value
    return found


def _is(value: Any, kind: type) -> bool:
    """Whether a value from JSON is of a kind; numbers are finite."""
    if kind is str:
        return isinstance(value, str)
    numbers = (int, float) if kind is float else (int,)
    return isinstance(value, numbers) and not isinstance(value, bool) and abs(value) < LARGEST


def _bench_rows(rows: Any, file: Path) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ReportError(f"{file} has timing rows that are no list of objects: {short(rows)}")
    for number, row in enumerate(rows, 1):
        where = f"timing row {number} of {file}"
        optional = {"values": str, "cache": str, "rank": int, "adapter_rank": int}
        _typed(row, BENCH_ROW, where, needed=True)
        _typed(row, optional, where, needed=False)
        if "roofline" in row:
            _typed(row, {"roofline": float, "bound": str}, where, needed=True)
    return [{"values": None} | row for row in rows]


def _from_record(data: dict[str, Any], file: Path) -> Result:
    """The result of a run record, or of the JSON of `inspect`; both list layers."""
    settings = data["settings"] if isinstance(data.get("settings"), dict) else data
    layers, errors, weights, bits = data["layers"], {}, 0, 0.0
    for number, layer in enumerate(layers, 1):
        where = f"layer {number} of {file}"
        shape = layer.get("shape") if isinstance(layer, dict) else None
        if not isinstance(shape, list) or len(shape) != 2:
            raise ReportError(
                f"{where} is {short(layer)}, expected an object with a shape of two numbers"
            )
        _typed({"N": shape[0], "K": shape[1]}, {"N": int, "K": int}, where, needed=True)
        _typed(layer, {"name": str, "bits_per_weight": float}, where, needed=True)
        _typed(layer, {"error": float, "heldout_error": float}, where, needed=False)
        weights += shape[0] * shape[1]
        bits += shape[0] * shape[1] * layer["bits_per_weight"]
    parts = {layer["name"]: layer["parts"] for layer in layers if layer.get("parts")}
    heldout = bool(layers) and all(layer.get("heldout_error") is not None for layer in layers)
    name = "heldout_error" if heldout else "error"
    errors = {layer["name"]: layer[name] for layer in layers if layer.get(name) is not None}
    kinds = {"method": str, "pattern": str, "rank": int, "values": str}
    folder = _typed(data, {"folder": str}, str(file), needed=False).get("folder", file.parent)
    return Result(
        **({"method": "dense"} | _typed(settings, kinds, str(file), needed=False)),
        **_sizes(data, str(file)),
        bits_per_weight=bits / weights if weights else None,
        layer_error=sum(errors.values()) / len(errors) if errors else None,
        errors=errors,
        heldout=heldout,
        folder=str(Path(folder).resolve()),
        parts=_parts(parts, str(file)),
    )


def _from_row(row: dict[str, Any], where: str) -> Result:
    kinds = MODEL_ROW | DISTANCES | {"method": str}
    known = {"method": "dense"} | _typed(row, kinds, where, needed=False) | _sizes(row, where)
    if "folder" in known:
        known["folder"] = str(Path(known["folder"]).resolve())
    errors = row.get("errors") or {}
    if not isinstance(errors, dict):
        raise ReportError(f"{where} has errors={short(errors)}, expected an object of numbers")
    errors = _typed(errors, dict.fromkeys(errors, float), where, needed=True)
    return Result(
        **known,
        errors=errors,
        heldout=row.get("heldout") is True,
        parts=_parts(row.get("parts") or {}, where),
        crop=_crop(row.get("crop"), where),
        decoding=_decoding(row.get("decoding") or [], where),
    )


def _dense_beside(data: dict[str, Any], where: str) -> Result:
    """The dense model of `eval --against`."""
    kinds = {"dense_perplexity": float, "against": str}
    found = _typed(data, kinds, where, needed=False)
    folder = str(Path(found["against"]).resolve()) if "against" in found else None
    return Result("dense", perplexity=found.get("dense_perplexity"), folder=folder)


def _sizes(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What a whole folder stores, checked."""
    parts = row.get("dense_bytes") or {}
    if not isinstance(parts, dict):
        raise ReportError(f"{where} has dense_bytes={short(parts)}, expected an object of numbers")
    parts = _typed(parts, dict.fromkeys(parts, int), f"dense_bytes of {where}", needed=True)
    return _typed(row, SIZES, where, needed=False) | {"dense_bytes": parts}


def _decoding(steps: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Measurements of `evaluate.decoding`, checked."""
    if not isinstance(steps, list | tuple) or not all(
        isinstance(step, dict) and isinstance(step.get("split"), dict) for step in steps
    ):
        raise ReportError(f"{where} has decoding={short(steps)}, expected objects with a split")
    for number, step in enumerate(steps, 1):
        of = f"decoding {number} of {where}"
        _typed(step, STEP, of, needed=True)
        _typed(step["split"], dict.fromkeys(step["split"], float), of, needed=True)
    return tuple(steps)


def _parts(parts: Any, where: str) -> dict[str, dict[str, float]]:
    """The bits per weight of every part of every layer, checked."""
    if not isinstance(parts, dict) or not all(isinstance(bits, dict) for bits in parts.values()):
        raise ReportError(f"{where} has parts={short(parts)}, expected numbers by layer and part")
    return {
        layer: _typed(bits, dict.fromkeys(bits, float), f"layer {layer} of {where}", needed=True)
        for layer, bits in parts.items()
    }


def _crop(crop: Any, where: str) -> dict[str, Any] | None:
    """A corner of a weight as `evaluate.crop.weight_crop` returns it, checked."""
    if crop is None:
        return None
    try:
        rows, columns = crop["shape"]
        whole = (
            isinstance(crop["layer"], str)
            and 0 < float(crop["step"]) < math.inf
            and "weight" in crop["parts"]
            and all(
                0 < rows * columns == len(base64.b64decode(text, validate=True))
                for text in crop["parts"].values()
            )
        )
    except (TypeError, KeyError, ValueError, AttributeError, binascii.Error):
        whole = False
    if not whole:
        raise ReportError(f"{where} has crop={short(crop)}, which is no corner of a weight")
    return crop


def _labelled_rows(rows: list[dict[str, Any]], data: dict[str, Any], file: Path) -> list[Result]:
    """Results of benchmarks/bench_methods.py: rows with labels, and the dense perplexity."""
    kinds = {name: MODEL_ROW[name] for name in ("bits_per_weight", "perplexity", "layer_error")}
    kinds |= DISTANCES
    dense = _typed(data, {"dense": float}, str(file), needed=False)
    found = [Result("dense", perplexity=dense["dense"])] if dense else []
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {file}"
        label = _typed(row, {"label": str}, where, needed=True)["label"]
        settings = row["settings"] if isinstance(row.get("settings"), dict) else {}
        method = settings.get("method")
        measured = _typed(row, kinds, where, needed=False)
        name = method if isinstance(method, str) else label
        found.append(Result(name, **measured, **_sizes(row, where), label=label, heldout=True))
    return found


def _merge(found: dict[str, Result], new: Result) -> None:
    """A record and the evaluation of one folder are one row; what was measured stays."""
    key = new.folder or f"{new.method}/{new.pattern}/{new.rank}/{new.values}/{new.label}"
    old = found.get(key)
    if old is not None:
        kept = {
            name: getattr(old, name)
            for name in Result.__dataclass_fields__
            if getattr(new, name) in (None, {}, "", ())
        }
        if old.heldout and not new.heldout:
            # Held-out errors are the honest ones: calibration errors never replace them.
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
            value = getattr(result, name)  # None where the JSON of eval stands alone
            if value is not None and len({getattr(r, name) for r in same}) > 1:
                parts.append(f"{prefix}{value}")
        label = result.label or " ".join(parts)
        while label in seen:
            label += f" ({Path(result.folder).name})" if result.folder and "(" not in label else "'"
        seen.add(label)
        labelled.append(replace(result, label=label))
    return labelled
