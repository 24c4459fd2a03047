"""Transformer matching (3BASiL-TM, arXiv 2603.01376, section 4): after any method, train a block to put out what it did.

All that a compressed block stores in floating point is trained together: kept values (or the step sizes of integer ones),
U, V, P, Q, biases and norms. Positions, signs and integer codes stay. The target is the dense block on the compressed prefix, as
in the paper; `target="dense"` takes what the dense model puts out at this depth, so that errors made before are undone as well
(perplexity on a five-block model, int4: 6.50 without matching, 6.00 and 6.01 with the two).
"""

from __future__ import annotations

import math
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..format import Decomposition, plane_unit
from ..models.streams import Stream
from ..settings import enforce, setting
from .record import MatchRecord

HELD_BACK = 8  # every eighth batch of calibration text is kept for the choice of the best epoch
TARGETS = ("dense", "prefix")


@dataclass(frozen=True)
class Matching:
    """`epochs` are 19 in the paper. `rate` suits every model, being a share of each tensor's size
    (2e-3, 1e-2, 3e-2 gave 6.11, 6.00, 6.08); it falls to a fifth along a cosine. `target`: see
    above. Raises on construction: ValueError.
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

        Raises: ValueError for anything else.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if isinstance(value, Integral):
            return cls(epochs=value) if value else None
        raise ArgumentError(
            f"matching={reprlib.repr(value)} must be a number of epochs, True, None, or Matching(epochs=..., rate=..., target=...)"
        )


class TrainableLinear(nn.Module):
    """A decomposition as a module: floating-point parts are fp32 parameters, the mask a buffer that no step can move.

    bias [N] or None. Memory beside the parameters: a byte an entry for the mask, one for B, four for the rebuilt weight.
    """

    def __init__(self, decomposition: Decomposition, bias: Tensor | None):
        super().__init__()
        d = decomposition.folded()
        self.shape, self.planes, self.values, self.group_size = (
            tuple(d.S.shape),
            d.planes,
            d.values,
            d.group_size,
        )
        self.register_buffer("mask", d.mask)
        kept = d.S.float()[d.mask]
        if d.scales is None:
            self.kept = nn.Parameter(kept)
        else:
            self.register_buffer(
                "codes", (kept / self._steps(d.scales.float())[d.mask]).round().to(torch.int8)
            )
            self.scales = nn.Parameter(d.scales.float().clone())
        for name in ("U", "V", "P", "Q"):
            t = getattr(d, name)
            self.register_parameter(name, None if t is None else nn.Parameter(t.float().clone()))
        self.register_buffer("B", d.B)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def _steps(self, scales: Tensor) -> Tensor:
        """[N, groups] -> [N,K], the step of every entry."""
        return scales.repeat_interleave(self.group_size or self.shape[1], 1)[:, : self.shape[1]]

    def weight(self) -> Tensor:
        """[N,K] fp32, differentiable in the parameters."""
        kept = (
            self.kept if hasattr(self, "kept") else self.codes * self._steps(self.scales)[self.mask]
        )
        if self.U is None:
            W = torch.zeros(self.shape, dtype=kept.dtype, device=kept.device)
        else:
            W = (self.U @ self.V.T) * (self.B * plane_unit(self.planes))
        W = W.masked_scatter(self.mask, kept)
        return W if self.P is None else W + self.P @ self.Q.T

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight().to(input.dtype), bias)

    @torch.no_grad()
    def decomposition(self) -> Decomposition:
        """The numbers as they are now, folded."""
        S = torch.zeros(self.shape, device=self.mask.device)
        scales = None
        if hasattr(self, "kept"):
            S[self.mask] = self.kept.detach()
        else:
            scales = self.scales.detach().clamp_min(1e-30).to(torch.bfloat16).float()
            S[self.mask] = self.codes * self._steps(scales)[self.mask]
        parts = {
            name: None if (t := getattr(self, name)) is None else t.detach().clone()
            for name in ("U", "V", "P", "Q")
        }
        return Decomposition(
            S,
            self.mask,
            parts["U"],
            parts["V"],
            self.B,
            parts["P"],
            parts["Q"],
            scales,
            self.values,
            self.group_size,
            self.planes,
        )


def match_block(
    index: int,
    block: nn.Module,
    decompositions: dict[str, Decomposition],
    stream: Stream,
    targets: list[Tensor],
    settings: Matching,
    stored: Callable[[str, Decomposition], Decomposition],
    tell: Callable[[str], None] = lambda message: None,
) -> tuple[dict[str, Decomposition], dict[str, Tensor], MatchRecord]:
    """Train block `index` towards `targets` and leave it so.

    Args:
        block: with compressed weights in its linears; its floats are fp32 afterwards.
        decompositions: module name inside the block -> what its linear stands for.
        stream: the compressed prefix at the block's input. targets: per batch [samples, window, hidden].
        stored: (module, decomposition) -> what is left of it once it is packed and unpacked.

    Returns: the trained decompositions, every other parameter that was trained (norms, biases) by its name in the block, and
    the record. The loss on held-back batches never rises: else everything comes back as it was.
    """
    began = time.perf_counter()
    modules = {}
    for name, d in decompositions.items():
        path, _, leaf = name.rpartition(".")
        modules[name] = TrainableLinear(d, block.get_submodule(name).bias)
        setattr(block.get_submodule(path), leaf, modules[name])
    inside = {id(p) for module in modules.values() for p in module.parameters()}
    others = {
        name: p for name, p in block.named_parameters() if id(p) not in inside and p.dim() < 2
    }
    for name, p in list(others.items()):
        path, _, leaf = name.rpartition(".")
        others[name] = nn.Parameter(p.detach().float())
        setattr(block.get_submodule(path), leaf, others[name])
    trained = [p for p in block.parameters() if id(p) in inside] + list(others.values())
    for p in trained:
        p.requires_grad_(True)
    count = len(targets)
    held = [b for b in range(count) if b % HELD_BACK == HELD_BACK - 1] or [count - 1]
    used = [b for b in range(count) if b not in held] or held

    @torch.no_grad()
    def measure() -> float:
        error = sum(
            float(
                (stream.run(index, block, b) - targets[b].to(stream.device)).float().square().sum()
            )
            for b in held
        )
        whole = sum(float((targets[b] - stream.hidden[b]).float().square().sum()) for b in held)
        return math.sqrt(error / whole) if whole else 0.0

    best, state, at = (before := measure()), _snapshot(trained), 0
    groups = [
        {"params": [p], "lr": settings.rate * max(float(p.detach().square().mean().sqrt()), 1e-8)}
        for p in trained
    ]
    optimizer = torch.optim.Adam(groups)
    steps = settings.epochs * len(used)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.6 + 0.4 * math.cos(math.pi * min(s, steps) / steps)
    )
    order = torch.Generator().manual_seed(index)
    for epoch in range(1, settings.epochs + 1):
        for b in torch.randperm(len(used), generator=order).tolist():
            with torch.enable_grad():
                loss = (
                    (stream.run(index, block, used[b]) - targets[used[b]].to(stream.device))
                    .float()
                    .square()
                    .mean()
                )
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        now = measure()
        tell(f"block {index}: epoch {epoch} of {settings.epochs}, distance {now:.4f}")
        if now < best:
            best, state, at = now, _snapshot(trained), epoch
    _restore(trained, state)
    result = {name: stored(name, module.decomposition()) for name, module in modules.items()}
    for name, d in result.items():
        assert torch.equal(d.mask, decompositions[name].mask) and bool((d.S[~d.mask] == 0).all()), (
            name
        )
    changed = {name: p.detach() for name, p in others.items()}
    changed |= {
        f"{name}.bias": m.bias.detach() for name, m in modules.items() if m.bias is not None
    }
    if at == 0:
        result, changed = decompositions, {}
    return result, changed, MatchRecord(index, before, best, at, time.perf_counter() - began)


def _snapshot(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _restore(parameters: list[Tensor], state: list[Tensor]) -> None:
    for p, saved in zip(parameters, state, strict=True):
        p.copy_(saved)
