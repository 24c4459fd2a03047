"""What may reach a terminal: characters that would steer it, or hide and reorder text, are spelled out instead."""

from __future__ import annotations

import codecs
import unicodedata

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as bidirectional overrides, half characters, line separators
TEXT = "\n\t\u200c\u200d"  # what belongs to running text: lines, and the joiners of some scripts and of emoji
PLAIN = {
    "×": "x", "–": "-", "—": "-", "─": "-", "━": "-", "·": "-", "→": "->", "µ": "u", "≈": "~", "≤": "<=", "≥": ">=",
    "ᵀ": "^T", "‖": "||", "…": "...", "’": "'",
}  # fmt: skip
ERRORS = "slab_kernels.plain"  # name of the codec error handler below


def visible(text: str, keep: str = "") -> str:
    """`text` with every unsafe character but those in `keep` as an escape: the bell is \\x07, a line feed \\n."""
    if text.isprintable():
        return text
    return "".join(
        c if c in keep or unicodedata.category(c) not in UNSAFE else c.encode("unicode_escape").decode() for c in text
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """For a stream that cannot encode a character: a similar one of ASCII, or its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("unicode_escape").decode() for c in characters), error.end


codecs.register_error(ERRORS, _plain)
