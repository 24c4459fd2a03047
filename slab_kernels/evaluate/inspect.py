"""What a model folder holds, layer by layer, counted from the bytes on disk; no weight is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..compression.record import LayerRecord, read_record
from ..format.layout import PackedLayout
from ..models.folder import Checkpoint
from ..models.packed_config import QUANT_METHOD, read_layouts
from ..models.shards import TensorEntry
from ..paths import expanded

FACTORS = ("U", "V", "P", "Q")
PARTS = {"U": "factors", "V": "factors", "P": "adapters", "Q": "adapters", "weight": "values"}


def inspect(folder: Path | str) -> dict[str, Any]:
    """Layers of a packed, pruned-but-dense or dense folder with shape, settings, bits per weight and error.

    bits_per_weight counts every stored tensor of the layer except its bias; factor_bits_per_weight is the part of
    U, V, P and Q. `parts` are the bits per weight of values, metadata, signs, scales, factors (U
    and V) and adapters (P and Q). `bits_per_weight` of the folder is over all its layers together.

    Raises: CheckpointError for a folder that is no checkpoint, or whose shards, index, config.json
        and record disagree; VersionError if a newer library packed it.
    """
    folder = expanded(folder)
    checkpoint = Checkpoint(folder)
    record = read_record(Path(folder))
    recorded = {layer.name: layer for layer in record.layers} if record else {}
    entry = checkpoint.config.get("quantization_config")
    ours = isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD
    layouts, described = (read_layouts(checkpoint), entry) if ours else ({}, {})
    stored: dict[str, dict[str, TensorEntry]] = {}
    for tensor, found in checkpoint.entries.items():
        name, _, leaf = tensor.rpartition(".")
        stored.setdefault(name, {})[leaf] = found
    matrices = [
        n for n, parts in stored.items() if "weight" in parts and len(parts["weight"].shape) == 2
    ]
    layers = [
        _layer(name, stored.get(name, {}), layouts.get(name), recorded.get(name), described)
        for name in layouts or recorded or matrices
    ]
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    bits = sum(math.prod(layer["shape"]) * layer["bits_per_weight"] for layer in layers)
    errors = [layer["error"] for layer in layers if layer["error"] is not None]
    return {
        "folder": str(folder),
        "model": record.model if record else _text(checkpoint.config, "model_type"),
        "stored": "packed" if layouts else "pruned, dense" if recorded else "dense",
        "format_version": described.get("format_version"),
        "method": _text(record.settings if record else described, "method"),
        "weights": weights,
        "bits_per_weight": bits / weights if weights else None,
        "mean_error": sum(errors) / len(errors) if errors else None,
        "bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        "layers": layers,
    }


def _text(settings: dict, key: str) -> str | None:
    value = settings.get(key)
    return value if isinstance(value, str) else None


def _layer(
    name: str,
    tensors: dict[str, TensorEntry],
    layout: PackedLayout | None,
    record: LayerRecord | None,
    described: dict,
) -> dict[str, Any]:
    """One row of `inspect`. described: what quantization_config says of the whole folder."""
    if layout is not None:
        shape = [layout.out_features, layout.in_features]
        counted = {leaf: entry.nbytes for leaf, entry in tensors.items() if leaf != "bias"}
    else:
        shape = list(tensors["weight"].shape if "weight" in tensors else record.shape)
        counted = {"weight": tensors["weight"].nbytes} if "weight" in tensors else {}
    weights = max(1, math.prod(shape))
    values = layout.values if layout else None
    if layout is None and record is None:
        values = str(tensors["weight"].dtype).removeprefix("torch.")
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
        "rank": record.rank if record else layout.rank if layout else None,
        "values": record.values if record else values,
        "group_size": layout.group_size if layout else None,
        "adapter_rank": layout.adapter_rank if layout else 0,
        "bits_per_weight": 8 * sum(counted.values()) / weights,
        "factor_bits_per_weight": 8 * factors / weights,
        "parts": parts,
        "error": record.error if record else None,
        "heldout_error": record.heldout_error if record else None,
    }
