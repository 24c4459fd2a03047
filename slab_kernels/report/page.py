"""The report as one self-contained HTML page: no script, no external resource, both colour schemes, phone and print."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f4f5f7; --ink: #1d2026; --muted: #667080; --line: #e4e7eb; --mark: #00805f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #181b20; --ground: #101216; --ink: #e8eaed; --muted: #98a1ae; --line: #2c3138; --mark: #3ecf9f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 47rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.12rem; margin: 0 0 .3rem; }
.model { color: var(--muted); margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.headline { font-size: 1.2rem; line-height: 1.45; margin: 0 0 1.6rem; text-wrap: pretty; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.2rem; margin: 0 0 1.1rem; }
section > p { color: var(--muted); font-size: .92rem; margin: 0 0 .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th { font-weight: 500; color: var(--muted); font-size: .82rem; line-height: 1.25; vertical-align: bottom; }
th, td { text-align: right; padding: .5rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; min-width: 5.2rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
tr.ours td { font-weight: 650; color: var(--mark); }
tr.dense td { color: var(--muted); }
img { display: block; width: 100%; height: auto; }
@media (max-width: 560px) {
  main { padding: 1.4rem .6rem 3rem; }
  section { padding: .9rem .8rem; }
  table { font-size: .82rem; }
  th { font-size: .72rem; min-width: 3.4rem; }
  th, td { padding: .42rem .3rem; }
}
footer { color: var(--muted); font-size: .88rem; overflow-wrap: anywhere; }
footer p { margin: .3rem 0; }
"""


def html(
    title: str,
    headline: str,
    tables: Sequence[tuple[str, Sequence[str], Sequence[tuple[Sequence[str], str]]]],
    pictures: Sequence[tuple[str, str, bytes, bytes]],
    notes: Sequence[str],
) -> str:
    """The page.

    Args:
        tables: (title, column names, rows), a row being its cells and its kind: "ours" and "dense" are set apart.
        pictures: (title, caption, PNG for a light page, PNG for a dark one), after the first table.
        notes: device, versions, what was measured: the small print.
    """
    source = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()  # noqa: E731
    shown = [
        f"<section><h2>{escape(name)}</h2>{_table(head, rows)}</section>"
        for name, head, rows in tables
    ]
    drawn = [
        f"<section><h2>{escape(name)}</h2><p>{escape(caption)}</p><picture>"
        f'<source srcset="{source(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{source(light)}" alt="{escape(name)}"></picture></section>'
        for name, caption, light, dark in pictures
    ]
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>Compression report</title><style>{STYLE}</style></head><body><main>",
        f"<h1>Compression report</h1><p class=model>{escape(title)}</p><p class=headline>{escape(headline)}</p>",
        *shown[:1], *drawn, *shown[1:],
        "<footer>", *(f"<p>{escape(note)}</p>" for note in notes), "</footer></main></body></html>\n",
    ]  # fmt: skip
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    lines = [
        "<div class=scroll><table><thead><tr>",
        *(f"<th>{escape(cell)}</th>" for cell in head),
        "</tr></thead><tbody>",
    ]
    for cells, kind in rows:
        lines.append(
            f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        )
    return "".join([*lines, "</tbody></table></div>"])
