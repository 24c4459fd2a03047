"""HASSLE-free (arXiv 2502.00899): min tr((W - S - L) H (W - S - L)^T), S and L found in turn.

S comes from a pruner of W - L, L = P Q^T is the best low-rank part of W - S in the Gram metric
(section 3, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .inputs import InputStats
from .solvers.finish import Split, finish
from .solvers.masks import select
from .solvers.metric import Metric, metric
from .solvers.sweep import curvature, sweep
from .threebasil import SCHEDULES, ThreeBasilConfig, admm

INNER = ("sparsegpt", "alps")


@dataclass(frozen=True)
class HassleFreeConfig(ThreeBasilConfig):
    """The settings of `hassle_free`, beside those of its ADMM.

    The paper has both inner pruners, and 80 alternations with SparseGPT; the error has settled
    after about 20 on layers tried. The ADMM of "alps" takes `rho`, `stable` and `iterations`.
    """

    inner: str = setting("sparsegpt", "the pruner", choices=INNER)
    alternations: int = setting(20, "of the pruner and the low-rank part", 1, 10_000)


def hassle_free(weight: Tensor, stats: InputStats, config: HassleFreeConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T, the best of all iterates by the loss."""
    space = metric(stats.matrix, config.damping, config.relative_damping)
    T = weight * space.scale

    def loss(split: Split) -> float:
        return space.loss(split.without_adapter(T - split.S))

    return finish(T, space, min(_iterates(T, space, config), key=loss), config, config.polish)


def _iterates(T: Tensor, space: Metric, config: HassleFreeConfig) -> Iterator[Split]:
    """S for T - L and L for T - S in turn, from L = 0."""
    rank, rest, basis = config.adapter_rank, T, None
    for _ in range(config.alternations if rank else 1):
        split = _pruned(rest, space, config)
        if rank:
            P, Q, basis = space.truncate(T - split.S, rank, basis)
            split = split._replace(P=P, Q=Q)
            rest = split.without_adapter(T)
        yield split


def _pruned(target: Tensor, space: Metric, config: HassleFreeConfig) -> Split:
    """S for target [N,K] in unit-diagonal coordinates, by the inner pruner."""
    if config.inner == "alps":
        return admm(target, space, config, SCHEDULES["alps"])
    curve, pattern = curvature(space.gram, 0.0), config.parsed
    mask = None if pattern.structured else select(target.abs() * curve.conditional_scale, pattern)
    swept = sweep(target, curve, pattern, mask=mask, joint=False)
    return Split(swept.approximation, swept.mask)
