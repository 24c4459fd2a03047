"""The reader of every text: what people have at hand comes in, and text or token ids come out.

A file, a folder, a dataset or the standard library by name; texts, chats, rows, token ids, batches
with masks or a dataset in memory. All of it becomes parts (`rows.Part`), and the parts become one
text or windows of token ids, with a note of what was read.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import CalibrationError, SlabError
from ..paths import expanded
from ..terminal import first_line
from . import stdlib
from .row_files import SUFFIXES as ROW_SUFFIXES
from .row_files import readable, rows_of
from .rows import TEXTS, Part, RowReader, is_chat
from .token_ids import check_windows, holds_ids, text_config
from .windows import CHARACTERS_PER_TOKEN, READ_AHEAD, Sampling, Windows, sample_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUFFIXES = (".txt", ".text", ".md", ".raw", ".rst", ".jsonl", ".ndjson", ".parquet")
LONGEST_NAME = 1000  # characters; what is longer is a text, not the name of one
BETWEEN = "\n\n"  # two parts of a text
# What can be read: a name, a path, token ids, or anything that gives texts, rows or batches.
Text = str | Path | Tensor | Iterable


@dataclass(frozen=True)
class Read:
    """What was read.

    content: the text, its parts joined by an empty line, or windows of token ids.
    kind: "texts", "chats", "prompts" or "token ids", or several of them joined by "and".
    name: of the file, folder or dataset; None for what was in memory.
    field: of the rows; None where there were none.
    rows: how many documents, chats or windows of ids were read.
    """

    content: str | Windows
    kind: str
    name: str | None
    field: str | None
    rows: int

    def facts(self, windows: Windows) -> dict[str, Any]:
        """What a record says of a text of which these windows were taken."""
        return {
            "kind": self.kind,
            "file": self.name,
            "field": self.field,
            "rows": self.rows,
            "windows": len(windows),
            "tokens": windows.tokens,
            "sha256": windows.digest(),
        }


def read(
    source: Text,
    reader: RowReader,
    max_characters: int | None = None,
    samples: int | None = None,
) -> Read:
    """The text or the token ids that `source` names or holds.

    Args:
        source: one of
            "stdlib", "stdlib:heldout": sources of Python's standard library;
            a UTF-8 text file, or a file of rows (.jsonl, .ndjson, .json or .parquet, see `rows`);
            a folder: all files below it with one of SUFFIXES, in path order;
            a dataset "name[:config][:split]", read with the optional package `datasets` (split
            "train");
            token ids: an integer tensor or array [samples, window], lists of rows of ids, or a
            batch {"input_ids", "attention_mask"} whose padding is left out (see `token_ids`);
            a row (dict), or a chat ([{"role", "content"}, ...]);
            a list of texts themselves (strings), files (Path), rows, chats or batches, or whatever
            else gives those one by one, as a `datasets.Dataset` and a DataLoader do.
        reader: takes from rows the field that is asked for.
        max_characters: of a text, stop reading there.
        samples: of token ids that come row by row or batch by batch, from a file or an iterable,
            stop reading at so many. A tensor, an array or a list is taken whole.

    Raises: CalibrationError if nothing is found, a file is not UTF-8, a row lacks the field or has
        no text, texts and token ids are mixed, or there is nothing in it; MissingPackageError where
        a package is missing to read a file.
    """
    named = isinstance(source, str | Path)
    whole = holds_ids(source) or isinstance(source, Mapping | list | tuple)
    parts, length = [], 0
    for part in _named(source, reader) if named else _held(source, reader):  # type: ignore[arg-type]
        parts.append(part)
        if isinstance(part.content, Windows) != isinstance(parts[0].content, Windows):
            raise CalibrationError(
                f"the {reader.name} text holds both texts and token ids; give one of the two"
            )
        if isinstance(part.content, Windows):
            length += len(part.content)
            enough = samples is not None and length >= samples and not whole
        else:
            length += len(part.content) + (len(BETWEEN) if length else 0)
            enough = max_characters is not None and length >= max_characters
        if enough:
            break
    what = str(source) if named else f"{reader.name}={reprlib.repr(source)}"
    if not parts:
        raise CalibrationError(f"{what} is empty; give at least one text, row or batch")
    fields = dict.fromkeys(part.field for part in parts if part.field)
    if reader.field is not None and reader.must and not fields:
        raise CalibrationError(
            f"field={reader.field!r} says which field of rows to read, and {what} has no rows; "
            "leave it out"
        )
    content = _joined(parts, what, max_characters, None if whole else samples)
    return Read(
        content,
        " and ".join(dict.fromkeys(part.kind for part in parts)),
        str(source) if named else None,
        ", ".join(fields) or None,
        len(content) if isinstance(content, Windows) else len(parts),
    )


def _joined(
    parts: list[Part], what: str, max_characters: int | None, samples: int | None
) -> str | Windows:
    """Parts of one kind as one. Raises: CalibrationError for a text that is none."""
    windows = [part.content for part in parts if isinstance(part.content, Windows)]
    if windows:
        return Windows(tuple(row for part in windows for row in part.rows)[:samples])
    text = BETWEEN.join(str(part.content) for part in parts)
    if not text.strip():
        raise CalibrationError(
            f"the text {what} is empty; give a text file with at least a few thousand words"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"the text {what} holds half a character (a lone surrogate) at {error.start}"
        ) from error
    return text[:max_characters]


def read_text(
    source: Text,
    max_characters: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    field: str | None = None,
) -> str:
    """The text that `source` names or holds, see `read`.

    tokenizer: writes out chats by its template. field: of rows, the one to read.

    Raises: as `read`, and CalibrationError for token ids.
    """
    reader = RowReader(field, None if tokenizer is None else lambda: tokenizer)
    found = read(source, reader, max_characters, samples=1)
    if isinstance(found.content, Windows):
        raise CalibrationError(
            f"{reprlib.repr(source)} holds token ids, and a text is needed here; give the text "
            "that they were made of"
        )
    return found.content


def read_windows(
    source: Text,
    model: PreTrainedModel,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    sampling: Sampling,
    field: str | None = None,
    name: str = "calibration",
    must: bool = True,
) -> tuple[Windows, Read]:
    """Windows of a text as a model can read them, and what was read.

    Token ids are taken as they are. Of a text windows are drawn as `sampling` says, cut to the
    model's positions. tokenizer: gives the one to use; it is called only where there is text.
    field, name, must: see `RowReader`.

    Raises: as `read`; CalibrationError or CheckpointError for ids that the model does not have.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    window = min(sampling.window, limit or sampling.window)
    characters = READ_AHEAD * sampling.samples * window * CHARACTERS_PER_TOKEN
    tokenizer = functools.cache(tokenizer)
    found = read(source, RowReader(field, tokenizer, name, must), characters, sampling.samples)
    if isinstance(found.content, Windows):
        check_windows(found.content, model, name)
        return found.content, found
    used = tokenizer()
    ids = sample_windows(used, found.content, sampling.samples, window, sampling.seed, name)
    windows = Windows.of(ids)
    check_windows(windows, model, name, used)
    return windows, found


