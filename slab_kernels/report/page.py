"""The report as one self-contained HTML page: no script, no external resource, both colour schemes,
phone and print."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import NamedTuple

from .headline import KeyNumber
from .results import Source
from .stylesheet import STYLE

LONG = 12  # rows of a table that is shown; a longer one is folded
LARGEST_LINK = 1 << 20  # bytes of a JSON file that the page carries along
GENERATOR = "<meta name=generator content=slab_kernels>"  # by which a page is known as ours


class Drawn(NamedTuple):
    """A picture: its PNG for a light page and for a dark one."""

    title: str
    caption: str
    light: bytes
    dark: bytes


class Text(NamedTuple):
    """What one model wrote."""

    label: str
    text: str


class Table(NamedTuple):
    """Rows of text, and of each row its kind: "ours" and "dense" are set apart."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: Sequence[str]


@dataclass(frozen=True)
class Page:
    """What stands on the page, from top to bottom."""

    title: str
    model: str
    headline: Sequence[str]
    numbers: Sequence[KeyNumber]
    prompt: str
    texts: Sequence[Text]  # the first two stand side by side, the others are folded
    pictures: Sequence[Drawn]
    tables: Sequence[Table]
    run: Sequence[tuple[str, str]]
    notes: Sequence[str]
    sources: Sequence[Source]


def html(page: Page) -> str:
    """The whole page."""
    head = escape(f"{page.title}: {page.model}" if page.model else page.title)
    first, *others = page.headline or [""]
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        GENERATOR,
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{head}</title><style>{STYLE}</style></head><body><main>",
        f"<header><h1>{escape(page.title)}</h1><p class=model>{escape(page.model)}</p>",
        f"<p class=headline>{escape(first)}</p>",
        *(f"<p class=also>{escape(sentence)}</p>" for sentence in others),
        "</header>",
        _numbers(page.numbers),
        _texts(page.prompt, page.texts),
        *map(_picture, page.pictures),
        *map(_table, page.tables),
        _footer(page),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _numbers(numbers: Sequence[KeyNumber]) -> str:
    if not numbers:
        return ""
    tiles = (
        f"<div><dt>{escape(number.name)}</dt><dd>{escape(number.value)}</dd>"
        f"<dd class=beside>{escape(number.beside)}</dd></div>"
        for number in numbers
    )
    return f"<dl class=numbers>{''.join(tiles)}</dl>"


def _texts(prompt: str, texts: Sequence[Text]) -> str:
    """The dense and the main compressed model side by side, the others folded below."""
    if not texts:
        return ""
    beside = "".join(_text(prompt, text) for text in texts[:2])
    folded = ""
    if texts[2:]:
        more = "".join(_text(prompt, text) for text in texts[2:])
        count = f"{len(texts) - 2} more methods" if texts[3:] else "one more method"
        folded = f"<details><summary>{count}</summary><div class=texts>{more}</div></details>"
    return (
        "<section><h2>The same prompt, continued</h2><p>Greedy: every model writes the token that "
        f"it holds most probable.</p><div class=texts>{beside}</div>{folded}</section>"
    )


def _text(prompt: str, text: Text) -> str:
    given = f"<span class=prompt>{escape(prompt)}</span>" if prompt else ""
    caption = f"<figcaption>{escape(text.label)}</figcaption>"
    return f"<figure>{caption}<pre>{given}{escape(text.text)}</pre></figure>"


def _picture(picture: Drawn) -> str:
    light, dark = (_data("image/png", data) for data in (picture.light, picture.dark))
    return (
        f"<section><h2>{escape(picture.title)}</h2><p>{escape(picture.caption)}</p><picture>"
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(picture.title)}"></picture></section>'
    )


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _table(table: Table) -> str:
    """A table that scrolls inside its box, folded where it is long."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells, kind in zip(table.rows, table.kinds, strict=True)
    )
    body = (
        f'<div class=scroll tabindex=0 role=region aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    title = escape(table.title)
    if len(table.rows) <= LONG:
        return f"<section><h2>{title}</h2>{body}</section>"
    count = f"{len(table.rows):,} rows"
    return (
        f"<section><details><summary><h2>{title}</h2> <span>{count}</span></summary>{body}"
        "</details></section>"
    )


def _footer(page: Page) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.run)
    links = "".join(f"<li>{_link(source)}</li>" for source in page.sources)
    return "".join(
        [
            "<footer>",
            f"<h2>How this was measured</h2><dl>{facts}</dl>" if facts else "",
            *(f"<p>{escape(note)}</p>" for note in page.notes),
            f"<h2>The numbers</h2><ul>{links}</ul>" if links else "",
            "</footer>",
        ]
    )


def _link(source: Source) -> str:
    """The JSON file itself, carried along so that the page stays whole wherever it is taken."""
    data = source.text.encode("utf-8", errors="replace")
    size = f"{len(data) / 1e3:,.0f} kB"
    if len(data) > LARGEST_LINK:
        return f"{escape(source.name)} ({size})"
    name = escape(PurePath(source.name).name)
    href = _data("application/json", data)
    return f'<a download="{name}" href="{href}">{escape(source.name)}</a> ({size})'
