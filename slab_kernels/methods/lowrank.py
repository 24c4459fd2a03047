"""Low-rank magnitudes under signs: masked alternating least squares, and the truncated SVD of the paper's loop."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import Pattern, select

OVERSAMPLE = 8  # extra columns of the randomised SVD (Halko et al. 2011, section 4.3)


def signs(x: Tensor) -> Tensor:
    """+1 or -1 everywhere, +1 for zero; same dtype."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def truncated_svd(A: Tensor, rank: int, iterations: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation A [N,K] ~= U V^T by subspace iteration; U [N,R] carries the singular values.

    Deterministic: the start comes from a generator of its own, torch's global one is not touched.
    """
    width = min(rank + OVERSAMPLE, *A.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(A.shape[1], width, generator=generator).to(A)
    Q = torch.linalg.qr(A @ basis).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ Q).Q).Q
    left, sigma, right = torch.linalg.svd(Q.T @ A, full_matrices=False)
    return (Q @ left[:, :rank]) * sigma[:rank], right[:rank].T.contiguous()


def fit_rows(A: Tensor, weight: Tensor, V: Tensor, previous: Tensor) -> Tensor:
    """argmin_U sum weight * (A - U V^T)^2 for A, weight [N,K], V [K,R]; `previous` [N,R] is the current U.

    A proximal term of 1e-6 of the mean curvature towards `previous` keeps rows solvable that have fewer counted
    entries than R, and keeps the step monotone.
    """
    R = V.shape[1]
    products = (V[:, :, None] * V[:, None, :]).flatten(1)
    normal = (weight @ products).unflatten(1, (R, R))
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(A.dtype).tiny * 1e8
    right = (A * weight) @ V + ridge[:, None] * previous
    if R == 1:
        return right / (normal[:, 0] + ridge[:, None])
    normal = normal + ridge[:, None, None] * torch.eye(R, dtype=A.dtype, device=A.device)
    return torch.linalg.solve(normal, right)


def masked_als(A: Tensor, weight: Tensor, U: Tensor, V: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Alternating least squares for min sum weight * (A - U V^T)^2 (weight [N,K] >= 0); never increases the loss."""
    for _ in range(iterations):
        U = fit_rows(A, weight, V, U)
        V = fit_rows(A.T, weight.T, U, V)
    return U, V


def signed_factors(
    W: Tensor, scale: Tensor, pattern: Pattern, rank: int, rounds: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """U [N,R], V [K,R] and kept mask [N,K] for min over pruned entries of sum_j scale_j^2 (|W_ij| - |U V^T|_ij)^2.

    Block coordinate descent over mask, signs and factors, each step exact: the loss of `signed_loss` never increases.
    Replaces the paper's EM-like loop (arXiv 2604.04493), which converges slowly to the same optimum.
    `scale` [K] > 0 is the error metric, e.g. the root mean square of each input.
    """
    A = W.abs() * scale
    mask = select(A, pattern)
    pruned = (~mask).to(A.dtype)
    V = ((A * pruned).sum(0) / pruned.sum(0).clamp_min(1))[:, None]
    V = V.clamp_min(1e-6 * A.mean().clamp_min(1e-30))
    U = torch.ones_like(A[:, :1])
    for _ in range(rounds):
        U, V = masked_als(A, pruned, U, V)
        mask = select((A - (U @ V.T).abs()).abs(), pattern)
        pruned = (~mask).to(A.dtype)
    if (
        rank > 1
    ):  # start from the SVD of |W| with the kept entries imputed by the rank-1 fit: R=1 is contained in it
        U, V = truncated_svd(torch.where(mask, U @ V.T, A), rank)
        for _ in range(rounds):
            target = A * signs(U @ V.T)
            U, V = masked_als(target, pruned, U, V)
            mask = select((A - (U @ V.T).abs()).abs(), pattern)
            pruned = (~mask).to(A.dtype)
    return U, V / scale[:, None], mask


def signed_loss(W: Tensor, scale: Tensor, mask: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """sum over pruned entries of scale_j^2 (|W_ij| - |U V^T|_ij)^2: the diagonal-metric loss with optimal signs."""
    E = (W.abs() - (U @ V.T).abs()) * scale
    return (E.masked_fill(mask, 0.0) ** 2).sum()
