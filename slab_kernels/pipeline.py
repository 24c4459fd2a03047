"""Compressing a model block after block: what `model.compress` runs, whatever the source and wherever the result goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .blocks import (
    Group,
    Stream,
    block_linears,
    catch_stream,
    filled_copy,
    find_blocks,
    find_groups,
    layer_inputs,
)
from .calibration import InputStats
from .checkpoint import (
    CheckpointError,
    Progress,
    TensorEntry,
    read_header,
    shard_name,
    write_shard,
)
from .format import (
    FACTOR_TYPES,
    INTEGER_RANGES,
    VALUE_TYPES,
    PackedLayout,
    PackedWeight,
    PatternError,
    ValueTypeError,
    pack,
)
from .record import LayerRecord, ProgressEvent, layer_from_dict
from .source import FolderSource, ModuleSource, compute_dtype, outside_filled

PACKABLE = ("2:4",)
KEEP_ON_DEVICE = (
    0.25  # share of a GPU's free memory that hidden states may take before they are kept in host memory
)


@dataclass(frozen=True)
class Plan:
    """What to do with every linear. Raises on construction: ValueError or a FormatError for anything unknown."""

    method: str = "slab"
    pattern: str = "2:4"
    rank: int = 1
    values: str = "fp16"
    group_size: int | None = 128
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        from .methods import METHODS

        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.values not in VALUE_TYPES:
            raise ValueTypeError(f"values={self.values!r} is unknown; choose one of {', '.join(VALUE_TYPES)}")
        counts = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        percent = re.fullmatch(r"(\d+(\.\d+)?)%", self.pattern)
        if not (counts and 0 < int(counts[1]) < int(counts[2])) and not (
            percent and 0 < float(percent[1]) < 100
        ):
            raise PatternError(
                f"pattern={self.pattern!r} is neither 'n:m' (keep n of m, as in '2:4') nor a percentage such as '50%'"
            )
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank={self.rank!r} must be an integer of at least 0")
        PackedLayout(16, 16, self.values, self.stored_group_size)

    @property
    def stored_group_size(self) -> int | None:
        return self.group_size if self.values in INTEGER_RANGES else None

    @property
    def packed(self) -> bool:
        return self.pattern in PACKABLE

    @property
    def needs_gram(self) -> bool:
        from .methods import METHODS

        return METHODS[self.method].statistics == "gram"

    @property
    def drift(self) -> bool:
        """Whether the method takes the drift from the dense model into account (its setting `drift` is not 0)."""
        from .methods import METHODS

        return bool(self.options.get("drift", getattr(METHODS[self.method].config, "drift", 0)))

    @property
    def group(self) -> int:
        """Inputs that belong together: the m of n:m."""
        return int(self.pattern.split(":")[1]) if ":" in self.pattern else 1

    def apply(self, weight: Tensor, stats: InputStats, dtype: torch.dtype) -> PackedWeight | Tensor:
        """weight [N,K] fp32 -> as it will be stored: packed, or dense in `dtype`."""
        from .methods import decompose

        decomposition = decompose(
            weight, stats, method=self.method, pattern=self.pattern, rank=self.rank, values=self.values,
            group_size=self.stored_group_size, **self.options,
        )  # fmt: skip
        if not self.packed:
            return decomposition.dense().to(dtype)
        return pack(decomposition, values=self.values, group_size=self.stored_group_size)


def dense_weight(stored: PackedWeight | Tensor) -> Tensor:
    """[N,K] fp32, the numbers that are stored."""
    return stored.dense() if isinstance(stored, PackedWeight) else stored.float()


def relative_error(weight: Tensor, stored: Tensor, stats: InputStats) -> float:
    """||X (W - W')^T|| / ||X W^T|| from the Gram matrix of X; 0 where W's output is zero throughout."""

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ stats.gram) * matrix).sum(dtype=torch.float64).clamp(min=0))

    whole = energy(weight)
    return (energy(weight - stored) / whole) ** 0.5 if whole > 0 else 0.0


class Sink(Protocol):
    """Where finished blocks go."""

    def finished(self) -> list[list[LayerRecord]]:
        """Records of the blocks that are done already."""

    def restore(self, index: int, linears: dict[str, nn.Linear]) -> dict[str, PackedWeight | Tensor]:
        """What was stored for a block that is done."""

    def store(
        self, index: int, stored: dict[str, PackedWeight | Tensor], layers: list[LayerRecord]
    ) -> list[LayerRecord]:
        """Keep a finished block; returns the records with their final bits per weight."""


class MemorySink:
    """Keeps everything in memory: for `compress(model)` without an output folder."""

    def __init__(self):
        self.stored: dict[str, PackedWeight | Tensor] = {}

    def finished(self) -> list[list[LayerRecord]]:
        return []

    def store(self, index: int, stored, layers: list[LayerRecord]) -> list[LayerRecord]:
        self.stored |= stored
        return layers


class FolderSink:
    """One shard a block, each noted in the progress file once it is whole."""

    def __init__(
        self,
        out: Path,
        source: FolderSource | ModuleSource,
        path: str,
        blocks: int,
        plan: Plan,
        progress: Progress,
    ):
        self.out, self.source, self.path, self.blocks, self.plan, self.progress = (
            out,
            source,
            path,
            blocks,
            plan,
            progress,
        )

    def shard(self, index: int) -> Path:
        """The shard of block `index`, or of everything outside the blocks for index == blocks."""
        return self.out / shard_name(index + 1, self.blocks + 1)

    def finished(self) -> list[list[LayerRecord]]:
        return [[layer_from_dict(layer) for layer in block["layers"]] for block in self.progress.blocks]

    def restore(self, index: int, linears: dict[str, nn.Linear]) -> dict[str, PackedWeight | Tensor]:
        from safetensors import safe_open

        stored: dict[str, PackedWeight | Tensor] = {}
        with safe_open(self.shard(index), framework="pt") as f:
            names = list(f.keys())
            for module, linear in linears.items():
                if not self.plan.packed:
                    stored[module] = f.get_tensor(f"{module}.weight")
                    continue
                parts = {
                    n.removeprefix(module + "."): f.get_tensor(n)
                    for n in names
                    if n.rpartition(".")[0] == module
                }
                parts.pop("bias", None)
                stored[module] = PackedWeight.from_tensors(
                    parts,
                    linear.out_features,
                    linear.in_features,
                    self.plan.values,
                    self.plan.stored_group_size,
                )
        return stored

    def store(self, index: int, stored, layers: list[LayerRecord]) -> list[LayerRecord]:
        tensors: dict[str, Tensor] = {}
        for module, weight in stored.items():
            parts = weight.tensors() if isinstance(weight, PackedWeight) else {"weight": weight}
            tensors |= {f"{module}.{name}": t for name, t in parts.items()}
        inside = [n for n in self.source.names if n.startswith(f"{self.path}.{index}.")]
        kept = [n for n in inside if not (n.endswith(".weight") and n.removesuffix(".weight") in stored)]
        table = self._write(index, {n: self.source.spec(n) for n in kept}, tensors)
        layers = [replace(layer, bits_per_weight=bits_on_disk(table, layer)) for layer in layers]
        self.progress.finish_block(self.shard(index).name, [layer.__dict__ for layer in layers])
        return layers

    def store_rest(self) -> None:
        """The shard of everything outside the blocks, in its original precision."""
        names = [n for n in self.source.names if not n.startswith(self.path + ".")]
        self._write(self.blocks, {n: self.source.spec(n) for n in names}, {})

    def _write(self, index: int, specs: dict, tensors: dict[str, Tensor]) -> dict[str, TensorEntry]:
        specs = specs | {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        return write_shard(
            self.shard(index), specs, lambda name: tensors[name] if name in tensors else self.source.get(name)
        )

    def tables(self) -> list[dict[str, TensorEntry]]:
        return [read_header(self.shard(index)) for index in range(self.blocks + 1)]


def bits_on_disk(table: dict[str, TensorEntry], layer: LayerRecord) -> float:
    """Bytes that the layer's tensors take in its shard (bias not counted) in bits per weight."""
    size = sum(
        e.nbytes for n, e in table.items() if n.rpartition(".")[0] == layer.name and not n.endswith(".bias")
    )
    return 8 * size / (layer.shape[0] * layer.shape[1])


def layout_on_disk(
    table: dict[str, TensorEntry], name: str, shape: tuple[int, int], values: str, group_size: int | None
) -> PackedLayout:
    """The layout of a packed weight from the header of its shard."""
    ranks = [table[f"{name}.{part}"].shape[1] if f"{name}.{part}" in table else 0 for part in ("U", "P")]
    types = [table[f"{name}.{part}"].dtype for part in ("U", "P") if f"{name}.{part}" in table]
    factors = next((key for key, dtype in FACTOR_TYPES.items() if types and dtype == types[0]), "fp16")
    return PackedLayout(*shape, values, group_size, *ranks, factors)


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is a GPU if there is one. Raises: ValueError for a device that this machine lacks."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown; use 'auto', 'cpu' or 'cuda'") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} is not on this machine (torch sees {torch.cuda.device_count()} GPUs); use device='cpu'"
        )
    return resolved


