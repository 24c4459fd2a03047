"""Where finished blocks go: memory, or shards of a folder that an interrupted run goes on with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import CheckpointError
from ..format import PackedLayout, PackedWeight, read_factors
from ..models.experts import Held, stored_slices
from ..models.output import OutputFolder
from ..models.shards import TensorEntry, read_header, shard_name, write_shard
from .job import Job
from .record import (
    ExpertsRecord,
    LayerRecord,
    MatchRecord,
    experts_from_dict,
    layer_from_dict,
    match_from_dict,
)


def dense_weight(stored: PackedWeight | Tensor) -> Tensor:
    """[N,K] fp32, the numbers that are stored."""
    return stored.dense() if isinstance(stored, PackedWeight) else stored.float()


@dataclass
class FinishedBlock:
    """What becomes of one block.

    stored: full module name -> packed weight, or dense [N,K] in the type of the source.
    layers, match, experts: the records.
    other: full parameter name -> what matching made of it (norms, biases).
    """

    stored: dict[str, PackedWeight | Tensor]
    layers: list[LayerRecord]
    other: dict[str, Tensor] = field(default_factory=dict)
    match: MatchRecord | None = None
    experts: list[ExpertsRecord] = field(default_factory=list)

    def records(self) -> FinishedBlock:
        """The same without its weights."""
        return FinishedBlock({}, self.layers, {}, self.match, self.experts)


class Sink(Protocol):
    """Where finished blocks go."""

    def finished(self) -> list[FinishedBlock]:
        """The records of the blocks that are done already, without their weights."""

    def restore(self, index: int, linears: dict[str, nn.Linear]) -> FinishedBlock:
        """What was stored for a block that is done."""

    def store(self, index: int, block: FinishedBlock) -> list[LayerRecord]:
        """Keep a finished block; returns its layers' records with their final bits per weight."""


class MemorySink:
    """Keeps everything in memory: for `compress(model)` without an output folder."""

    def __init__(self) -> None:
        self.stored: dict[str, PackedWeight | Tensor] = {}
        self.other: dict[str, Tensor] = {}

    def finished(self) -> list[FinishedBlock]:
        return []

    def restore(self, index: int, linears: dict[str, nn.Linear]) -> FinishedBlock:
        raise AssertionError("a run in memory has no block that was finished before it")

    def store(self, index: int, block: FinishedBlock) -> list[LayerRecord]:
        self.stored |= block.stored
        self.other |= block.other
        return block.layers


