"""Orders of channels that suit the 2:4 groups of the linears that read them.

The dense model's function does not depend on the order of its residual stream's channels, of its
MLPs' hidden channels and of its value heads' channels (`models.channels`). What is stored does: of
four neighbours in a row two are pruned. One pass of some calibration windows through the dense
blocks tells what pruning each weight costs; groups are then chosen so that the sum over all rows of
all readers is small (`methods.solvers.orders`). Nothing of this is left at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError
from ..methods.solvers.orders import assign_groups, pruning_cost
from ..models.blocks import outside_filled
from ..models.channels import (
    Channels,
    Move,
    Moves,
    by_parameter,
    free_in_block,
    moves,
    residual,
    same_function,
    same_norms,
)
from ..models.groups import inputs_by_name
from ..models.streams import Stream, catch_stream
from ..text.windows import Windows
from .job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16_384  # of the calibration text at most: a diagonal of H^-1 needs no more
ROWS = 16_384  # of all readers of the residual stream, drawn where there are more
ROUNDS = 30  # of assignment; layers on which eight were tried lost no more than with a hundred
RESIDUAL = "channels of the residual stream"


# Channels and the costs [rows,K] of pruning in all linears that read them -> their order [K].
Choice = Callable[[Channels, Tensor], Tensor]


def find_orders(
    job: Job, text: Tensor | Windows, say: Callable[[str], None], choose: Choice | None = None
) -> Moves:
    """What brings every parameter of the model into the new orders of its channels.

    text: for calibration; ids [samples, window], or windows of several lengths. say: is told in a
    sentence which channels keep their order, since the model is not known to allow another. choose:
    gives the orders; default `assign_groups`.
    """
    windows = Windows.of(text)
    windows = Windows(windows.rows[: max(1, TOKENS // windows.longest)])
    with outside_filled(job.source, job.path, job.device, job.dtype) as model:
        stream = catch_stream(model, job.blocks, windows, job.load_block, job.device)
        search = _Search(job, stream, model, choose or _assigned(job))
    with torch.no_grad():
        for index in range(len(job.blocks)):
            block = job.load_block(index)
            search.pass_block(index, block)
            stream.advance(index, block)
        search.settle_residual()
    for what, why in search.left_out.items():
        say(f"{what} keep their order: {why}")
    return by_parameter(search.found)


def _assigned(job: Job) -> Choice:
    pattern = job.plan.usual.parsed
    return lambda channels, cost: assign_groups(cost, pattern, ROUNDS)


class _Search:
    """The orders of a model's channels, found while a text passes its dense blocks.

    found: the moves so far. left_out: channels that keep their order -> why.
    residual: the channels of the residual stream, None where they keep their order.
    costs: [rows,K] each, of the linears that read the residual stream so far.
    """

    def __init__(self, job: Job, stream: Stream, model: PreTrainedModel, choose: Choice):
        self.job, self.stream, self.choose = job, stream, choose
        self.found: list[Move] = []
        self.left_out: dict[str, str] = {}
        self.costs: list[Tensor] = []
        self.residual: Channels | None = None
        self.drawn = torch.Generator().manual_seed(0)
        try:
            channels = residual(model, job.path, job.blocks)
        except ArchitectureError as error:
            self.left_out[RESIDUAL] = str(error)
            return
        # Whether the model allows an order is tried with one that is surely another.
        self.trial = torch.randperm(channels.size, generator=self.drawn)
        if same_norms(model, job.path, channels, self.trial):
            self.residual = channels
            self.readers = {name for name, _ in channels.readers}
            rows = sum(n for name, (n, _) in job.shapes.items() if name in self.readers)
            self.share = min(1.0, ROWS / max(rows, 1))
        else:
            self.left_out[RESIDUAL] = "a norm outside the blocks depends on it"

    def pass_block(self, index: int, block: nn.Module) -> None:
        """Take from a dense block what decides the orders of its channels."""
        prefix = self.job.prefix(index)
        linears: dict[str, nn.Linear] = {}
        for name in self.job.linears[index]:
            linear = block.get_submodule(name.removeprefix(prefix))
            assert isinstance(linear, nn.Linear)
            linears[name] = linear
        inside: dict[str, list[Channels]] = {}
        try:
            inside = free_in_block(block, prefix)
        except ArchitectureError as error:
            self.left_out["channels inside blocks"] = str(error)
        readers = {n for listed in inside.values() for c in listed for n, _ in c.readers}
        if self.residual is not None:
            readers |= self.readers
        costs = self._costs(index, block, {n: m for n, m in linears.items() if n in readers})
        self._pass_residual(index, block, costs)
        for kind, channels in inside.items():
            listed = [move for c in channels for move in self._order(c, costs)]
            if same_function(self.stream, index, block, prefix, by_parameter(listed)):
                self.found += listed
            else:
                self.left_out[kind] = f"the output of {prefix[:-1]} depends on it"

    def _costs(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear]
    ) -> dict[str, Tensor]:
        """Linear -> [N,K] what pruning each of its weights costs, as shares of its output.

        linears: those that read channels whose order is free; a Gram matrix of each is in memory.
        """
        grams: dict[str, Tensor] = {}
        for batch in range(len(self.stream.hidden)) if linears else ():
            products: dict[int, Tensor] = {}  # of q, k and v, which read one tensor, there is one
            for name, x in inputs_by_name(self.stream, index, block, linears, batch).items():
                if id(x) not in products:
                    products[id(x)] = x.float().T @ x.float()
                grams[name] = grams[name] + products[id(x)] if name in grams else products[id(x)]
        costs = {}
        for name, gram in grams.items():
            W, settings = linears[name].weight.float(), self.job.plan.layer(name)
            energy = ((W @ gram) * W).sum().clamp_min(torch.finfo(W.dtype).tiny)
            costs[name] = pruning_cost(W, gram, settings.config((W.shape[0], W.shape[1]))) / energy
        return costs

    def _order(self, channels: Channels, costs: dict[str, Tensor]) -> list[Move]:
        """What brings channels inside a block into their new order; nothing if nobody asks."""
        size = channels.size
        read = [costs[n][:, start : start + size] for n, start in channels.readers if n in costs]
        pattern = self.job.plan.usual.parsed
        if not read or size % pattern.group:
            return []
        return moves(channels, self.choose(channels, torch.cat(read)))

    def _pass_residual(self, index: int, block: nn.Module, costs: dict[str, Tensor]) -> None:
        if self.residual is None:
            return
        prefix = self.job.prefix(index)
        changed = by_parameter(moves(self.residual, self.trial))
        if not same_function(self.stream, index, block, prefix, changed, self.trial):
            self.residual = None
            self.left_out[RESIDUAL] = f"the output of {prefix[:-1]} depends on it"
            return
        for name, cost in costs.items():
            if name not in self.readers:
                continue
            rows = torch.randperm(len(cost), generator=self.drawn)
            self.costs.append(cost[rows[: math.ceil(self.share * len(cost))]])

    def settle_residual(self) -> None:
        """The order of the residual stream, once all its readers are known."""
        pattern = self.job.plan.usual.parsed
        if self.residual is None or not self.costs or self.residual.size % pattern.group:
            return
        self.found += moves(self.residual, self.choose(self.residual, torch.cat(self.costs)))
