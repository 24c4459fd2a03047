"""What a whole folder stores: packed linears, and by name all that is left beside them.

Counted from the headers of the shards; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format.layout import PackedLayout
from .packed import model_entries
from .packed_config import QUANT_METHOD, UNTIED_KEY, read_layouts
from .quantised.checkpoint import open_checkpoint
from .shards import TensorEntry

PARTS = ("linears", "embeddings", "head", "norms", "other")  # in the order in which they are named
HEADS = ("lm_head", "embed_out", "output", "head", "score")  # last names of output heads
NORMS = ("norm", "ln_", ".ln", "layernorm")  # what the name of a norm holds


@dataclass(frozen=True)
class Totals:
    """Sizes of a folder in bytes, and the numbers that it stands for.

    bytes: of all tensors. parameters: numbers of the dense model; a matrix that is both embedding
        and output head counts once. packed_bytes, packed_weights: of the packed linears without
        their biases, a packed output head among them. head_bytes: of a packed output head, 0 where
        it is not packed. dense: bytes by part of what is not packed, of PARTS, where there are any;
        embeddings in int8 are among the embeddings, with their scales.
    """

    bytes: int
    parameters: int
    packed_bytes: int
    packed_weights: int
    dense: dict[str, int]
    head_bytes: int = 0

    @property
    def megabytes(self) -> float:
        """Of 10⁶ bytes."""
        return self.bytes / 1e6

    @property
    def bits_per_parameter(self) -> float | None:
        """Of the whole folder; None where it stores nothing."""
        return 8 * self.bytes / self.parameters if self.parameters else None

    @property
    def bits_per_weight(self) -> float | None:
        """Of the packed linears; None where nothing is packed."""
        return 8 * self.packed_bytes / self.packed_weights if self.packed_weights else None

    def to_dict(self) -> dict[str, Any]:
        """As every JSON of the command line holds it."""
        return {
            "bytes": self.bytes,
            "parameters": self.parameters,
            "bits_per_parameter": self.bits_per_parameter,
            "packed_bytes": self.packed_bytes,
            "packed_head_bytes": self.head_bytes,
            "dense_bytes": self.dense,
        }

    def parts(self) -> list[str]:
        """Such as "packed linears 50.20 MB" and "embeddings 28.31 MB"; together they are all."""
        named = {"packed linears": self.packed_bytes - self.head_bytes}
        named["packed head"] = self.head_bytes
        named |= {f"dense {p}" if p in ("linears", "head") else p: b for p, b in self.dense.items()}
        return [f"{name} {size / 1e6:.2f} MB" for name, size in named.items() if size]

    def __str__(self) -> str:
        """Such as "78.90 MB in all, 4.69 bits per parameter (packed linears 50.20 MB, ...)"."""
        bits = self.bits_per_parameter
        each = "" if bits is None else f", {bits:.3f} bits per parameter"
        parts = f" ({', '.join(self.parts())})" if self.bytes else ""
        return f"{self.megabytes:.2f} MB in all{each}{parts}"


def read_totals(folder: Path | str) -> Totals:
    """The totals of a model folder, packed or dense.

    Weights in a format of another library count with the bytes that are stored of them.

    Raises: CheckpointError, VersionError as `open_checkpoint` and `read_layouts`.
    """
    checkpoint = open_checkpoint(Path(folder))
    entry = checkpoint.config.get("quantization_config")
    ours = isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD
    layouts = read_layouts(checkpoint) if ours else {}
    return folder_totals(model_entries(checkpoint, layouts), layouts, checkpoint.config)


def folder_totals(
    entries: Mapping[str, TensorEntry],
    layouts: Mapping[str, PackedLayout],
    config: Mapping[str, Any],
) -> Totals:
    """The totals of what a folder holds.

    Args:
        entries: every tensor by its stored name. layouts: of the packed modules.
        config: the content of config.json, which says how large the vocabulary is, what is tied
            and which embeddings are stored in int8.
    """
    vocabulary, tied, tables = _vocabulary(config), _is_tied(config), _int8_tables(config)
    matrices = {
        name: entry
        for name, entry in entries.items()
        if len(entry.shape) > 1 and entry.shape[0] == vocabulary
    }
    embedded = bool(tables) or any(not _is_head(name) for name in matrices)
    dense = dict.fromkeys(PARTS, 0)
    parameters = packed_bytes = head_bytes = 0
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if module in layouts and leaf != "bias":
            packed_bytes += entry.nbytes
            head_bytes += entry.nbytes if _is_packed_head(layouts, module, vocabulary) else 0
            continue
        part = _part(name, entry, name in matrices, embedded)
        if module in tables:
            part = "embeddings"
            parameters += math.prod(entry.shape) if leaf == "codes" else 0
        elif not (tied and part == "head"):
            parameters += math.prod(entry.shape)
        dense[part] += entry.nbytes
    weights = 0
    for name, layout in layouts.items():
        numbers = layout.out_features * layout.in_features
        weights += numbers
        if not (tied and _is_packed_head(layouts, name, vocabulary)):
            parameters += numbers
    return Totals(
        bytes=sum(entry.nbytes for entry in entries.values()),
        parameters=parameters,
        packed_bytes=packed_bytes,
        packed_weights=weights,
        dense={part: size for part, size in dense.items() if size},
        head_bytes=head_bytes,
    )


def _part(name: str, entry: TensorEntry, of_vocabulary: bool, embedded: bool) -> str:
    """The part of PARTS that a tensor which is not packed belongs to.

    embedded: whether another matrix is the embedding; a head alone is both.
    """
    if of_vocabulary:
        return "head" if _is_head(name) and embedded else "embeddings"
    lowered = name.lower()
    if any(word in lowered.rpartition(".")[0] for word in NORMS):
        return "norms"
    if "embed" in lowered or "wte" in lowered or "wpe" in lowered:
        return "embeddings"
    return "linears" if len(entry.shape) > 1 and min(entry.shape) > 1 else "other"


def _is_head(name: str) -> bool:
    """Whether a stored tensor is the weight of an output head, by its module's name."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in HEADS


def _is_packed_head(layouts: Mapping[str, PackedLayout], name: str, vocabulary: int | None) -> bool:
    return layouts[name].out_features == vocabulary and _is_head(f"{name}.weight")


def _of_text(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the language model, which a model of several modalities has inside."""
    inner = config.get("text_config")
    found = config.get(key)
    return inner.get(key) if found is None and isinstance(inner, dict) else found


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    found = _of_text(config, "vocab_size")
    return found if isinstance(found, int) else None


def _int8_tables(config: Mapping[str, Any]) -> dict[str, Any]:
    """Module name -> what quantization_config says of its int8 embeddings."""
    entry = config.get("quantization_config")
    found = entry.get("embeddings") if isinstance(entry, dict) else None
    return found if isinstance(found, dict) else {}


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether embedding and head are one matrix of the dense model."""
    shared = any(e.get("tied") for e in _int8_tables(config).values() if isinstance(e, dict))
    entry = config.get("quantization_config")
    untied = isinstance(entry, dict) and entry.get(UNTIED_KEY) is True
    return shared or untied or _of_text(config, "tie_word_embeddings") is True
