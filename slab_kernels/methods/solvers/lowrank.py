"""Low-rank magnitudes under signs, |W| ~ U V^T on pruned positions, and truncated SVDs.

The magnitudes are found by masked alternating least squares, the SVDs by subspace iteration (Halko
et al. 2011, arXiv 0909.4061, algorithm 4.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .levels import nearest
from .masks import Pattern, select

OVERSAMPLE = 8  # extra columns of the randomised SVD (Halko et al. 2011, section 4.3)
SEED = 0  # of the basis from which a truncated SVD starts


def signs(x: Tensor) -> Tensor:
    """+1 or -1 everywhere, +1 for zero; same dtype."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def truncated_svd(
    A: Tensor,
    rank: int,
    iterations: int = 4,
    metric: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation A [N,K] ~ U V^T by subspace iteration. Deterministic.

    U [N,R] carries the singular values, V [K,R] is orthonormal.
    metric: F [K,K]; the approximation is then that of A F, which is not formed. V then has all
        R + OVERSAMPLE columns, for the start of the next call.
    start: a basis [K, R or more] to start from, such as the V of a nearby matrix. Without one, a
        generator of its own draws it; torch's global one is not touched.
    """
    width = min(rank + OVERSAMPLE, *A.shape)

    def forward(X: Tensor) -> Tensor:
        return A @ (X if metric is None else metric @ X)

    def backward(Y: Tensor) -> Tensor:
        return A.T @ Y if metric is None else metric.T @ (A.T @ Y)

    if start is None:
        start = torch.randn(A.shape[1], width, generator=torch.Generator().manual_seed(SEED)).to(A)
    Q = torch.linalg.qr(forward(start)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(forward(torch.linalg.qr(backward(Q)).Q)).Q
    left, sigma, right = torch.linalg.svd(backward(Q).T, full_matrices=False)
    U, V = (Q @ left[:, :rank]) * sigma[:rank], right.T.contiguous()
    return U, V if metric is not None else V[:, :rank].contiguous()


def fit_rows(weighted: Tensor, weight: Tensor, V: Tensor, previous: Tensor) -> Tensor:
    """U [N,R] of least sum weight * (A - U V^T)^2 for weighted = A * weight, weight [N,K], V [K,R].

    A proximal term of 1e-6 of the mean curvature towards `previous` [N,R] keeps rows solvable that
    have fewer counted entries than R, and keeps the step monotone.
    """
    R = V.shape[1]
    products = (V[:, :, None] * V[:, None, :]).flatten(1)
    normal = (weight @ products).unflatten(1, (R, R))
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(V.dtype).tiny * 1e8
    right = weighted @ V + ridge[:, None] * previous
    if R == 1:
        return right / (normal[:, 0] + ridge[:, None])
    normal = normal + ridge[:, None, None] * torch.eye(R, dtype=V.dtype, device=V.device)
    return torch.linalg.solve(normal, right)


def masked_als(
    A: Tensor, weight: Tensor, U: Tensor, V: Tensor, iterations: int = 3
) -> tuple[Tensor, Tensor]:
    """U and V after alternating least squares for sum weight * (A - U V^T)^2, weight [N,K] >= 0.

    No step increases the sum.
    """
    weighted = A * weight
    for _ in range(iterations):
        U = fit_rows(weighted, weight, V, U)
        V = fit_rows(weighted.T, weight.T, U, V)
    return U, V


def signed_factors(
    W: Tensor,
    scale: Tensor,
    pattern: Pattern,
    rank: int,
    rounds: int = 8,
    planes: int = 1,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U [N,R], V [K,R] and kept mask [N,K] for the least loss in a diagonal metric.

    The loss is the sum over pruned entries of scale_j^2 (|W_ij| - c_ij |U V^T|_ij)^2, where c > 0
    is the nearest level of `planes` signs, 1 for one plane. Block coordinate descent over mask,
    levels and factors, each step exact, never increases it. This replaces the paper's EM-like loop
    (arXiv 2604.04493), which converges slowly to the same optimum.
    scale: [K] > 0, the error metric, such as the root mean square of each input.
    given: V [K,R], which then stays.
    """
    A = W.abs() * scale
    mask = select(A, pattern)
    pruned = (~mask).to(A.dtype)
    V = ((A * pruned).sum(0) / pruned.sum(0).clamp_min(1))[:, None]
    V = V.clamp_min(1e-6 * A.mean().clamp_min(1e-30))
    U = torch.ones_like(A[:, :1])
    if given is not None:
        V = given * scale[:, None]
        U = fit_rows(A * pruned, pruned, V, torch.zeros_like(A[:, :1]).expand(-1, V.shape[1]))

    def descend(U: Tensor, V: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(rounds):
            L = U @ V.T
            c = nearest(A, L.abs(), planes)
            wanted, counted = A * signs(L) / c, (~mask) * c * c
            if given is None:
                U, V = masked_als(wanted, counted, U, V)
            else:
                U = fit_rows(wanted * counted, counted, V, U)
            mask = select((A - c * (U @ V.T).abs()).abs(), pattern)
        return U, V, mask

    U, V, mask = descend(U, V, mask)
    if given is not None:
        return U, given, mask
    if rank > 1:
        # The SVD is of |W| with kept entries imputed by the rank-1 fit, so it contains that fit.
        L = U @ V.T
        U, V = truncated_svd(torch.where(mask, L, A / nearest(A, L.abs(), planes)), rank)
        U, V, mask = descend(U, V, mask)
    return U, V / scale[:, None], mask