def compress_blocks(
    source: FolderSource | ModuleSource,
    plan: Plan,
    skip: tuple[str, ...],
    texts: list[Tensor],
    device: torch.device,
    sink: Sink,
    report: Callable[[ProgressEvent], None],
) -> list[LayerRecord]:
    """Compress every block in order. texts: calibration tokens, then optionally held-out tokens, [samples, window] each.

    Statistics of a layer come from the compressed prefix: earlier blocks, and earlier groups of its own block.
    """
    path, blocks = find_blocks(source.model)
    linears = block_linears(path, blocks, plan.group, skip)
    total, dtype = sum(map(len, linears)), compute_dtype(source.config, device)
    names = source.names

    def materialise(index: int) -> nn.Module:
        prefix = f"{path}.{index}."
        tensors = {n.removeprefix(prefix): source.get(n) for n in names if n.startswith(prefix)}
        return filled_copy(blocks[index], tensors, device, dtype)

    widest = max((item for block in linears for item in block.items()), key=lambda item: item[1].in_features)
    if plan.needs_gram and texts[0].numel() < widest[1].in_features:
        message = (
            f"warning: {texts[0].numel()} calibration tokens are fewer than the {widest[1].in_features} inputs of "
            f"{widest[0]}; method {plan.method!r} fits that sample and little else: use several times as many"
        )
        report(ProgressEvent("warning", blocks=len(blocks), layers=total, message=message))
    records = sink.finished()
    if len(records) == len(blocks):
        return [layer for block in records for layer in block]
    with outside_filled(source, path, device, dtype) as model:
        streams = [
            catch_stream(model, blocks, t, materialise, device, _home(t, source.config, device))
            for t in texts
        ]
    dense_stream = streams[0].twin() if plan.drift else None
    if records:
        done = sum(map(len, records))
        message = f"resuming after block {len(records)} of {len(blocks)}"
        report(ProgressEvent("resumed", len(records), len(blocks), done, total, message=message))

    def treat(
        index: int, finished: bool
    ) -> None:  # a function, so that a block is released before the next is made
        block = materialise(index)
        dense_block = materialise(index) if plan.drift else None
        inside = {name: block.get_submodule(name.removeprefix(f"{path}.{index}.")) for name in linears[index]}
        if finished:
            for name, stored in sink.restore(index, inside).items():
                _set_weight(inside[name], dense_weight(stored).to(device))
        else:
            done = sum(map(len, records))

            def tell(layer: LayerRecord, number: int) -> None:
                report(ProgressEvent("layer", index, len(blocks), done + number, total, layer))

            stored, layers = _compress_block(
                index, (block, dense_block), inside, (streams, dense_stream), plan, source, tell
            )
            records.append(sink.store(index, stored, layers))
            report(ProgressEvent("block", index, len(blocks), done + len(layers), total))
        if index + 1 < len(blocks):
            with torch.no_grad():
                for stream in streams:
                    stream.advance(index, block)
                if dense_stream is not None:
                    dense_stream.advance(index, dense_block)

    already = len(records)
    for index in range(len(blocks)):
        treat(index, finished=index < already)
    return [layer for block in records for layer in block]


