"""The texts of a run: the one that layers are fitted to, and the ones on which they are judged.

An eighth of the calibration text's windows is held back: no weight is fitted to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.folder import hub_folder
from ..models.source import Source
from ..text.source import (
    CHARACTERS_PER_TOKEN,
    READ_AHEAD,
    Sampling,
    open_tokenizer,
    read_text,
    sample_windows,
)
from ..text.token_ids import check_fits, text_config, token_ids

Text = str | Path | Tensor | list | dict  # a text or token ids, as `compress` takes them
HELD_BACK = 8  # Of so many windows of the calibration text one judges, and is never fitted to.


@dataclass(frozen=True)
class Tokens:
    """Token ids [samples, window] int64 of the calibration text, and of the held-out one if any."""

    calibration: Tensor
    heldout: Tensor | None

    @property
    def fitted(self) -> Tensor:
        """The windows of the calibration text that layers are fitted to."""
        return self.calibration[~self._judging()]

    @property
    def held_back(self) -> Tensor | None:
        """The windows of the calibration text that judge; None where it has a single window.

        They are every eighth, and the last one of fewer than eight.
        """
        judging = self._judging()
        return self.calibration[judging] if bool(judging.any()) else None

    @property
    def windows_held_back(self) -> int:
        return int(self._judging().sum())

    def _judging(self) -> Tensor:
        """[samples] bool: the windows that are held back."""
        samples = len(self.calibration)
        judging = torch.arange(samples) % HELD_BACK == HELD_BACK - 1
        if 1 < samples < HELD_BACK:
            judging[-1] = True
        return judging

    def digests(self) -> dict[str, str | None]:
        """The hashes by which a run that goes on knows its texts again."""
        return {
            "calibration_sha256": _digest(self.calibration),
            "heldout_sha256": None if self.heldout is None else _digest(self.heldout),
        }


@dataclass(frozen=True)
class Calibration:
    """The texts of `compress` as they were given, and how windows are drawn from them."""

    calibration: Text
    heldout: Text | None
    sampling: Sampling

    def names(self) -> dict[str, str | None]:
        """How a record calls the texts."""
        return {"calibration": _name(self.calibration), "heldout": _name(self.heldout)}

    def tokens(self, source: Source, tokenizer: Any) -> Tokens:
        """Windows of both texts, cut to the model's positions.

        tokenizer: None for the one in the model's folder, which is opened only for a text.

        Raises: CalibrationError, or CheckpointError for a tokenizer that cannot be used.
        """
        limit = getattr(text_config(source.model), "max_position_embeddings", None)
        window = min(self.sampling.window, limit or self.sampling.window)

        def windows(name: str, text: Text, count: int) -> Tensor:
            nonlocal tokenizer
            ids, used = token_ids(text, name), None
            if ids is None:
                tokenizer = source.tokenizer() if tokenizer is None else tokenizer
                used = tokenizer
                characters = READ_AHEAD * count * window * CHARACTERS_PER_TOKEN
                content = read_text(text, characters, tokenizer)  # type: ignore[arg-type]  # no ids
                ids = sample_windows(tokenizer, content, count, window, self.sampling.seed, name)
            check_fits(ids, source.model, name, used)
            return ids

        samples = self.sampling.samples
        calibration = windows("calibration", self.calibration, samples)
        if self.heldout is None:
            return Tokens(calibration, None)
        return Tokens(calibration, windows("held-out", self.heldout, max(1, samples // 4)))


def usable_tokenizer(tokenizer: Any, trust_remote_code: bool) -> Any:
    """The tokenizer that was given, opened if it is a folder; None if none was.

    Raises: ArgumentError for what is no tokenizer, CheckpointError for a folder without one.
    """
    if isinstance(tokenizer, str | Path):
        return open_tokenizer(hub_folder(tokenizer), trust_remote_code)
    if not (tokenizer is None or callable(tokenizer)):
        raise ArgumentError(f"tokenizer={tokenizer!r} must be one of transformers, or its folder")
    return tokenizer


def _digest(tokens: Tensor) -> str:
    content = tokens.contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + content).hexdigest()


def _name(text: Text | None) -> str | None:
    """The name that was given for a text, or what kind of thing was given."""
    if text is None or isinstance(text, str | Path):
        return None if text is None else str(text)
    return "texts" if token_ids(text) is None else "token ids"
