"""A model, and which of its linears are to become what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..device import native_products
from ..errors import FormatError
from ..format import Int8Table, int8_table
from ..models.blocks import block_linears, find_blocks, load_block, packable_experts
from ..models.model_config import compute_dtype
from ..models.source import Source
from ..models.tables import TableEntry
from ..models.ties import tied_names
from .plan import Plan
from .vocabulary import AS_IT_IS, Wanted, choose


@dataclass(frozen=True)
class Job:
    """What a run works at.

    path: the name of the list of blocks, such as "model.layers".
    linears: per block, full module name -> the linear to compress, on meta.
    tied: names of parameters that are another parameter -> that one's name.
    tables: the embeddings that become int8 rows, by name. head: the output head that is packed, or
    None. notes: what of this the model cannot have, in sentences. wanted: what was asked for.
    """

    source: Source
    plan: Plan
    device: torch.device
    path: str
    blocks: nn.ModuleList
    linears: list[dict[str, nn.Linear]]
    tied: dict[str, str]
    tables: dict[str, TableEntry] = field(default_factory=dict)
    head: str | None = None
    notes: tuple[str, ...] = ()
    wanted: Wanted = AS_IT_IS

    @classmethod
    def of(
        cls,
        source: Source,
        plan: Plan,
        skip: tuple[str, ...],
        device: torch.device,
        wanted: Wanted = AS_IT_IS,
    ) -> Job:
        """The job of compressing every linear of `source` but those that `skip` names.

        Raises: ArgumentError for a pattern of the plan that matches no layer, ArchitectureError for
            a model without blocks, a FormatError or MethodError for a layer that cannot have its
            settings.
        """
        path, blocks = find_blocks(source.model)
        tied = tied_names(source.model)
        # A layer that no 2:4 fits is left dense, as the model's matter; a pattern that the user
        # chose must fit every layer.
        group = plan.usual.parsed.group if plan.usual.packed else 1
        source.unstack_named(packable_experts(path, blocks, group, skip))
        linears = block_linears(path, blocks, group, skip, tied)
        chosen = choose(source.model, plan, wanted)
        job = cls(source, plan, device, path, blocks, linears, tied, *chosen, wanted)
        plan.check_shapes(job.shapes)
        plan.by_pattern.check_matches(job.names)
        return job

    def without(self, dense: tuple[str, ...], reason: str) -> Job:
        """The same job with "embeddings" or "head", whichever `dense` names, left dense."""
        changes: dict[str, Any] = {}
        if "embeddings" in dense and self.tables:
            changes["tables"] = {}
        if "head" in dense and self.head is not None:
            changes["head"] = None
        words = {"tables": "the embedding", "head": "the output head"}
        notes = tuple(f"{words[name]} stays dense: {reason}" for name in changes)
        if "head" in changes and self.tables and "tables" not in changes:
            # The table serves a tied head that is not packed.
            changes["tables"] = choose(
                self.source.model, self.plan, replace(self.wanted, head=False)
            )[0]
        return replace(self, **changes, notes=(*self.notes, *notes))

    def with_layers(self, layers: dict[str, dict]) -> Job:
        """The same job with settings of their own for some layers."""
        return replace(self, plan=replace(self.plan, layers=layers))

    @property
    def dtype(self) -> torch.dtype:
        """The type in which blocks compute."""
        return compute_dtype(self.source.config, self.device)

    @property
    def products(self) -> torch.dtype | None:
        """The type to which blocks round the operands of their products; None for `dtype`."""
        return native_products(self.device)

    @property
    def layers(self) -> int:
        return sum(map(len, self.linears)) + (self.head is not None)

    @property
    def steps(self) -> int:
        """The blocks, and the head behind them where it is packed."""
        return len(self.blocks) + (self.head is not None)

    @property
    def unties(self) -> bool:
        """Whether embedding and head, one tensor before, are none afterwards."""
        names = {f"{name}.weight" for name in (*self.tables, self.head) if name is not None}
        return bool(names & {*self.tied, *self.tied.values()})

    def table(self, name: str) -> Int8Table:
        """The int8 rows of the embedding `name`. Raises: RangeError naming it."""
        weight = self.source.get(f"{name}.weight")
        try:
            return int8_table(weight)
        except FormatError as error:
            raise type(error)(f"{name}: {error}") from error

    @property
    def names(self) -> list[str]:
        """The layers that are compressed: linears of the blocks, and the head if it is packed."""
        return [*self.shapes, *([] if self.head is None else [self.head])]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (N, K)."""
        return {
            name: (linear.out_features, linear.in_features)
            for block in self.linears
            for name, linear in block.items()
        }

    def prefix(self, index: int) -> str:
        """What the names inside block `index` begin with."""
        return f"{self.path}.{index}."

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its dense weights, on the device."""
        return load_block(self.source, self.path, self.blocks, index, self.device, self.dtype)
