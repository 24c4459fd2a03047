"""After the last block: the rest of a folder, or of the model in memory, is put in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..format import Int8Table, PackedLayout, PackedWeight
from ..models.experts import unstack_named
from ..models.folder import PROGRESS_NAME, RECORD_NAME, write_index
from ..models.output import check_same_settings, file_sha256, is_whole
from ..models.packed_config import UNTIED_KEY, quantization_config
from ..models.shards import read_json, write_json
from ..models.tables import put_table
from ..models.ties import untie, untie_config
from ..models.totals import folder_totals
from ..nn import Int8Embedding
from ..nn.replacement import replace_linear
from .card import write_card, write_side_files
from .job import Job
from .record import RunRecord
from .sinks import FolderSink, MemorySink

# A run is not told by these entries of a record: they are names, or follow from other entries.
DERIVED = ("calibration", "heldout", "layers")


def finish(sink: FolderSink, record: RunRecord, tokenizer: Any) -> RunRecord:
    """Write everything else; config.json, without which nothing loads the folder, comes last.

    tokenizer: what a model in memory was compressed with, to be saved with it; or None.

    Returns: the record as it was written, with the hashes of the shards.
    """
    out, job, progress = sink.out, sink.job, sink.progress
    assert progress is not None
    sink.store_rest()
    tables = sink.tables()
    write_index(out, tables)
    base = write_side_files(out, job.source, tokenizer)
    shards = {block["file"]: block["sha256"] for block in progress.blocks}
    last = sink.shard(sink.blocks)
    record = replace(record, shards={**shards, last.name: file_sha256(last)})
    config: dict[str, Any] = dict(job.source.config)
    layouts: dict[str, PackedLayout] = {}
    if job.plan.usual.packed:
        layouts = sink.layouts(tables, record.layers)
        config["quantization_config"] = _entry(layouts, job, record)
        if job.unties:
            untie_config(config)
    entries = {name: entry for table in tables for name, entry in table.items()}
    write_card(out, base, job, record, folder_totals(entries, layouts, config))
    write_json(out / RECORD_NAME, record.to_dict())
    write_json(out / "config.json", config)
    return record


def into(model: nn.Module, sink: MemorySink, job: Job, record: RunRecord) -> nn.Module:
    """Put what was compressed into the module that was given."""
    packed: dict[str, PackedWeight] = {}
    source = job.source  # whose channels may be in other orders than the module's
    tables = {name: job.table(name) for name in job.tables}  # before the module changes
    replaced = {f"{name}.weight" for name in (*sink.stored, *tables)}
    parameters = {name: source.get(name) for name in source.moves.keys() - replaced} | sink.other
    for name, stored in sink.stored.items():
        if isinstance(stored, PackedWeight):
            packed[name] = stored
        else:
            parameters[f"{name}.weight"] = stored
    with torch.inference_mode():  # Only here may parameters be written to that were made under it.
        for name, value in parameters.items():
            if (part := source.slices.get(name)) is not None:
                part.of(model.get_parameter(part.stack)).copy_(value)
            else:
                model.get_parameter(name).copy_(value)
    unstack_named(model, packed)
    replace_linear(model, packed)
    _put_tables(model, job, tables)
    if packed:
        layouts = {name: weight.layout for name, weight in packed.items()}
        config: Any = model.config
        config.quantization_config = _entry(layouts, job, record)
    attributes: Any = model
    attributes.slab_record = record
    return model


def _entry(layouts: dict[str, PackedLayout], job: Job, record: RunRecord) -> dict[str, Any]:
    """The entry of config.json, which also says whether a packed head was the embedding."""
    untied = {UNTIED_KEY: job.unties and job.head is not None}
    return quantization_config(layouts, record.settings | untied, job.tables)


def _put_tables(model: nn.Module, job: Job, tables: dict[str, Int8Table]) -> None:
    """Put embeddings of int8 rows into the model, and say that nothing in it is tied any more."""
    for name, entry in job.tables.items():
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        weight = embedding.weight
        table = Int8Table(*(part.to(weight.device) for part in tables[name]))
        sizes = embedding.padding_idx, weight.dtype, entry.multiplier
        rows = Int8Embedding.from_table(table, *sizes)
        put_table(model, name, entry, rows)
    if job.unties:
        untie(model)


def complete(out: Path, settings: dict) -> RunRecord | None:
    """The record of a run that finished in `out`, None if none did.

    Raises: CheckpointError if it had other settings, or the shards are not what it wrote.
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
