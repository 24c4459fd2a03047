"""Compressing a model block after block: what `model.compress` runs, whatever the source and wherever the result goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..format import Decomposition, PackedWeight, cast
from ..methods.inputs import InputStats
from ..models.blocks import block_linears, filled_copy, find_blocks, outside_filled
from ..models.groups import Group, find_groups, layer_inputs
from ..models.model_config import compute_dtype
from ..models.source import FolderSource, ModuleSource
from ..models.streams import Stream, catch_stream
from ..models.ties import tied_names
from .matching import match_block
from .memory import peak_memory
from .plan import Plan
from .record import LayerRecord, MatchRecord, ProgressEvent
from .sinks import FinishedBlock, Sink, dense_weight
from .team import Team

# Share of a GPU's free memory that hidden states may take before they are kept in host memory.
KEEP_ON_DEVICE = 0.25


def relative_error(weight: Tensor, stored: Tensor, stats: InputStats) -> float:
    """||X (W - W')^T|| / ||X W^T|| from the Gram matrix of X; 0 where W's output is zero throughout."""

    # Tiny weights would have no squares.
    exponent = torch.frexp(weight.abs().max()).exponent.clamp(-120, 120)

    def energy(matrix: Tensor) -> float:
        matrix = torch.ldexp(matrix, -exponent)
        return float(((matrix @ stats.gram) * matrix).sum(dtype=torch.float64).clamp(min=0))

    whole = energy(weight)
    return (energy(weight - stored) / whole) ** 0.5 if whole > 0 else 0.0


def compress_blocks(
    source: FolderSource | ModuleSource,
    plan: Plan,
    skip: tuple[str, ...],
    texts: list[Tensor],
    device: torch.device,
    sink: Sink,
    report: Callable[[ProgressEvent], None],
    team: Team,
) -> tuple[list[LayerRecord], list[MatchRecord]]:
    """Compress every block in order. texts: calibration tokens, then optionally held-out tokens, [samples, window] each.

    Statistics of a layer come from the compressed prefix: earlier blocks, and earlier groups of its own block.
    """
    path, blocks = find_blocks(source.model)
    tied = tied_names(source.model)
    linears = block_linears(path, blocks, plan.group, skip, tied)
    total, dtype = sum(map(len, linears)), compute_dtype(source.config, device)
    names = source.names

    def materialise(index: int) -> nn.Module:
        prefix = f"{path}.{index}."
        inside = [n for n in (*names, *tied) if n.startswith(prefix)]
        tensors = {n.removeprefix(prefix): source.get(tied.get(n, n)) for n in inside}
        return filled_copy(blocks[index], tensors, device, dtype)

    widest = max(
        (item for block in linears for item in block.items()), key=lambda item: item[1].in_features
    )
    if plan.needs_gram and texts[0].numel() < widest[1].in_features:
        message = (
            f"warning: {texts[0].numel()} calibration tokens are fewer than the {widest[1].in_features} inputs of "
            f"{widest[0]}; method {plan.method!r} fits that sample and little else: use several times as many"
        )
        report(ProgressEvent("warning", blocks=len(blocks), layers=total, message=message))
    done = sink.finished()
    for block, inside in zip(done, linears, strict=False):
        if {layer.name: layer.shape for layer in block.layers} != {
            n: tuple(m.weight.shape) for n, m in inside.items()
        }:
            raise CheckpointError(
                "the finished blocks of the interrupted run are not this model's; use an empty folder"
            )
    if len(done) == len(blocks):
        return _records(done)
    replaced = (
        {name: linear for block in linears for name, linear in block.items()} if plan.packed else {}
    )
    with outside_filled(source, path, device, dtype) as model:
        streams = [
            catch_stream(
                model,
                blocks,
                t,
                materialise,
                device,
                keep_on=_home(t, source.config, device),
                packed=replaced,
            )
            for t in texts
        ]
    dense_stream = streams[0].twin() if plan.dense_stream else None
    if done:
        message = f"resuming after block {len(done)} of {len(blocks)}"
        number = sum(len(block.layers) for block in done)
        report(ProgressEvent("resumed", len(done), len(blocks), number, total, message=message))

    def treat(
        index: int, finished: bool
    ) -> None:  # a function, so that a block is released before the next is made
        block = materialise(index)
        dense_block = materialise(index) if plan.dense_stream or plan.matching else None
        prefix = f"{path}.{index}."
        inside = {name: block.get_submodule(name.removeprefix(prefix)) for name in linears[index]}
        if finished:
            kept = sink.restore(index, inside)
            _put(block, prefix, kept, device, dtype)
        else:
            number = sum(len(block.layers) for block in done)

            def tell(layer: LayerRecord, position: int) -> None:
                report(ProgressEvent("layer", index, len(blocks), number + position, total, layer))

            def say(message: str) -> None:
                report(
                    ProgressEvent(
                        "matching", index, len(blocks), number + len(inside), total, message=message
                    )
                )

            work = _Work(
                index, prefix, block, dense_block, inside, streams, dense_stream, plan, team
            )
            kept = work.compress(source, tell)
            if plan.matching is not None and inside:
                work.match(kept, source, say)
            kept.layers = sink.store(index, kept)
            done.append(FinishedBlock({}, kept.layers, {}, kept.match))
            report(ProgressEvent("block", index, len(blocks), number + len(kept.layers), total))
            _put(block, prefix, kept, device, dtype)
        if index + 1 < len(blocks):
            with torch.no_grad():
                for stream in streams:
                    stream.advance(index, block)
                if dense_stream is not None:
                    dense_stream.advance(index, dense_block)

    already = len(done)
    for index in range(len(blocks)):
        treat(index, finished=index < already)
    return _records(done)


def _records(done: list[FinishedBlock]) -> tuple[list[LayerRecord], list[MatchRecord]]:
    return [layer for block in done for layer in block.layers], [
        block.match for block in done if block.match is not None
    ]


def _put(
    block: nn.Module,
    prefix: str,
    kept: FinishedBlock,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """The stored numbers into a block, so that what follows sees what will be loaded."""
    for name, stored in kept.stored.items():
        path, _, leaf = name.removeprefix(prefix).rpartition(".")
        linear = getattr(block.get_submodule(path), leaf)
        if type(linear) is not nn.Linear:  # matching left a trainable one there
            made = nn.Linear(
                linear.shape[1],
                linear.shape[0],
                linear.bias is not None,
                device="meta",
                dtype=dtype,
            )
            made.bias = linear.bias
            setattr(block.get_submodule(path), leaf, made)
        _set_weight(getattr(block.get_submodule(path), leaf), dense_weight(stored).to(device))
    for name, value in kept.other.items():
        path, _, leaf = name.removeprefix(prefix).rpartition(".")
        owner = block.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(
                value.to(device=device, dtype=dtype or value.dtype), requires_grad=False
            )
    block.requires_grad_(False)


def _home(tokens: Tensor, config: dict, device: torch.device) -> torch.device:
    """Where hidden states are kept: on the device while they take no more than a quarter of its free memory."""
    if device.type != "cuda":
        return device
    size = tokens.numel() * int(config.get("hidden_size") or 8192) * 4
    return (
        device
        if size < KEEP_ON_DEVICE * torch.cuda.mem_get_info(device)[0]
        else torch.device("cpu")
    )


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
    stats, moved = (
        InputStats(K),
        None if dense_stream is None else torch.zeros(K, K, device=stream.device),
    )
    for batch in range(len(stream.hidden)):
        x = layer_inputs(stream, index, blocks[0], pair[0], group, batch)
        stats.update(x)
        if moved is not None:
            dense = layer_inputs(dense_stream, index, blocks[1], pair[1], group, batch)
            # an expert can be given other tokens in the dense model: then the two cannot be compared
            moved = moved + (dense - x).float().T @ x.float() if dense.shape == x.shape else None
    return stats, moved / stats.tokens if moved is not None and bool(moved.any()) else None


@dataclass
class _Work:
    """One block under compression: itself, its dense twin, its linears by full name, and the text on its way through both."""

    index: int
    prefix: str
    block: nn.Module
    dense_block: nn.Module | None
    linears: dict[str, nn.Linear]
    streams: list[Stream]
    dense_stream: Stream | None
    plan: Plan
    team: Team
    decompositions: dict[str, Decomposition] = field(default_factory=dict)

    def compress(
        self, source: FolderSource | ModuleSource, tell: Callable[[LayerRecord, int], None]
    ) -> FinishedBlock:
        """Every linear, group after group of those that read the same input."""
        finished, blocks = FinishedBlock({}, []), (self.block, self.dense_block)
        twins = (
            dict(zip(self.block.modules(), self.dense_block.modules(), strict=True))
            if self.dense_block is not None
            else {}
        )
        for name, linear in self.linears.items():
            if bad := int((~linear.weight.isfinite()).sum()):
                raise CheckpointError(
                    f"{name}.weight holds {bad} NaN or infinite numbers; the model's checkpoint is damaged"
                )
        for group in (
            find_groups(self.streams[0], self.index, self.block, self.linears)
            if self.linears
            else ()
        ):
            began = time.perf_counter()
            first = self.linears[group.names[0]]
            stats, moved = _statistics(
                self.index,
                group,
                (first, twins.get(first)),
                blocks,
                self.streams[0],
                self.dense_stream,
            )
            heldout = [
                _statistics(self.index, group, (first, None), blocks, stream, None)[0]
                for stream in self.streams[1:]
            ]
            shared = (time.perf_counter() - began) / len(group.names)
            results = self.team.share(
                group.names, lambda name: self._layer(name, stats, moved, heldout, shared, group)
            )
            for name, (decomposition, layer) in results.items():
                plan = self.plan.layer(name)
                self.decompositions[name] = decomposition
                dtype = source.spec(f"{name}.weight")[0]
                stored = finished.stored[name] = plan.store(name, decomposition, dtype)
                bits = (
                    stored.bits_per_weight()
                    if isinstance(stored, PackedWeight)
                    else 8.0 * stored.element_size()
                )
                finished.layers.append(replace(layer, bits_per_weight=bits))
                _set_weight(
                    self.linears[name], dense_weight(stored).to(self.linears[name].weight.device)
                )
                tell(finished.layers[-1], len(finished.layers))
        return finished

    def _layer(
        self,
        name: str,
        stats: InputStats,
        moved: Tensor | None,
        heldout: list[InputStats],
        shared: float,
        group: Group,
    ) -> tuple[Decomposition, LayerRecord]:
        """One linear; `moved` as `_statistics` gives it, `shared` its part of the time that the group's statistics took."""
        began, plan = time.perf_counter(), self.plan.layer(name)
        weight = self.linears[name].weight.float()
        known = stats if moved is None or not plan.drift else stats.with_drift(weight @ moved)
        with peak_memory(weight.device) as peak:
            try:
                decomposition = plan.decompose(weight, known)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
        dense = decomposition.dense()
        errors = [relative_error(weight, dense, s) for s in (stats, *heldout)]
        layer = LayerRecord(
            name=name, block=self.index, shape=tuple(weight.shape), method=plan.method, pattern=plan.pattern,
            rank=0 if decomposition.U is None else decomposition.U.shape[1], values=plan.values, bits_per_weight=0.0,
            error=errors[0], heldout_error=errors[1] if len(errors) > 1 else None, group=group.names,
            seconds=shared + time.perf_counter() - began, planes=decomposition.planes,
            adapter_rank=0 if decomposition.P is None else decomposition.P.shape[1], peak_bytes=peak[0],
        )  # fmt: skip
        return decomposition, layer

    def match(
        self,
        finished: FinishedBlock,
        source: FolderSource | ModuleSource,
        say: Callable[[str], None],
    ) -> None:
        """Transformer matching of the whole block; changes `finished`. Done by one process for all."""
        stream, settings = self.streams[0], self.plan.matching
        reads = self.dense_stream if settings.target == "dense" else stream

        def train() -> tuple:
            with torch.no_grad():
                targets = [
                    reads.run(self.index, self.dense_block, b).to(reads.hidden[b].device)
                    for b in range(len(stream.hidden))
                ]
            inside = {name.removeprefix(self.prefix): d for name, d in self.decompositions.items()}
            plans = {
                name.removeprefix(self.prefix): self.plan.layer(name)
                for name in self.decompositions
            }
            return match_block(
                self.index,
                self.block,
                inside,
                stream,
                targets,
                settings,
                lambda name, d: plans[name].as_stored(d),
                say,
            )

        trained, other, finished.match = self.team.from_leader(train)
        for name, t in other.items():
            full = self.prefix + name
            finished.other[full] = cast(t, source.spec(full)[0], full)
        for name, decomposition in trained.items():
            full = self.prefix + name
            dtype = source.spec(f"{full}.weight")[0]
            finished.stored[full] = self.plan.layer(full).store(full, decomposition, dtype)
