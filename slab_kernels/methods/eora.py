"""EoRA (arXiv 2410.21271): a low-rank adapter, best in the Gram metric, on top of any pruner."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .config import Config
from .inputs import InputStats
from .magnitude import magnitude
from .solvers.finish import finish
from .solvers.metric import metric
from .sparsegpt import SparseGPTConfig, sparsegpt
from .wanda import wanda

PRUNERS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class EoraConfig(Config):
    """`polish`: see `finish`."""

    pruner: str = setting(
        "sparsegpt", "what prunes the weight that the adapter corrects", choices=PRUNERS
    )
    polish: int = setting(
        3, "rounds in the Gram metric afterwards; 0 is the published method alone", 0, 10_000
    )


def eora(weight: Tensor, stats: InputStats, config: EoraConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T: S by the pruner, quantised where asked, P Q^T = truncation of W - S.

    The paper projects the error on the eigenvectors of the Gram matrix scaled by the roots of its eigenvalues (equations 4-6);
    any F with F F^T = G gives the same product P Q^T.
    """
    base = Config(config.pattern, 0, config.values, config.group_size)
    if config.pruner == "sparsegpt":
        pruned = sparsegpt(weight, stats, SparseGPTConfig(**vars(base)))
    else:
        pruned = {"magnitude": magnitude, "wanda": wanda}[config.pruner](weight, stats, base)
    space = metric(stats.gram)
    T, S = weight * space.scale, pruned.S * space.scale
    P = Q = None
    if config.adapter_rank:
        P, Q, _ = space.truncate(T - S, config.adapter_rank)
    return finish(T, space, S, pruned.mask, P, Q, config, config.polish, scales=pruned.scales)
