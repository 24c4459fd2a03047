"""`Experts`: the experts of a mixture, each with linears of its own in place of stacked weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GATED, PLAIN = ("gate_proj", "up_proj"), ("up_proj",)  # what an expert's input is read by
DOWN = "down_proj"


class Expert(nn.Module):
    """One expert: linears of the names in GATED or PLAIN, and one called DOWN behind them."""

    def forward(self, x: Tensor, experts: Experts) -> Tensor:
        """x [tokens, H] -> [tokens, H]; experts: the mixture, which knows the activation."""
        read = [linear(x) for name, linear in self.named_children() if name != DOWN]
        down: Any = self._modules[DOWN]
        return down(experts.gated(read))


class Experts(nn.Module):
    """The experts of one mixture: its children "0", "1", ... are `Expert` modules.

    It is called as transformers calls its own experts and returns the same. Tokens are sorted by
    expert, and every expert that has any runs once, on all of its tokens. Its linears are nn.Linear
    or packed layers. Each slot of a token is written once and the slots are added in their order,
    so the sum does not depend on the order in which a GPU finishes them.

    fed: the experts whose linears are shown all tokens, for calibration; what the module returns
        stays the same. Only nn.Linear can be shown them.
    """

    def __init__(
        self,
        stacked: nn.Module,
        experts: list[dict[str, nn.Linear]],
        interleaved: bool = False,
    ):
        """stacked: transformers' module, whose activation and whatever else it holds beside the
        stacked weights is kept. experts: the linears of each, in the order in which they run.
        interleaved: its gate reads gate and up number by number, not one after the other."""
        super().__init__()
        self.num_experts = len(experts)
        self.interleaved = interleaved
        self.fed: frozenset[int] = frozenset()
        self._stacked = (stacked,)  # within a tuple it is no part of this module
        for number, linears in enumerate(experts):
            expert = Expert()
            for name, linear in linears.items():
                expert.add_module(name, linear)
            self.add_module(str(number), expert)
        for name, child in stacked.named_children():  # an activation may have weights
            self.add_module(name, child)
        self.train(stacked.training)

    @property
    def stacked(self) -> nn.Module:
        """transformers' module, without its stacked weights."""
        return self._stacked[0]

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of an expert's linears that read its input."""
        return tuple(name for name, _ in self.expert(0).named_children() if name != DOWN)

    def expert(self, number: int) -> Expert:
        expert = self._modules[str(number)]
        assert isinstance(expert, Expert)
        return expert

    def gated(self, read: list[Tensor]) -> Tensor:
        """What DOWN reads, from what the linears before it put out."""
        stacked: Any = self.stacked
        if len(read) == 1:
            return stacked.act_fn(read[0])
        both = torch.stack(read, -1).flatten(-2) if self.interleaved else torch.cat(read, -1)
        return stacked._apply_gate(both)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H]; top_k_index [tokens, k] int64, the experts of each token, and
        top_k_weights [tokens, k], how much each of them counts -> [tokens, H]."""
        tokens, slots = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        x = hidden_states[order // slots]
        parts, start = [], 0
        for number, count in enumerate(counts[: self.num_experts]):
            if number in self.fed:
                self.expert(number)(hidden_states, self)
            if count:
                rows = x[start : start + count]
                run = self._past_modules if number in self.fed else self._run
                parts.append(run(number, rows))
                start += count
        if not parts:
            return torch.zeros_like(hidden_states)
        sorted_out = torch.cat(parts)
        out = torch.empty_like(order)
        out[order] = torch.arange(len(order), device=order.device)
        weighted = sorted_out[out].view(tokens, slots, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def _run(self, number: int, rows: Tensor) -> Tensor:
        return self.expert(number)(rows, self)

    def _past_modules(self, number: int, rows: Tensor) -> Tensor:
        """What `_run` gives, computed from the weights, so that nobody sees the linears called."""
        expert = self.expert(number)

        def product(name: str, x: Tensor) -> Tensor:
            linear = expert.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            return nn.functional.linear(x, linear.weight, linear.bias)

        return product(DOWN, self.gated([product(name, rows) for name in self.projections]))

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts"
