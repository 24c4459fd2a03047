"""The user's file of rows for a device, as `slab-kernels tune` reads and writes it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..backends.triton import configs, row_files
from ..backends.triton.rows import Row, TileConfig, TritonDevice
from ..errors import ConfigError
from . import machine
from .tune_problems import Problem


def present(path: Path) -> list[Row]:
    """The rows of the file, none if there is no file.

    Raises: ConfigError if it is not usable.
    """
    return row_files.read(path) if os.path.lexists(path) else []


def check_writable(path: Path) -> None:
    """Whatever would make `save` fail after hours of timing fails here; the folder is made.

    Raises: ConfigError.
    """
    if str(path).startswith("~"):
        raise ConfigError(f"there is no home folder for {path}; give a folder with --out")
    present(path)
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {path.parent}: {error.strerror}; choose another folder with --out"
        ) from error


def merged(rows: Iterable[Row], problem: Problem, row: Row | None) -> list[Row]:
    """The rows with `row` in place of any for the same problem; the others keep their order.

    row: None takes such a row out. Since the first row that fits is taken, a row goes before the
    first that is for more: for any N and K, for higher ranks, or for more tokens.
    """
    own = _purpose(problem.row(TileConfig()))
    kept = [other for other in rows if _purpose(other) != own]
    if row is None:
        return kept
    reach = _reach(row)
    at = next((i for i, other in enumerate(kept) if _reach(other) >= reach), len(kept))
    return [*kept[:at], row, *kept[at:]]


def _purpose(row: Row) -> Row:
    """The row without what does not say which problem it is for."""
    return replace(row, config=TileConfig(), shared=0, capability=0)


def _reach(row: Row) -> tuple[bool, bool, float, float, int]:
    """It is larger for a row that is for more problems."""
    rank = math.inf if row.rank is None else row.rank
    return row.N is None, row.K is None, rank, row.tokens or math.inf, -row.above


def save(path: Path, rows: Iterable[Row], device: TritonDevice) -> None:
    """Writes a file of rows in one step.

    After an interruption or on a full disk the old file is there, whole.

    Raises: ConfigError if the file cannot be written.
    """
    named = machine.versions()
    versions = {name: named[name] for name in ("slab_kernels", "torch", "triton")}
    head = {"format": row_files.FORMAT, "device": device.name, "versions": versions}
    lines = ",\n".join("  " + json.dumps(row_files.row_to(row)) for row in rows)
    text = f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n'
    target = Path(os.path.realpath(path))  # so that a link stays one
    fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "w", encoding="utf-8", opener=_private) as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(fresh, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"cannot write {path}: {error.strerror or error}; rows written before are still "
                "there; make room or choose another folder with --out"
            ) from error
        raise
    configs.forget()


def _private(name: str, flags: int) -> int:
    """Opens a file that only this user may read and write."""
    return os.open(name, flags, 0o600)
