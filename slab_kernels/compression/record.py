"""What a compression run reports: one record at the end, events on the way, and the progress bar fed by them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..errors import CheckpointError
from ..format.layout import MAX_FEATURES
from ..models.folder import RECORD_NAME
from ..models.shards import read_json
from ..terminal import visible

MAX_NUMBER = 1 << 63  # no count in a record is larger, and floats hold it


@dataclass(frozen=True)
class LayerRecord:
    """One compressed linear.

    error: ||X (W - W')^T|| / ||X W^T|| in Frobenius norm, X the calibration inputs of the compressed prefix, W' the
    weight as stored; heldout_error the same on held-out text, None where not measured. bits_per_weight: bytes of its
    tensors on disk (bias not counted) times 8 over shape[0] * shape[1].
    """

    name: str
    block: int
    shape: tuple[int, int]
    method: str
    pattern: str
    rank: int
    values: str
    bits_per_weight: float
    error: float
    heldout_error: float | None
    seconds: float
    group: tuple[str, ...] = ()  # layers that share the input, compressed together
    planes: int = 1
    adapter_rank: int = 0
    peak_bytes: int = (
        0  # memory while it was decomposed: the GPU's, or what the process held on a CPU
    )


@dataclass(frozen=True)
class MatchRecord:
    """How far a block's output was from the target, ||y - target|| / ||target - input|| over held-back text, before and after
    transformer matching.
    """

    block: int
    before: float
    after: float
    epochs: int  # after which the best was reached; 0: training did not help and was dropped
    seconds: float


@dataclass(frozen=True)
class RunRecord:
    """A finished run, as slab_run.json holds it. Same settings, same machine: everything but the seconds is the same."""

    model: str
    settings: dict
    stored: str  # "packed" | "dense"
    layers: list[LayerRecord]
    tokens: int
    hidden_state_bytes: int  # what the calibration samples' hidden states took beside one block
    seconds: float
    versions: dict = field(default_factory=dict)
    matching: list[MatchRecord] = field(default_factory=list)
    ignored_tensors: list[str] = field(default_factory=list)
    shards: dict = field(default_factory=dict)  # file name -> SHA-256 of what the run wrote there

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all compressed weights."""
        weights = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        return sum(
            n * layer.bits_per_weight for n, layer in zip(weights, self.layers, strict=True)
        ) / sum(weights)

    @property
    def mean_error(self) -> float:
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict:
        return asdict(self) | {
            "bits_per_weight": self.bits_per_weight,
            "mean_error": self.mean_error,
        }

    @classmethod
    def from_dict(cls, content: dict) -> RunRecord:
        """Raises: CheckpointError if `content` is no run record."""
        parts = {"layers": layer_from_dict, "matching": match_from_dict}
        if not isinstance(content, dict) or not content.get("layers"):
            raise CheckpointError(f"{RECORD_NAME} lists no layers; {DAMAGED}")
        for name in parts.keys() & content.keys():
            if not isinstance(content[name], list):
                raise CheckpointError(f"{RECORD_NAME} has {name}={short(content[name])}; {DAMAGED}")
        made = {
            name: [make(entry) for entry in content.get(name, [])] for name, make in parts.items()
        }
        return _checked(cls, content | made)


DAMAGED = "it is damaged or of another program: copy it again, or delete it"
NUMBERS = {"int": (int,), "float": (int, float)}
PLAIN = {"str": str, "dict": dict}


def _checked(cls: type, content: dict) -> Any:
    """An instance of a dataclass of this file, every value of the type that its field declares;
    unknown keys are left out.

    Raises: CheckpointError.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{RECORD_NAME} holds {short(content)} for a {cls.__name__}; {DAMAGED}"
        )
    known = {}
    for f in fields(cls):
        if f.name not in content:
            if f.default is MISSING and f.default_factory is MISSING:
                raise CheckpointError(
                    f"{RECORD_NAME} lacks {f.name!r} in a {cls.__name__}; {DAMAGED}"
                )
            continue
        value = content[f.name]
        if not _fits(value, f.type):
            raise CheckpointError(
                f"{RECORD_NAME} has {f.name}={short(value)}, no {f.type}; {DAMAGED}"
            )
        known[f.name] = tuple(value) if f.type.startswith("tuple") else value
    return cls(**known)


def _fits(value, kind: str) -> bool:
    """Whether a value from JSON is of the type that an annotation of this file names."""
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind in NUMBERS:
        return type(value) in NUMBERS[kind] and (type(value) is float or abs(value) <= MAX_NUMBER)
    if kind in PLAIN:
        return isinstance(value, PLAIN[kind])
    if not isinstance(value, list | tuple):
        return False
    if kind == "tuple[int, int]":  # the shape of a layer
        return len(value) == 2 and all(type(n) is int and 0 < n <= MAX_FEATURES for n in value)
    return all(type(entry).__name__ in kind for entry in value)  # list[str], list[LayerRecord], ...


def read_record(folder: Path) -> RunRecord | None:
    """What slab_run.json of a folder holds; None if there is none. Raises: CheckpointError if it
    is no run record."""
    path = folder / RECORD_NAME
    return RunRecord.from_dict(read_json(path)) if path.is_file() else None


def match_from_dict(content: dict | None) -> MatchRecord | None:
    """Raises: CheckpointError."""
    return None if content is None else _checked(MatchRecord, content)


def layer_from_dict(content: dict) -> LayerRecord:
    """Raises: CheckpointError."""
    return _checked(LayerRecord, content)


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a run. kind: "start", "warning", "resumed", "budget", "layer", "matching", "block" or "done"; `str(event)` is one line for people."""

    kind: str
    block: int = 0
    blocks: int = 0
    done: int = 0  # layers finished
    layers: int = 0  # layers in all
    layer: LayerRecord | None = None
    message: str = ""

    def __str__(self) -> str:
        if self.layer is None:
            return self.message
        held = (
            "" if self.layer.heldout_error is None else f" held-out {self.layer.heldout_error:.4f}"
        )
        return (
            f"[{self.done}/{self.layers}] {self.layer.name} error {self.layer.error:.4f}{held} "
            f"{self.layer.bits_per_weight:.3f} bits per weight {self.layer.seconds:.1f} s"
        )


def listener(progress) -> Callable[[ProgressEvent], None]:
    """What to call with events: `progress` itself, a bar on stderr for True (and for None on a terminal), or nothing."""
    if callable(progress):
        return progress
    if progress or (progress is None and sys.stderr.isatty()):
        return _Bar()
    return lambda event: None


class _Bar:
    """A rich progress bar on stderr under one line a layer."""

    def __init__(self):
        self.bar = None

    def __call__(self, event: ProgressEvent) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self.bar is None:
            columns = (
                TextColumn("compress"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"), TimeElapsedColumn(),
                TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("compress", total=None)
            self.bar.start()
        if str(event):
            self.bar.console.print(visible(str(event)), highlight=False, markup=False)
        self.bar.update(self.task, completed=event.done, total=event.layers or None)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
