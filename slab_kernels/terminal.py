"""Text for a terminal: characters that would steer it, hide text or reorder it are spelled out."""

from __future__ import annotations

import codecs
import unicodedata

# These categories of Unicode are controls, formats such as bidirectional overrides, half characters
# and line separators.
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
MOST = 300  # characters of a reason
TEXT = "\n\t\u200c\u200d"  # parts of running text: lines, the joiners of some scripts and of emoji
PLAIN = {
    "×": "x", "–": "-", "—": "-", "─": "-", "━": "-", "·": "-", "→": "->", "µ": "u", "≈": "~",
    "≤": "<=", "≥": ">=", "ᵀ": "^T", "‖": "||", "…": "...", "’": "'",
}  # fmt: skip
ERRORS = "slab_kernels.plain"  # name of the codec error handler below


def visible(text: str, keep: str = "") -> str:
    """`text` with every unsafe character as an escape, such as \\x07 for the bell.

    keep: characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in UNSAFE and c not in keep
        else c
        for c in text
    )


def clock(seconds: float) -> str:
    """A length of time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def first_line(error: BaseException) -> str:
    """What an exception of another library says, as a part of a sentence: its first line, and those
    behind it while they end with a colon, no longer than MOST characters, with unsafe characters as
    escapes. A KeyError says no more than a key, so its class stands before it."""
    lines = (str(error).strip() or repr(error)).splitlines()
    said = lines.pop(0).rstrip()
    while lines and said.endswith(":"):
        said = f"{said} {lines.pop(0).strip()}"
    if type(error) is KeyError:
        said = f"KeyError {said}"
    return visible(said if len(said) <= MOST else said[: MOST - 3] + "...")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler ERRORS: a character that a stream cannot encode becomes a similar one
    of ASCII, or its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = [PLAIN.get(c) or c.encode("unicode_escape").decode() for c in characters]
    return "".join(plain), error.end


codecs.register_error(ERRORS, _plain)
