"""A part's result file: what machine it was, then its rows, whole after every row.

A part that is run again goes on behind the rows that the file has of the same device and commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "results"


class Rows:
    """The rows of a part, each with a name of its own ("case").

    earlier: folders where a file of that name may lie from an earlier call.
    """

    def __init__(self, path: Path, head: dict[str, Any], earlier: tuple[Path, ...] = ()):
        self.path, self.head = path, head
        self.rows: list[Row] = []
        self.more: dict[str, Any] = {}  # verdicts, and whatever else the file says besides its rows
        for file in (path, *(folder / path.name for folder in earlier)):
            found = _read(file)
            if all(found.get(key) == head[key] for key in ("device", "commit")):
                self.rows = found["rows"]
                known = {"rows", *head}
                self.more = {key: value for key, value in found.items() if key not in known}
                break

    def forget(self, beginning: str = "") -> None:
        """Drops the rows whose case begins so, and if that is every row, whatever else is said."""
        self.rows = [row for row in self.rows if not row["case"].startswith(beginning)]
        if not beginning:
            self.more = {}

    def has(self, case: str) -> bool:
        return any(row["case"] == case for row in self.rows)

    def add(self, *rows: Row) -> None:
        """Adds rows in place of those of the same case."""
        new = {row["case"] for row in rows}
        self.rows = [row for row in self.rows if row["case"] not in new] + list(rows)
        self.save()

    def save(self, **more: Any) -> None:
        """Writes the file. more: what it shall say besides its rows."""
        self.more |= more
        lines = ",\n".join("  " + json.dumps(row) for row in self.rows)
        said = json.dumps(self.head | self.more, indent=1)[:-2]
        fresh = self.path.with_name(self.path.name + ".tmp")
        fresh.write_text(f'{said},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        os.replace(fresh, self.path)


def _read(path: Path) -> dict[str, Any]:
    """A result file; empty if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) else {}
