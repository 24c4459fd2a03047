"""Files of rows: JSON, one object per line or one list, and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, MissingPackageError
from ..terminal import first_line

PARQUET = ".parquet"
SUFFIXES = (".jsonl", ".ndjson", ".json", PARQUET)
ROWS_AT_ONCE = 256  # of a Parquet file that are turned into Python objects together


def rows_of(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every row of a file and its place, for messages: "line 3 of chats.jsonl".

    fields: those that may be asked for; of a Parquet file no others are read.

    Raises: CalibrationError, MissingPackageError for a Parquet file without pyarrow.
    """
    with readable(path):
        if path.suffix == PARQUET:
            yield from _parquet(path, fields)
        else:
            yield from _json(path)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".json" and (whole := _whole(path)) is not None:
        for number, row in enumerate(whole, 1):
            yield f"row {number} of {path}", row
        return
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"line {number} of {path}"
                yield where, _row(line, where)


def _parquet(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path} needs the optional package pyarrow (pip install pyarrow); a .jsonl "
            "file needs nothing"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Without any of them the first row is read as it is, and the message names its fields.
            wanted = [name for name in fields if name in names] or None
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {path}", row
    except (CalibrationError, OSError):
        raise
    except Exception as error:  # pyarrow has many types for files that it cannot read
        raise CalibrationError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around the reading of a text. Raises: CalibrationError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror or error}") from error


def _whole(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list or object, None if it is none.

    Then it may hold one row per line all the same, and is refused by its first line if not.
    """
    content = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, list) else [whole]


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is no JSON: {error}") from error
