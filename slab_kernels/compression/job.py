"""A model, and which of its linears are to become what."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..device import native_products
from ..models.blocks import block_linears, find_blocks, load_block
from ..models.model_config import compute_dtype
from ..models.source import Source
from ..models.ties import tied_names
from .plan import Plan


@dataclass(frozen=True)
class Job:
    """What a run works at.

    path: the name of the list of blocks, such as "model.layers".
    linears: per block, full module name -> the linear to compress, on meta.
    tied: names of parameters that are another parameter -> that one's name.
    """

    source: Source
    plan: Plan
    device: torch.device
    path: str
    blocks: nn.ModuleList
    linears: list[dict[str, nn.Linear]]
    tied: dict[str, str]

    @classmethod
    def of(cls, source: Source, plan: Plan, skip: tuple[str, ...], device: torch.device) -> Job:
        """The job of compressing every linear of `source` but those that `skip` names.

        Raises: ArchitectureError for a model without blocks, a FormatError for a layer that cannot
            have its settings.
        """
        path, blocks = find_blocks(source.model)
        tied = tied_names(source.model)
        # A layer that no 2:4 fits is left dense, as the model's matter; a pattern that the user
        # chose must fit every layer.
        group = plan.usual.parsed.group if plan.usual.packed else 1
        job = cls(
            source, plan, device, path, blocks, block_linears(path, blocks, group, skip, tied), tied
        )
        plan.check_shapes(job.shapes)
        return job

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
        return sum(map(len, self.linears))

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
