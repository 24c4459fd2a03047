"""What `bench_methods.py` compares: every method of the library, and dense integers beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    family: which line or marker of the picture it belongs to.
    settings: keywords of `compress`.
    integer: bits and group size of a dense integer weight; None for a method of the library.
    """

    label: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    integer: tuple[int, int] | None = None


# Of a method from a paper: as it was published, which is without our last refit.
PUBLISHED = {"polish": 0}
DENSE = {"embeddings": "dense", "head": False}
# Values and planes of ours, as they are measured.
OWN = (
    ("fp16", 1), ("fp16", 2), ("int8", 1), ("int3", 1), ("int3", 2), ("int4", 1), ("int4", 2),
    ("int4", 3),
)  # fmt: skip
PRESETS = ("small", "balanced", "exact")
BUDGETS = (3.6, 4.6)  # stored bits per weight of the searches
PERMUTED = ("preset balanced", "slab fp16")  # measured again in other orders of channels
# Entries that are measured again with transformer matching, which takes minutes each.
MATCHED = (
    "slab fp16", "slab fp16, permuted", "slab int3, 2 planes", "slab int4, 2 planes",
    "slab int4, 3 planes", "slab, searched for 3.6 bits", "slab, searched for 4.6 bits",
    "gptq int4, groups of 64", "gptq int4, groups of 32", "gptq int3, groups of 32",
    "threebasil polished",
)  # fmt: skip
# Whose family the matched twin of an entry belongs to.
MATCHED_FAMILY = {
    "slab": "slab, matched",
    "slab, searched": "slab, matched",
    "gptq": "gptq, matched",
    "2:4, polished": "2:4, matched",
}


def entries(adapter_rank: int, epochs: int) -> list[Entry]:
    """All rows in the order in which they are measured; matched ones, which take longest, last.

    adapter_rank: rank of P Q^T in the rows of `slab` that have it.
    epochs: of transformer matching, in the matched rows.
    """
    rows = dense_entries() + own_entries(adapter_rank) + published_entries()
    return rows + matched_entries(rows, epochs)


def dense_entries() -> list[Entry]:
    """Dense integer weights."""
    return [
        Entry(
            f"{name} int{bits}, groups of {size}",
            name,
            # What is not 2:4 is written as a dense checkpoint; these methods keep every weight.
            {"method": name, "pattern": "50%"},
            (bits, size),
        )
        for name in ("rtn", "gptq")
        for bits in (4, 3)
        for size in (128, 64, 32)
    ]


def published_entries() -> list[Entry]:
    """Methods of other papers, as published and with our last refit."""
    before, after = "2:4, published", "2:4, polished"
    names = ("magnitude", "wanda", "sparsegpt", "slab-paper")
    rows = [Entry(name, before, {"method": name}) for name in names]
    for name in ("alps", "eora", "oats", "sslc", "hassle-free", "threebasil"):
        rows.append(Entry(f"{name} as published", before, {"method": name, **PUBLISHED}))
        rows.append(Entry(f"{name} polished", after, {"method": name}))
    basil = {"method": "threebasil", "values": "int4"}
    rows.append(Entry("threebasil int4 polished", after, basil))
    inside = {"method": "hassle-free", "inner": "alps", **PUBLISHED}
    rows.append(Entry("hassle-free, alps inside", before, inside))
    for values in ("fp16", "int4"):
        slim = {"method": "slim", "values": values}
        once = {**slim, "alternations": 1, **PUBLISHED}
        rows.append(Entry(f"slim {values} as published", before, once))
        rows.append(Entry(f"slim {values} polished", after, slim))
    return rows


def own_entries(adapter_rank: int) -> list[Entry]:
    """Rows of the library's own method: first what each preset chooses, then single settings."""
    rows = [Entry(f"preset {name}", "preset", {"preset": name}) for name in PRESETS]
    for values, planes in OWN:
        name = f"slab {values}" + (f", {planes} planes" if planes > 1 else "")
        rows.append(Entry(name, "slab", {"values": values, "planes": planes, **DENSE}))
    for values in ("fp16", "int4"):
        both = {"values": values, "planes": 1, "adapter_rank": adapter_rank, **DENSE}
        rows.append(Entry(f"slab {values}, S + P Q^T only", "slab", {**both, "rank": 0}))
        rows.append(Entry(f"slab {values}, with P Q^T", "slab", both))
    permuted = {row.label: row for row in rows if row.label in PERMUTED}
    for label, row in permuted.items():
        settings = {**row.settings, "permute": True}
        rows.append(replace(row, label=f"{label}, permuted", settings=settings))
    for bits in BUDGETS:
        searched = {"bits": bits, "group_size": None, **DENSE}
        rows.append(Entry(f"slab, searched for {bits} bits", "slab, searched", searched))
    return rows


def matched_entries(rows: list[Entry], epochs: int) -> list[Entry]:
    """Some of the rows again, with transformer matching."""
    return [
        replace(
            row,
            label=f"{row.label}, matched",
            family=MATCHED_FAMILY[row.family],
            settings={**row.settings, "matching": epochs},
        )
        for row in rows
        if row.label in MATCHED
    ]
