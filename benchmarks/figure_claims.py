"""Numbers inside sentences of the documents, each tied to a file under benchmarks/results/.

A claim is a sentence with a format field for every number. The document has to contain it with
the numbers that the claim computes; `figures.py --write` puts them there. Numbers that need no
file follow from the format itself (`stored_bits`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from figure_tables import EPYC, H100, cold_rows, matching, method, read, the_row

FIELD = re.compile(r"\{(:[^{}]*)?\}")
NUMBER = r"[0-9][0-9,]*(?:\.[0-9]+)?"


@dataclass(frozen=True)
class Claim:
    """`sentence` stands in `document` with `numbers()` in its fields; line breaks are free."""

    document: str
    sentence: str
    numbers: Callable[[], Iterable[float]]

    def text(self) -> str:
        """The sentence with its numbers."""
        return self.sentence.format(*self.numbers())

    def pattern(self) -> re.Pattern[str]:
        """Finds the sentence with any numbers; the text between two numbers is a group."""
        parts = re.split(FIELD.pattern.replace("(:", "(?::"), self.sentence)
        spaced = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in parts]
        return re.compile("(" + f"){NUMBER}(".join(spaced) + ")")

    def renewed(self, text: str) -> str:
        """The text with the claim's numbers in it. Raises: ValueError if it lacks the sentence."""
        found = self.pattern().search(text)
        if not found:
            raise ValueError(f"the sentence {self.sentence!r} is not there")
        forms = [f"{{{form}}}" for form in FIELD.findall(self.sentence)]
        numbers = [form.format(n) for form, n in zip(forms, self.numbers(), strict=True)]
        pieces = found.groups()
        whole = pieces[0] + "".join(n + after for n, after in zip(numbers, pieces[1:], strict=True))
        return text[: found.start()] + whole + text[found.end() :]


CLAIMS: list[Claim] = []
