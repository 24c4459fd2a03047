"""What a model folder holds, layer by layer, counted from the bytes on disk; no weight is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .checkpoint import RECORD_NAME, Checkpoint, read_json

FACTORS = ("U", "V", "P", "Q")


def inspect(folder: Path | str) -> dict[str, Any]:
    """Layers of a packed, pruned-but-dense or dense folder with shape, settings, bits per weight and error.

    bits_per_weight counts every stored tensor of the layer except its bias; factor_bits_per_weight is the part of
    U, V, P and Q. `bits_per_weight` of the folder is over all its layers together.

    Raises: CheckpointError for a folder that is no checkpoint, or whose shards and index disagree.
    """
    checkpoint = Checkpoint(folder)
    record = read_json(Path(folder) / RECORD_NAME) if (Path(folder) / RECORD_NAME).is_file() else {}
    recorded = {layer["name"]: layer for layer in record.get("layers", [])}
    quantised = checkpoint.config.get("quantization_config") or {}
    modules = quantised.get("modules", {})
    stored: dict[str, dict[str, Any]] = {}
    for tensor, entry in checkpoint.entries.items():
        name, _, leaf = tensor.rpartition(".")
        stored.setdefault(name, {})[leaf] = entry
    layers = []
    for name in modules or recorded or [n for n, parts in stored.items() if "weight" in parts and len(parts["weight"].shape) == 2]:
        layers.append(_layer(name, stored.get(name, {}), modules.get(name), recorded.get(name, {}), quantised))
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    bits = sum(math.prod(layer["shape"]) * layer["bits_per_weight"] for layer in layers)
    errors = [layer["error"] for layer in layers if layer["error"] is not None]
    return {
        "folder": str(folder),
        "model": record.get("model") or checkpoint.config.get("model_type"),
        "stored": "packed" if modules else "pruned, dense" if recorded else "dense",
        "format_version": quantised.get("format_version"),
        "method": record.get("settings", {}).get("method") or quantised.get("method"),
        "weights": weights,
        "bits_per_weight": bits / weights if weights else None,
        "mean_error": sum(errors) / len(errors) if errors else None,
        "bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        "layers": layers,
    }


def _layer(name: str, tensors: dict, module: dict | None, record: dict, quantised: dict) -> dict[str, Any]:
    if module is not None:
        shape = [module["out_features"], module["in_features"]]
        counted = {leaf: entry.nbytes for leaf, entry in tensors.items() if leaf != "bias"}
    else:
        shape = list(tensors["weight"].shape) if "weight" in tensors else list(record["shape"])
        counted = {"weight": tensors["weight"].nbytes} if "weight" in tensors else {}
    weights = math.prod(shape)
    setting = lambda key: record.get(key, (module or {}).get(key, quantised.get(key)))  # noqa: E731
    return {
        "name": name,
        "shape": shape,
        "method": setting("method") or "dense",
        "pattern": setting("pattern"),
        "rank": setting("rank"),
        "values": setting("values") or (str(tensors["weight"].dtype).removeprefix("torch.") if "weight" in tensors else None),
        "group_size": setting("group_size"),
        "adapter_rank": (module or {}).get("adapter_rank", 0),
        "bits_per_weight": 8 * sum(counted.values()) / weights,
        "factor_bits_per_weight": 8 * sum(size for leaf, size in counted.items() if leaf in FACTORS) / weights,
        "error": record.get("error"),
        "heldout_error": record.get("heldout_error"),
    }
