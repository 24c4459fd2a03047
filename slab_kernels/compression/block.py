"""One block under compression: its linears group after group, then matching of the whole."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..format import Decomposition, PackedWeight, cast
from ..methods.inputs import InputStats
from ..models.groups import Group, find_groups, layer_inputs
from ..models.streams import Stream
from .job import Job
from .matching import Goal, Matched, match_block
from .memory import peak_memory
from .plan import as_stored, decompose_as_stored, store
from .record import LayerRecord
from .sinks import FinishedBlock, dense_weight
from .team import Team


@dataclass
class Streams:
    """The texts of a run on their way through the blocks.

    calibration, heldout: hidden states of the compressed prefix; heldout is None without that text.
    dense: the calibration text in the dense model; None where nobody asks for it.
    """

    calibration: Stream
    heldout: Stream | None
    dense: Stream | None

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, dense_block: nn.Module | None) -> None:
        """Lead every text through block `index`, the dense one through its dense twin."""
        self.calibration.advance(index, block)
        if self.heldout is not None:
            self.heldout.advance(index, block)
        if self.dense is not None and dense_block is not None:
            self.dense.advance(index, dense_block)


class Reader(NamedTuple):
    """A linear in its block, and the text that comes there."""

    stream: Stream
    block: nn.Module
    linear: nn.Linear

    def inputs(self, index: int, group: Group, batch: int) -> Tensor:
        """What the linear reads in one batch, [tokens, in_features]."""
        return layer_inputs(self.stream, index, self.block, self.linear, group, batch)


class GroupInputs(NamedTuple):
    """What is known of the input x of a group of linears.

    moved: the mean over tokens of (x_dense - x) x^T, [K,K] fp32; None where the two are equal or
        not known. A layer W puts out W x_dense in the dense model, so the mean of its drift
        (y_dense - W x) x^T is W @ moved.
    seconds: the time that the statistics took, per linear of the group.
    """

    stats: InputStats
    heldout: InputStats | None
    moved: Tensor | None
    seconds: float


def relative_error(weight: Tensor, stored: Tensor, stats: InputStats) -> float:
    """||X (W - W')^T|| / ||X W^T|| from the Gram matrix of X; 0 where W puts out zeros throughout.

    weight, stored: W and W', [N,K] fp32.
    """
    gram = stats.gram
    assert gram is not None
    # Tiny weights would have no squares in fp32.
    exponent = torch.frexp(weight.abs().max()).exponent.clamp(-120, 120)

    def energy(matrix: Tensor) -> float:
        matrix = torch.ldexp(matrix, -exponent)
        return float(((matrix @ gram) * matrix).sum(dtype=torch.float64).clamp(min=0))

    whole = energy(weight)
    return (energy(weight - stored) / whole) ** 0.5 if whole > 0 else 0.0


def moments(index: int, group: Group, reader: Reader) -> InputStats:
    """Statistics of the inputs of one text."""
    stats = InputStats(reader.linear.in_features)
    for batch in range(len(reader.stream.hidden)):
        stats.update(reader.inputs(index, group, batch))
    return stats


def _moments_and_shift(
    index: int, group: Group, reader: Reader, dense: Reader
) -> tuple[InputStats, Tensor | None]:
    """`GroupInputs.stats` and `.moved`, with the same linear of the dense model as `dense`."""
    K = reader.linear.in_features
    stats = InputStats(K)
    moved: Tensor | None = torch.zeros(K, K, device=reader.stream.device)
    for batch in range(len(reader.stream.hidden)):
        x = reader.inputs(index, group, batch)
        stats.update(x)
        if moved is not None:
            other = dense.inputs(index, group, batch)
            # An expert may get other tokens in the dense model; the two cannot be compared then.
            moved = moved + (other - x).float().T @ x.float() if other.shape == x.shape else None
    if moved is None or not bool(moved.any()):
        return stats, None
    return stats, moved / stats.tokens


@dataclass
class BlockWork:
    """Block `index`: its dense twin, and its linears by their full names."""

    job: Job
    index: int
    block: nn.Module
    dense_block: nn.Module | None
    linears: dict[str, nn.Linear]
    streams: Streams
    team: Team
    decompositions: dict[str, Decomposition] = field(default_factory=dict)

    def compress(self, tell: Callable[[LayerRecord, int], None]) -> FinishedBlock:
        """Every linear, group after group of those that read the same input.

        tell: is called with the record of each layer, and how many of the block are finished.

        Raises: CheckpointError for a weight with NaN, and what the method raises.
        """
        finished = FinishedBlock({}, [])
        for name, linear in self.linears.items():
            if bad := int((~linear.weight.isfinite()).sum()):
                raise CheckpointError(
                    f"{name}.weight holds {bad} NaN or infinite numbers; "
                    "the model's checkpoint is damaged"
                )
        if not self.linears:
            return finished
        for group in find_groups(self.streams.calibration, self.index, self.block, self.linears):
            inputs = self._inputs(group)
            layer = functools.partial(self._layer, inputs=inputs, group=group)
            results = self.team.share(group.names, layer)
            for name, (decomposition, layer) in results.items():
                self._keep(finished, name, decomposition, layer)
                tell(finished.layers[-1], len(finished.layers))
        return finished

    def _inputs(self, group: Group) -> GroupInputs:
        """Run the texts up to a group of linears, and gather what their method and records need."""
        began = time.perf_counter()
        index, streams, linear = self.index, self.streams, self.linears[group.names[0]]
        reader = Reader(streams.calibration, self.block, linear)
        moved = heldout = None
        if streams.dense is None or self.dense_block is None:
            stats = moments(index, group, reader)
        else:
            name = group.names[0].removeprefix(self.job.prefix(index))
            twin = self.dense_block.get_submodule(name)
            assert isinstance(twin, nn.Linear)
            dense = Reader(streams.dense, self.dense_block, twin)
            stats, moved = _moments_and_shift(index, group, reader, dense)
        if streams.heldout is not None:
            heldout = moments(index, group, Reader(streams.heldout, self.block, linear))
        seconds = (time.perf_counter() - began) / len(group.names)
        return GroupInputs(stats, heldout, moved, seconds)

    def _layer(
        self, name: str, inputs: GroupInputs, group: Group
    ) -> tuple[Decomposition, LayerRecord]:
        """One linear: the numbers that will be stored, and their record without its bits."""
        began, settings = time.perf_counter(), self.job.plan.layer(name)
        weight, stats = self.linears[name].weight.float(), inputs.stats
        if inputs.moved is not None and settings.drift:
            stats = stats.with_drift(weight @ inputs.moved)
        with peak_memory(weight.device) as peak:
            try:
                decomposition = decompose_as_stored(weight, stats, settings)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
        dense, heldout = decomposition.dense(), inputs.heldout
        layer = LayerRecord(
            name=name,
            block=self.index,
            shape=(weight.shape[0], weight.shape[1]),
            method=settings.method,
            pattern=settings.pattern,
            rank=0 if decomposition.U is None else decomposition.U.shape[1],
            values=settings.values,
            bits_per_weight=0.0,
            error=relative_error(weight, dense, inputs.stats),
            heldout_error=None if heldout is None else relative_error(weight, dense, heldout),
            seconds=inputs.seconds + time.perf_counter() - began,
            group=group.names,
            planes=decomposition.planes,
            group_size=decomposition.group_size,
            adapter_rank=0 if decomposition.P is None else decomposition.P.shape[1],
            peak_bytes=peak.bytes,
        )
        return decomposition, layer

    def _keep(
        self, finished: FinishedBlock, name: str, decomposition: Decomposition, layer: LayerRecord
    ) -> None:
        """Note a layer, and let the rest of the block see its stored weight."""
        self.decompositions[name] = decomposition
        dtype = self.job.source.spec(f"{name}.weight")[0]
        stored = store(name, decomposition, self.job.plan.layer(name), dtype)
        finished.stored[name] = stored
        if isinstance(stored, PackedWeight):
            bits = stored.bits_per_weight()
        else:
            bits = 8.0 * stored.element_size()
        finished.layers.append(replace(layer, bits_per_weight=bits))
        set_weight(self.linears[name], dense_weight(stored))

    def match(self, finished: FinishedBlock, say: Callable[[str], None]) -> None:
        """Transformer matching of the whole block, by one process for all; changes `finished`."""
        prefix, source = self.job.prefix(self.index), self.job.source
        matched: Matched = self.team.from_leader(lambda: self._train(say))
        finished.match = matched.record
        for name, vector in matched.vectors.items():
            full = prefix + name
            finished.other[full] = cast(vector, source.spec(full)[0], full)
        for name, decomposition in matched.decompositions.items():
            full = prefix + name
            dtype = source.spec(f"{full}.weight")[0]
            finished.stored[full] = store(full, decomposition, self.job.plan.layer(full), dtype)

    def _train(self, say: Callable[[str], None]) -> Matched:
        """Train the block towards what its dense twin puts out.

        The twin reads hidden states of the compressed prefix or, with target="dense", of the dense
        model.
        """
        plan, stream, dense_block = self.job.plan, self.streams.calibration, self.dense_block
        assert plan.matching is not None and dense_block is not None
        reads = self.streams.dense if plan.matching.target == "dense" else stream
        assert reads is not None
        with torch.no_grad():
            targets = [
                reads.run(self.index, dense_block, batch).to(reads.hidden[batch].device)
                for batch in range(len(stream.hidden))
            ]
        prefix = self.job.prefix(self.index)
        return match_block(
            Goal(self.index, stream, targets),
            self.block,
            {name.removeprefix(prefix): d for name, d in self.decompositions.items()},
            plan.matching,
            lambda name, d: as_stored(d, plan.layer(prefix + name)),
            say,
        )


def set_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Put a weight [N,K] into a linear, in the type and on the device of the one that it had."""
    old = linear.weight
    linear.weight = nn.Parameter(weight.to(old.device).to(old.dtype), requires_grad=False)
