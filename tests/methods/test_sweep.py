"""The Gram-metric pieces against naive references: ALS, sweep, conjugate gradients, coordinate
descent."""

from __future__ import annotations

import warnings
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slab_kernels.errors import CalibrationError
from slab_kernels.methods.solvers.descent import descend_groups, descend_levels
from slab_kernels.methods.solvers.levels import nearest
from slab_kernels.methods.solvers.lowrank import (
    masked_als,
    signed_factors,
    signs,
    truncated_svd,
)
from slab_kernels.methods.solvers.masks import Pattern, parse_pattern, select
from slab_kernels.methods.solvers.quantize import (
    Grid,
    expand_scales,
    grid_scales,
    quantize,
    round_to_grid,
)
from slab_kernels.methods.solvers.refit import (
    InputFactor,
    KeptValues,
    OutputFactor,
    StepSizes,
    conjugate_gradients,
    gram_loss,
)
from slab_kernels.methods.solvers.sweep import curvature, sweep

P24 = Pattern(2, 4)


def layer(N: int, K: int, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """W [N,K] and the Gram matrix [K,K] of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g) / K**0.5 + torch.eye(K)
    x = torch.randn(tokens, K, generator=g) @ mix * torch.rand(K, generator=g).add(0.3)
    return torch.randn(N, K, generator=g), x.T @ x / tokens


def signed_loss(W, scale, mask, U, V, planes=1):
    """What `signed_factors` minimises: sum over pruned entries of scale_j^2 (|W_ij| - c |U
    V^T|_ij)^2."""
    L = (U @ V.T).abs()
    E = (W.abs() - nearest(W.abs(), L, planes) * L) * scale
    return float((E.masked_fill(mask, 0.0) ** 2).sum())


# ------------------------------------------------------------------------------------------------
# low rank
def test_truncated_svd_is_the_best_and_leaves_the_global_generator_alone():
    A = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        0.7 ** torch.arange(20.0)
    )
    state = torch.get_rng_state()
    U, V = truncated_svd(A, 3, iterations=8)
    assert torch.equal(state, torch.get_rng_state())
    left, sigma, right = torch.linalg.svd(A)
    torch.testing.assert_close(U @ V.T, (left[:, :3] * sigma[:3]) @ right[:3], rtol=1e-3, atol=1e-4)
    assert truncated_svd(A[:2], 2)[0].shape == (2, 2)


@settings(max_examples=20, deadline=None)
@given(R=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_masked_als_never_increases_the_loss(R, seed):
    g = torch.Generator().manual_seed(seed)
    A, U, V = (
        torch.rand(9, 12, generator=g),
        torch.rand(9, R, generator=g),
        torch.rand(12, R, generator=g),
    )
    weight = (torch.rand(9, 12, generator=g) < 0.5).float()
    weight[0] = 0  # a row that nothing determines
    losses = []
    for _ in range(6):
        losses.append(float((weight * (A - U @ V.T) ** 2).sum()))
        U, V = masked_als(A, weight, U, V, 1)
    assert all(b <= a * (1 + 1e-4) + 1e-6 for a, b in pairwise(losses)), losses
    assert U.isfinite().all() and V.isfinite().all()


def test_rank_one_als_solves_the_masked_normal_equations():
    W, _ = layer(8, 12)
    weight = (~select(W.abs(), P24)).float()
    U, V = masked_als(W.abs(), weight, torch.ones(8, 1), torch.ones(12, 1), 60)
    E = weight * (W.abs() - U @ V.T)
    assert (E @ V).abs().max() < 1e-3 and (E.T @ U).abs().max() < 1e-3


@pytest.mark.parametrize("rank", [1, 2])
def test_more_rounds_of_signed_factors_never_hurt(rank):
    W, H = layer(24, 32)
    d = H.diagonal().sqrt()
    losses = []
    for rounds in range(1, 6):
        U, V, mask = signed_factors(W, d, P24, rank, rounds)
        losses.append(signed_loss(W, d, mask, U, V))
        assert (mask.view(24, 8, 4).sum(-1) == 2).all()
    if rank == 1:  # rank 2 starts from the rank-1 result, which moves
        assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses)), losses
    assert losses[-1] <= losses[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), R=st.integers(1, 2))
def test_signs_and_mask_of_the_diagonal_problem_are_optimal(seed, R):
    """Brute force over all masks and signs of one group: B = sign(W * L), keep the largest ||w| -
    |l|| d."""
    g = torch.Generator().manual_seed(seed)
    w, L = torch.randn(4, generator=g), torch.randn(4, R, generator=g).sum(1)
    if R == 1:
        L = L.abs()
    d = torch.rand(4, generator=g) + 0.1
    best = min(
        sum(float((d[i] * (w[i] - s * L[i])) ** 2) for i, s in zip(gone, sign, strict=True))
        for gone in combinations(range(4), 2)
        for sign in product((-1, 1), repeat=2)
    )
    mask = select(((w.abs() - L.abs()) * d).abs()[None], P24)[0]
    B = signs(w) * signs(L)
    ours = float(((d * (w - B * L)) ** 2)[~mask].sum())
    assert ours == pytest.approx(best, rel=1e-5, abs=1e-9)


# ------------------------------------------------------------------------------------------------
# sweep
def naive_sweep(W, H, L, pattern, damping):
    """OBS from the textbook: after every column, invert what is left of H. Masks by SparseGPT's
    rule."""
    N, K = W.shape
    H = (H + damping * H.diagonal().mean() * torch.eye(K)).double()
    left, out = W.double().clone(), torch.zeros(N, K).double()
    kept = torch.zeros(N, K, dtype=torch.bool)
    for j in range(K):
        inverse = torch.linalg.inv(H[j:, j:])
        if j % pattern.group == 0:
            cost = []
            for k in range(j, j + pattern.group):  # [H^-1]_kk once the columns before k are fixed
                cost.append((left[:, k].abs() - L[:, k]) ** 2 / torch.linalg.inv(H[k:, k:])[0, 0])
            kept[:, j : j + pattern.group] = select(torch.stack(cost, 1), pattern)
        w = left[:, j]
        out[:, j] = torch.where(kept[:, j], w, torch.where(w < 0, -1.0, 1.0) * L[:, j])
        left[:, j:] -= ((w - out[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return out.float(), kept


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("nm", [(2, 4), (4, 8), (1, 3)])
def test_blocked_sweep_agrees_with_textbook_obs(filled, nm, monkeypatch):
    monkeypatch.setattr(
        "slab_kernels.methods.solvers.sweep.BLOCK", 16
    )  # several blocks in a small layer
    W, H = layer(6, 48)
    L = torch.full_like(W, 0.6) if filled else torch.zeros_like(W)
    expected, kept = naive_sweep(W, H, L, Pattern(*nm), 0.01)
    swept = sweep(W, curvature(H), Pattern(*nm), L if filled else None, joint=False)
    assert torch.equal(swept.mask, kept)
    torch.testing.assert_close(swept.approximation, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("joint", [False, True])
def test_sweep_with_identity_gram_is_the_diagonal_solution(joint):
    W, _ = layer(20, 32)
    L = torch.rand_like(W)
    swept = sweep(W, curvature(torch.eye(32), damping=0.0), P24, L, joint=joint)
    mask = select((W.abs() - L).abs(), P24)
    assert torch.equal(swept.mask, mask)
    torch.testing.assert_close(swept.approximation, torch.where(mask, W, signs(W) * L))


def test_joint_choice_is_the_optimum_of_the_first_group():
    """With every other column free, the loss of a state is delta^T (H^-1 restricted)^-1 delta:
    brute force."""
    W, H = layer(10, 12)
    L = torch.rand_like(W)
    swept = sweep(W, curvature(H, damping=0.0), P24, L)
    inverse = torch.linalg.inv(H)
    for row in range(10):
        costs = {}
        for gone in combinations(range(4), 2):
            for s in product((1.0, -1.0), repeat=2):
                delta = W[row, list(gone)] - torch.tensor(s) * L[row, list(gone)]
                costs[gone, s] = float(
                    delta @ torch.linalg.inv(inverse[list(gone)][:, list(gone)]) @ delta
                )
        gone, _ = min(costs, key=costs.get)
        assert (~swept.mask[row, :4]).nonzero().flatten().tolist() == list(gone)


def test_unstructured_sweep_keeps_what_the_mask_says_in_every_block(monkeypatch):
    monkeypatch.setattr("slab_kernels.methods.solvers.sweep.BLOCK", 16)
    W, H = layer(12, 40)
    mask = select(W.abs(), parse_pattern("60%"))
    swept = sweep(W, curvature(H), parse_pattern("60%"), mask=mask)
    for a in range(0, 40, 16):
        assert torch.equal(swept.mask[:, a : a + 16].sum(1), mask[:, a : a + 16].sum(1))


@pytest.mark.parametrize(
    ("values", "group_size"), [("int8", 32), ("int4", 32), ("int8", None), ("int4", 64)]
)
def test_sweep_rounds_inside(values, group_size):
    W, H = layer(8, 96)
    swept = sweep(W, curvature(H), P24, None, grid=Grid(values, group_size))
    step = expand_scales(swept.scales, 96, group_size)
    kept = swept.approximation[swept.mask]
    torch.testing.assert_close(
        kept, round_to_grid(swept.approximation, step, values)[swept.mask], rtol=0, atol=0
    )
    assert (swept.approximation[~swept.mask] == 0).all()
    assert torch.equal(swept.scales, swept.scales.to(torch.bfloat16).float())
    plain, _ = quantize(W, swept.mask, values, group_size)
    assert gram_loss(W - swept.approximation, H) < gram_loss(W - plain, H)


def test_a_singular_gram_gets_more_damping_and_says_how_much():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature(x.T @ x / 5, damping=0.01)
    with pytest.warns(RuntimeWarning, match="not positive definite with damping=1e-06"):
        curvature(-1e-3 * torch.eye(40) + x.T @ x / 5, damping=1e-6)
    with pytest.raises(CalibrationError, match="not positive definite"):
        curvature(torch.eye(8) - 1e6 * torch.ones(8, 8))
    assert curvature(torch.zeros(8, 8)).factor.isfinite().all()


# ------------------------------------------------------------------------------------------------
# refit
def problem(R: int, seed: int = 3):
    W, H = layer(16, 24, seed)
    d = H.diagonal().sqrt()
    U, V, mask = signed_factors(W, d, P24, R)
    sign = (signs(W) * signs(U @ V.T)).masked_fill(mask, 0.0)
    kept = W.masked_fill(~mask, 0.0)
    return W, H, U, V, mask, sign, kept


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("which", ["kept", "V", "U", "steps"])
def test_refit_leaves_no_gradient_and_matches_dense_least_squares(R, which):
    W, H, U, V, mask, sign, kept = problem(R)
    H = H.double()
    W, U, V, sign, kept = (t.double() for t in (W, U, V, sign, kept))
    fixed, diagonal = (U @ V.T) * sign, H.diagonal()
    parts, start = [KeptValues(mask, diagonal)], [kept]
    residual = W - kept - fixed
    if which == "V":
        parts, start = [*parts, InputFactor(U, sign, diagonal)], [*start, V]
    elif which == "U":
        parts, start = [*parts, OutputFactor(V, sign, diagonal)], [*start, U]
    elif which == "steps":
        scales = grid_scales(kept.float(), mask, "int4", 32).double()
        q = (kept / expand_scales(scales, 24, 32)).round()
        parts, start = [StepSizes(q, 32, diagonal)], [scales]
        residual = W - parts[0].expand(scales) - fixed
    before = gram_loss(residual, H)
    x = conjugate_gradients(residual, H, parts, start, 400)
    before_parts, after_parts = (
        sum(part.expand(t) for part, t in zip(parts, unknowns, strict=True))
        for unknowns in (start, x)
    )
    E = residual + before_parts - after_parts
    scale = (W @ H).abs().max()
    for part in parts:
        assert part.collect(E @ H).abs().max() < 1e-6 * scale * (
            1 + part.collect(torch.ones_like(E)).abs().max()
        )
    assert gram_loss(E, H) <= before
    if which == "kept":
        for i in range(3):  # the normal equations of a row, solved directly
            k = mask[i]
            exact = torch.linalg.solve(H[k][:, k], (H @ (W - fixed)[i])[k])
            torch.testing.assert_close(x[0][i, k], exact, rtol=1e-5, atol=1e-7)


def test_parts_are_adjoint_to_themselves():
    W, H, U, V, mask, sign, kept = problem(2)
    q = (kept * 3).round()
    for part, x in (
        (KeptValues(mask, H.diagonal()), kept),
        (InputFactor(U, sign, H.diagonal()), V),
        (OutputFactor(V, sign, H.diagonal()), U),
        (StepSizes(q, 32, H.diagonal()), torch.ones(16, 1)),
        (StepSizes(q, None, H.diagonal()), torch.ones(16, 1)),
    ):
        torch.testing.assert_close(
            (part.expand(x) * W).sum(), (x * part.collect(W)).sum(), rtol=1e-4, atol=1e-4
        )


# ------------------------------------------------------------------------------------------------
# descent
@pytest.mark.parametrize("values", [None, "int8", "int4"])
def test_group_descent_only_falls_and_keeps_the_pattern(values, monkeypatch):
    monkeypatch.setattr("slab_kernels.methods.solvers.descent.BLOCK", 8)
    W, H, U, V, mask, sign, kept = problem(1)
    grid = scales = None
    if values:
        kept, scales = quantize(W, mask, values, 32)
        grid = Grid(values, 32)
    magnitude = (U @ V.T).abs()
    now = kept + (U @ V.T) * sign
    losses = [float(gram_loss(W - now, H))]
    for _ in range(5):
        now, mask = descend_groups(W, now, mask, magnitude, H, P24, scales=scales, grid=grid)
        losses.append(float(gram_loss(W - now, H)))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses)), losses
    assert losses[1] < losses[0]
    assert (mask.view(16, 6, 4).sum(-1) == 2).all()
    torch.testing.assert_close(now.abs()[~mask], magnitude[~mask], rtol=1e-4, atol=1e-5)
    if values:
        step = expand_scales(scales, 24, 32)
        torch.testing.assert_close(
            now[mask], round_to_grid(now, step, values)[mask], rtol=1e-4, atol=1e-4
        )


def test_a_single_row_is_swept_and_descended_without_changing_its_inputs():
    """The transpose of one row is contiguous, so a copy must be asked for."""
    W, H = layer(1, 16)
    L, given = torch.rand_like(W), W.clone()
    mask = sweep(W, curvature(H), P24, L).mask
    before = mask.clone()
    _, chosen = descend_groups(W, torch.where(mask, 0.0, L), mask, L, H, P24)
    assert torch.equal(W, given) and torch.equal(mask, before) and not torch.equal(chosen, mask)


def test_group_descent_finds_the_best_state_of_a_single_group():
    for seed in range(5):
        W, H = layer(1, 4, seed)
        L = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed))
        mask = torch.tensor([[True, True, False, False]])
        start = torch.where(mask, W, L)
        got, chosen = descend_groups(W, start, mask, L, H, P24)
        best = float("inf")
        for gone in combinations(range(4), 2):
            stay = [i for i in range(4) if i not in gone]
            for s in product((1.0, -1.0), repeat=2):
                e = torch.zeros(4)
                e[list(gone)] = W[0, list(gone)] - torch.tensor(s) * L[0, list(gone)]
                e[stay] = -torch.linalg.solve(
                    H[stay][:, stay], H[stay][:, list(gone)] @ e[list(gone)]
                )
                best = min(best, float(e @ H @ e))
        assert float(gram_loss(W - got, H)) == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert chosen.sum() == 2


@pytest.mark.parametrize("values", [None, "int4"])
def test_sign_descent_only_falls_and_flips_signs_only(values, monkeypatch):
    monkeypatch.setattr("slab_kernels.methods.solvers.descent.BLOCK", 8)
    W, H, U, V, mask, sign, kept = problem(2)
    grid = scales = None
    if values:
        kept, scales = quantize(W, mask, values, 32)
        grid = Grid(values, 32)
    now = kept + (U @ V.T) * sign
    first, loss = now, float(gram_loss(W - now, H))
    flips = []
    for _ in range(4):
        before = now
        now = descend_levels(W, before, mask, (U @ V.T).abs(), H, scales=scales, grid=grid)
        flips.append(int((now.signbit() != before.signbit())[~mask].sum()))
        assert float(gram_loss(W - now, H)) <= loss * (1 + 1e-5)
        loss = float(gram_loss(W - now, H))
    torch.testing.assert_close(now.abs()[~mask], first.abs()[~mask], rtol=1e-4, atol=1e-5)
    assert flips[0] > 0 and flips[-1] <= flips[0]
