"""The texts of a run: the one that layers are fitted to, and the ones on which they are judged.

An eighth of the calibration text's windows is held back: no weight is fitted to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..models.folder import hub_folder
from ..models.hub import HubArguments
from ..models.source import Source
from ..text.source import Text, read_windows
from ..text.tokenizer import open_tokenizer
from ..text.windows import Sampling, Windows

HELD_BACK = 8  # Of so many windows of the calibration text one judges, and is never fitted to.


@dataclass(frozen=True)
class Tokens:
    """Windows of the calibration text, and of the held-out one if any.

    read: what a record says of both, by their names.
    """

    calibration: Windows
    heldout: Windows | None
    read: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @property
    def fitted(self) -> Windows:
        """The windows of the calibration text that layers are fitted to."""
        judging = self._judging()
        every = range(len(self.calibration))
        return self.calibration.chosen(number for number in every if number not in judging)

    @property
    def held_back(self) -> Windows | None:
        """The windows of the calibration text that judge; None where it has a single window.

        They are every eighth, and the last one of fewer than eight.
        """
        judging = self._judging()
        return self.calibration.chosen(judging) if judging else None

    @property
    def windows_held_back(self) -> int:
        return len(self._judging())

    def _judging(self) -> range:
        """The numbers of the windows that are held back."""
        samples = len(self.calibration)
        if 1 < samples < HELD_BACK:
            return range(samples - 1, samples)
        return range(HELD_BACK - 1, samples, HELD_BACK)

    def digests(self) -> dict[str, str | None]:
        """The hashes by which a run that goes on knows its texts again."""
        return {
            "calibration_sha256": self.calibration.digest(),
            "heldout_sha256": None if self.heldout is None else self.heldout.digest(),
        }

    def names(self) -> dict[str, str | None]:
        """How a record calls the texts: as they were named, else by what they are."""
        return {
            name: None if read is None else read["file"] or read["kind"]
            for name, read in self.read.items()
        }


@dataclass(frozen=True)
class Calibration:
    """The texts of `compress` as they were given, and how windows are drawn from them.

    field: of rows, the one to read; of the held-out text too, where that has rows.
    """

    calibration: Text
    heldout: Text | None
    sampling: Sampling
    field: str | None = None

    def tokens(self, source: Source, tokenizer: Any) -> Tokens:
        """Windows of both texts, cut to the model's positions.

        tokenizer: None for the one in the model's folder, which is opened only for a text.

        Raises: CalibrationError, MissingPackageError, or CheckpointError for a tokenizer that
            cannot be used.
        """

        def own() -> Any:
            return source.tokenizer() if tokenizer is None else tokenizer

        windows, read = read_windows(self.calibration, source.model, own, self.sampling, self.field)
        if self.heldout is None:
            facts = {"calibration": read.facts(windows), "heldout": None}
            return Tokens(windows, None, facts)
        fewer = replace(self.sampling, samples=max(1, self.sampling.samples // 4))
        judging, heard = read_windows(
            self.heldout, source.model, own, fewer, self.field, "held-out", must=False
        )
        facts = {"calibration": read.facts(windows), "heldout": heard.facts(judging)}
        return Tokens(windows, judging, facts)


def usable_tokenizer(tokenizer: Any, hub: HubArguments) -> Any:
    """The tokenizer that was given, opened if it is a folder or a name; None if none was.

    hub: how the model is found, of which revision and subfolder are its own.

    Raises: ArgumentError for what is no tokenizer, CheckpointError for a folder without one.
    """
    if isinstance(tokenizer, str | Path):
        folder = hub_folder(tokenizer, HubArguments(token=hub.token))
        return open_tokenizer(folder, hub.trust_remote_code)
    if not (tokenizer is None or callable(tokenizer)):
        raise ArgumentError(f"tokenizer={tokenizer!r} must be one of transformers, or its folder")
    return tokenizer
