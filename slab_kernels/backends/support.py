"""The support table: which backend runs which values and activations on which hardware.

Every answer is asked of `Backend.refusals`, the rules that dispatch goes by, so the table cannot
say anything else. What only this machine lacks (a driver, a compiler) is not in it.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch

from ..format.layout import GROUP_SIZES, INTEGER_RANGES, MAX_FEATURES, VALUE_TYPES
from . import dispatch
from .base import Backend, LinearProblem

VALUES = [
    (name, size)
    for name in VALUE_TYPES
    for size in ((None, *GROUP_SIZES) if name in INTEGER_RANGES else (None,))
]
ACTIVATIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# The CPU, then compute capabilities of GPUs, oldest first; 7.5 stands for all older ones. The CPU
# is one architecture: its kernels are compiled for every instruction set from one source and take
# the best at run time, so no rule depends on it.
GPUS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
ARCHITECTURES = {"CPU": None, **{f"{major}.{minor}": (major, minor) for major, minor in GPUS}}
# Sizes of a LinearProblem that a backend may limit, and their names in the table.
SIZES = {
    "rank": "rank",
    "planes": "planes",
    "adapter_rank": "adapter rank",
    "M": "M",
    "N": "N",
    "K": "K",
}
AWKWARD = LinearProblem(3, 17, 172)  # a backend that wants round sizes refuses it
# Makes the Triton backend's rules accept CPU tensors. That is for debugging and no support.
INTERPRETER = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Answer:
    """What a backend says to one kind of problem.

    reasons: why it refuses; empty where it accepts.
    most: field of LinearProblem -> the greatest size that it takes, where there is a limit.
    """

    backend: str
    values: str
    group_size: int | None
    activations: str
    architecture: str
    reasons: list[str]
    most: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The plain JSON form."""
        return asdict(self)


def answers() -> list[Answer]:
    """Every backend on every value type, group size, architecture and activation type, in that
    order."""
    with without(INTERPRETER):
        return [
            answer(dispatch.backend(name), values, size, activations, architecture)
            for name in dispatch.ORDER
            for values, size in VALUES
            for architecture in ARCHITECTURES
            for activations in ACTIVATIONS
        ]


@contextlib.contextmanager
def without(variable: str) -> Iterator[None]:
    """The environment without that variable: the table is the same on every machine."""
    before = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before


def answer(
    backend: Backend, values: str, group_size: int | None, activations: str, architecture: str
) -> Answer:
    """The backend's answer for rank 1, no adapter and awkward sizes; if it accepts, each size's
    limit."""
    device, capability = "cpu" if architecture == "CPU" else "cuda", ARCHITECTURES[architecture]
    problem = replace(
        AWKWARD, values=values, group_size=group_size, dtype=ACTIVATIONS[activations], device=device
    )
    reasons, most = backend.refusals(problem, capability), {}
    for name in () if reasons else SIZES:

        def refuses(size: int, name: str = name) -> bool:
            changes: dict[str, Any] = {name: size}
            return bool(backend.refusals(replace(problem, **changes), capability))

        # A size refused at the format's own limit has a lower one, below which all are taken.
        if refuses(MAX_FEATURES):
            most[name] = bisect.bisect_left(range(MAX_FEATURES), True, key=refuses) - 1
    return Answer(backend.name, values, group_size, activations, architecture, reasons, most)


def markdown() -> str:
    """The table in Markdown.

    A row is of value types that a backend treats alike, a column of neighbouring GPUs that all do.
    """
    cells = {
        key: cell(list(found))
        for key, found in groupby(
            answers(), lambda a: (a.backend, (a.values, a.group_size), a.architecture)
        )
    }
    rows: dict[tuple, list[tuple[str, int | None]]] = {}  # backend and its cells -> values
    for name in dispatch.ORDER:
        for stored in VALUES:
            rows.setdefault((name, *(cells[name, stored, a] for a in ARCHITECTURES)), []).append(
                stored
            )
    gpus = enumerate(list(ARCHITECTURES)[1:], start=2)  # with their places in a row's key
    runs = [list(run) for _, run in groupby(gpus, lambda gpu: [key[gpu[0]] for key in rows])]
    columns = [1, *(run[0][0] for run in runs)]
    lines = [["backend", "S values", "CPU", *headings([run[0][1] for run in runs])]]
    lines += [
        [f"`{key[0]}`", value_types(stored), *(key[column] for column in columns)]
        for key, stored in rows.items()
    ]
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return f"{head}{'|---' * len(lines[0])}|\n{''.join(body)}"


def cell(found: Sequence[Answer]) -> str:
    """The activations that run, those of equal limits together; a dash where none does."""
    able: dict[str, list[str]] = {}
    for one in found:
        if not one.reasons:
            limits = ", ".join(f"{SIZES[name]} ≤ {most}" for name, most in one.most.items())
            able.setdefault(limits, []).append(one.activations)
    texts = [
        ", ".join(names) + (f" ({limits})" if limits else "") for limits, names in able.items()
    ]
    return "; ".join(texts) or "–"


def headings(oldest: Sequence[str]) -> list[str]:
    """What stands above the columns of GPUs, given the oldest GPU of each."""
    newer = [*oldest[1:], None]
    below = [f"GPU below {after}" if after else "GPU" for after in newer[:1]]
    between = zip(oldest[1:], newer[1:], strict=True)
    return below + [
        f"GPU from {first}" + (f", below {after}" if after else "") for first, after in between
    ]


def value_types(stored: Sequence[tuple[str, int | None]]) -> str:
    """The names of value types; a type of which only some group sizes are meant says which."""
    texts = []
    for name, sizes in groupby(stored, lambda pair: pair[0]):
        listed = [f"groups of {size}" if size else "one scale per row" for _, size in sizes]
        whole = len(listed) == sum(name == values for values, _ in VALUES)
        texts.append(name if whole else f"{name} ({', '.join(listed)})")
    return ", ".join(texts)
