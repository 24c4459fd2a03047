"""One budget of stored bits for a whole model, spent where the expected loss says it helps most.

SLaB's authors name adaptive rank as future work (arXiv 2604.04493); here value type, sign planes
and rank of every layer are chosen together:
1. With the dense model's own inputs every layer is decomposed by each row of LADDER, by the sweep
   alone, without refits: the order of the rows is what counts.
2. What the error of each row costs, in nats per token of divergence from the dense model's
   predictions, is read off the gradients of one backward pass (`sensitivity`). The costs of layers
   are expected to add up.
3. The sum is minimised under the budget: layers climb their rows in order of loss saved per bit.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BudgetError
from ..methods import LayerSettings
from ..methods.inputs import InputStats
from ..models.blocks import find_blocks
from ..models.groups import find_groups
from ..models.passes import Passes, Room
from ..models.streams import Stream, catch_stream
from ..settings import Rule
from ..text.windows import Windows
from .plan import decompose_as_stored
from .routing import Feeding
from .sensitivity import LayerSensitivity, Sensitivity
from .statistics import moments

PROBES = 8  # windows on which gradients are taken
# The rows go from coarse to fine. Below two planes a bit is better spent on the pruned positions
# than on kept values. Ranks above 1 pay for themselves only on wide layers, where U and V are
# cheap; the search finds out which.
LADDER: tuple[dict, ...] = (
    {"values": "int3", "planes": 1, "rank": 1},
    {"values": "int4", "planes": 1, "rank": 1},
    {"values": "int3", "planes": 2, "rank": 1},
    {"values": "int3", "planes": 2, "rank": 4},
    {"values": "int4", "planes": 2, "rank": 1},
    {"values": "int4", "planes": 2, "rank": 4},
    {"values": "int4", "planes": 3, "rank": 1},
    {"values": "int4", "planes": 3, "rank": 4},
    {"values": "int8", "planes": 2, "rank": 4},
    {"values": "int8", "planes": 3, "rank": 4},
    {"values": "fp16", "planes": 2, "rank": 4},
    {"values": "fp16", "planes": 3, "rank": 4},
)
BITS = Rule("stored bits per weight over the whole model", float, 0, above=True)
# Settings that a search chooses, and what they are where nobody gave them.
CHOSEN = {"values": "fp16", "planes": 1, "rank": 1, "adapter_rank": None}


@dataclass(frozen=True)
class Choice:
    """A row of LADDER for one layer, its bits in all, and the loss that is expected of it."""

    settings: dict[str, Any]
    bits: float
    loss: float


class Row(NamedTuple):
    """A row of LADDER that a layer can have, and the bits that the layer then takes in all."""

    settings: dict[str, Any]
    bits: float


def check_bits(bits: float, settings: LayerSettings) -> float:
    """`bits` as a plain number.

    Raises: BudgetError for what is no budget, and for one beside settings that it chooses itself.
    """
    bits = BITS.accept("bits", bits, BudgetError)
    if settings.method != "slab" or not settings.packed:
        raise BudgetError(
            f"bits={bits:g} chooses among the packed forms of method 'slab', not of "
            f"{settings.method!r} with pattern {settings.pattern!r}"
        )
    for name, usual in CHOSEN.items():
        if getattr(settings, name) != usual:
            raise BudgetError(
                f"bits={bits:g} chooses {name} layer by layer, so "
                f"{name}={getattr(settings, name)!r} contradicts it; leave one out"
            )
    return bits


@dataclass
class BudgetSearch:
    """The search for the settings of every layer.

    open_model: gives the dense model in memory; not called where `known` holds every layer.
    shapes: module name -> (N, K) of the linears to compress.
    usual: method, pattern and group size, which all layers share.
    tokens: windows of the calibration text.
    say: is called with a line per layer that was measured.
    known: module name -> the expected loss of each of its rows, from an interrupted search.
    note: is called with the same for each layer that is measured now.
    """

    open_model: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, int]]
    usual: LayerSettings
    tokens: Windows
    say: Callable[[str], None]
    known: dict[str, list[float]] = field(default_factory=dict)
    note: Callable[[str, list[float]], None] | None = None

    def best(self, bits: float) -> dict[str, dict[str, Any]]:
        """Module name -> the settings in which it differs from `usual`.

        All layers together take at most `bits` stored bits per weight.

        Raises: BudgetError naming the range if `bits` is outside of what the rows reach.
        """
        rows = {name: self._rows(shape) for name, shape in self.shapes.items()}
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        _check_reach(bits, rows, weights)
        losses = self._losses(rows)
        choices = {
            name: [
                Choice(row.settings, row.bits, loss)
                for row, loss in zip(rows[name], losses[name], strict=True)
            ]
            for name in self.shapes
        }
        chosen = spend(choices, bits * weights)
        return {name: choice.settings for name, choice in chosen.items()}

    def _rows(self, shape: tuple[int, int]) -> list[Row]:
        """The rows that a layer of this shape can have."""
        found = []
        for settings in LADDER:
            if settings["rank"] <= min(shape):
                layout = replace(self.usual, **settings).layout(shape)
                found.append(Row(settings, layout.bits_per_weight() * math.prod(shape)))
        return found

    def _losses(self, rows: dict[str, list[Row]]) -> dict[str, list[float]]:
        """Module name -> the expected loss of each of its rows, measured where it is not known."""
        losses = {
            name: self.known[name]
            for name in self.shapes
            if len(self.known.get(name, ())) == len(rows[name])
        }
        missing = {name: rows[name] for name in self.shapes if name not in losses}
        if missing:
            for name, found in Measurement(self.open_model(), self.usual, self.tokens).run(missing):
                losses[name] = found
                if self.note is not None:
                    self.note(name, found)
                self.say(f"budget: {name} {found[0]:.2e} nats per token at its coarsest")
        return losses


def _check_reach(bits: float, rows: dict[str, list[Row]], weights: int) -> None:
    """Raises: BudgetError for a budget outside of what the rows of LADDER reach together."""
    least = sum(min(row.bits for row in options) for options in rows.values()) / weights
    most = sum(max(row.bits for row in options) for options in rows.values()) / weights
    reach = f"what this model's layers reach: {least:.3f} to {most:.3f} stored bits per weight"
    if not least <= bits:
        raise BudgetError(f"bits={bits:g} is below {reach}")
    if bits > most:
        raise BudgetError(f"bits={bits:g} is above {reach}; give values, planes and rank yourself")


class Measurement:
    """Steps 1 and 2, on a dense model in memory, which is as before afterwards."""

    def __init__(self, model: nn.Module, usual: LayerSettings, tokens: Windows):
        self.model, self.usual, self.tokens = model, usual, tokens
        self.device = next(model.parameters()).device
        self.path, self.blocks = find_blocks(model)
        self.probes = Windows(tokens.rows[:PROBES])

    def run(self, rows: dict[str, list[Row]]) -> Iterator[tuple[str, list[float]]]:
        """Layer after layer of `rows`: its name, and the expected loss of each of its rows."""
        stream, probing = self._stream(self.tokens), self._stream(self.probes)
        sensitivity = Sensitivity(self.model, self.probes, probing)
        for index, block in enumerate(self.blocks):
            prefix = f"{self.path}.{index}."
            linears: dict[str, nn.Linear] = {}
            for name, module in block.named_modules():
                if prefix + name in rows and isinstance(module, nn.Linear):
                    linears[prefix + name] = module
            costs = sensitivity.of_block(index, block, linears) if linears else {}
            passes = Passes(stream, index, block, linears, Room(0))
            feeding = Feeding.of(self.usual, stream, index, block, None, prefix)
            for group in find_groups(stream, index, block, linears) if linears else ():
                (stats,) = moments(passes, [group])
                for name in group.names:
                    yield name, self._layer(linears[name], rows[name], stats, costs[name])
            feeding.end()
            with torch.no_grad():
                stream.advance(index, block)
                probing.advance(index, block)

    def _stream(self, tokens: Windows) -> Stream:
        blocks = self.blocks
        return catch_stream(
            self.model, blocks, tokens, lambda index: _bare(blocks[index]), self.device
        )

    def _layer(
        self, linear: nn.Linear, rows: list[Row], stats: InputStats, cost: LayerSensitivity
    ) -> list[float]:
        """The expected loss of each row of one layer."""
        W = linear.weight.detach().float()
        return [cost.loss(W - self._quick(W, stats, row)) for row in rows]

    def _quick(self, W: Tensor, stats: InputStats, row: Row) -> Tensor:
        """The weight [N,K] that a row leaves, without refits."""
        options = {**self.usual.options, "rounds": 0, "drift": 0.0}
        quick = replace(self.usual, options=options, **row.settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decompose_as_stored(W, stats, quick).dense()


def _bare(block: nn.Module) -> nn.Module:
    """The same block with its own forward, while `catch_stream` has put another in its place."""
    other = copy.copy(block)
    other.__dict__ = {name: value for name, value in block.__dict__.items() if name != "forward"}
    return other


def spend(choices: dict[str, list[Choice]], budget: float) -> dict[str, Choice]:
    """The row of every layer, at most `budget` bits in all.

    Every layer climbs the lower convex hull of its loss over bits, the best step of all layers
    first. On hulls this is the optimum of the relaxed problem up to the last step that no longer
    fits; steps that do not fit are skipped, so that cheaper ones can still use what is left. No
    row that fits as the same one for all layers has a smaller expected loss: each is compared.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].bits for hull in hulls.values())
    steps = []
    for name, hull in hulls.items():
        for i in range(1, len(hull)):
            gain = (hull[i - 1].loss - hull[i].loss) / (hull[i].bits - hull[i - 1].bits)
            steps.append((-gain, name, i))
    for _, name, i in sorted(steps):
        extra = hulls[name][i].bits - hulls[name][at[name]].bits
        if at[name] < i and spent + extra <= budget:
            at[name] = i
            spent += extra
    best = {name: hulls[name][i] for name, i in at.items()}
    for settings in LADDER:
        uniform = {
            name: choice
            for name, options in choices.items()
            for choice in options
            if choice.settings == settings
        }
        fits = sum(choice.bits for choice in uniform.values()) <= budget
        if len(uniform) == len(choices) and fits:
            best = min(best, uniform, key=_expected_loss)
    return best


def _expected_loss(rows: dict[str, Choice]) -> float:
    return sum(choice.loss for choice in rows.values())


def _hull(options: list[Choice]) -> list[Choice]:
    """The rows on the lower convex hull of (bits, loss), cheapest first."""
    hull: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.bits, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and (hull[-2].loss - hull[-1].loss) * (choice.bits - hull[-1].bits) <= (
            hull[-1].loss - choice.loss
        ) * (hull[-1].bits - hull[-2].bits):
            hull.pop()
        hull.append(choice)
    return hull
