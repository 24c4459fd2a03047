"""Every figure of README.md and docs/, drawn or computed from files under benchmarks/results/.

    python benchmarks/figures.py --check    say what differs; exit 1 if anything does
    python benchmarks/figures.py --write    write tables, numbers and pictures anew

A table stands between `<!-- begin table: NAME -->` and `<!-- end -->` (figure_tables.py,
figure_smollm2.py, figure_runs.py, figure_kernel_tables.py, figure_cpu_peers.py,
command_tables.py). So do sentences that follow from rows of which some may be missing, between
`<!-- begin text: NAME -->` and the same end (figure_findings.py, figure_runs.py). A number inside
any other sentence belongs to a claim (figure_claims.py), and a picture in docs/figures/ carries the
hash of its rows (figure_pictures.py). `--check` needs no matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from command_tables import COMMAND_TABLES
from figure_claims import CLAIMS, Claim
from figure_cpu_peers import CPU_PEER_TABLES
from figure_findings import FINDING_TEXTS
from figure_kernel_tables import KERNEL_TABLES
from figure_pictures import PICTURES
from figure_runs import RUN_REGIONS
from figure_smollm2 import SMOLLM2_TABLES
from figure_tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
REGIONS: dict[str, Callable[[], str]] = {
    **TABLES,
    **SMOLLM2_TABLES,
    **FINDING_TEXTS,
    **RUN_REGIONS,
    **KERNEL_TABLES,
    **COMMAND_TABLES,
    **CPU_PEER_TABLES,
}
REGION = re.compile(
    r"(?P<begin><!-- begin (?:table|text): (?P<name>[^\n]*?) -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)


def documents(root: Path = ROOT) -> list[Path]:
    """README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def with_regions(text: str) -> str:
    """The text with all that stands between markers made anew. Raises: KeyError for its name."""
    # The empty lines make it a table for Python-Markdown too, which builds the site.
    return REGION.sub(lambda m: f"{m['begin']}\n{REGIONS[m['name']]()}\n{m['end']}", text)


def with_claims(text: str, claims: list[Claim]) -> str:
    """The text with the numbers of every claim anew. Raises: ValueError for a lost sentence."""
    for claim in claims:
        text = claim.renewed(text)
    return text


def renewed(text: str, name: str) -> str:
    """A document's text as its sources have it. `name` is its path from the repository's root."""
    return with_claims(with_regions(text), [claim for claim in CLAIMS if claim.document == name])


def differences(old: str, new: str, name: str) -> Iterator[str]:
    """One sentence for each line that is not what it should be."""
    before, after = old.splitlines(), new.splitlines()
    if len(before) != len(after):
        yield f"{name}: {len(before)} lines, and {len(after)} when written anew"
    for number, (line, wanted) in enumerate(zip(before, after, strict=False), start=1):
        if line != wanted:
            yield f"{name}:{number}: {line!r} should be {wanted!r}"


def stale_documents(root: Path = ROOT) -> Iterator[str]:
    """What of the documents' tables and numbers is not what the results say."""
    for path in documents(root):
        name = path.relative_to(root).as_posix()
        old = path.read_text(encoding="utf-8")
        try:
            yield from differences(old, renewed(old, name), name)
        except (KeyError, ValueError) as error:
            yield f"{name}: {error}"


def stale_pictures(folder: Path = FIGURES) -> Iterator[str]:
    """Pictures that are missing, drawn from other rows, or drawn by nobody."""
    for name, picture in PICTURES.items():
        path = folder / name
        if not path.exists():
            yield f"docs/figures/{name} is missing"
        elif picture.fingerprint() not in path.read_text(encoding="utf-8"):
            yield f"docs/figures/{name} was drawn from other rows"
    for path in folder.glob("*"):
        if path.name not in PICTURES:
            yield f"docs/figures/{path.name} is drawn by no entry of figure_pictures.py"


def write() -> Iterator[str]:
    """Writes what differs; yields what was written."""
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = renewed(old, path.relative_to(ROOT).as_posix())
        if new != old:
            path.write_text(new, encoding="utf-8")
            yield str(path.relative_to(ROOT))
    FIGURES.mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        path = FIGURES / name
        if not path.exists() or picture.fingerprint() not in path.read_text(encoding="utf-8"):
            path.write_text(picture.svg(), encoding="utf-8")
            yield str(path.relative_to(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="change nothing")
    what.add_argument("--write", action="store_true", help="write what differs")
    if parser.parse_args().write:
        print(*write(), sep="\n")
        return 0
    found = [*stale_documents(), *stale_pictures()]
    print(*found, sep="\n", file=sys.stderr)
    if found:
        print("figures.py: run `python benchmarks/figures.py --write`", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
