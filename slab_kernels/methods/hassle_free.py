"""HASSLE-free (arXiv 2502.00899): alternate a pruner of W - L with the best low-rank part of W - S in the Gram metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Decomposition
from ..settings import setting
from .inputs import InputStats
from .solvers.finish import finish
from .solvers.masks import top_of_rows
from .solvers.metric import metric
from .solvers.sweep import curvature, sweep
from .threebasil import SCHEDULES, ThreeBasilConfig, admm

INNER = ("sparsegpt", "alps")


@dataclass(frozen=True)
class HassleFreeConfig(ThreeBasilConfig):
    """The paper has both inner pruners, and 80 alternations with SparseGPT; the error has settled
    after about 20 on layers tried. The ADMM of "alps" takes `rho`, `stable` and `iterations`.
    """

    inner: str = setting("sparsegpt", "the pruner", choices=INNER)
    alternations: int = setting(20, "of the pruner and the low-rank part", 1, 10_000)


def hassle_free(weight: Tensor, stats: InputStats, config: HassleFreeConfig) -> Decomposition:
    """weight [N,K] fp32, Gram matrix -> S + P Q^T, the best of all iterates by the loss (section 3)."""
    space, pattern = metric(stats.gram, config.damping, config.relative_damping), config.parsed
    T, rank = weight * space.scale, config.adapter_rank
    best, least = None, float("inf")
    P = Q = basis = None
    for _ in range(config.alternations if rank else 1):
        target = T if P is None else T - P @ Q.T
        if config.inner == "alps":
            S, mask = admm(target, space, pattern, config, SCHEDULES["alps"])[:2]
        else:
            curve, count = curvature(space.gram, 0.0), None
            if not pattern.structured:
                keep = torch.full_like(T[:, :1], pattern.kept_in_row(T.shape[1]), dtype=torch.long)
                count = top_of_rows(target.abs() * curve.conditional_scale, keep)
            S, mask, _ = sweep(target, curve, pattern, mask=count, joint=False)
        if rank:
            P, Q, basis = space.truncate(T - S, rank, basis)
        loss = space.loss(T - S if P is None else T - S - P @ Q.T)
        if loss < least:
            best, least = (S, mask, P, Q), loss
    return finish(T, space, *best, config, config.polish)
