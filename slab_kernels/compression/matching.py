"""Transformer matching: a compressed block is trained towards the dense one.

It is 3BASiL-TM's (arXiv 2603.01376, section 4) and follows any method. All that a compressed block
stores in floating point is trained together: kept values (or the step sizes of integer ones), U, V,
P, Q, biases and norms. Positions, signs and integer codes stay. The target is the output of the
dense block on the compressed prefix, as in the paper. `target="dense"` takes what the dense model
puts out at this depth instead, so that errors made in earlier blocks are undone as well (perplexity
on a five-block model, int4: 6.50 without matching, 6.00 and 6.01 with the two targets).
"""

from __future__ import annotations

import math
import reprlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..format import Decomposition
from ..models.streams import Stream
from ..settings import enforce, setting
from .record import MatchRecord
from .trainable import TrainableLinear

TARGETS = ("dense", "prefix")


@dataclass(frozen=True)
class Matching:
    """How a block is trained.

    epochs: the paper takes 19.
    rate: suits every model, being a share of each tensor's size (2e-3, 1e-2 and 3e-2 gave
        perplexities of 6.11, 6.00 and 6.08); it falls to a fifth along a cosine.
    target: "prefix" or "dense", see above.

    Raises on construction: ArgumentError.
    """

    epochs: int = setting(10, "passes over the calibration text", 1, 1_000_000)
    rate: float = setting(
        1e-2, "largest Adam step as a share of each tensor's root mean square", 0, 1, above=True
    )
    target: str = setting("prefix", "whose block output is learnt", choices=TARGETS)

    def __post_init__(self):
        enforce(self, of=" of matching")

    @classmethod
    def of(cls, value: Matching | int | bool | None) -> Matching | None:
        """The settings that `value` stands for; None for None, False and 0.

        It may be the settings, a number of epochs, or True for the usual ones.

        Raises: ArgumentError for anything else.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if isinstance(value, Integral):
            return cls(epochs=int(value)) if value else None
        raise ArgumentError(
            f"matching={reprlib.repr(value)} must be a number of epochs, True, None, or "
            "Matching(epochs=..., rate=..., target=...)"
        )


class Target(NamedTuple):
    """What a block shall make of one text.

    stream: the hidden states at the block's input, which the compressed prefix gives.
    outputs: per batch [samples, window, hidden].
    """

    stream: Stream
    outputs: list[Tensor]

    def error(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Output of block `index` minus target, fp32, of one batch."""
        output = self.stream.run(index, block, batch)
        return (output - self.outputs[batch].to(self.stream.device)).float()


@dataclass(frozen=True)
class Goal:
    """What block `index` shall put out.

    taught: on the windows that it is trained on. judged: on those by which the best epoch is
    chosen, which are held back; `taught` again where no windows are held back.
    """

    index: int
    taught: Target
    judged: Target

    @torch.no_grad()
    def distance(self, block: nn.Module) -> float:
        """||y - target|| / ||target - input|| over the windows that judge."""
        stream, outputs = self.judged
        errors = (self.judged.error(self.index, block, b) for b in range(len(outputs)))
        error = sum(float(e.square().sum()) for e in errors)
        moves = (output - hidden for output, hidden in zip(outputs, stream.hidden, strict=True))
        whole = sum(float(move.float().square().sum()) for move in moves)
        return math.sqrt(error / whole) if whole else 0.0


class Trained(NamedTuple):
    """What can be trained of a block: its compressed linears and other vectors (norms, biases)."""

    linears: dict[str, TrainableLinear]
    others: dict[str, nn.Parameter]

    def parameters(self) -> list[nn.Parameter]:
        inside = [p for linear in self.linears.values() for p in linear.parameters()]
        return inside + list(self.others.values())

    def vectors(self) -> dict[str, Tensor]:
        """Norms and biases as they are now, by their names in the block."""
        found = {name: p.detach() for name, p in self.others.items()}
        for name, linear in self.linears.items():
            if linear.bias is not None:
                found[f"{name}.bias"] = linear.bias.detach()
        return found


