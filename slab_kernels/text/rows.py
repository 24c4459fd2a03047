"""Rows of JSON as text: documents, chats, or prompts with their completions.

A row is an object with one of
    "text"                    a string, taken as it is;
    "messages"                a chat, [{"role": ..., "content": ...}, ...], which the tokenizer's
                              own template writes out;
    "prompt", "completion"    two strings, joined as they are, or two such chats, which follow each
                              other.
Other keys beside these are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..terminal import first_line

SUFFIXES = (".jsonl", ".ndjson", ".json")
FIELDS = "text, messages, or prompt and completion"


def row_text(row: Any, tokenizer, where: str) -> str:
    """The text of one row.

    Args:
        tokenizer: writes out chats; may be None where there are none.
        where: the row's place, for messages: "line 3 of chats.jsonl".

    Raises: CalibrationError for a row that has none of the fields, or a chat that the tokenizer's
        template cannot write.
    """
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where} is {_kind(row)}, expected an object with {FIELDS}")
    kinds = (("text",), ("messages",), ("prompt", "completion"))
    parts = next((kind for kind in kinds if kind[0] in row), None)
    if parts is None:
        found = ", ".join(map(str, list(row)[:6])) or "nothing"
        raise CalibrationError(f"{where} has none of the fields {FIELDS}; it has {found}")
    values = [row.get(part) for part in parts]
    if all(isinstance(value, str) for value in values) and parts != ("messages",):
        return "".join(values)
    if all(_is_chat(value) for value in values) and parts != ("text",):
        return _chat([message for value in values for message in value], tokenizer, where)
    wanted = "a string" if parts == ("text",) else "a list of {role, content}"
    wanted = "both strings or both lists of {role, content}" if len(parts) == 2 else wanted
    raise CalibrationError(
        f"{where}: {' and '.join(parts)} must be {wanted}, not {' and '.join(map(_kind, values))}"
    )


def read_rows(path: Path, tokenizer, max_characters: int | None = None) -> str:
    """The texts of a file of rows, joined by an empty line.

    It holds a JSON object a line, or one JSON list. max_characters: no row is read once there are
    so many.

    Raises: CalibrationError naming the line.
    """
    texts, length = [], 0
    for where, row in _rows(path):
        texts.append(row_text(row, tokenizer, where))
        length += len(texts[-1]) + 2
        if max_characters is not None and length >= max_characters:
            break
    return "\n\n".join(texts)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".json":
            try:
                whole = json.loads(path.read_text(encoding="utf-8-sig"))
                rows = whole if isinstance(whole, list) else [whole]
                yield from ((f"row {number} of {path}", row) for number, row in enumerate(rows, 1))
                return
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError):
                pass  # rows a line under the shorter name, or else refused below by line 1
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"line {number} of {path}"
                    try:
                        yield where, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        if isinstance(error, UnicodeDecodeError):
                            raise
                        raise CalibrationError(f"{where} is no JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror or error}") from error


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def _chat(messages: list, tokenizer, where: str) -> str:
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
        reason = first_line(error)
        raise CalibrationError(
            f"{where}: the tokenizer's chat template cannot write this chat: {reason}"
        ) from error


def _kind(value: Any) -> str:
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
