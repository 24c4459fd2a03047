"""What documents say of SmolLM2 follows from the rows there are, whichever these are."""

from __future__ import annotations

import json
import re
import shutil
import zlib

import figure_findings
import figure_pictures
import figure_smollm2
import figure_tables
import figures
import pytest
from method_entries import entries

README_LINES = 200
ENTRIES = entries(adapter_rank=36, epochs=10)
SETTINGS = {
    "preset small": {"bits_per_weight": 3.76, "kl": 0.2},
    "preset balanced": {"bits_per_weight": 4.26, "kl": 0.1},
    "preset exact": {"bits_per_weight": 10.05, "kl": 0.05},
}


def row(entry) -> dict:
    """A made-up row: integers and ours at their bits, matched at half the KL."""
    jitter = zlib.crc32(entry.label.encode()) % 100 / 1e4
    bits = entry.integer[0] + 16 / entry.integer[1] if entry.integer else 4.2
    matching = "matching" in entry.settings
    made = {"bits_per_weight": bits, "kl": 0.3 + jitter}
    made |= SETTINGS.get(entry.label, {})
    return made | {
        "label": entry.label, "family": entry.family, "settings": entry.settings,
        "kl": made["kl"] / (2 if matching else 1), "kl_p99": 1.0, "top1": 0.8, "bytes": 9e7,
        "perplexity": 40.0 + jitter, "cpu_seconds": 500.0, "peak_bytes": 2e9,
        "heldout_error": None if matching else 0.066, "calibration_error": 0.06,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in the place of the results; `fill` puts rows of SmolLM2 there."""
    folder = tmp_path / "results"
    shutil.copytree(figure_tables.RESULTS, folder)
    monkeypatch.setattr(figure_tables, "RESULTS", folder)
    figure_tables.read.cache_clear()
    yield folder
    figure_tables.read.cache_clear()


def fill(folder, wanted, **changed) -> None:
    """Rows of the wanted labels, with the columns of some changed: label -> {column: value}."""
    changed = {label.replace("_", " "): columns for label, columns in changed.items()}
    whole = json.loads((folder / figure_smollm2.FILE).read_text(encoding="utf-8"))
    whole["rows"] = [row(e) | changed.get(e.label, {}) for e in ENTRIES if wanted(e.label)]
    (folder / figure_smollm2.FILE).write_text(json.dumps(whole), encoding="utf-8")
    figure_tables.read.cache_clear()


SOME = {
    "all": lambda label: True,
    "none": lambda label: False,
    "no matched ones": lambda label: "matched" not in label,
    "presets": lambda label: label.startswith("preset"),
    "integers": lambda label: "groups of" in label,
    "every third": lambda label: zlib.crc32(label.encode()) % 3 == 0,
}


@pytest.mark.parametrize("wanted", SOME.values(), ids=SOME)
def test_every_region_stands_with_any_rows(results, wanted):
    fill(results, wanted)
    for name in (*figure_smollm2.SMOLLM2_TABLES, *figure_findings.FINDING_TEXTS):
        text = figures.REGIONS[name]()
        assert "nan" not in text and "None" not in text
        prose = [line for line in text.splitlines() if not line.startswith("|")]
        assert all(len(line) <= 100 for line in prose)
        assert not re.search(r"  | [.,;]|\b(?:of|to|from) (?:and\b|[.,;])", "\n".join(prose))


def test_every_row_stands_in_the_table_by_a_name(results):
    fill(results, lambda label: True)
    names = re.findall(r"^\| (.*?) \|", figures.REGIONS["smollm2-all"](), re.MULTILINE)[2:]
    assert len(set(names)) == len(names) == len(ENTRIES)
    assert not {f"`{entry.label}`" for entry in ENTRIES if ", " in entry.label} & set(names)


def test_a_row_of_a_new_label_is_shown_by_it(results):
    fill(results, lambda label: label == "wanda", wanda={"label": "something new"})
    assert "| `something new` |" in figures.REGIONS["smollm2-all"]()


def test_the_readme_is_short_with_every_row(results):
    fill(results, lambda label: True)
    text = (figures.ROOT / "README.md").read_text(encoding="utf-8")
    assert len(figures.renewed(text, "README.md").splitlines()) <= README_LINES


def test_flags_are_those_of_the_row(results):
    """Of a size both the searched row and its matched one may be there; the better one counts."""
    fill(results, lambda label: "searched" in label)
    assert "| `--bits 3.6 --group-size 0 --match 10` |" in figures.REGIONS["settings-for-goals"]()
    fill(results, lambda label: label == "slab, searched for 3.6 bits")
    text = figures.REGIONS["settings-for-goals"]()
    assert "| `--bits 3.6 --group-size 0` |" in text and "match" not in text


def test_rows_that_are_not_there_are_named(results):
    fill(results, lambda label: label not in ("wanda", "rtn int3, groups of 64"))
    last = figure_findings.missing()
    assert last.split(": ")[1].split("; ") == [
        "round to nearest, 3 bits, groups of 64",
        "`wanda`.\n",
    ]
    fill(results, lambda label: True)
    assert figure_findings.missing() == ""
    assert figure_findings.findings().count("**") == 2 * len(figure_findings.FINDINGS)


@pytest.mark.parametrize("ours, sentence", [
    (0.1, "below that of GPTQ in the one pair here"),
    (0.4, "GPTQ has the lower KL in every pair"),
])  # fmt: skip
def test_who_is_ahead_follows_from_the_rows(results, ours, sentence):
    pair = ("preset balanced", "gptq int4, groups of 64")
    fill(results, lambda label: label in pair, preset_balanced={"kl": ours})
    assert sentence in " ".join(figure_findings.equal_bits().split())


def test_where_it_loses_is_said(results):
    won, lost = (
        ("preset balanced", "gptq int4, groups of 64"),
        ("preset small", "gptq int3, groups of 32"),
    )
    fill(
        results, lambda label: label in won + lost,
        **{"preset balanced": {"kl": 0.1}, "preset small": {"kl": 0.9}},
    )  # fmt: skip
    text = " ".join(figure_findings.equal_bits().split())
    assert "in 1 of 2 pairs; GPTQ is ahead at 3.76 bits." in text


def test_bits_that_the_other_lacks_count_for_it(results):
    """0.1 against 0.3 with a bit more: a fourth of 0.3 is less than 0.1."""
    pair = ("preset small", "gptq int3, groups of 32")
    fill(results, lambda label: label in pair, preset_small={"kl": 0.1, "bits_per_weight": 4.5})
    ((own, other),) = figure_findings.pairs()
    assert figure_findings.at_as_many_bits(own, other) == pytest.approx(
        own["kl"] / other["kl"] * 4, rel=1e-9
    )
    assert "GPTQ has the lower KL" in figure_findings.equal_bits()


def test_an_order_that_comes_out_otherwise_is_said(results):
    fill(
        results,
        lambda label: label in ("magnitude", "wanda", "sparsegpt"),
        magnitude={"kl": 3.0}, wanda={"kl": 2.0}, sparsegpt={"kl": 1.0},
    )  # fmt: skip
    text = " ".join(figure_findings.published_order().split())
    assert "2 pairs were looked at, and all come out the same way" in text
    fill(
        results,
        lambda label: label in ("magnitude", "wanda", "sparsegpt"),
        magnitude={"kl": 3.0}, wanda={"kl": 1.0}, sparsegpt={"kl": 2.0},
    )  # fmt: skip
    text = " ".join(figure_findings.published_order().split())
    assert "1 come out the other way" in text and "`sparsegpt` is worse than `wanda`" in text


def test_shares_of_the_gap_to_the_papers_solver(results):
    rows = {
        "slab fp16": {"perplexity": 35.0, "kl": 0.1},
        "slab fp16, permuted, matched": {"perplexity": 34.0, "kl": 0.05},
        "slab-paper": {"kl": 0.4},
    }
    fill(results, lambda label: label in rows, **rows)
    dense = figure_tables.read(figure_smollm2.FILE)["dense"]
    paper = figure_smollm2.by_label()["slab-paper"]["perplexity"]
    plain, both = (f"{100 * (paper - own) / (paper - dense):.1f}" for own in (35.0, 34.0))
    text = " ".join(figure_findings.papers_format().split())
    assert f"that is {plain} % in perplexity and 75.0 % in KL; with both it is {both} %" in text
    assert "in perplexity and 87.5 % in KL (34.00 and 0.050)." in text


def test_the_picture_takes_any_rows(results):
    pytest.importorskip("matplotlib")
    for wanted in (SOME["all"], SOME["every third"]):
        fill(results, wanted)
        picture = figure_pictures.PICTURES["methods-smollm2.svg"]
        assert "‖" in picture.svg() and picture.fingerprint() in picture.svg()
