"""A row as text or token ids: a document, a chat, a prompt with its completion, or ids.

A row is an object, of which the first that is there is read of
    "input_ids"               token ids, without those that an "attention_mask" beside them leaves
                              out;
    "text"                    a string, taken as it is;
    "messages"                a chat, [{"role": ..., "content": ...}, ...], which the tokenizer's
                              own template writes out;
    "prompt", "completion"    two strings, joined as they are, or two chats, which follow each
                              other.
Other keys are ignored. Whoever names a field gets what is in it, a string, a chat or token ids.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, CalibrationError
from ..terminal import first_line
from .token_ids import IDS, MASK, holds_ids, token_ids
from .windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS, CHATS, PROMPTS, TOKENS = "texts", "chats", "prompts", "token ids"  # kinds of parts
KINDS = (("text",), ("messages",), ("prompt", "completion"))
FIELDS = "input_ids, text, messages, or prompt and completion"
SHOWN = 8  # fields of a row that a message names


@dataclass(frozen=True)
class Part:
    """A document, chat, prompt or batch of token ids. field: where it stood in a row, if in one."""

    kind: str
    content: str | Windows
    field: str | None = None


@dataclass(frozen=True)
class RowReader:
    """Takes from rows what is asked for.

    field: the one to read; None for the usual ones. tokenizer: gives the one that writes out chats,
    and is called only where there is one; None where nobody has a tokenizer. name: of the text, for
    messages. must: whether a field that was named must be met, so that a text without rows is
    refused.

    Raises on construction: ArgumentError for a field that is no name.
    """

    field: str | None = None
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    name: str = "calibration"
    must: bool = True

    def __post_init__(self) -> None:
        if not (self.field is None or (isinstance(self.field, str) and self.field)):
            raise ArgumentError(
                f"field={reprlib.repr(self.field)} must be the name of a field of the rows, such "
                "as 'messages'"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are looked at."""
        usual = (IDS, *(name for kind in KINDS for name in kind))
        asked = usual if self.field is None else (self.field,)
        return (*asked, MASK)

    def part(self, row: Any, where: str) -> Part:
        """What a row holds. where: its place, for messages.

        Raises: CalibrationError for a row without such a field, something else in it, or a chat
            that the tokenizer's template cannot write.
        """
        if not isinstance(row, Mapping):
            raise CalibrationError(f"{where} is {_kind(row)}, expected an object with {FIELDS}")
        if self.field is not None:
            return self._named(row, self.field, where)
        if IDS in row:
            return self.ids(row, where, IDS)
        parts = next((kind for kind in KINDS if kind[0] in row), None)
        if parts is None:
            raise CalibrationError(
                f"{where} has none of the fields {FIELDS}; it has {_names(row)}, one of which may "
                "be named as the field to read"
            )
        values: list[Any] = [row.get(part) for part in parts]
        name = " and ".join(parts)
        texts = [value for value in values if isinstance(value, str)]
        chats = [value for value in values if is_chat(value)]
        if len(texts) == len(parts) and parts != ("messages",):
            return Part(TEXTS if len(parts) == 1 else PROMPTS, "".join(texts), name)
        if len(chats) == len(parts) and parts != ("text",):
            return self.chat([message for chat in chats for message in chat], where, name)
        wanted = {
            "text": "a string",
            "messages": "a list of {role, content}",
            "prompt": "both strings or both lists of {role, content}",
        }[parts[0]]
        raise CalibrationError(
            f"{where}: {name} must be {wanted}, not {' and '.join(map(_kind, values))}"
        )

    def _named(self, row: Mapping, field: str, where: str) -> Part:
        """What the field that was named holds. Raises: CalibrationError."""
        if field not in row:
            raise CalibrationError(f"{where} has no field {field!r}; it has {_names(row)}")
        value = row[field]
        if str(getattr(value, "dtype", "")) == "object":  # NumPy's array of a chat's messages
            value = value.tolist()
        if isinstance(value, str):
            return Part(TEXTS, value, field)
        if is_chat(value):
            return self.chat(value, where, field)
        if field == IDS:
            return self.ids(row, where, field)
        if holds_ids(value):
            return self.ids({IDS: value, MASK: row.get(MASK)}, where, field)
        raise CalibrationError(
            f"{where}: {field} must be a string, a list of {{role, content}} or token ids, not "
            f"{_kind(value)}"
        )

    def ids(self, source: Any, where: str, field: str | None = None) -> Part:
        """Token ids in any form that `token_ids` takes. Raises: CalibrationError."""
        try:
            return Part(TOKENS, token_ids(source, self.name), field)
        except CalibrationError as error:
            if not where:
                raise
            raise CalibrationError(f"{where}: {error}") from error

    def chat(self, messages: Any, where: str, field: str | None = None) -> Part:
        """A chat as the tokenizer's template writes it. Raises: CalibrationError."""
        if self.tokenizer is None:
            raise CalibrationError(
                f"{where} is a chat, which only a tokenizer can write out; give tokenizer="
            )
        tokenizer = self.tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{where} is a chat, and this model's tokenizer has no chat template; give text, "
                "or a tokenizer that has one"
            )
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # a template is a program of the model's author
            raise CalibrationError(
                f"{where}: the tokenizer's chat template cannot write this chat: "
                f"{first_line(error)}"
            ) from error
        return Part(CHATS, text, field)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with its role."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def _names(row: Mapping) -> str:
    """The fields of a row, for messages."""
    names = list(map(str, row))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more


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
