"""`python -m tests.matrix`: every type on every road, as a table; exit code 1 if one is wrong."""

from __future__ import annotations

import argparse
import os
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
    from matrix.roads import NOT_BUILT, REFUSED, RIGHT, WRONG

    by = {kind: [o for o in outcomes if o.outcome == kind] for kind in (RIGHT, WRONG, REFUSED, NOT_BUILT)}
    encoders = [o.type for o in by[REFUSED] if "encoder-decoder" in o.message]
    by[REFUSED] = [o for o in by[REFUSED] if o.type not in encoders]
    lines = [
        "# Architectures",
        "",
        f"Every causal language model that transformers {version} builds from a config, in some ten thousand random weights: compressed, loaded by",
        "`slab_kernels.load`, opened by plain `from_pretrained`, saved by `save_pretrained` and opened again by both, decompressed and opened without this",
        "library. *Right* means that all of them compute what the dense model computes with the packed weights in it (fp32, 1e-4 of the largest logit) and hold",
        "the same tensors bit by bit. Written by `python -m tests.matrix --write docs/architectures.md`; a test compares a sample of it.",
        "",
        f"{len(outcomes)} types: {len(by[RIGHT])} right, {len(by[WRONG])} wrong, {len(by[REFUSED]) + len(encoders)} refused in words "
        f"({len(encoders)} of them encoder-decoders), {len(by[NOT_BUILT])} not built at this size.",
        "",
        "## Right",
        "",
        "| type | packed linears | of | left dense by `--skip`, as the refusal advises |",
        "|---|---|---|---|",
        *(f"| `{o.type}` | {o.packed} | {o.linears} | {' '.join(f'`{s}`' for s in o.skip)} |" for o in by[RIGHT]),
    ]
    for kind, title in ((WRONG, "Wrong"), (REFUSED, "Refused")):
        if by[kind]:
            lines += ["", f"## {title}", "", "| type | where | what is said |", "|---|---|---|"]
            lines += [f"| `{o.type}` | {o.road} | {cell(o.message)} |" for o in by[kind]]
    if encoders:
        lines += ["", f"Encoder-decoders, all refused by that word: {', '.join(f'`{name}`' for name in encoders)}."]
    if by[NOT_BUILT]:
        lines += ["", "## Not built", "", "transformers builds none of these from the tiny config, so nothing is known of them.", "", "| type | why |", "|---|---|"]
        lines += [f"| `{o.type}` | {cell(o.message)} |" for o in by[NOT_BUILT]]
    return "\n".join(lines) + "\n"


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
    from matrix.roads import WRONG, travel

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcomes, began = [], time.monotonic()
    for name in given.types or types():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as top:
            outcomes.append(travel(name, Path(top)))
        found = outcomes[-1]
        print(f"{found.type:26} {found.outcome:9} {found.packed:3}/{found.linears:<3} {time.monotonic() - start:4.1f} s  {found.road} {found.message}", flush=True)
    counts = {o.outcome: sum(other.outcome == o.outcome for other in outcomes) for o in outcomes}
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())), f"of {len(outcomes)} types in {time.monotonic() - began:.0f} s")
    if given.write:
        given.write.write_text(page(outcomes, transformers.__version__), encoding="utf-8")
    return 1 if WRONG in counts else 0


if __name__ == "__main__":
    sys.exit(main())