def _home(tokens: Tensor, config: dict, device: torch.device) -> torch.device:
    """Where hidden states are kept: on the device while they take no more than a quarter of its free memory."""
    if device.type != "cuda":
        return device
    size = tokens.numel() * int(config.get("hidden_size") or 8192) * 4
    return device if size < KEEP_ON_DEVICE * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def _set_weight(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)


def _statistics(
    index: int,
    group: Group,
    pair: tuple[nn.Linear, nn.Linear | None],
    blocks: tuple,
    stream: Stream,
    dense_stream: Stream | None,
) -> tuple[InputStats, Tensor | None]:
    """Statistics of the inputs x of one linear, and with a dense stream the mean of (x_dense - x) x^T, [K,K] fp32.

    pair, blocks: the linear and its block, to be compressed, and their dense twins (None without a dense stream).
    A layer W in the dense model puts out W x_dense, so its drift, the mean of (y_dense - W x) x^T, is W times that.
    """
    K = pair[0].in_features
    stats, moved = InputStats(K), None if dense_stream is None else torch.zeros(K, K, device=stream.device)
    for batch in range(len(stream.hidden)):
        x = layer_inputs(stream, index, blocks[0], pair[0], group.names[0], group.calls, batch)
        stats.update(x)
        if moved is not None:
            dense = layer_inputs(dense_stream, index, blocks[1], pair[1], group.names[0], group.calls, batch)
            # an expert can be given other tokens in the dense model: then the two cannot be compared
            moved = moved + (dense - x).float().T @ x.float() if dense.shape == x.shape else None
    return stats, moved / stats.tokens if moved is not None and bool(moved.any()) else None


