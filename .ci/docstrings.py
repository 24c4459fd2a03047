"""How the site reads docstrings: "Raises: ..." and "Returns: ..." on one line are sentences.

The parser of Google's style takes such a line with its indented continuation for a section of
parameters and drops it. As one line it stays a paragraph.
"""

from __future__ import annotations

import re

import griffe

SENTENCE = re.compile(r"^(?:Raises|Returns): \S.*(?:\n[ \t]+\S.*)*", re.MULTILINE)


class Sentences(griffe.Extension):
    """Joins the lines of each such sentence."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = SENTENCE.sub(lambda found: " ".join(found[0].split()), text)
