"""The record of a compression run, as slab_run.json holds it."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..errors import CheckpointError
from ..format.layout import MAX_FEATURES
from ..models.folder import RECORD_NAME
from ..models.shards import read_json

MAX_NUMBER = 1 << 63  # No count in a record is larger, and a float holds it.


@dataclass(frozen=True)
class LayerRecord:
    """One compressed linear.

    error: ||X (W - W')^T|| / ||X W^T|| in the Frobenius norm. X are its calibration inputs in the
        model whose earlier layers are compressed, W' is the weight as stored.
    heldout_error: the same on the held-out text, or without one on the calibration windows that
        were held back; None where there are none of either.
    bits_per_weight: 8 times the bytes of its tensors on disk (its bias not counted) per weight.
    group: the layers that read the same input and were compressed together; of an expert's, those
        of that expert.
    group_size: inputs that share a scale; None for one scale per row, or values without scales.
    peak_bytes: the most memory while it was decomposed: the GPU's, on a CPU the process's.
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
    group: tuple[str, ...] = ()
    planes: int = 1
    group_size: int | None = None
    adapter_rank: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class MatchRecord:
    """What transformer matching did to one block.

    before, after: the distance ||y - target|| / ||target - input|| of the block's output y on the
        windows that were held back.
    epochs: those after which the best was reached; 0 where training did not help and was dropped.
    """

    block: int
    before: float
    after: float
    epochs: int
    seconds: float


@dataclass(frozen=True)
class ExpertsRecord:
    """How the experts of one block were calibrated.

    module: their name in the model. tokens: of the windows that layers are fitted to, those that
    the router sent to each expert before the block was compressed. of: all tokens of those windows.
    needed: how many a method needs of an expert (`compression.routing`). fed: the experts that got
    fewer, and were shown all tokens.
    """

    block: int
    module: str
    tokens: list[int]
    of: int
    needed: int
    fed: list[int]

    def with_fed(self, fed: list[int]) -> ExpertsRecord:
        """The same with other experts that were shown all tokens."""
        return replace(self, fed=fed)

    def __str__(self) -> str:
        """A line for people, with the counts of the experts."""
        listed = ", ".join(map(str, self.tokens))
        if len(self.tokens) > 16:
            listed = f"{min(self.tokens)} to {max(self.tokens)} ({len(self.tokens)} experts)"
        said = f"{self.module}: of {self.of} tokens each expert got {listed}"
        if not self.fed:
            return said
        few = ", ".join(f"{n} ({self.tokens[n]})" for n in self.fed[:8])
        more = f" and {len(self.fed) - 8} more" if len(self.fed) > 8 else ""
        return (
            f"{said}; fewer than the {self.needed} that are needed came to expert {few}{more}, "
            f"fed all {self.of} instead"
        )


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    With the same settings on the same machine everything but seconds and memory is the same.

    settings: what was asked for, with the preset that it amounts to ("preset", None for none); a
        group size may be "auto" there, and of a layer is the number that was used.
    stored: "packed" or "dense".
    origin: of a model of the hub {"name", "revision", "subfolder", "commit"}; else empty.
    dequantised: the format in which the weights were stored before, such as "fp8, blocks of
        128x128"; empty where they were dense.
    tokens: of the calibration text. held_back: how many of its windows no weight was fitted to.
    texts: what was read, as "calibration" and as "heldout" (None without one): {"kind", "file",
        "field", "rows", "windows", "tokens", "sha256" of the token ids}.
    hidden_state_bytes: what the hidden states of the texts took beside one block.
    ignored_tensors: names in the checkpoint that the model does not have.
    shards: file name -> SHA-256 of what the run wrote there.
    """

    model: str
    settings: dict
    stored: str
    layers: list[LayerRecord]
    tokens: int
    hidden_state_bytes: int
    seconds: float
    versions: dict = field(default_factory=dict)
    matching: list[MatchRecord] = field(default_factory=list)
    ignored_tensors: list[str] = field(default_factory=list)
    shards: dict = field(default_factory=dict)
    held_back: int = 0
    texts: dict = field(default_factory=dict)
    origin: dict = field(default_factory=dict)
    experts: list[ExpertsRecord] = field(default_factory=list)
    dequantised: str = ""

    @property
    def weights(self) -> int:
        """How many weights were compressed."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all layers."""
        bits = sum(math.prod(layer.shape) * layer.bits_per_weight for layer in self.layers)
        return bits / self.weights

    @property
    def mean_error(self) -> float:
        """The mean over all layers on the calibration text, each counted once."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    @property
    def mean_heldout_error(self) -> float | None:
        """The mean over all layers on text that none was fitted to; None where there was none."""
        errors = [e for layer in self.layers if (e := layer.heldout_error) is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def named_error(self) -> str:
        """The mean error that judges the run, by its name and as a number."""
        return named_error(self.mean_error, self.mean_heldout_error)

    def to_dict(self) -> dict:
        return asdict(self) | {
            "bits_per_weight": self.bits_per_weight,
            "mean_error": self.mean_error,
            "mean_heldout_error": self.mean_heldout_error,
        }

    @classmethod
    def from_dict(cls, content: dict) -> RunRecord:
        """Raises: CheckpointError if `content` is no run record."""
        parts = {
            "layers": layer_from_dict,
            "matching": match_from_dict,
            "experts": experts_from_dict,
        }
        if not isinstance(content, dict) or not content.get("layers"):
            raise CheckpointError(f"{RECORD_NAME} lists no layers; {DAMAGED}")
        for name in parts.keys() & content.keys():
            if not isinstance(content[name], list):
                raise CheckpointError(f"{RECORD_NAME} has {name}={short(content[name])}; {DAMAGED}")
        made = {
            name: [make(entry) for entry in content.get(name, [])] for name, make in parts.items()
        }
        return _checked(cls, content | made)


def named_error(calibration: float, heldout: float | None) -> str:
    """A mean error by its name and as a number: the held-out one wherever it is known."""
    if heldout is None:
        return f"mean calibration error {calibration:.4f}"
    return f"mean held-out error {heldout:.4f}"


DAMAGED = "it is damaged or of another program: copy it again, or delete it"
NUMBERS = {"int": (int,), "float": (int, float)}
PLAIN = {"str": str, "dict": dict}


def _checked(cls: type, content: Any) -> Any:
    """An instance of a dataclass of this file, made of what JSON held; unknown keys are left out.

    Raises: CheckpointError where a value has not the type that its field declares.
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
        if not _fits(value, str(f.type)):
            raise CheckpointError(
                f"{RECORD_NAME} has {f.name}={short(value)}, no {f.type}; {DAMAGED}"
            )
        known[f.name] = tuple(value) if f.type.startswith("tuple") else value
    return cls(**known)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value from JSON has the type `kind`, an annotation of this file."""
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind in NUMBERS:
        return type(value) in NUMBERS[kind] and (type(value) is float or abs(value) <= MAX_NUMBER)
    if kind in PLAIN:
        return isinstance(value, PLAIN[kind])
    if not isinstance(value, list | tuple):
        return False
    if kind == "tuple[int, int]":  # It is the shape of a layer.
        return len(value) == 2 and all(type(n) is int and 0 < n <= MAX_FEATURES for n in value)
    # What is left is list[str], list[LayerRecord] and the like.
    return all(type(entry).__name__ in kind for entry in value)


def read_record(folder: Path) -> RunRecord | None:
    """What slab_run.json of a folder holds, None if there is none.

    Raises: CheckpointError if it is no run record.
    """
    path = folder / RECORD_NAME
    return RunRecord.from_dict(read_json(path)) if path.is_file() else None


def match_from_dict(content: dict | None) -> MatchRecord | None:
    """Raises: CheckpointError."""
    return None if content is None else _checked(MatchRecord, content)


def experts_from_dict(content: dict) -> ExpertsRecord:
    """Raises: CheckpointError."""
    return _checked(ExpertsRecord, content)


def layer_from_dict(content: dict) -> LayerRecord:
    """Raises: CheckpointError."""
    return _checked(LayerRecord, content)
