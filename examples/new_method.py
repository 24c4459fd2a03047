"""A method of one's own: Wanda's positions, and pruned entries keep their signs.

    python examples/new_method.py

A pruned entry becomes its sign times the mean magnitude of its row's pruned entries. This script
compares that with `wanda` on one layer. As an installed package it would need no line of code
outside itself: its pyproject.toml names METHOD as an entry point,

    [project.entry-points."slab_kernels.methods"]
    wanda-signs = "new_method:METHOD"

and `slab-kernels compress MODEL OUT --method wanda-signs` finds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slab_kernels import Decomposition, InputStats, decompose, pack
from slab_kernels.methods import METHODS, Method
from slab_kernels.methods.config import Config
from slab_kernels.methods.wanda import wanda


def wanda_signs(weight: torch.Tensor, stats: InputStats, config: Config) -> Decomposition:
    """weight [N, K] fp32 -> Wanda's S, and (U Vᵀ) ⊙ B of rank one on the pruned entries."""
    kept = wanda(weight, stats, config)
    pruned = ~kept.mask
    total = (weight.abs() * pruned).sum(1, keepdim=True)
    U = total / pruned.sum(1, keepdim=True)  # [N, 1], the mean magnitude of a row's pruned entries
    V = torch.ones_like(weight[:1].T)  # [K, 1]
    B = torch.where(weight < 0, -1, 1).to(torch.int8).masked_fill(kept.mask, 0)
    return replace(kept, U=U, V=V, B=B)


METHOD = Method("wanda-signs", wanda_signs, Config, "diagonal", "Wanda and signs", signs=True)


def main() -> None:
    METHODS[METHOD.name] = METHOD  # What the entry point does for an installed package.
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512), torch.randn(2048, 512)
    stats = InputStats(512, needs="diagonal")
    stats.update(x)
    for name in ("wanda", METHOD.name):
        parts = decompose(weight, stats, method=name, values="int4")
        lost = (x @ (weight - parts.dense()).T).norm() / (x @ weight.T).norm()
        bits = pack(parts).bits_per_weight()
        print(f"{name:12} {lost:.3f} of the output lost, {bits:.2f} bits per weight")


if __name__ == "__main__":
    main()
