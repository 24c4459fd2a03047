"""One block under compression: its linears group after group, then matching of the whole."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..format import Decomposition, PackedWeight, cast
from ..models.groups import Group
from ..models.streams import Stream
from .job import Job
from .matching import Goal, Matched, Target, match_block
from .memory import peak_memory
from .plan import as_stored, decompose_as_stored, store
from .record import LayerRecord
from .routing import Feeding
from .sinks import FinishedBlock, dense_weight
from .statistics import GroupInputs, Streams
from .team import Team


def relative_error(weight: Tensor, stored: Tensor, gram: Tensor) -> float:
    """||X (W - W')^T|| / ||X W^T|| from the Gram matrix of X; 0 where W puts out zeros throughout.

    weight, stored: W and W', [N,K] fp32. gram: [K,K] fp32.
    """
    # Tiny weights would have no squares in fp32.
    exponent = torch.frexp(weight.abs().max()).exponent.clamp(-120, 120)

    def energy(matrix: Tensor) -> float:
        matrix = torch.ldexp(matrix, -exponent)
        return float(((matrix @ gram) * matrix).sum(dtype=torch.float64).clamp(min=0))

    whole = energy(weight)
    return (energy(weight - stored) / whole) ** 0.5 if whole > 0 else 0.0


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

    def compress(
        self,
        tell: Callable[[LayerRecord, int], None],
        say: Callable[[str], None] = lambda message: None,
    ) -> FinishedBlock:
        """Every linear, group after group of those that read the same input.

        tell: is called with the record of each layer, and how many of the block are finished.
        say: is called with a line on the tokens of the block's experts, if it has any.

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
        prefix, streams = self.job.prefix(self.index), self.streams
        feeding = Feeding.of(
            self.job.plan.usual,
            streams.calibration,
            self.index,
            self.block,
            self.dense_block,
            prefix,
        )
        for counts in feeding.records:
            say(str(counts))
        waves, passes = streams.enter(
            self.index, self.block, self.dense_block, self.linears, prefix, feeding
        )
        for wave in waves:
            inputs: dict[str, tuple[GroupInputs, Group]] = {}
            for group, found in zip(wave, passes.inputs(wave), strict=True):
                for name in group.names:
                    beside = feeding.beside(group.names, name)
                    inputs[name] = found, replace(group, names=beside)
            layer = functools.partial(self._layer, inputs)
            # One process alone tells of each layer as soon as it is done.
            for names in [[name] for name in inputs] if self.team.size == 1 else [list(inputs)]:
                for name, (decomposition, record) in self.team.share(names, layer).items():
                    self._keep(finished, name, decomposition, record)
                    tell(finished.layers[-1], len(finished.layers))
            passes.finish(tuple(inputs))
        finished.experts = feeding.records
        return finished

    def _layer(
        self, known: dict[str, tuple[GroupInputs, Group]], name: str
    ) -> tuple[Decomposition, LayerRecord]:
        """One linear: the numbers that will be stored, and their record without its bits.

        known: of every linear what it reads, and its group.
        """
        began, settings = time.perf_counter(), self.job.plan.layer(name)
        inputs, group = known[name]
        weight, stats = self.linears[name].weight.float(), inputs.stats
        if inputs.moved is not None and settings.drift:
            stats = stats.with_drift(weight @ inputs.moved)
        with peak_memory(weight.device) as peak:
            try:
                decomposition = decompose_as_stored(weight, stats, settings)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
        dense, judging = decomposition.dense(), inputs.judging
        layer = LayerRecord(
            name=name,
            block=self.index,
            shape=(weight.shape[0], weight.shape[1]),
            method=settings.method,
            pattern=settings.pattern,
            rank=0 if decomposition.U is None else decomposition.U.shape[1],
            values=settings.values,
            bits_per_weight=0.0,
            error=relative_error(weight, dense, inputs.stats.matrix),
            heldout_error=None if judging is None else relative_error(weight, dense, judging),
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
        self.streams.forget()  # what training changes, and while it needs the memory
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
        plan, streams = self.job.plan, self.streams
        assert plan.matching is not None
        from_dense = plan.matching.target == "dense"
        taught = self._target(streams.calibration, streams.dense if from_dense else None)
        judged = None
        if streams.held_back is not None:
            reads = streams.dense_held_back if from_dense else None
            judged = self._target(streams.held_back, reads)
        prefix = self.job.prefix(self.index)
        return match_block(
            Goal(self.index, taught, judged or taught),
            self.block,
            {name.removeprefix(prefix): d for name, d in self.decompositions.items()},
            plan.matching,
            lambda name, d: as_stored(d, plan.layer(prefix + name)),
            say,
        )

    @torch.no_grad()
    def _target(self, stream: Stream, dense: Stream | None) -> Target:
        """What the twin makes of a text at the block's input; of `dense` in its place if given."""
        dense_block, reads = self.dense_block, (dense or stream).exact()
        assert dense_block is not None
        outputs = [
            reads.run(self.index, dense_block, batch).to(reads.hidden[batch].device)
            for batch in range(len(reads.hidden))
        ]
        return Target(stream.exact(), outputs)


def set_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Put a weight [N,K] into a linear, in the type and on the device of the one that it had."""
    old = linear.weight
    linear.weight = nn.Parameter(weight.to(old.device).to(old.dtype), requires_grad=False)
