"""The documents, taken apart: Python blocks, command lines, inline code, links.

What a block is follows from its look alone. Fenced as `python`: it runs. Indented or fenced as a
shell's, with a known command in front: a command line. Anything else is a listing.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BESIDE = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
DOCUMENTS = [*BESIDE, *PAGES]
# Programs of other projects, whose command lines are not ours to check.
FOREIGN = {"vllm", "curl", "trtllm-serve", "git", "docker", "convert_hf_to_gguf.py"}
OWN = {"slab-kernels", "make", "python", "pytest", "pip", "torchrun", ".ci/packages", ".ci/run"}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[list[str]]:
    """The words of every line in an indented or shell block that starts with a known command."""
    indented = FENCE.sub("", text).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", indented, re.MULTILINE)
    lines += "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if line.removeprefix("$ ").split(" ")[0] in OWN | FOREIGN
    ]
    return [line[: line.index("|")] if "|" in line else line for line in words]


def spans(text: str) -> list[str]:
    """Inline code, also where a line breaks inside it, outside of fences."""
    found = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    return [" ".join(span.split()) for span in found]


def link_targets(text: str) -> list[str]:
    """Where links and pictures lead, but for other sites and places on the same page."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", text))
    return [target for target in targets if "://" not in target]


def each(find: Callable[[str], Iterable], documents: list[Path] = DOCUMENTS) -> list:
    """A parameter (document, item) for everything that `find` finds in a document."""
    found = {
        (document, str(item)): item for document in documents for item in find(text_of(document))
    }
    return [
        pytest.param(document, item, id=f"{document.stem}: {label[:50]}")
        for (document, label), item in found.items()
    ]


def provide(models: Path, name: str, dense: bool) -> None:
    """Puts a tiny model into the current folder under a name that a document opens."""
    if not Path(name).exists():
        shutil.copytree(models / ("dense" if dense else "packed"), name)
