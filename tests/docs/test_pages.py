"""Documents as a reader meets them: named things exist, lines fit, pages are complete."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from command_tables import COMMANDS, group

import slab_kernels
from docs.documents import (
    DOCUMENTS,
    FENCE,
    PAGES,
    ROOT,
    each,
    link_targets,
    python_blocks,
    spans,
    text_of,
)
from slab_kernels.methods import METHODS

FOLDERS = ("benchmarks/", "tests/", "docs/", "csrc/", "slab_kernels/", ".ci/", "examples/")
README = ROOT / "README.md"
WRITTEN = {"architectures.md", "architectures-vllm.md"}  # by programs, which wrap as they like


def named_paths(text: str) -> list[str]:
    return [span for span in spans(text) if span.startswith(FOLDERS) and " " not in span]


@pytest.mark.parametrize(("document", "name"), each(named_paths))
def test_named_files_exist(document, name):
    """A star stands for any name, as in a shell, and a capital NAME for a file to be written."""
    if "NAME" in name:
        name = name.rpartition("/")[0]
    pattern = name.partition("::")[0].rstrip("/")
    assert list(ROOT.glob(pattern)), f"{document.name} names {name}, which does not exist"


@pytest.mark.parametrize(("document", "target"), each(link_targets))
def test_links_lead_to_files(document, target):
    assert (document.parent / target).is_file(), f"{document.name} links to {target}"


def names_of_ours(text: str) -> list[str]:
    """Names of the package in code, and the objects that the API page documents."""
    code = "\n".join([*spans(text), *python_blocks(text)])
    listed = re.findall(r"^::: slab_kernels\.(\S+)$", text, re.MULTILINE)
    entry_points = {"methods", "backends"}  # groups of entry points have no object behind them
    found = re.findall(r"\bslab_kernels\.([A-Za-z_.]+[A-Za-z_])", code)
    return [name for name in [*found, *listed] if name not in entry_points]


@pytest.mark.parametrize(("document", "name"), each(names_of_ours))
def test_names_of_the_package_exist(document, name):
    owner, rest = slab_kernels, name.split(".")
    while rest:
        path = f"{owner.__name__}.{rest[0]}" if hasattr(owner, "__path__") else ""
        if path and not hasattr(owner, rest[0]) and importlib.util.find_spec(path):
            importlib.import_module(path)
        owner = getattr(owner, rest.pop(0))


def test_every_public_name_is_on_the_api_page():
    listed = re.findall(r"^::: \S+\.(\w+)$", text_of(ROOT / "docs" / "api.md"), re.MULTILINE)
    # A module that is listed shows all its names.
    assert {name for name, home in slab_kernels._HOMES.items() if home not in listed} <= set(listed)


def test_every_method_is_in_the_table_of_methods():
    table = text_of(ROOT / "docs" / "methods.md").split("\n\n")
    (rows,) = (part for part in table if part.startswith("| name | what it is |"))
    assert set(re.findall(r"`([\w-]+)`", rows)) >= set(METHODS)


def test_every_room_is_in_the_page_of_the_architecture():
    page = text_of(ROOT / "docs" / "architecture.md")
    rooms = [path for path in (ROOT / "slab_kernels").iterdir() if (path / "__init__.py").exists()]
    rooms += (ROOT / "slab_kernels").glob("[!_]*.py")
    names = {f"{room.name}/" if room.is_dir() else room.name for room in rooms}
    assert not {name for name in names if f"`{name}`" not in page}


def test_every_command_has_a_section_with_its_options():
    sections = re.findall(r"^## (\S+)$", text_of(ROOT / "docs" / "command-line.md"), re.MULTILINE)
    assert set(group().commands) == set(COMMANDS) == set(sections)


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_lines_fit(document):
    """Prose and listings keep to 100 columns; tables may be longer where a cell needs it."""
    if document.name in WRITTEN:
        pytest.skip("a program writes it")
    lines = text_of(document).splitlines()
    long = [line for line in lines if len(line) > 100 and not line.startswith(("|", "<!--"))]
    assert not long, f"{document.name}: {long}"


def test_every_page_is_in_the_index_and_in_the_sites_menu():
    index = set(link_targets(text_of(ROOT / "docs" / "index.md")))
    names = {page.name for page in PAGES}
    assert names - {"index.md"} <= index
    settings = text_of(ROOT / "mkdocs.yml")
    menu = set(re.findall(r"[\w-]+\.md", settings[settings.index("\nnav:") :]))
    outside = {"overview.md", "contributing.md", "changelog.md", "security.md", "tests.md"}
    assert menu == names | outside


def test_the_readme_names_every_page():
    linked = {Path(target).name for target in link_targets(text_of(README))}
    assert {page.name for page in PAGES} - {"index.md"} <= linked


def test_every_paper_of_a_method_is_cited():
    cited = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert cited["cff-version"] == "1.2.0" and cited["version"] == slab_kernels.__version__
    assert {"message", "title", "authors"} <= cited.keys()
    papers = {reference["url"].rpartition("/")[2] for reference in cited["references"]}
    named = set(re.findall(r"\d{4}\.\d{5}", text_of(ROOT / "docs" / "methods.md")))
    assert named <= papers
    for reference in cited["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()


def test_pages_say_nothing_of_the_machine_that_wrote_them():
    for document in DOCUMENTS:
        assert not re.search(r"/tmp/|/work/|/home/|/root/", FENCE.sub("", text_of(document)))
