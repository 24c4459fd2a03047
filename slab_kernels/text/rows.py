"""Rows of JSON as text: documents, chats, or prompts with their completions.

A row is an object with one of
    "text"                    a string, taken as it is;
    "messages"                a chat, [{"role": ..., "content": ...}, ...], which the tokenizer's
                              own template writes out;
    "prompt", "completion"    two strings, joined as they are, or two chats, which follow each
                              other.
Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibrationError
from ..terminal import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".ndjson", ".json")
KINDS = (("text",), ("messages",), ("prompt", "completion"))
FIELDS = "text, messages, or prompt and completion"


def row_text(row: Any, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """The text of one row.

    Args:
        tokenizer: writes out chats; may be None where there are none.
        where: the row's place, for messages: "line 3 of chats.jsonl".

    Raises: CalibrationError for a row that has none of the fields, or a chat that the tokenizer's
        template cannot write.
    """
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where} is {_kind(row)}, expected an object with {FIELDS}")
    parts = next((kind for kind in KINDS if kind[0] in row), None)
    if parts is None:
        found = ", ".join(map(str, list(row)[:6])) or "nothing"
        raise CalibrationError(f"{where} has none of the fields {FIELDS}; it has {found}")
    values = [row.get(part) for part in parts]
    texts = [value for value in values if isinstance(value, str)]
    chats = [value for value in values if isinstance(value, list) and _is_chat(value)]
    if len(texts) == len(parts) and parts != ("messages",):
        return "".join(texts)
    if len(chats) == len(parts) and parts != ("text",):
        return _chat([message for chat in chats for message in chat], tokenizer, where)
    wanted = {
        "text": "a string",
        "messages": "a list of {role, content}",
        "prompt": "both strings or both lists of {role, content}",
    }[parts[0]]
    raise CalibrationError(
        f"{where}: {' and '.join(parts)} must be {wanted}, not {' and '.join(map(_kind, values))}"
    )


def read_rows(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, max_characters: int | None = None
) -> str:
    """The texts of a file of rows, joined by an empty line.

    The file holds one JSON object per line, or one JSON list. max_characters: no row is read once
    there are so many.

    Raises: CalibrationError naming the line.
    """
    texts: list[str] = []
    length = 0
    for where, row in _rows(path):
        texts.append(row_text(row, tokenizer, where))
        length += len(texts[-1]) + 2
        if max_characters is not None and length >= max_characters:
            break
    return "\n\n".join(texts)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row and its place, for messages. Raises: CalibrationError."""
    with readable(path):
        if path.suffix == ".json" and (whole := _whole(path)) is not None:
            for number, row in enumerate(whole, 1):
                yield f"row {number} of {path}", row
            return
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"line {number} of {path}"
                    yield where, _row(line, where)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around the reading of a text. Raises: CalibrationError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror or error}") from error


def _whole(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list or object, None if it is none.

    Then it may hold one row per line all the same, and is refused by its first line if not.
    """
    content = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, list) else [whole]


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is no JSON: {error}") from error


def _is_chat(value: list) -> bool:
    return bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _chat(messages: list, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """A chat as the tokenizer's template writes it. Raises: CalibrationError."""
    if tokenizer is None:
        raise CalibrationError(
            f"{where} is a chat, which only a tokenizer can write out; give tokenizer="
        )
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where} is a chat, and this model's tokenizer has no chat template; give text, "
            "or a tokenizer that has one"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's author
        raise CalibrationError(
            f"{where}: the tokenizer's chat template cannot write this chat: {first_line(error)}"
        ) from error


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null or absent",
    }
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")
