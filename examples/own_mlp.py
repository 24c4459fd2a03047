"""Compresses the linears of a small network in plain PyTorch, without any model of transformers.

    python examples/own_mlp.py

Trains a network of four linears on a known function, records what the two large ones read, replaces
them by packed layers, and prints how far the loss moved and what a weight takes.
"""

from __future__ import annotations

import torch
from torch import nn

from slab_kernels import InputStats, decompose, pack, replace_linear


def trained_network() -> nn.Sequential:
    """A network that has learned y = sin(x_0) + x_1 x_2 from random points."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(16, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(200):
        x, y = points(256)
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), y).backward()
        optimizer.step()
    return network.eval()


def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 16)
    return x, (x[:, :1].sin() + x[:, 1:2] * x[:, 2:3])


def input_statistics(network: nn.Sequential, names: list[str]) -> dict[str, InputStats]:
    """What the named linears read while the network sees sample inputs."""
    stats = {}
    for name in names:
        linear = network.get_submodule(name)
        stats[name] = InputStats(linear.in_features, needs="gram")
        linear.register_forward_pre_hook(lambda _, inputs, s=stats[name]: s.update(inputs[0]))
    with torch.no_grad():
        network(points(4096)[0])
    for name in names:
        network.get_submodule(name)._forward_pre_hooks.clear()
    return stats


def main() -> None:
    network = trained_network()
    x, y = points(4096)
    before = nn.functional.mse_loss(network(x), y).item()
    packed = {}
    for name, stats in input_statistics(network, ["2", "4"]).items():
        weight = network.get_submodule(name).weight
        packed[name] = pack(decompose(weight, stats, values="int4", planes=2))
    replace_linear(network, packed)
    after = nn.functional.mse_loss(network(x), y).item()
    print(f"mean squared error {before:.4f} -> {after:.4f}")
    for name, weight in packed.items():
        print(f"layer {name}: {weight.bits_per_weight():.2f} bits per weight instead of 32")


if __name__ == "__main__":
    main()
