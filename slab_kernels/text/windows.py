"""Windows of token ids, of one length or of several, and how they are cut from a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..settings import SEED, WINDOW, enforce, setting
from .tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Bounds how much of a large text is tokenised. English text has 3 to 5 characters per token.
CHARACTERS_PER_TOKEN = 16
# As many times the text that the samples need is read: they are drawn from more than its beginning.
READ_AHEAD = 8


@dataclass(frozen=True)
class Sampling:
    """How windows are drawn from a text. Raises on construction: CalibrationError."""

    samples: int = setting(128, "windows of text", 1)
    window: int = setting(2048, **WINDOW)
    seed: int = setting(0, **SEED)

    def __post_init__(self):
        enforce(self, CalibrationError)


@dataclass(frozen=True)
class Windows:
    """Windows of a text that a model reads one by one, without any padding.

    rows: the token ids of each window, [tokens] int64 on the CPU. Lengths may differ.
    """

    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, tokens: Tensor | Windows) -> Windows:
        """Windows of one length from ids [samples, window] int64; windows as they are."""
        return tokens if isinstance(tokens, Windows) else cls(tokens.unbind())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """The tokens of all windows."""
        return sum(map(len, self.rows))

    @property
    def longest(self) -> int:
        """The tokens of the longest window."""
        return max(map(len, self.rows))

    @property
    def shortest(self) -> int:
        """The tokens of the shortest window."""
        return min(map(len, self.rows))

    def chosen(self, numbers: Iterable[int]) -> Windows:
        """The windows of these numbers, in their order; one may be there several times."""
        return Windows(tuple(self.rows[number] for number in numbers))

    def batches(self, tokens: int) -> list[Tensor]:
        """Ids [windows, length] int64 of at most `tokens` tokens, or of one window that has more.

        Only windows of one length stand together, so that none is padded: what the model computes
        for a token does not depend on what else is in its batch, whatever the model does with
        padding. Lengths come in the order in which they first occur.
        """
        by_length: dict[int, list[Tensor]] = {}
        for row in self.rows:
            by_length.setdefault(len(row), []).append(row)
        return [
            batch
            for length, rows in by_length.items()
            for batch in torch.stack(rows).split(max(1, tokens // length))
        ]

    def digest(self) -> str:
        """SHA-256, hexadecimal, of the ids and of where windows begin."""
        lengths = tuple(map(len, self.rows))
        same = len(set(lengths)) == 1
        sha = hashlib.sha256(str((len(self), self.longest) if same else lengths).encode())
        for row in self.rows:
            sha.update(row.contiguous().numpy().tobytes())
        return sha.hexdigest()


def windows(tokens: Tensor, window: int, bos: int | None) -> list[Tensor]:
    """`tokens` cut, without overlap, into windows of at most `window` ids.

    Each starts with the id `bos`, where that is not None. The last may be shorter. Every token lies
    in exactly one window.

    Raises: CalibrationError for a window too short to hold a token.
    """
    step = window if bos is None else window - 1
    if step < 1:
        raise CalibrationError(f"window={window} is too short; use at least 2")
    pieces = tokens.split(step)
    if bos is None:
        return list(pieces)
    start = torch.tensor([bos], dtype=tokens.dtype)
    return [torch.cat((start, piece)) for piece in pieces]


def sample_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    samples: int,
    window: int,
    seed: int = 0,
    name: str = "calibration",
) -> Tensor:
    """Whole windows [samples, window] int64 of `text`, drawn without replacement by `seed`.

    There are fewer if the text has fewer. At most READ_AHEAD times the text that the samples need
    is tokenised. name: of the text, for messages.

    Raises: CalibrationError if the text does not fill one window, or for numbers that `Sampling`
        refuses.
    """
    Sampling(samples, window, seed)
    tokens = tokenize(tokenizer, text[: READ_AHEAD * samples * window * CHARACTERS_PER_TOKEN])
    pieces = windows(tokens, window, tokenizer.bos_token_id) if len(tokens) else []
    whole = [piece for piece in pieces if len(piece) == window]
    if not whole:
        raise CalibrationError(
            f"the {name} text has {len(tokens)} tokens, fewer than one window of {window}; give a "
            "longer text or a smaller window"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return torch.stack([whole[i] for i in order[:samples].tolist()])
