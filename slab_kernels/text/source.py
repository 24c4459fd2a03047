"""Text read from files, a dataset, the standard library or memory, and cut into token windows."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from ..paths import expanded
from ..settings import SEED, WINDOW, enforce, setting
from ..terminal import first_line
from . import rows, stdlib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".text", ".md", ".raw", ".rst", ".jsonl", ".ndjson")
LONGEST_NAME = 1000  # characters; what is longer is a text, not the name of one
# Bounds how much of a large text is tokenised. English text has 3 to 5 characters per token.
CHARACTERS_PER_TOKEN = 16
# As many times the text that the samples need is read: they are drawn from more than its beginning.
READ_AHEAD = 8
TOKENIZER_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
MAX_TOKENIZER_FILE = 1 << 28  # bytes; a vocabulary of a million tokens takes a tenth


@dataclass(frozen=True)
class Sampling:
    """How windows are drawn from a text. Raises on construction: CalibrationError."""

    samples: int = setting(128, "windows of text", 1)
    window: int = setting(2048, **WINDOW)
    seed: int = setting(0, **SEED)

    def __post_init__(self):
        enforce(self, CalibrationError)


def read_text(
    source: str | Path | list | dict,
    max_characters: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The text that `source` names or holds.

    Args:
        source: one of
            "stdlib", "stdlib:heldout": sources of Python's standard library;
            a UTF-8 text file, or a file of rows (.jsonl, .ndjson or .json, see `rows`);
            a folder: all .txt .text .md .raw .rst .jsonl .ndjson files below it, in path order;
            a dataset "name[:config][:split]", read with the optional package `datasets` (split
            "train", column "text");
            a list of texts themselves (strings), files (Path) or rows (dict);
            a dict: one row.
            Parts are joined by an empty line.
        max_characters: stop reading there.
        tokenizer: writes out the chats in rows by its template.

    Raises: CalibrationError if nothing is found, a file is not UTF-8, a row has no text, or the
        text is empty.
    """
    if isinstance(source, str | Path):
        text, name = _named_text(source, max_characters, tokenizer), str(source)
    elif isinstance(source, Mapping | list | tuple):
        parts = [source] if isinstance(source, Mapping) else source
        texts = [_part(part, number, tokenizer) for number, part in enumerate(parts, 1)]
        text, name = "\n\n".join(texts), "given"
    else:
        raise CalibrationError(
            f"{reprlib.repr(source)} is neither text nor token ids: give a text file, a folder, a "
            "list of texts or of rows, or integer ids [samples, window]"
        )
    if not text.strip():
        raise CalibrationError(
            f"the text {name} is empty; give a text file with at least a few thousand words"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"the text {name} holds half a character (a lone surrogate) at {error.start}"
        ) from error
    return text[:max_characters]


def _part(part: Any, number: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of one entry of a list, the `number`-th from 1."""
    if isinstance(part, str):
        return part
    if isinstance(part, Path):
        return _read_file(expanded(part), None, tokenizer)
    return rows.row_text(part, tokenizer, f"entry {number} of the given list")


def _named_text(
    source: str | Path, max_characters: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The text of a name: of the standard library's, a file, a folder or a dataset."""
    name = str(source)
    if name in ("stdlib", "stdlib:heldout"):
        return _stdlib(heldout=name != "stdlib")
    if "\n" in name or len(name) > LONGEST_NAME:
        raise CalibrationError(
            f"{reprlib.repr(name)} is no name of a file or a folder; to give a text itself, put it "
            "in a list"
        )
    path = expanded(name)
    if path.is_file():
        return _read_file(path, max_characters, tokenizer)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"the folder {path} holds no text file ({' '.join(SUFFIXES)})")
        return "\n\n".join(_read_file(p, max_characters, tokenizer) for p in files)
    if name.startswith((".", "/", "~")) or path.suffix in (*SUFFIXES, ".json"):
        raise CalibrationError(
            f"the text {name} does not exist; give a text file, a folder of them, or 'stdlib'"
        )
    return _dataset(name, max_characters)


def _stdlib(heldout: bool) -> str:
    try:
        return stdlib.heldout_text() if heldout else stdlib.training_text()
    except OSError as error:
        raise CalibrationError(str(error)) from error


def _read_file(
    path: Path, max_characters: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    if path.suffix in rows.SUFFIXES:
        return rows.read_rows(path, tokenizer, max_characters)
    with rows.readable(path):
        return path.read_text(encoding="utf-8")


def _dataset(name: str, max_characters: int | None) -> str:
    """The column "text" of a dataset "name[:config][:split]". Raises: CalibrationError."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{name!r} is neither a file nor a folder, and reading it as a dataset name needs "
            "the optional package datasets (pip install datasets); a text file or 'stdlib' needs "
            "nothing"
        ) from error
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        found = load_dataset(path, config or None, split=split or "train", streaming=True)
        texts: list[str] = []
        length = 0
        for row in found:
            texts.append(row["text"])
            length += len(texts[-1])
            if max_characters is not None and length >= max_characters:
                break
    except KeyError as error:
        raise CalibrationError(
            f"dataset {name!r} has no column 'text'; save its text to a file and give that"
        ) from error
    except Exception as error:  # of many types: no network, unknown name, missing config
        reason = first_line(error)
        raise CalibrationError(f"cannot read dataset {name!r}: {reason}") from error
    return "\n\n".join(texts)


def open_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    trust_remote_code: run Python code that the folder brings along; nobody is asked.

    Raises: CheckpointError if there is none that works.
    """
    from transformers import AutoTokenizer

    for file in Path(path).glob("*"):
        read = file.suffix in TOKENIZER_FILES and file.is_file()
        if read and file.stat().st_size > MAX_TOKENIZER_FILE:
            raise CheckpointError(
                f"{file} is larger than {MAX_TOKENIZER_FILE >> 20} MiB, which no tokenizer's file "
                "is; copy or download it again"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it knows special tokens only")  # transformers made one up
        # Some settings fail only when a text is encoded and decoded.
        tokenizer.decode(tokenizer("a text", verbose=False)["input_ids"])
        return tokenizer
    except Exception as error:  # transformers raises many types for unusable files
        if "trust_remote_code=True" in str(error) and not trust_remote_code:
            reason = "it is a program in that folder, which runs only with trust_remote_code=True"
        else:
            reason = first_line(error)
        raise CheckpointError(
            f"no tokenizer can be loaded from {path} ({reason}); put its files there or give "
            "tokenizer="
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of `text` [tokens] int64, with no special tokens added.

    Raises: CalibrationError for what is no text.
    """
    if not isinstance(text, str):
        raise CalibrationError(
            f"{reprlib.repr(text)} is no text; `text.source.read_text` reads a file, a folder or a "
            "list of texts"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


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
