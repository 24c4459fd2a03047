"""The support table: which backend runs which values and activations on which hardware.

Every answer is asked of `Backend.refusals`, the rules that dispatch goes by, so the table cannot say anything else. What
only this machine lacks (a driver, a compiler) is not in it. This rewrites the table between a file's markers:

    python -m slab_kernels.support README.md
"""

from __future__ import annotations

import argparse
import bisect
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import dispatch
from .backends.base import Backend, LinearProblem
from .format import GROUP_SIZES, INTEGER_RANGES, MAX_FEATURES, VALUE_TYPES

VALUES = [(name, size) for name in VALUE_TYPES for size in ((None, *GROUP_SIZES) if name in INTEGER_RANGES else (None,))]
ACTIVATIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = None
# Compute capabilities; 7.5 stands for all older ones. The CPU is one column: its kernels are compiled for every instruction
# set from one source and take the best at run time, so no answer depends on it.
ARCHITECTURES = (CPU, (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
SIZES = {"rank": "rank", "adapter_rank": "adapter rank", "M": "M", "N": "N", "K": "K"}  # of LinearProblem; in the table
AWKWARD = LinearProblem(3, 17, 172)  # tails everywhere: a backend that wants round sizes says so instead of running it
BEGIN, END = "<!-- support: generated, do not edit -->\n", "<!-- /support -->\n"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """What a backend says to one kind of problem: why not, or nothing and the greatest sizes that it takes."""

    backend: str
    values: str
    group_size: int | None
    activations: str
    capability: tuple[int, int] | None
    reasons: list[str]
    most: dict[str, int]  # field of LinearProblem -> its limit, where there is one

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {
            "backend": self.backend,
            "values": self.values,
            "group_size": self.group_size,
            "activations": self.activations,
            "architecture": architecture(self.capability),
            "reasons": self.reasons,
            "most": self.most,
        }


def problem_of(values: str, group_size: int | None, activations: str, capability: tuple[int, int] | None) -> LinearProblem:
    """A problem of that kind: rank 1, no adapter, sizes that nothing divides."""
    device = "cpu" if capability is CPU else "cuda"
    return replace(AWKWARD, values=values, group_size=group_size, dtype=ACTIVATIONS[activations], device=device)


def answers() -> list[Answer]:
    """Every backend on every architecture, value type, group size and activation type; activations vary fastest."""
    return [
        answer(dispatch.backend(name), *stored, activations, capability)
        for name in dispatch.ORDER
        for stored in VALUES
        for capability in ARCHITECTURES
        for activations in ACTIVATIONS
    ]


def answer(
    backend: Backend, values: str, group_size: int | None, activations: str, capability: tuple[int, int] | None
) -> Answer:
    problem = problem_of(values, group_size, activations, capability)
    reasons, most = backend.refusals(problem, capability), {}
    for name in () if reasons else SIZES:
        limit = greatest(lambda size, name=name: not backend.refusals(replace(problem, **{name: size}), capability))
        if limit is not None:
            most[name] = limit
    return Answer(backend.name, values, group_size, activations, capability, reasons, most)


def greatest(accepts: Callable[[int], bool]) -> int | None:
    """The greatest size accepted, None if the format's greatest is; below an accepted size all are taken to be."""
    if accepts(MAX_FEATURES):
        return None
    return bisect.bisect_left(range(MAX_FEATURES), True, key=lambda size: not accepts(size)) - 1


def markdown() -> str:
    """The table: a row for the value types of a backend that are treated alike, a column for architectures alike."""
    cells = {
        key: cell(list(found))
        for key, found in groupby(answers(), lambda a: (a.backend, (a.values, a.group_size), a.capability))
    }
    columns = alike(ARCHITECTURES, lambda c: (c is CPU, *(cells[b, v, c] for b in dispatch.ORDER for v in VALUES)))
    lines = [["backend", "S values", *("CPU" if CPU in c else f"GPU {', '.join(map(architecture, c))}" for c in columns)]]
    lines.append(["---"] * len(lines[0]))
    for name in dispatch.ORDER:
        for stored in alike(VALUES, lambda v, name=name: tuple(cells[name, v, c] for c in ARCHITECTURES)):
            lines.append([f"`{name}`", value_types(stored), *(cells[name, stored[0], c[0]] for c in columns)])
    table = "".join(f"{'|'.join(['', *(f' {text} ' for text in line), ''])}\n" for line in lines)
    return table.replace(" --- ", "---") + (
        "\nA cell names the activations that run, or why none does. GPUs go by compute capability, 7.5 stands for all older ones.\n"
        f"Where nothing else is said, integers come in groups of {', '.join(map(str, GROUP_SIZES))} or with one scale a row, and "
        f"{', '.join(SIZES.values())} are free.\n"
    )


def cell(found: Sequence[Answer]) -> str:
    """One cell from the answers for every activation type."""
    able: dict[str, list[str]] = {}
    for one in found:
        if not one.reasons:
            limits = ", ".join(f"{SIZES[name]} ≤ {limit}" for name, limit in one.most.items())
            able.setdefault(limits, []).append(one.activations)
    if able:
        return "; ".join(", ".join(names) + (f" ({limits})" if limits else "") for limits, names in able.items())
    every = list(dict.fromkeys(reason for one in found for reason in one.reasons))
    common = [reason for reason in every if all(reason in one.reasons for one in found)]
    return f"no: {'; '.join(common or every)}"


def architecture(capability: tuple[int, int] | None) -> str:
    return "cpu" if capability is CPU else "{}.{}".format(*capability)


def value_types(stored: Sequence[tuple[str, int | None]]) -> str:
    """Names; a type of which only some group sizes are meant says which."""
    texts = []
    for name in dict.fromkeys(values for values, _ in stored):
        sizes = [size for values, size in stored if values == name]
        whole = len(sizes) == sum(values == name for values, _ in VALUES)
        listed = ", ".join(f"groups of {size}" if size else "a scale a row" for size in sizes)
        texts.append(name if whole else f"{name} ({listed})")
    return ", ".join(texts)


def alike(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items of equal key together, in the order of the first of each."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def renewed(text: str) -> str:
    """The text with the table between its markers made anew. Raises: ValueError if there are no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no line {BEGIN.strip()!r} with a later {END.strip()!r}")
    return f"{before}{BEGIN}{markdown()}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrite the support table in a file, between its markers.")
    parser.add_argument("file", type=Path, metavar="FILE", help="for example README.md")
    file = parser.parse_args().file
    try:
        file.write_text(renewed(file.read_text(encoding="utf-8")), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SystemExit(f"slab_kernels: {file}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
