"""What the site has beside docs/: README.md and its neighbours, and files that pages link to.

Pages are written for the repository, where a link is a path from the page's own folder. On the
site the same links lead to the same things: a page outside docs/ gets a name of its own in
PAGES, and any other file of the repository is copied to source/ when something links to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # path in the repository -> name on the site
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "tests/README.md": "tests.md",
}
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
# A table right after a comment is no table for Python-Markdown, which wants an empty line there.
COMMENT_BEFORE_TABLE = re.compile(r"(-->\n)(?=\|)")
TABLE_BEFORE_COMMENT = re.compile(r"(\|\n)(?=<!--)")


def repository_path(page: str) -> str:
    """The path in the repository of a page of the site."""
    outside = {name: path for path, name in PAGES.items()}
    return outside.get(page, f"docs/{page}")


def site_path(target: str) -> str:
    """The path on the site of a file of the repository."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}"


def linked_files(text: str, page: str) -> set[str]:
    """The files of the repository that a page links to, as paths in the repository."""
    folder = posixpath.dirname(page)
    targets = (found[2] for found in LINK.finditer(FENCED.sub("", text)) if "://" not in found[2])
    return {posixpath.normpath(posixpath.join(folder, target)) for target in targets}


def on_files(files: Files, config) -> Files:
    """Adds the pages outside docs/, and the files that any page links to."""
    pages = {f"docs/{file.src_uri}" for file in files.documentation_pages()} | set(PAGES)
    for path, name in PAGES.items():
        files.append(
            File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8"))
        )
    linked = set()
    for page in pages:
        linked |= linked_files((ROOT / page).read_text(encoding="utf-8"), page)
    for path in sorted(linked - pages):
        if not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turns links of the repository into links of the site; mkdocs warns of broken ones."""
    source = repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups()
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        return f"{before}{posixpath.relpath(site_path(path), here or '.')}{anchor or ''}{after}"

    parts = FENCED.split(markdown)  # every second part is a fenced block
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    text = COMMENT_BEFORE_TABLE.sub(r"\1\n", "".join(parts))
    return TABLE_BEFORE_COMMENT.sub(r"\1\n", text)
