"""Calibration and evaluation text: a file, a folder, a dataset by name, or the standard library's own sources."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .calibration import CalibrationError

SUFFIXES = (".txt", ".text", ".md", ".raw", ".rst")
CHARACTERS_PER_TOKEN = 16  # generous: English text has 3 to 5; bounds how much of a large text is tokenised
READ_AHEAD = 8  # times the text that the samples need, so that they are drawn from more than its beginning


def read_text(source: str | Path, max_characters: int | None = None) -> str:
    """The text that `source` names.

    Args:
        source: "stdlib" or "stdlib:heldout" (sources of Python's standard library), a UTF-8 text file, a folder (all
            .txt .text .md .raw .rst files below it, in path order, joined by an empty line), or a dataset
            "name[:config][:split]" read with the optional package `datasets` (split "train", column "text").
        max_characters: stop reading there.

    Raises: CalibrationError if nothing is found, a file is not UTF-8, or the text is empty.
    """
    name = str(source)
    if name in ("stdlib", "stdlib:heldout"):
        text = _stdlib(heldout=name != "stdlib")
    elif (path := Path(name).expanduser()).is_file():
        text = _read_file(path)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"the folder {path} holds no text file ({' '.join(SUFFIXES)})")
        text = "\n\n".join(_read_file(p) for p in files)
    elif name.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise CalibrationError(
            f"the text {name} does not exist; give a text file, a folder of them, or 'stdlib'"
        )
    else:
        text = _dataset(name, max_characters)
    if not text.strip():
        raise CalibrationError(
            f"the text {name} is empty; give a text file with at least a few thousand words"
        )
    return text[:max_characters]


def _stdlib(heldout: bool) -> str:
    from . import stdlib_text

    try:
        return stdlib_text.heldout_text() if heldout else stdlib_text.training_text()
    except OSError as error:
        raise CalibrationError(str(error)) from error


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror or error}") from error


def _dataset(name: str, max_characters: int | None) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{name!r} is neither a file nor a folder, and reading it as a dataset name needs the optional package "
            "datasets (pip install datasets); a text file or 'stdlib' needs nothing"
        ) from error
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=True)
        texts, length = [], 0
        for row in rows:
            texts.append(row["text"])
            length += len(texts[-1])
            if max_characters is not None and length >= max_characters:
                break
    except KeyError as error:
        raise CalibrationError(
            f"dataset {name!r} has no column 'text'; save its text to a file and give that"
        ) from error
    except Exception as error:  # the package raises many types: no network, unknown name, missing config
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CalibrationError(f"cannot read dataset {name!r}: {reason}") from error
    return "\n\n".join(texts)


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids of `text` [tokens] int64, with no special tokens added."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def windows(tokens: Tensor, window: int, bos: int | None) -> list[Tensor]:
    """`tokens` cut, without overlap, into windows of at most `window` ids; each starts with `bos` where there is one.

    The last may be shorter. Every token lies in exactly one window.
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
    tokenizer, text: str, samples: int, window: int, seed: int = 0, name: str = "calibration"
) -> Tensor:
    """`samples` whole windows [samples, window] int64, drawn without replacement by `seed`; fewer if the text has fewer.

    At most 8 times the text that the samples need is tokenised.

    Raises: CalibrationError if the text does not fill one window.
    """
    if samples < 1 or window < 2:
        raise CalibrationError(
            f"samples={samples} and window={window}: at least 1 sample and 2 tokens a window are needed"
        )
    tokens = tokenize(tokenizer, text[: READ_AHEAD * samples * window * CHARACTERS_PER_TOKEN])
    whole = (
        [w for w in windows(tokens, window, tokenizer.bos_token_id) if len(w) == window]
        if len(tokens)
        else []
    )
    if not whole:
        raise CalibrationError(
            f"the {name} text has {len(tokens)} tokens, fewer than one window of {window}; give a longer text or a smaller window"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return torch.stack([whole[i] for i in order[:samples].tolist()])
