"""Results that take long to make, kept on disk under a hash of everything that they were made from.

Compiled and disassembled kernels are the same for every test process and for the next run, as long
as their sources, the compiler and its options are. Any of these in another form is another key, so
nothing is ever out of date.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "tests"
MOST = 1000  # results of a kind; those used longest ago go first


def kept(
    kind: str, inputs: Iterable[str | bytes], make: Callable[[], bytes], folder: Path = FOLDER
) -> bytes:
    """What `make` returned for these inputs, now or in an earlier run.

    Only one process at a time makes a result; the others wait for it. A file is complete or absent,
    and one that is damaged is made again.
    """
    digest = hashlib.sha256()
    for part in inputs:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    path = place / digest.hexdigest()[:32]
    found = _read(path)
    if found is not None:
        return found
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read(path)
        if found is None:
            found = make()
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(zlib.compress(found, 1))
            fresh.replace(path)
            _forget_the_oldest(place)
    return found


def _read(path: Path) -> bytes | None:
    try:
        data = zlib.decompress(path.read_bytes())
        os.utime(path)
    except (OSError, zlib.error):
        return None
    return data


def _used(path: Path) -> float:
    """When it was last asked for; 0 if another process has removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _forget_the_oldest(place: Path) -> None:
    """Removes what is over MOST, with its lock."""
    results = [path for path in place.iterdir() if not path.suffix]
    for path in sorted(results, key=_used, reverse=True)[MOST:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
