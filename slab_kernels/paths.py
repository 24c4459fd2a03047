"""Paths as people type them: `~` is the home folder wherever something is read or written."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ArgumentError


def expanded(path: str | os.PathLike) -> Path:
    """`path` with a leading ~ or ~user as that home folder.

    Raises: ArgumentError where there is no such home folder, and for an empty path or no path at
    all.
    """
    if path == "":
        raise ArgumentError("a path is empty; give the name of a file or a folder")
    try:
        return Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"{str(path)!r} cannot be used as a path: {error}") from error