def _held(source: Any, reader: RowReader) -> Iterator[Part]:
    """The parts of what is in memory. Raises: CalibrationError."""
    _refuse_tables(source, reader.name)
    first = source[0] if isinstance(source, list | tuple) and source else source
    if holds_ids(source) and not (reader.field is not None and isinstance(first, Mapping)):
        yield reader.ids(source, "")
    elif isinstance(source, Mapping):
        yield reader.part(source, "the given row")
    elif is_chat(source):
        yield reader.chat(source, "the given list")
    else:
        kind = "list" if isinstance(source, list | tuple) else type(source).__name__
        for number, entry in enumerate(_entries(source), 1):
            yield from _entry(entry, f"entry {number} of the given {kind}", reader)


def _refuse_tables(source: Any, name: str) -> None:
    """Raises: CalibrationError for what holds rows and does not give them, with how it does."""
    if hasattr(source, "columns") and hasattr(source, "to_dict"):
        raise CalibrationError(
            f"{name}= is a {type(source).__name__}; give its rows, as in {name}="
            "frame.to_dict('records')"
        )
    splits = isinstance(source, Mapping) and bool(source)
    if splits and all(hasattr(split, "column_names") for split in source.values()):
        raise CalibrationError(
            f"{name}= holds the splits {', '.join(map(str, source))}; give one of them, as in "
            f"{name}=data[{next(iter(source))!r}]"
        )