def _compress_block(
    index: int,
    blocks: tuple[nn.Module, nn.Module | None],
    linears: dict[str, nn.Linear],
    streams: tuple[list[Stream], Stream | None],
    plan: Plan,
    source,
    tell: Callable,
) -> tuple[dict[str, PackedWeight | Tensor], list[LayerRecord]]:
    """blocks: the one to be compressed and its dense twin; streams: those of the compressed prefix, and the dense one."""
    stored, layers = {}, []
    twins = dict(zip(blocks[0].modules(), blocks[1].modules(), strict=True)) if blocks[1] is not None else {}
    for name, linear in linears.items():
        if bad := int((~linear.weight.isfinite()).sum()):
            raise CheckpointError(
                f"{name}.weight holds {bad} NaN or infinite numbers; the model's checkpoint is damaged"
            )
    for group in find_groups(streams[0][0], index, blocks[0], linears) if linears else ():
        began = time.perf_counter()
        first = linears[group.names[0]]
        twin = twins.get(first)
        stats, moved = _statistics(index, group, (first, twin), blocks, streams[0][0], streams[1])
        heldout = [
            _statistics(index, group, (first, None), blocks, stream, None)[0] for stream in streams[0][1:]
        ]
        for name in group.names:
            linear = linears[name]
            weight = linear.weight.float()
            known = stats if moved is None else stats.with_drift(weight @ moved)
            try:
                stored[name] = plan.apply(weight, known, source.spec(f"{name}.weight")[0])
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
            dense = dense_weight(stored[name])
            errors = [relative_error(weight, dense, s) for s in (stats, *heldout)]
            _set_weight(linear, dense)
            layout = stored[name].layout if isinstance(stored[name], PackedWeight) else None
            now = time.perf_counter()
            layer = LayerRecord(
                name=name, block=index, shape=tuple(weight.shape), method=plan.method, pattern=plan.pattern,
                rank=layout.rank if layout else plan.rank, values=plan.values,
                bits_per_weight=layout.bits_per_weight() if layout else 8.0 * stored[name].element_size(),
                error=errors[0], heldout_error=errors[1] if len(errors) > 1 else None, seconds=now - began,
                group=group.names,
            )  # fmt: skip
            began = now
            layers.append(layer)
            tell(layer, len(layers))
    return stored, layers
