"""Where finished blocks go: memory, or the shards of a folder that an interrupted run can go on with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..errors import CheckpointError
from ..format import PackedLayout, PackedWeight, read_factors
from ..models.output import OutputFolder
from ..models.shards import TensorEntry, read_header, shard_name, write_shard
from ..models.source import FolderSource, ModuleSource
from .plan import Plan
from .record import LayerRecord, MatchRecord, layer_from_dict, match_from_dict


def dense_weight(stored: PackedWeight | Tensor) -> Tensor:
    """[N,K] fp32, the numbers that are stored."""
    return stored.dense() if isinstance(stored, PackedWeight) else stored.float()


@dataclass
class FinishedBlock:
    """What becomes of one block.

    stored: module name -> packed weight, or dense in its own type.  other: full parameter name -> what matching made of it
    (norms, biases).  layers, match: the records.
    """

    stored: dict[str, PackedWeight | Tensor]
    layers: list[LayerRecord]
    other: dict[str, Tensor] = field(default_factory=dict)
    match: MatchRecord | None = None


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

    def __init__(self):
        self.stored: dict[str, PackedWeight | Tensor] = {}
        self.other: dict[str, Tensor] = {}

    def finished(self) -> list[FinishedBlock]:
        return []

    def store(self, index: int, block: FinishedBlock) -> list[LayerRecord]:
        self.stored |= block.stored
        self.other |= block.other
        return block.layers


class FolderSink:
    """One shard a block, each noted in the progress file once it is whole. `progress` None: reads only, and writes nothing."""

    def __init__(
        self,
        out: Path,
        source: FolderSource | ModuleSource,
        path: str,
        blocks: int,
        plan: Plan,
        progress: OutputFolder | None,
        done: list[dict],
    ):
        self.out, self.source, self.path, self.blocks, self.plan, self.progress = (
            out,
            source,
            path,
            blocks,
            plan,
            progress,
        )
        self.done = done

    def shard(self, index: int) -> Path:
        """The shard of block `index`, or of everything outside the blocks for index == blocks."""
        return self.out / shard_name(index + 1, self.blocks + 1)

    def finished(self) -> list[FinishedBlock]:
        """Raises: CheckpointError if the progress file does not fit the model."""
        blocks = []
        for index, block in enumerate(self.done[: self.blocks]):
            layers = [layer_from_dict(layer) for layer in block["layers"]]
            if block["file"] != self.shard(index).name or any(
                layer.block != index for layer in layers
            ):
                raise CheckpointError(
                    f"{self.out} holds other finished blocks than its model has; use an empty folder"
                )
            blocks.append(FinishedBlock({}, layers, {}, match_from_dict(block["match"])))
        return blocks

    def restore(self, index: int, linears: dict[str, nn.Linear]) -> FinishedBlock:
        from safetensors import safe_open

        parts: dict[str, dict[str, Tensor]] = {module: {} for module in linears}
        block, inside = FinishedBlock({}, []), set(self._inside(index))
        with safe_open(self.shard(index), framework="pt") as f:
            for name in f.keys():
                module, _, leaf = name.rpartition(".")
                if module in parts and leaf != "bias":
                    parts[module][leaf] = f.get_tensor(name)
                elif (
                    name in inside
                ):  # the rest is as the source has it, under the names of its checkpoint
                    block.other[name] = f.get_tensor(name)
        for module, linear in linears.items():
            if not self.plan.packed:
                block.stored[module] = parts[module]["weight"]
                continue
            plan = self.plan.layer(module)
            sizes = linear.out_features, linear.in_features, plan.values, plan.stored_group_size
            block.stored[module] = PackedWeight.from_tensors(parts[module], *sizes)
        return block

    def store(self, index: int, block: FinishedBlock) -> list[LayerRecord]:
        tensors: dict[str, Tensor] = {}
        for module, weight in block.stored.items():
            parts = weight.tensors() if isinstance(weight, PackedWeight) else {"weight": weight}
            tensors |= {f"{module}.{name}": t for name, t in parts.items()}
        tensors |= block.other
        kept = [
            n
            for n in self._inside(index)
            if n not in tensors
            and not (n.endswith(".weight") and n.removesuffix(".weight") in block.stored)
        ]
        if self.progress is None:
            return block.layers
        table = self._write(index, kept, tensors)
        layers = [
            replace(layer, bits_per_weight=bits_on_disk(table, layer)) for layer in block.layers
        ]
        match = None if block.match is None else asdict(block.match)
        self.progress.finish_block(
            self.shard(index).name, [layer.__dict__ for layer in layers], match
        )
        return layers

    def store_rest(self) -> None:
        """The shard of everything outside the blocks, in its original precision."""
        names = [n for n in self.source.names if not n.startswith(self.path + ".")]
        self._write(self.blocks, names, {})

    def _inside(self, index: int) -> list[str]:
        return [n for n in self.source.names if n.startswith(f"{self.path}.{index}.")]

    def _write(
        self, index: int, kept: list[str], tensors: dict[str, Tensor]
    ) -> dict[str, TensorEntry]:
        """One shard of `tensors` and of what is `kept` of the source as it is."""
        forms = self.source.stored_forms(kept)
        specs = {name: (dtype, shape) for name, (dtype, shape, _) in forms.items()}
        specs |= {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        return write_shard(
            self.shard(index),
            specs,
            lambda name: tensors[name] if name in tensors else forms[name][2](),
        )

    def tables(self) -> list[dict[str, TensorEntry]]:
        return [read_header(self.shard(index)) for index in range(self.blocks + 1)]


def bits_on_disk(table: dict[str, TensorEntry], layer: LayerRecord) -> float:
    """Bytes that the layer's tensors take in its shard (bias not counted) in bits per weight."""
    size = sum(
        e.nbytes
        for n, e in table.items()
        if n.rpartition(".")[0] == layer.name and not n.endswith(".bias")
    )
    return 8 * size / (layer.shape[0] * layer.shape[1])


def layout_on_disk(
    table: dict[str, TensorEntry],
    name: str,
    shape: tuple[int, int],
    values: str,
    group_size: int | None,
    planes: int,
) -> PackedLayout:
    """The layout of a packed weight from the header of its shard."""
    factors = read_factors(table.get(f"{name}.U"), table.get(f"{name}.P"))
    return PackedLayout(*shape, values, group_size, planes=planes, **factors)
