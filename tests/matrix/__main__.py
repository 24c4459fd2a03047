"""`python -m tests.matrix`: every type on every road, as a table; exit code 1 if one is wrong."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def page(outcomes: list, version: str) -> str:
    """docs/architectures.md."""
    from matrix.roads import LATE, NOT_BUILT, REFUSED, RIGHT, WRONG

    by = {
        kind: [o for o in outcomes if o.outcome == kind]
        for kind in (RIGHT, WRONG, LATE, REFUSED, NOT_BUILT)
    }
    lines = [
        "# Architectures",
        "",
        f"Every causal language model of transformers {version}, built from a config with some ten",
        "thousand random weights and taken along every road: compressed, loaded by `load`, opened",
        "by plain `from_pretrained`, saved by `save` and `save_pretrained`, opened again by both,",
        "decompressed and opened without this library. *Right* means that all of them compute what",
        "the dense model computes with the packed weights in it (fp32, 1e-4 of the largest logit),",
        "and that both loaders give the same tensors bit by bit. This page is written by",
        "`python -m tests.matrix --write docs/architectures.md`; `make test-all` runs all of it.",
        "",
        f"{len(outcomes)} types: {len(by[RIGHT])} right, {len(by[WRONG])} wrong, "
        f"{len(by[LATE])} refused on a later road, {len(by[REFUSED])} refused by `compress`, "
        f"{len(by[NOT_BUILT])} not built at this size.",
        "",
        "## Right",
        "",
        "Packed are the `nn.Linear` of the decoder blocks and the matrices of their experts, each",
        "counted once. Other linears are output heads, vision and audio towers, and what `--skip`",
        "leaves dense because a refusal advises it. Routers of experts stay dense.",
        "",
        "| type | packed linears | of | `--skip` |",
        "|---|---|---|---|",
        *(
            f"| `{o.type}` | {o.packed} | {o.linears} | {' '.join(f'`{s}`' for s in o.skip)} |"
            for o in by[RIGHT]
        ),
    ]
    for kind, title in (
        (WRONG, "Wrong"),
        (LATE, "Compressed, and refused later"),
        (REFUSED, "Refused by compress"),
    ):
        if by[kind]:
            lines += [
                "",
                f"## {title}",
                "",
                "| types | where | what is said, of the first |",
                "|---|---|---|",
            ]
            lines += [
                f"| {names(group)} | {group[0].road} | {cell(group[0].message)} |"
                for group in alike(by[kind])
            ]
    if by[NOT_BUILT]:
        lines += [
            "",
            "## Not built",
            "",
            "Nothing is known of these: transformers builds none from the common keys alone,",
            "needs another package for them, or they are another type under a second name.",
            "",
        ]
        lines += [
            "| type | why |",
            "|---|---|",
            *(f"| `{o.type}` | {cell(o.message)} |" for o in by[NOT_BUILT]),
        ]
    return "\n".join(lines) + "\n"


def names(group: list) -> str:
    return ", ".join(f"`{o.type}`" for o in group)


def alike(outcomes: list) -> list[list]:
    """Outcomes whose messages differ in names and numbers only; the largest group first."""
    groups: dict[tuple, list] = {}
    for o in outcomes:
        said = re.sub(r"'[^']*'|\S*[._/\d]\S*|\w+For\w+", "*", o.message)
        groups.setdefault((o.road, said), []).append(o)
    return sorted(groups.values(), key=len, reverse=True)


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:300]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--write", type=Path, help="the page to write")
    given = parser.parse_args(arguments)

    import torch
    import transformers

    from matrix.configs import types
    from matrix.roads import RIGHT, WRONG, travel

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcomes, began = [], time.monotonic()
    for name in given.types or types():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as top:
            outcomes.append(travel(name, Path(top)))
        found, seconds = outcomes[-1], time.monotonic() - start
        packed = f"{found.packed:3}/{found.linears:<3}"
        said = "" if found.outcome == RIGHT else f"{found.road} {found.message}"
        print(f"{name:26} {found.outcome:9} {packed} {seconds:4.1f} s  {said}", flush=True)
    counts = {o.outcome: sum(other.outcome == o.outcome for other in outcomes) for o in outcomes}
    print(
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())),
        f"of {len(outcomes)} types in {time.monotonic() - began:.0f} s",
    )
    if given.write:
        given.write.write_text(page(outcomes, transformers.__version__), encoding="utf-8")
    return 1 if WRONG in counts else 0


if __name__ == "__main__":
    sys.exit(main())
