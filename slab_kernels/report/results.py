"""What a report shows: measured models, timings of linears, tables of any other kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DENSE, OURS, PAPERS = "dense", "slab", "slab-paper"  # methods that a report sets apart


@dataclass(frozen=True)
class Result:
    """One model, compressed or dense: a row of the table. None where nothing was measured."""

    method: str
    pattern: str | None = None
    rank: int | None = None
    values: str | None = None
    bits_per_weight: float | None = None  # of the compressed linears, factors and scales included
    perplexity: float | None = None
    layer_error: float | None = None  # mean over the layers
    tokens_per_second: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # layer -> relative output error
    heldout: bool = False  # the errors are of held-out text, not of the calibration inputs
    folder: str | None = None
    label: str = ""
    bytes: int | None = None  # of all tensors on disk, embeddings included
    continuation: str | None = None  # of the report's prompt
    # layer -> part (values, metadata, signs, scales, factors, adapters) -> bits per weight
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    crop: dict[str, Any] | None = None  # a corner of one weight and of its parts
    parameters: int | None = None  # numbers of the dense model, a tied matrix once
    bits_per_parameter: float | None = None  # of all tensors on disk
    packed_bytes: int | None = None  # of the packed linears, a packed output head included
    packed_head_bytes: int | None = None
    dense_bytes: dict[str, int] = field(default_factory=dict)  # part -> bytes of what is not packed
    kl: float | None = None  # mean of KL(dense || this) in nats per token
    kl_p99: float | None = None  # its 99th percentile
    top1: float | None = None  # share of tokens whose most probable successor is the dense model's
    perplexity_ratio: float | None = None  # to the dense model's on the same text
    perplexity_ratio_stderr: float | None = None
    # For each number of texts at once what `evaluate.decoding` measured.
    decoding: tuple[dict[str, Any], ...] = ()

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE

    @property
    def stored(self) -> dict[str, int]:
        """Part -> bytes of all that is on disk, where they are known."""
        head = self.packed_head_bytes or 0
        packed = {"packed linears": (self.packed_bytes or 0) - head, "packed head": head}
        dense = {
            f"dense {n}" if n in ("linears", "head") else n: b for n, b in self.dense_bytes.items()
        }
        return {name: size for name, size in (packed | dense).items() if size > 0}


@dataclass(frozen=True)
class Table:
    """Measurements of another kind, as they are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Source:
    """A JSON file that was read: its name, and its text for who wants to compute with it."""

    name: str
    text: str


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    results: tuple[Result, ...] = ()
    bench: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    notes: tuple[str, ...] = ()  # device, versions, text and window: the small print
    tables: tuple[Table, ...] = ()
    prompt: str | None = None  # what the models continue
    run: tuple[tuple[str, str], ...] = ()  # when, how long and by which command it was measured
    sources: tuple[Source, ...] = ()
    compares_methods: bool = False  # a benchmark of many settings, not the story of one model

    @property
    def dense(self) -> Result | None:
        return next((r for r in self.results if r.is_dense), None)

    @property
    def compressed(self) -> list[Result]:
        return [r for r in self.results if not r.is_dense]

    @property
    def main(self) -> Result | None:
        """The compressed model that the page is about: ours if there is one of it, else the one
        with the lowest perplexity, else the first."""
        ours = [r for r in self.compressed if r.method == OURS]
        if len(ours) == 1:
            return ours[0]
        measured = [r for r in ours or self.compressed if r.perplexity is not None]
        if measured:
            return min(measured, key=lambda r: r.perplexity or 0.0)
        return next(iter(ours or self.compressed), None)

    @property
    def is_benchmark(self) -> bool:
        """Whether it is about kernels or methods rather than about one compressed model."""
        return self.compares_methods or not self.results
