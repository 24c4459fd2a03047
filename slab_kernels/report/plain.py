"""Measurements of which a report knows nothing but their names and numbers, as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .results import Table


def of_tasks(data: dict[str, Any], file: Path) -> Table:
    """The JSON of `eval --tasks`."""
    rows = [
        (str(task), str(metric), _cell(value))
        for task, metrics in data["tasks"].items()
        for metric, value in (metrics.items() if isinstance(metrics, dict) else [("", metrics)])
    ]
    title = f"Tasks of {data.get('folder') or file.name}"
    return Table(title, ("task", "metric", "value"), tuple(rows))


def of_anything(data: dict[str, Any], file: Path) -> list[Table]:
    """Every list of objects or of lists as a table, everything else as names and values."""
    tables, facts = [], []
    for name, value in data.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            flat = [_flat(row) for row in value]
            columns = tuple(dict.fromkeys(column for row in flat for column in row))
            rows = tuple(tuple(_cell(row.get(column)) for column in columns) for row in flat)
            tables.append(Table(f"{file.stem}: {name}", columns, rows))
        elif isinstance(value, list) and value and all(isinstance(row, list) for row in value):
            width = max(map(len, value))
            rows = tuple(tuple(map(_cell, row + [None] * (width - len(row)))) for row in value)
            columns = tuple(str(i + 1) for i in range(width))
            tables.append(Table(f"{file.stem}: {name}", columns, rows))
        else:
            facts += [(key, _cell(entry)) for key, entry in _flat({name: value}).items()]
    return [Table(f"{file.stem}", ("name", "value"), tuple(facts)), *tables] if facts else tables


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Objects inside an object become entries of their own: {"a": {"b": 1}} -> {"a b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> str:
    """A value from JSON as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
