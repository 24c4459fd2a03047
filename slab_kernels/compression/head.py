"""The output head packed like any linear: its inputs, its rows in pieces, one V for all of them.

The head reads what the final norm makes of the last block's hidden states; a `Tail` leads the
texts there, so that the head is one more block with a single linear, and its statistics come from
where every other layer's come from.

A head has many rows: 128k x 4096 are 2 GB in fp32, and a method holds some twenty such copies. Rows
are independent of each other but for V (a packed weight has one V for all rows). So a head beyond
WEIGHTS_AT_ONCE is cut into pieces: `slab` first solves evenly spaced rows alone, which gives V, and
then every piece for that V. Methods without a sign term need no V. Those with an adapter P Q^T, and
other methods with a sign term, solve all rows at once, whatever memory that takes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatError
from ..format import Decomposition, PackedLayout, PackedWeight, pack
from ..methods import LayerSettings
from ..models.blocks import batches
from ..models.endings import Ending, Tail
from .calibration import Tokens
from .job import Job
from .memory import peak_memory
from .plan import decompose_as_stored
from .record import LayerRecord
from .routing import Feeding
from .sinks import FinishedBlock
from .statistics import GroupInputs, Streams
from .team import Team

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_AT_ONCE = 1 << 26  # of a head; a copy in fp32 takes 256 MiB
SHARES_V = "slab"  # the method that solves rows for a V that is given


class Solved(NamedTuple):
    """A packed head, or some of its rows, and the squared errors and outputs of those.

    errors, outputs: tr(E H E^T) and tr(W H W^T) on the text that it is fitted to, and on the one by
    which it is judged, if there is one.
    """

    packed: PackedWeight
    errors: tuple[float, ...]
    outputs: tuple[float, ...]


@dataclass
class HeadWork:
    """The output head of a job, after the last block.

    model: the model, its weights real outside the blocks. tokens: of the texts in `streams`.
    """

    job: Job
    model: PreTrainedModel
    tokens: Tokens
    streams: Streams
    team: Team

    def compress(self) -> FinishedBlock:
        """The packed head with its record. Raises: CheckpointError, and what the method raises."""
        job, name = self.job, self.job.head
        assert name is not None
        weight = job.source.get(job.tied.get(f"{name}.weight", f"{name}.weight"))
        weight = weight.to(device=job.device, dtype=job.dtype)
        if bad := int((~weight.isfinite()).sum()):
            raise CheckpointError(
                f"{name}.weight holds {bad} NaN or infinite numbers; "
                "the model's checkpoint is damaged"
            )
        self._lead_on()
        ending = Ending(self.model, job.blocks, self.streams.calibration.returned)
        tail, twin = (Tail(ending, name, weight) for _ in range(2))
        index = len(job.blocks)
        linears = {name: tail.head}
        (wave,), passes = self.streams.enter(index, tail, twin, linears, "", Feeding())
        (inputs,) = passes.inputs(wave)

        def layer(name: str) -> tuple[PackedWeight, LayerRecord]:
            N, K = weight.shape
            return _layer(name, index, weight, inputs, job.plan.layer(name).for_shape((N, K)))

        packed, record = self.team.share((name,), layer)[name]
        return FinishedBlock({name: packed}, [record])

    def _lead_on(self) -> None:
        """Let a tail come behind the last block of every stream; some share their calls."""
        streams, tokens = self.streams, self.tokens
        pairs = [
            (streams.calibration, tokens.fitted),
            (streams.dense, tokens.fitted),
            (streams.held_back, tokens.held_back),
            (streams.heldout, tokens.heldout),
        ]
        led: list[list] = []
        for stream, windows in pairs:
            if stream is None or windows is None:
                continue
            if not any(stream.calls is calls for calls in led):
                stream.follow([(batch,) for batch in batches(windows)])
                led.append(stream.calls)


def _layer(
    name: str, index: int, weight: Tensor, inputs: GroupInputs, settings: LayerSettings
) -> tuple[PackedWeight, LayerRecord]:
    """The packed head and its record."""
    began = time.perf_counter()
    with peak_memory(weight.device) as peak:
        try:
            solved = solve(weight, inputs, settings)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
    packed = solved.packed
    errors = [
        (error / output) ** 0.5 if output > 0 else 0.0
        for error, output in zip(solved.errors, solved.outputs, strict=True)
    ]
    layout = packed.layout
    return packed, LayerRecord(
        name=name,
        block=index,
        shape=(weight.shape[0], weight.shape[1]),
        method=settings.method,
        pattern=settings.pattern,
        rank=layout.rank,
        values=settings.values,
        bits_per_weight=packed.bits_per_weight(),
        error=errors[0],
        heldout_error=errors[1] if len(errors) > 1 else None,
        seconds=inputs.seconds + time.perf_counter() - began,
        group=(name,),
        planes=layout.planes,
        group_size=layout.group_size,
        adapter_rank=layout.adapter_rank,
        peak_bytes=peak.bytes,
    )


def solve(weight: Tensor, inputs: GroupInputs, settings: LayerSettings) -> Solved:
    """A weight [N,K] of any floating type, packed; beyond WEIGHTS_AT_ONCE row piece by row piece.

    Raises: as `methods.decompose`.
    """
    N, K = weight.shape
    rows = max(1, WEIGHTS_AT_ONCE // K)
    config = settings.config((N, K))
    signs = settings.chosen.signs and config.rank > 0
    if N <= rows or config.adapter_rank or (signs and settings.method != SHARES_V):
        return _solve_rows(weight, inputs, settings, None)
    V: Tensor | None = None
    if signs:
        spaced = torch.arange(rows, device=weight.device) * N // rows
        V = _decomposed(weight[spaced], inputs, settings, None).V
    parts = [_solve_rows(piece, inputs, settings, V) for piece in weight.split(rows)]
    errors, outputs = (
        tuple(map(sum, zip(*(getattr(part, name) for part in parts), strict=True)))
        for name in ("errors", "outputs")
    )
    return Solved(below_each_other([part.packed for part in parts]), errors, outputs)


def _decomposed(
    weight: Tensor, inputs: GroupInputs, settings: LayerSettings, V: Tensor | None
) -> Decomposition:
    """Some rows [n,K] of a weight as they will be stored; V [K,R]: the one that they must have."""
    weight, stats = weight.float(), inputs.stats
    if inputs.moved is not None and settings.drift:
        stats = stats.with_drift(weight @ inputs.moved)
    return decompose_as_stored(weight, replace(stats, input_factor=V), settings)


def _solve_rows(
    weight: Tensor, inputs: GroupInputs, settings: LayerSettings, V: Tensor | None
) -> Solved:
    found = _decomposed(weight, inputs, settings, V)
    dtype = None if V is None else _exact_type(V)
    packed = pack(
        found,
        settings.values,
        settings.stored_group_size,
        factor_dtype=dtype,
        adapter_values=settings.stored_adapter,
    )
    weight, stored = weight.float(), packed.dense()
    grams = [inputs.stats.matrix]
    if inputs.judging is not None:
        grams.append(inputs.judging)
    errors = tuple(_energy(weight - stored, gram) for gram in grams)
    return Solved(packed, errors, tuple(_energy(weight, gram) for gram in grams))


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """tr(M H M^T), the squared output of a weight M [n,K] with H [K,K], per token."""
    return float(((matrix @ gram) * matrix).sum(dtype=torch.float64).clamp(min=0))


def _exact_type(V: Tensor) -> torch.dtype:
    """The type in which factors are stored that holds V as it is."""
    half = torch.float16
    return half if torch.equal(V.to(half).float(), V.float()) else torch.float32


def below_each_other(parts: list[PackedWeight]) -> PackedWeight:
    """One packed weight of the rows of several, which have the same K, settings, V and Q.

    Raises: FormatError if they have not.
    """
    first = parts[0].tensors()
    joined: dict[str, Tensor] = {}
    for name, tensor in first.items():
        others = [part.tensors()[name] for part in parts]
        if name not in ("V", "Q"):  # which have no row for an output
            joined[name] = torch.cat(others)
            continue
        if not all(torch.equal(tensor, other) for other in others):
            raise FormatError(f"packed rows with different {name} are not one weight")
        joined[name] = tensor
    layout: PackedLayout = parts[0].layout
    rows = sum(part.out_features for part in parts)
    return PackedWeight.from_tensors(
        joined, rows, layout.in_features, layout.values, layout.group_size
    )
