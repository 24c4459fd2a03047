"""A fault: where it is planted, and the tests that must see it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """A text of one source file and what stands there instead while the tests run.

    `files` is a pattern below the repository, so that a text may move between the files of a
    folder; it must stand in them exactly once. `tests` are pytest's arguments.
    """

    name: str
    files: str
    old: str
    new: str
    tests: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def place(self, root: Path = ROOT) -> tuple[Path, int, int]:
        """The file, and where the text begins and ends in it.

        Raises: LookupError if it does not stand there exactly once.
        """
        found = []
        for path in sorted(root.glob(self.files)):
            text = path.read_text(encoding="utf-8")
            at = text.find(self.old)
            while at >= 0:
                found.append((path, at, at + len(self.old)))
                at = text.find(self.old, at + 1)
        if len(found) != 1:
            raise LookupError(
                f"{self.name}: {self.old!r} stands {len(found)} times in {self.files}"
            )
        return found[0]
