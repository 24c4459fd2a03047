"""What a model folder holds, layer by layer, counted from the bytes on disk; no weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compression.record import LayerRecord, read_record
from ..errors import CheckpointError
from ..format import TABLE_NAMES, PackedLayout, paddings
from ..models.folder import Checkpoint, hub_folder
from ..models.hub import HubArguments
from ..models.packed import model_entries, read_tables
from ..models.packed_config import QUANT_METHOD, read_layouts
from ..models.quantised.checkpoint import Dequantised, open_checkpoint
from ..models.shards import TensorEntry
from ..models.totals import folder_totals

FACTORS = ("U", "V", "P", "Q")
# Tensor -> the part of a layer that it is counted to, where that has another name.
PARTS = {"U": "factors", "V": "factors", "P": "adapters", "Q": "adapters", "weight": "values"}


def inspect(
    folder: Path | str,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """A packed, pruned-but-dense or dense folder: its settings, sizes and errors, and its layers'.

    folder: by its path, or the name of a model on the hub, with the revision, subfolder and token
    by which it is found there.

    Returns: {"folder", "model", "stored", "format_version", "method", "preset", "weights",
        "bits_per_weight", "mean_error", "mean_heldout_error", "padding", "layers", "embeddings",
        and what `Totals.to_dict` has of all tensors: "bytes", "parameters", "bits_per_parameter",
        "dense_bytes" by part}; what is not known is None. embeddings: those of int8 rows, each with
        its shape, bytes and the head that is tied.
        bits_per_weight of a layer counts every stored tensor of it except its bias,
        factor_bits_per_weight the part of U, V, P and Q, and `parts` holds the bits per weight of
        values, metadata, signs, scales, factors (U and V) and adapters (P and Q). bits_per_weight
        of the folder is over all its layers together. `padding` holds the fields of a
        `format.Padding` for the layers whose inputs are padded.
    Raises: CheckpointError for a folder that is no checkpoint or that is stored in a format of
        another library which is not read (`models.quantised`), or whose shards, index, config.json
        and record disagree; VersionError if a newer library packed it.
    """
    folder = hub_folder(folder, HubArguments(revision, subfolder, token))
    checkpoint = open_checkpoint(folder)
    record = read_record(folder)
    recorded = {layer.name: layer for layer in record.layers} if record else {}
    entry = checkpoint.config.get("quantization_config")
    ours = isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD
    described: dict[str, Any] = entry if ours and isinstance(entry, dict) else {}
    layouts = read_layouts(checkpoint) if ours else {}
    stored: dict[str, dict[str, TensorEntry]] = {}
    entries = model_entries(checkpoint, layouts)
    for tensor, found in entries.items():
        name, _, leaf = tensor.rpartition(".")
        stored.setdefault(name, {})[leaf] = found
    matrices = [
        n for n, parts in stored.items() if "weight" in parts and len(parts["weight"].shape) == 2
    ]
    layers = [
        _layer(name, stored.get(name, {}), layouts.get(name), recorded.get(name), described)
        for name in layouts or recorded or matrices
    ]
    if isinstance(checkpoint, Dequantised):
        for layer in layers:
            if f"{layer['name']}.weight" in checkpoint.quantised:
                layer["values"] = checkpoint.method
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    bits = sum(math.prod(layer["shape"]) * layer["bits_per_weight"] for layer in layers)
    pruned = "pruned, dense" if recorded else "dense"
    return {
        "folder": str(folder),
        "model": record.model if record else _text(checkpoint.config, "model_type"),
        "stored": "packed" if layouts else pruned,
        "format_version": described.get("format_version"),
        "method": _text(record.settings if record else described, "method"),
        "preset": _text(record.settings, "preset") if record else None,
        "weights": weights,
        "bits_per_weight": bits / weights if weights else None,
        "mean_error": _mean(layer["error"] for layer in layers),
        "mean_heldout_error": _mean(layer["heldout_error"] for layer in layers),
        "padding": [asdict(padding) for padding in paddings(layouts.values())],
        **folder_totals(entries, layouts, checkpoint.config).to_dict(),
        "layers": layers,
        "embeddings": _embeddings(checkpoint) if ours else [],
    }


def _mean(errors: Iterable[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None


def _embeddings(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The embeddings of int8 rows. Raises: CheckpointError."""
    found = []
    for name, table in read_tables(checkpoint).items():
        parts = [checkpoint.entries.get(f"{name}.{part}") for part in TABLE_NAMES]
        if parts[0] is None or parts[1] is None:
            raise CheckpointError(f"the folder holds nothing of the embedding {name!r}")
        size, shape = parts[0].nbytes + parts[1].nbytes, list(parts[0].shape)
        found.append({"name": name, **table.to_dict(), "shape": shape, "bytes": size})
    return found


def _text(settings: dict[str, Any], key: str) -> str | None:
    value = settings.get(key)
    return value if isinstance(value, str) else None


def _layer(
    name: str,
    tensors: dict[str, TensorEntry],
    layout: PackedLayout | None,
    record: LayerRecord | None,
    described: dict[str, Any],
) -> dict[str, Any]:
    """One layer of `inspect`.

    tensors: what is stored of it. record: what the run has noted of it. described: what
    quantization_config says of the whole folder.
    """
    weight = tensors.get("weight")
    rank, values = None, None
    if layout is not None:
        shape = [layout.out_features, layout.in_features]
        counted = {leaf: entry.nbytes for leaf, entry in tensors.items() if leaf != "bias"}
        rank, values = layout.rank, layout.values
    elif weight is not None:
        shape, counted = list(weight.shape), {"weight": weight.nbytes}
        values = str(weight.dtype).removeprefix("torch.")
    elif record is not None:  # stored under other names, as dense experts of Mixtral are
        shape = list(record.shape)
        counted = {"weight": round(record.bits_per_weight * math.prod(shape) / 8)}
    else:
        raise CheckpointError(f"the folder holds nothing of the layer {name!r}")
    weights = max(1, math.prod(shape))
    factors = sum(size for leaf, size in counted.items() if leaf in FACTORS)
    parts: dict[str, float] = {}
    for leaf, size in counted.items():
        part = PARTS.get(leaf, leaf)
        parts[part] = parts.get(part, 0.0) + 8 * size / weights
    return {
        "name": name,
        "shape": shape,
        "method": record.method if record else _text(described, "method") or "dense",
        "pattern": record.pattern if record else _text(described, "pattern"),
        "rank": record.rank if record else rank,
        "values": record.values if record else values,
        "planes": layout.planes if layout else None,
        "group_size": layout.group_size if layout else None,
        "padded_in_features": layout.padded_in_features if layout else None,
        "adapter_rank": layout.adapter_rank if layout else 0,
        "bits_per_weight": 8 * sum(counted.values()) / weights,
        "factor_bits_per_weight": 8 * factors / weights,
        "parts": parts,
        "error": record.error if record else None,
        "heldout_error": record.heldout_error if record else None,
    }