@contextmanager
def trainable(block: nn.Module, decompositions: dict[str, Decomposition]) -> Iterator[Trained]:
    """Inside, the block computes with fp32 copies that can be trained; afterwards it is as before.

    decompositions: module name inside the block -> what its linear stands for.
    """
    before: dict[str, nn.Module | nn.Parameter] = {}

    def put(name: str, value: nn.Module | nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        owner = block.get_submodule(path)
        before.setdefault(name, getattr(owner, leaf))
        setattr(owner, leaf, value)

    linears = {
        name: TrainableLinear(d, getattr(block.get_submodule(name), "bias", None))
        for name, d in decompositions.items()
    }
    for name, linear in linears.items():
        put(name, linear)
    inside = {id(p) for linear in linears.values() for p in linear.parameters()}
    others = {
        name: nn.Parameter(p.detach().float().clone())
        for name, p in block.named_parameters()
        if id(p) not in inside and p.dim() < 2
    }
    for name, parameter in others.items():
        put(name, parameter)
    try:
        yield Trained(linears, others)
    finally:
        for name, value in before.items():
            put(name, value)


@dataclass
class Best:
    """The smallest loss so far, after which epoch it was reached, and the parameters of then."""

    loss: float
    epoch: int
    weights: list[Tensor]


class Matched(NamedTuple):
    """What matching made of a block.

    decompositions: by module name inside the block.
    vectors: norms and biases that were trained, by their names in the block.
    """

    decompositions: dict[str, Decomposition]
    vectors: dict[str, Tensor]
    record: MatchRecord


def match_block(
    goal: Goal,
    block: nn.Module,
    decompositions: dict[str, Decomposition],
    settings: Matching,
    stored: Callable[[str, Decomposition], Decomposition],
    tell: Callable[[str], None] = lambda message: None,
) -> Matched:
    """Train a block towards its goal. The block itself is as before afterwards.

    Args:
        block: with compressed weights in its linears.
        decompositions: module name inside the block -> what its linear stands for.
        stored: (module, decomposition) -> what is left of it once it is packed and unpacked.
        tell: is called with a line after every epoch.

    Returns: what was learnt. The distance on the windows that judge never rises: where no epoch
        lowers it, the decompositions are those given and no vector is there.
    """
    began = time.perf_counter()
    with trainable(block, decompositions) as trained:
        before = goal.distance(block)
        best = _train(goal, block, trained.parameters(), settings, before, tell)
        result = {name: stored(name, m.decomposition()) for name, m in trained.linears.items()}
        vectors = trained.vectors()
    for name, d in result.items():
        mask = decompositions[name].mask
        assert torch.equal(d.mask, mask) and bool((d.S[~mask] == 0).all()), name
    if best.epoch == 0:
        result, vectors = decompositions, {}
    seconds = time.perf_counter() - began
    return Matched(result, vectors, MatchRecord(goal.index, before, best.loss, best.epoch, seconds))


def _train(
    goal: Goal,
    block: nn.Module,
    parameters: list[nn.Parameter],
    settings: Matching,
    before: float,
    tell: Callable[[str], None],
) -> Best:
    """Adam over all epochs; the parameters end as they were after the best one.

    before: the distance at the start.
    """
    best = Best(before, 0, _copies(parameters))
    optimizer = torch.optim.Adam([_group(p, settings.rate) for p in parameters])
    batches = len(goal.taught.outputs)
    # Every token weighs the same, also where windows and so batches differ in length.
    usual = sum(output.numel() for output in goal.taught.outputs) / batches
    shares = [output.numel() / usual for output in goal.taught.outputs]
    steps = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.6 + 0.4 * math.cos(math.pi * min(step, steps) / steps)
    )
    order = torch.Generator().manual_seed(goal.index)
    for epoch in range(1, settings.epochs + 1):
        for batch in torch.randperm(batches, generator=order).tolist():
            with torch.enable_grad():
                loss = goal.taught.error(goal.index, block, batch).square().mean()
                (loss * shares[batch]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        distance = goal.distance(block)
        tell(f"block {goal.index}: epoch {epoch} of {settings.epochs}, distance {distance:.4f}")
        if distance < best.loss:
            best = Best(distance, epoch, _copies(parameters))
    with torch.no_grad():
        for parameter, weight in zip(parameters, best.weights, strict=True):
            parameter.copy_(weight)
    return best


def _group(parameter: nn.Parameter, rate: float) -> dict:
    """A parameter group of Adam whose steps are in proportion to the parameter's size."""
    size = float(parameter.detach().square().mean().sqrt())
    return {"params": [parameter], "lr": rate * max(size, 1e-8)}


def _copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]
