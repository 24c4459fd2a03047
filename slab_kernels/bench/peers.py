"""All kernels of other libraries that can be timed beside ours, and which versions are here."""

from __future__ import annotations

from importlib import metadata

import torch

from .peer import Peer
from .peers_cpu import CPU_PEERS
from .peers_cuda import CUDA_PEERS

PEERS: tuple[Peer, ...] = (*CUDA_PEERS, *CPU_PEERS)
DISTRIBUTIONS = (
    "vllm",
    "gemlite",
    "humming-kernels",
    "onnxruntime",
    "openvino",
    "llama-cpp-python",
)


def on(device: torch.device | str) -> tuple[Peer, ...]:
    """The peers for devices of that type."""
    return tuple(peer for peer in PEERS if peer.device == torch.device(device).type)


def versions() -> dict[str, str]:
    """Distribution -> version of those that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
