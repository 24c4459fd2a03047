"""EoRA (arXiv 2410.21271): P Q^T = the best part of W - S in the Gram metric, S by any pruner.

The paper projects W - S on the eigenvectors of H scaled by the roots of its eigenvalues (equations
4-6); any F with F F^T = H gives the same product P Q^T.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .magnitude import magnitude
from .solvers.finish import PolishedConfig, Split, finish
from .solvers.metric import metric
from .sparsegpt import SparseGPTConfig, sparsegpt
from .wanda import wanda

PRUNERS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class EoraConfig(PolishedConfig):
    """The settings of `eora`."""

    pruner: str = setting(
        "sparsegpt", "what prunes the weight that the adapter corrects", choices=PRUNERS
    )


def eora(weight: Tensor, stats: InputStats, config: EoraConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T; S is quantised where that is asked for."""
    base = Config(config.pattern, 0, config.values, config.group_size)
    if config.pruner == "sparsegpt":
        pruned = sparsegpt(weight, stats, SparseGPTConfig(**vars(base)))
    else:
        pruned = {"magnitude": magnitude, "wanda": wanda}[config.pruner](weight, stats, base)
    space = metric(stats.matrix)
    T, S = weight * space.scale, pruned.S * space.scale
    split = Split(S, pruned.mask, scales=pruned.scales)
    if config.adapter_rank:
        P, Q, _ = space.truncate(T - S, config.adapter_rank)
        split = split._replace(P=P, Q=Q)
    return finish(T, space, split, config, config.polish)