@dataclass
class FolderSink:
    """One shard per block, each noted in the progress file once it is whole.

    progress: None for a process that only reads; another one writes.
    done: the finished blocks as the progress file holds them.
    """

    out: Path
    job: Job
    progress: OutputFolder | None
    done: list[dict[str, Any]]

    @property
    def blocks(self) -> int:
        return len(self.job.blocks)

    def shard(self, index: int) -> Path:
        """The shard of block `index`, or of everything outside the blocks for index == blocks."""
        return self.out / shard_name(index + 1, self.blocks + 1)

    def finished(self) -> list[FinishedBlock]:
        """The records of the blocks that an interrupted run has finished.

        Raises: CheckpointError if they do not fit the model.
        """
        blocks = []
        for index, block in enumerate(self.done[: self.job.steps]):
            layers = [layer_from_dict(layer) for layer in block["layers"]]
            elsewhere = any(layer.block != index for layer in layers)
            if elsewhere or block["file"] != self.shard(index).name:
                raise CheckpointError(
                    f"{self.out} holds other finished blocks than its model has; "
                    "use an empty folder"
                )
            experts = [experts_from_dict(each) for each in block.get("experts", ())]
            match = match_from_dict(block["match"])
            blocks.append(FinishedBlock({}, layers, {}, match, experts))
        return blocks

    def restore(self, index: int, linears: dict[str, nn.Linear]) -> FinishedBlock:
        from safetensors import safe_open

        parts: dict[str, dict[str, Tensor]] = {module: {} for module in linears}
        block, inside = FinishedBlock({}, []), set(self._inside(index))
        slices, experts = self.job.source.slices, self._dense_experts(linears)
        with safe_open(self.shard(index), framework="pt") as f:
            for name in f.keys():
                if name in experts:
                    found = experts[name].apart(f.get_tensor(name), slices)
                elif name.rpartition(".")[0] in parts or name in inside:
                    found = {name: f.get_tensor(name)}
                else:
                    # A shard also holds tensors under names that only the source's checkpoint has;
                    # those are as the source gives them.
                    continue
                for full, tensor in found.items():
                    module, _, leaf = full.rpartition(".")
                    if module in parts and leaf != "bias":
                        parts[module][leaf] = tensor
                    else:
                        block.other[full] = tensor
        for module, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            settings = self.job.plan.layer(module).for_shape(shape)
            if settings.packed:
                block.stored[module] = PackedWeight.from_tensors(
                    parts[module], *shape, settings.values, settings.stored_group_size
                )
            else:
                block.stored[module] = parts[module]["weight"]
        return block

    def store(self, index: int, block: FinishedBlock) -> list[LayerRecord]:
        if self.progress is None:
            return block.layers
        tensors: dict[str, Tensor] = {}
        for module, weight in block.stored.items():
            parts = weight.tensors() if isinstance(weight, PackedWeight) else {"weight": weight}
            tensors |= {f"{module}.{name}": t for name, t in parts.items()}
        tensors |= block.other | self._tables(index)
        modules = (*block.stored, *(self.job.tables if index == self.blocks else ()))
        weights, inside = {f"{module}.weight" for module in modules}, self._inside(index)
        source = self.job.source
        # A stack of biases is cut into those of the experts, like the stack of their weights. Those
        # that were not trained are read from the model.
        tensors |= source.get_all(
            name
            for name in inside
            if name in source.slices and name not in weights and name not in tensors
        )
        kept = [name for name in inside if name not in weights and name not in tensors]
        dense = self._dense_experts(block.stored)
        held = {name: part.joined(tensors, source.slices) for name, part in dense.items()}
        for part in dense.values():
            for name in part.names:
                del tensors[name]
        tensors |= held
        table = self._write(index, kept, tensors)
        layers = block.layers
        if self.job.plan.usual.packed:  # dense weights take what their type does
            layers = [
                replace(layer, bits_per_weight=bits_on_disk(table, layer)) for layer in layers
            ]
        self.progress.finish_block(
            self.shard(index).name,
            [layer.__dict__ for layer in layers],
            None if block.match is None else asdict(block.match),
            [asdict(record) for record in block.experts],
        )
        return layers

    def _dense_experts(self, modules: Iterable[str]) -> dict[str, Held]:
        """The tensors in which experts among these modules are stored where nothing is packed."""
        source = self.job.source
        if self.job.plan.usual.packed:
            return {}
        found = set(modules)
        inside = {n: part for n, part in source.slices.items() if n.rpartition(".")[0] in found}
        return stored_slices(source.model, inside) if inside else {}

    def store_rest(self) -> None:
        """The shard of everything outside the blocks, where it was not stored with the head.

        What is no table keeps its original precision.
        """
        if len(self.done) <= self.blocks and self.job.head is None:
            replaced = {f"{module}.weight" for module in self.job.tables}
            kept = [name for name in self._inside(self.blocks) if name not in replaced]
            self._write(self.blocks, kept, self._tables(self.blocks))

    def _tables(self, index: int) -> dict[str, Tensor]:
        """The tensors of embeddings of int8 rows in shard `index`."""
        return {
            f"{name}.{part}": tensor
            for name in (self.job.tables if index == self.blocks else ())
            for part, tensor in self.job.table(name)._asdict().items()
        }

    def _inside(self, index: int) -> list[str]:
        """The source's tensors in block `index`, or outside the blocks for index == blocks."""
        if index == self.blocks:
            return [n for n in self.job.source.names if not n.startswith(f"{self.job.path}.")]
        prefix = self.job.prefix(index)
        return [name for name in self.job.source.names if name.startswith(prefix)]

    def _write(
        self, index: int, kept: list[str], tensors: dict[str, Tensor]
    ) -> dict[str, TensorEntry]:
        """One shard of `tensors` and of what is `kept` of the source as it is."""
        forms = self.job.source.stored_forms(kept)
        specs = {name: (dtype, shape) for name, (dtype, shape, _) in forms.items()}
        specs |= {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}

        def get(name: str) -> Tensor:
            return tensors[name] if name in tensors else forms[name][2]()

        return write_shard(self.shard(index), specs, get)

    def tables(self) -> list[dict[str, TensorEntry]]:
        """The header of every shard, in order."""
        return [read_header(self.shard(index)) for index in range(self.blocks + 1)]

    def layouts(
        self, tables: list[dict[str, TensorEntry]], layers: list[LayerRecord]
    ) -> dict[str, PackedLayout]:
        """Module name -> layout of its packed weight, from the headers of the shards."""
        return {
            layer.name: layout_on_disk(
                tables[layer.block],
                layer,
                self.job.plan.layer(layer.name).for_shape(layer.shape).stored_group_size,
            )
            for layer in layers
        }


def bits_on_disk(table: dict[str, TensorEntry], layer: LayerRecord) -> float:
    """What the layer's tensors take in its shard, its bias not counted, in bits per weight."""
    size = sum(
        entry.nbytes
        for name, entry in table.items()
        if name.rpartition(".")[0] == layer.name and not name.endswith(".bias")
    )
    return 8 * size / math.prod(layer.shape)


def layout_on_disk(
    table: dict[str, TensorEntry], layer: LayerRecord, group_size: int | None
) -> PackedLayout:
    """The layout of a packed weight from the header of its shard."""
    factors = read_factors(table.get(f"{layer.name}.U"), table.get(f"{layer.name}.P"))
    return PackedLayout(*layer.shape, layer.values, group_size, planes=layer.planes, **factors)
