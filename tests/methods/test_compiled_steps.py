"""The compiled steps of sweep and descent against the torch code that defines them, for every
instruction set that runs here."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pairwise import grid

from slab_kernels import native
from slab_kernels.errors import BackendError
from slab_kernels.methods import decompose
from slab_kernels.methods.inputs import InputStats
from slab_kernels.methods.solvers import compiled, descent
from slab_kernels.methods.solvers.levels import nearest
from slab_kernels.methods.solvers.masks import Pattern, select
from slab_kernels.methods.solvers.quantize import Grid, expand_scales, round_to_grid
from slab_kernels.methods.solvers.refit import gram_loss
from slab_kernels.methods.solvers.sweep import curvature, sweep

if not native.LIBRARY.exists():
    pytest.skip(f"no native library: {native.missing_library()}", allow_module_level=True)

P24 = Pattern(2, 4)
GRIDS = [None, Grid("int8", 32), Grid("int4", 64), Grid("int3", None)]
SHAPES = [(1, 4), (7, 96), (33, 260), (70, 132)]


@pytest.fixture(autouse=True)
def no_library_of_another_state():
    """Without the steps in the library, torch would be compared with itself here."""
    assert native.missing_library() is None


@pytest.fixture
def use_isa():
    """Chooses an instruction set for the rest of the test."""
    before = torch.ops.slab_kernels.cpu_isa()
    yield torch.ops.slab_kernels.cpu_use_isa
    torch.ops.slab_kernels.cpu_use_isa(before)


def layer(N, K):
    """W, its Gram matrix, magnitudes, and a mask of the largest weights."""
    g = torch.Generator().manual_seed(N * K)
    x = torch.randn(2 * K + 50, K, generator=g) @ torch.randn(K, K, generator=g).div(K**0.5).add(
        0.1
    )
    W = torch.randn(N, K, generator=g)
    return W, x.T @ x / len(x), 0.3 + 0.6 * torch.rand(N, K, generator=g), select(W.abs(), P24)


def both(monkeypatch, run):
    """What `run` returns with the torch code and with the compiled steps, one pass each."""
    monkeypatch.setattr(descent, "PASSES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "usable", lambda *_: False)
        want = run()
    return want, run()


@grid(**{"N, K": SHAPES, "planes": [0, 1, 2, 3], "values": GRIDS, "isa": native.runnable()})
def test_sweep_and_descent_are_those_of_torch(monkeypatch, use_isa, N, K, planes, values, isa):
    use_isa(isa)
    W, H, magnitude, mask = layer(N, K)

    def run():
        swept = sweep(
            W, curvature(H), P24, magnitude if planes else None, mask, values, planes=planes or 1
        )
        gradient = (W - swept.approximation) @ H
        moved = descent.descend(
            W, swept.approximation, swept.mask, magnitude, H, P24,
            scales=swept.scales, grid=values, planes=planes, gradient=gradient,
        )  # fmt: skip
        return swept, moved, gradient

    (want, want_moved, _), (got, got_moved, gradient) = both(monkeypatch, run)
    # A tie, or a sum that rounds otherwise, may send a group another way; hardly any may go.
    assert (got.mask == want.mask).float().mean() > 0.98
    assert (got_moved[1] == want_moved[1]).float().mean() > 0.97
    losses = [float(gram_loss(W - t, H)) for t in (got.approximation, got_moved[0])]
    wanted = [float(gram_loss(W - t, H)) for t in (want.approximation, want_moved[0])]
    assert losses == pytest.approx(wanted, rel=0.02) and losses[1] <= losses[0] * (1 + 1e-5)
    same = (got.mask == want.mask).view(N, -1).all(1)
    assert same.float().mean() > 0.5
    assert torch.allclose(got.approximation[same], want.approximation[same], rtol=1e-3, atol=1e-3)
    now, kept = got_moved
    size = gradient.abs().max() + W.abs().max()
    torch.testing.assert_close(gradient, (W - now) @ H, rtol=0, atol=float(1e-5 * size))
    assert (kept.view(N, -1, 4).sum(-1) == 2).all()
    if values is not None:
        steps = expand_scales(got.scales, K, values.group_size)
        rounded = round_to_grid(now, steps, values.values)
        torch.testing.assert_close(now[kept], rounded[kept], rtol=1e-4, atol=1e-4)
        assert torch.equal(got.scales, got.scales.to(torch.bfloat16).float())
    if not planes:
        assert now[~kept].abs().max() < 1e-4


@pytest.mark.parametrize("planes", [0, 1, 3])
@pytest.mark.parametrize("values", [None, Grid("int4", 32), Grid("int3", None)])
def test_what_is_returned_has_the_loss_of_fp64(planes, values):
    # Columns of five decades, strided arguments, and the whole of what a step returns.
    W, H, magnitude, mask = layer(19, 132)
    scale = torch.logspace(-2, 3, 132)
    H = H * scale * scale[:, None]
    W, magnitude = W.T.contiguous().T, magnitude.repeat(1, 2)[:, :132]
    swept = sweep(
        W, curvature(H.T), P24, magnitude if planes else None, mask, values, planes=planes or 1
    )
    before = swept.approximation.clone()
    now, kept = descent.descend(
        W, swept.approximation, swept.mask, magnitude, H.T, P24,
        scales=swept.scales, grid=values, planes=planes,
    )  # fmt: skip
    assert torch.equal(before, swept.approximation)

    def loss(t):
        E = (W - t).double()
        return ((E @ H.double()) * E).sum(1)

    assert (loss(now) <= loss(before) * (1 + 1e-4)).all()
    # A pruned entry is its level up to a rounding of what its group would be without constraints,
    # which is large in quiet columns beside loud ones. It costs nothing: these columns are quiet.
    exact, size = torch.zeros_like(now), magnitude[~kept]
    if planes:
        exact[~kept] = nearest(now[~kept], size, planes) * size
    exact[kept] = now[kept]
    if values is not None:
        steps = expand_scales(swept.scales, 132, values.group_size)
        exact[kept] = round_to_grid(now, steps, values.values)[kept]
    assert (exact - now).abs().max() < 0.01
    torch.testing.assert_close(loss(exact), loss(now), rtol=1e-4, atol=0)


@pytest.mark.parametrize("isa", native.runnable())
def test_a_group_at_the_best_of_all_its_states_stays_there(use_isa, isa):
    """Kept values are rounded one after the other, which is not always the best rounding.

    The best is found here by trying every pair of kept positions with every pair of integers.
    """
    use_isa(isa)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g) + 3 * torch.randn(200, 1, generator=g)
    W, H = torch.randn(64, 4, generator=g), x.T @ x / len(x)
    scales = W.abs().amax(1, keepdim=True) / 3
    integers = torch.arange(-4.0, 4)
    tried = torch.zeros(6, 8, 8, 4)
    for choice, (i, k) in enumerate(combinations(range(4), 2)):
        tried[choice, ..., i], tried[choice, ..., k] = integers[:, None], integers
    tried = tried.view(-1, 4)
    E = (W[:, None] - tried * scales[:, None]).double()
    loss, best = ((E @ H.double()) * E).sum(-1).min(1)
    kept = torch.zeros(6, 4, dtype=torch.bool)
    for choice, pair in enumerate(combinations(range(4), 2)):
        kept[choice, list(pair)] = True
    start, mask = tried[best] * scales, kept[best // 64]
    now, _ = descent.descend(
        W, start, mask, torch.zeros_like(W), H, P24, scales=scales, grid=Grid("int3", None),
        planes=0,
    )  # fmt: skip
    after = (W - now).double()
    assert (((after @ H.double()) * after).sum(1) <= loss * (1 + 1e-4)).all()


def test_numbers_that_are_not_finite_stay_in_their_row():
    W, H, magnitude, mask = layer(18, 64)
    start = torch.where(mask, W, magnitude)
    want = descent.descend(W, start, mask, magnitude, H, P24)
    for bad in (torch.nan, torch.inf):
        broken = W.clone()
        broken[5, 7] = bad
        got = descent.descend(broken, start, mask, magnitude, H, P24)
        others = torch.arange(18) != 5
        assert torch.equal(got[0][others], want[0][others])
        assert torch.equal(got[1][others], want[1][others])
        assert (got[1].view(18, -1, 4).sum(-1) == 2).all()


def test_what_the_steps_cannot_run_goes_to_torch(monkeypatch):
    W, H, magnitude, mask = layer(5, 32)
    start = torch.where(mask, W, magnitude)
    double = [t.double() for t in (W, start, magnitude, H)]
    now, _ = descent.descend(double[0], double[1], mask, double[2], double[3], P24)
    assert now.dtype == torch.float64
    assert not compiled.usable(W.to("meta"), P24, 1, 128)
    assert not compiled.usable(W, Pattern(4, 8), 1, 128)
    assert not compiled.usable(W, P24, 4, 128) and not compiled.usable(W, P24, 1, 256)
    assert compiled.usable(W, P24, 3, 128)
    want, _ = both(monkeypatch, lambda: descent.descend(W, start, mask, magnitude, H, P24))
    monkeypatch.setattr(native, "missing_library", lambda: "it was not built")
    got = descent.descend(W, start, mask, magnitude, H, P24)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    W, H, _, _ = layer(5, 32)
    monkeypatch.setenv(native.ENVIRONMENT, "nonsense")
    with pytest.raises(BackendError, match="nonsense is not an instruction set"):
        decompose(W, InputStats.from_gram(H))


def test_more_passes_within_a_block_only_help(monkeypatch):
    W, H, magnitude, mask = layer(33, 260)
    start = torch.where(mask, W, magnitude)
    losses = [float(gram_loss(W - start, H))]
    for passes in (1, 2, 3):
        monkeypatch.setattr(descent, "PASSES", passes)
        moved, _ = descent.descend(W, start, mask, magnitude, H, P24)
        losses.append(float(gram_loss(W - moved, H)))
    assert losses == sorted(losses, reverse=True)


def test_bits_depend_on_no_thread_count():
    W, H, _, _ = layer(300, 260)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stats = InputStats.from_gram(H.clone(), 1000)
            found.append(decompose(W, stats, values="int4", group_size=32, planes=2))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].S, other.S) and torch.equal(found[0].U, other.U)
        assert torch.equal(found[0].V, other.V) and torch.equal(found[0].B, other.B)
        assert torch.equal(found[0].mask, other.mask)
        assert torch.equal(found[0].scales, other.scales)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": 2}, "are not a block of groups"),
        ({"end": 300}, "are not a block of groups"),
        ({"planes": 4}, "planes=4 must be 1 to 3"),
        ({"planes": 0}, "planes=0 must be 1 to 3"),
        ({"kept": torch.zeros(8, 8)}, "kept has another dtype than bool"),
        ({"gram": torch.zeros(8, 4)}, r"gram has shape \[8, 4\], expected \[8, 8\]"),
        ({"gram": torch.zeros(8, 8).T}, "gram is not contiguous"),
        ({"target": torch.zeros(8, 8).double()}, "target has another dtype than float32"),
        ({"groups": torch.zeros(2, 34)}, r"groups has shape \[2, 34\], expected \[2, 92\]"),
        ({"magnitude": None}, "planes=1 must be 1 to 3 with a magnitude"),
        ({"scales": torch.ones(8, 2), "scale_inputs": 3}, "scale_inputs=3 must be a multiple"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    square = torch.eye(8)
    arguments = {
        "error": square.clone(), "gradient": square.clone(), "kept": square.bool(),
        "target": square, "magnitude": square, "scales": None, "gram": square,
        "groups": compiled.descent_groups(square), "start": 0, "end": 8, "planes": 1,
        "scale_inputs": 0, "lowest": -8, "highest": 7, "passes": 1,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.slab_kernels.descend_cpu(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fractions": None}, "fractions and likely belong together"),
        ({"scales": None}, "fractions and likely belong together, beside scales"),
        ({"scales": torch.ones(8, 2)}, r"scales has shape \[8, 2\], expected \[8, 1\]"),
        ({"fixed": torch.zeros(8, 8).T}, "fixed is not contiguous"),
        ({"highest": 0}, "highest=0 above 0"),
        ({"weight": torch.ones(4)}, r"weight has shape \[4\], expected \[8\]"),
    ],
)
def test_bad_arguments_of_a_sweep_are_refused(change, message):
    square = torch.eye(8)
    arguments = {
        "remaining": square.clone(), "fixed": square.clone(), "kept": square.bool(),
        "scales": torch.ones(8, 1), "likely": square.bool(), "magnitude": square,
        "factor": square, "groups": compiled.sweep_groups(square),
        "fractions": torch.ones(3), "weight": torch.ones(8), "start": 0, "end": 8, "planes": 1,
        "scale_inputs": 32, "lowest": -8, "highest": 7,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.slab_kernels.sweep_cpu(**{**arguments, **change})
