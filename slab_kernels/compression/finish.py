"""After the last block: the rest of a folder, or of the model in memory, is put in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError
from ..format import PackedWeight
from ..models.folder import PROGRESS_NAME, RECORD_NAME, write_index
from ..models.output import check_same_settings, file_sha256, is_whole
from ..models.packed_config import quantization_config
from ..models.shards import read_json, write_json
from ..nn.replacement import replace_linear
from .plan import Plan
from .record import RunRecord
from .sinks import FolderSink, MemorySink, layout_on_disk

# Settings of a record that follow from others, or are names.
DERIVED = ("calibration", "heldout", "layers")


def finish(out: Path, sink: FolderSink, record: RunRecord, plan: Plan, tokenizer) -> RunRecord:
    """Write everything else; config.json, without which nothing loads the folder, comes last."""
    sink.store_rest()
    tables = sink.tables()
    write_index(out, tables)
    sink.source.write_side_files(out, tokenizer)
    hashes = {block["file"]: block["sha256"] for block in sink.progress.blocks}
    last = sink.shard(len(hashes))
    record = replace(record, shards={**hashes, last.name: file_sha256(last)})
    write_json(out / RECORD_NAME, record.to_dict())
    config = dict(sink.source.config)
    if plan.packed:
        layouts = {
            layer.name: layout_on_disk(
                tables[layer.block],
                layer.name,
                layer.shape,
                layer.values,
                plan.layer(layer.name).stored_group_size,
                layer.planes,
            )
            for layer in record.layers
        }
        config["quantization_config"] = quantization_config(layouts, record.settings)
    write_json(out / "config.json", config)
    return record


def into(model: nn.Module, sink: MemorySink, record: RunRecord) -> nn.Module:
    """Put what was compressed into the module that was given."""
    stored = sink.stored
    packed = {name: weight for name, weight in stored.items() if isinstance(weight, PackedWeight)}
    dense = {f"{name}.weight": weight for name, weight in stored.items() if name not in packed}
    with torch.inference_mode():  # where parameters may be written to that were made under it
        for name, value in (sink.other | dense).items():
            model.get_parameter(name).copy_(value)
    replace_linear(model, packed)
    if packed:
        layouts = {name: weight.layout for name, weight in packed.items()}
        model.config.quantization_config = quantization_config(layouts, record.settings)
    model.slab_record = record
    return model


def complete(out: Path, settings: dict) -> RunRecord | None:
    """The record of a run that finished in `out`; None if none did.

    Raises: CheckpointError if it had other settings, or its shards are not what it wrote.
    """
    whole = all((out / name).exists() for name in ("config.json", RECORD_NAME))
    if not whole or (out / PROGRESS_NAME).exists():
        return None
    record = RunRecord.from_dict(read_json(out / RECORD_NAME))
    before = {name: value for name, value in record.settings.items() if name not in DERIVED}
    check_same_settings(out, before, settings)
    for file, sha256 in record.shards.items():
        if not is_whole(out / file, sha256):
            raise CheckpointError(
                f"{out / file} is not what the finished run wrote; compress into an empty folder"
            )
    return record
