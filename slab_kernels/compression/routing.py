"""Experts under calibration: most see the tokens that their router sends them, some see all.

A method needs so many tokens of an expert. With a Gram matrix that is the widest input K of its
linears: fewer tokens leave the matrix singular, and the method would then be free to make any error
in the directions that none of these tokens takes. Mean squares of 128 tokens are known to an
eighth, sqrt(2 / 128), if inputs are near normal. A method that looks at no inputs needs one token,
so that its error can be measured. An expert that gets fewer is shown all tokens of the text: the
inputs that it would have if the router sent it everything. What the block computes stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..methods import LayerSettings
from ..models.experts import mixtures, stages
from ..models.groups import Group, routed_tokens
from ..models.streams import Stream
from ..nn.experts import Experts
from .record import ExpertsRecord

FOR_SQUARES = 128  # tokens


def needed_tokens(settings: LayerSettings, experts: Experts) -> int:
    """The tokens that one of `experts` must see for its linears to be fitted to them."""
    widths = [m.in_features for m in experts.modules() if isinstance(m, nn.Linear)]
    needs = {"none": 1, "diagonal": FOR_SQUARES, "gram": max(widths)}
    return needs[settings.chosen.statistics]


@dataclass
class Feeding:
    """Who of a block's experts is shown all tokens, until `end`.

    copies: the block, and its dense twin where there is one. prefix: of the full names of linears.
    records: what is known of each mixture of the block. routed: the linears that saw only what the
    router sends to their expert, when the block began.
    """

    copies: list[nn.Module] = field(default_factory=list)
    prefix: str = ""
    records: list[ExpertsRecord] = field(default_factory=list)
    stages: dict[str, str] = field(default_factory=dict)
    routed: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        settings: LayerSettings,
        stream: Stream,
        index: int,
        block: nn.Module,
        dense_block: nn.Module | None,
        prefix: str,
    ) -> Feeding:
        """Count the tokens of each expert of block `index`, and feed those that get too few."""
        found = mixtures(block)
        if not found:
            return cls()
        copies = [block] if dense_block is None else [block, dense_block]
        counts = routed_tokens(stream, index, block)
        feeding = cls(copies, prefix, [], stages(block, prefix))
        total = sum(hidden.shape[:-1].numel() for hidden in stream.hidden)
        for path, experts in found.items():
            needed, tokens = needed_tokens(settings, experts), counts[path]
            fed = [number for number, count in enumerate(tokens) if count < needed]
            feeding.records.append(ExpertsRecord(index, prefix + path, tokens, total, needed, fed))
            feeding._show(path, fed)
        feeding.routed = frozenset(name for name in feeding.stages if not feeding._is_fed(name))
        return feeding

    def needed(self, names: Iterable[str]) -> int:
        """The tokens that the experts of these linears must see; 0 for other linears."""
        modules = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
        return max((r.needed for r in self.records if r.module in modules), default=0)

    def beside(self, names: tuple[str, ...], name: str) -> tuple[str, ...]:
        """Those of the linears `names` that a record names as the group of the linear `name`.

        Of experts they are its own expert's: all that are shown all tokens read the same, and each
        of them would name all others.
        """
        if name not in self.stages:
            return names
        own = name.rpartition(".")[0]
        return tuple(other for other in names if other.rpartition(".")[0] == own)

    def feed(self, names: Iterable[str]) -> bool:
        """Show all tokens to the experts of these linears too; False if they are no experts' or
        are shown them already."""
        new = {name for name in names if name in self.stages and not self._is_fed(name)}
        for position, record in enumerate(self.records):
            numbers = {self._number(name) for name in new if name.startswith(f"{record.module}.")}
            if numbers:
                fed = sorted({*record.fed, *numbers})
                self.records[position] = record.with_fed(fed)
                self._show(record.module.removeprefix(self.prefix), fed)
        return bool(new)

    def end(self) -> list[nn.Module]:
        """Show nobody anything more; returns the modules that were called otherwise meanwhile."""
        called: list[nn.Module] = []
        for record in self.records:
            path = record.module.removeprefix(self.prefix)
            for copy in self.copies:
                experts = mixtures(copy)[path]
                called += [m for n in experts.fed for m in experts.expert(n).modules()]
                experts.fed = frozenset()
        return called

    def _show(self, path: str, fed: list[int]) -> None:
        for copy in self.copies:
            mixtures(copy)[path].fed = frozenset(fed)

    def _is_fed(self, name: str) -> bool:
        return any(
            name.startswith(f"{record.module}.") and self._number(name) in record.fed
            for record in self.records
        )

    @staticmethod
    def _number(name: str) -> int:
        """Which expert a linear belongs to: the number before the last name."""
        return int(name.split(".")[-2])


def in_waves(
    groups: list[Group],
    linears: dict[str, nn.Linear],
    stages: dict[str, str],
    tokens: int,
    room: int,
) -> list[list[Group]]:
    """The same groups in lists that one pass over the texts serves, in order of execution.

    Experts do not read what others put out, so the statistics of several are gathered at once, as
    many as there is room for.

    stages: see `models.experts.stages`; linears that are in none come alone. tokens: of a batch.
    room: bytes for what is gathered, which is a Gram matrix and the inputs of a batch.
    """
    found: dict[str, list[Group]] = {}
    for number, group in enumerate(groups):
        found.setdefault(stages.get(group.names[0], str(number)), []).append(group)
    waves: list[list[Group]] = []
    for members in found.values():
        left = -1
        for group in members:
            width = linears[group.names[0]].in_features
            left -= 4 * width * (width + tokens)
            if left < 0:
                waves.append([])
                left = room - 4 * width * (width + tokens)
            waves[-1].append(group)
    return waves