def _entries(source: Any) -> Iterator[Any]:
    """What a list, an iterable or a sequence gives. Raises: CalibrationError for other things."""
    ordered = not isinstance(source, bytes | bytearray | set | frozenset)
    if ordered and hasattr(source, "__iter__"):
        yield from source
    elif ordered and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        # A dataset of torch need not end when it is asked for more than it has.
        yield from (source[number] for number in range(len(source)))
    else:
        raise CalibrationError(
            f"{reprlib.repr(source)} is neither text nor token ids: give a text file, a folder, a "
            "list of texts, of chats or of rows, integer ids [samples, window], or batches with "
            "input_ids and attention_mask"
        )


def _entry(entry: Any, where: str, reader: RowReader) -> Iterator[Part]:
    """The parts of one entry of a list. Raises: CalibrationError."""
    if isinstance(entry, str):
        yield Part(TEXTS, entry)
    elif isinstance(entry, Path):
        yield from _file(expanded(entry), reader)
    elif is_chat(entry):
        yield reader.chat(entry, where)
    elif holds_ids(entry) and not isinstance(entry, Mapping):
        yield reader.ids([entry], where)
    else:
        yield reader.part(entry, where)


def _named(source: str | Path, reader: RowReader) -> Iterator[Part]:
    """The parts of a name: of the standard library's, a file, a folder or a dataset."""
    name = str(source)
    if name in ("stdlib", "stdlib:heldout"):
        yield Part(TEXTS, _stdlib(heldout=name != "stdlib"))
        return
    if "\n" in name or len(name) > LONGEST_NAME:
        raise CalibrationError(
            f"{reprlib.repr(name)} is no name of a file or a folder; to give a text itself, put it "
            "in a list"
        )
    path = expanded(name)
    if path.is_file():
        yield from _file(path, reader)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"the folder {path} holds no text file ({' '.join(SUFFIXES)})")
        for file in files:
            yield from _file(file, reader)
    elif name.startswith((".", "/", "~")) or path.suffix in (*SUFFIXES, ".json"):
        raise CalibrationError(
            f"the text {name} does not exist; give a text file, a folder of them, or 'stdlib'"
        )
    else:
        yield from _dataset(name, reader)


def _stdlib(heldout: bool) -> str:
    try:
        return stdlib.heldout_text() if heldout else stdlib.training_text()
    except OSError as error:
        raise CalibrationError(str(error)) from error


def _file(path: Path, reader: RowReader) -> Iterator[Part]:
    if path.suffix in ROW_SUFFIXES:
        for where, row in rows_of(path, reader.fields):
            yield reader.part(row, where)
        return
    with readable(path):
        text = path.read_text(encoding="utf-8")
    yield Part(TEXTS, text)


def _dataset(name: str, reader: RowReader) -> Iterator[Part]:
    """The rows of a dataset "name[:config][:split]". Raises: CalibrationError."""
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
        for number, row in enumerate(found, 1):
            yield reader.part(row, f"row {number} of dataset {name!r}")
    except SlabError:
        raise
    except Exception as error:  # of many types: no network, unknown name, missing config
        reason = first_line(error)
        raise CalibrationError(f"cannot read dataset {name!r}: {reason}") from error
