"""Published methods: their order on a layer, errors of released codes, the metric they share."""

from __future__ import annotations

import itertools
import operator
import warnings

import pytest
import torch
from test_methods import correlated_layer, error
from test_sweep import signed_loss

from slab_kernels.format import pack, unpack
from slab_kernels.methods import METHODS, decompose
from slab_kernels.methods.inputs import InputStats
from slab_kernels.methods.slim import saliency, slim_quant
from slab_kernels.methods.solvers.descent import descend_levels
from slab_kernels.methods.solvers.levels import nearest, neighbours
from slab_kernels.methods.solvers.lowrank import signed_factors
from slab_kernels.methods.solvers.masks import parse_pattern
from slab_kernels.methods.solvers.metric import metric, once_per_gram
from slab_kernels.methods.solvers.quantize import round_to_grid
from slab_kernels.methods.solvers.refit import gram_loss
from slab_kernels.methods.threebasil import SCHEDULES, ThreeBasilConfig, admm

RANK = 8
P24 = parse_pattern("2:4")


@pytest.fixture(scope="module")
def layer():
    return correlated_layer(256, 256, tokens=8192)


@pytest.fixture(scope="module")
def errors(layer):
    W, stats, heldout = layer
    return lambda name, **options: error(W, decompose(W, stats, name, **options).dense(), heldout)


@pytest.mark.slow
def test_published_methods_stand_in_the_published_order(errors):
    """As published (`polish=0`), at equal rank: 3BASiL table 1, HASSLE-free table 2, ALPS figure 1,
    EoRA table 1."""
    plain = {"adapter_rank": RANK, "polish": 0}
    magnitude, wanda, sparsegpt = errors("magnitude"), errors("wanda"), errors("sparsegpt")
    alps, oats, sslc = errors("alps", polish=0), errors("oats", **plain), errors("sslc", **plain)
    eora, eora_wanda = errors("eora", **plain), errors("eora", pruner="wanda", **plain)
    hassle, inner_alps = (
        errors("hassle-free", **plain),
        errors("hassle-free", inner="alps", **plain),
    )
    threebasil = errors("threebasil", **plain)
    assert magnitude > wanda > sparsegpt > alps
    assert wanda > eora_wanda > eora and sparsegpt > eora
    assert min(oats, sslc) > hassle > inner_alps > threebasil * 0.999
    assert alps > threebasil


@pytest.mark.slow
@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.adapter] + ["alps"])
@pytest.mark.parametrize("values", ["fp16", "int4"])
def test_polish_never_hurts_and_the_joint_solver_beats_all(name, values, errors):
    settings = {"values": values, "group_size": 32} | (
        {} if name == "alps" else {"adapter_rank": RANK}
    )
    polished = errors(name, **settings)
    assert polished <= errors(name, polish=0, **settings) * 1.002
    ours = errors(
        "slab", rank=0, adapter_rank=0 if name == "alps" else RANK, values=values, group_size=32
    )
    assert ours <= polished * (
        1.01 if values == "fp16" else 1.08
    )  # from a scaled SVD int4 ends a little lower than from ADMM
    assert errors("slab", adapter_rank=RANK, values=values, group_size=32) < 0.8 * polished


@pytest.mark.slow
@pytest.mark.parametrize("values", ["fp16", "int4", "int3"])
def test_every_plane_and_every_rank_of_the_adapter_helps(values, errors):
    planes = [errors("slab", values=values, planes=p, group_size=32) for p in (1, 2, 3)]
    assert planes[0] > planes[1] > planes[2] and (
        values != "fp16" or planes[0] > 1.5 * planes[1] > 2.2 * planes[2]
    )
    adapters = [errors("slab", values=values, adapter_rank=r, group_size=32) for r in (0, 4, 16)]
    assert adapters[0] > adapters[1] > adapters[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slab", "slim", "threebasil"])
def test_adapters_of_int8_lose_nothing_and_are_what_pack_stores(name, layer, errors):
    wide, narrow = (
        errors(name, adapter_rank=16, adapter_values=stored) for stored in ("fp16", "int8")
    )
    assert narrow < 1.01 * wide
    d = decompose(layer[0], layer[1], name, adapter_rank=16)
    stored = unpack(pack(d, adapter_values="int8"))
    assert torch.equal(stored.P, d.P) and torch.equal(stored.Q, d.Q)
    with pytest.raises(ValueError, match="adapter_values='int5' is unknown"):
        decompose(layer[0], layer[1], name, adapter_rank=16, adapter_values="int5")


# ---- levels ----


@pytest.mark.slow
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_nearest_level_and_its_neighbours_by_brute_force(planes):
    w = torch.randn(500, generator=torch.Generator().manual_seed(0))
    l = torch.rand(500, generator=torch.Generator().manual_seed(1)) + 0.01  # noqa: E741
    halves = [2.0**-i for i in range(planes)]
    signs = itertools.product((1, -1), repeat=planes)
    every = torch.tensor([sum(map(operator.mul, some, halves)) for some in signs])
    assert len(every.unique()) == 2**planes and not (every == 0).any()
    best = (w[:, None] - every * l[:, None]).abs().amin(1)
    torch.testing.assert_close((w - nearest(w, l, planes) * l).abs(), best)
    below, above = neighbours(w, l, planes)
    assert bool(torch.isin(below, every).all()) and torch.equal(above, below + 2.0 ** (2 - planes))
    torch.testing.assert_close(torch.minimum((w - below * l).abs(), (w - above * l).abs()), best)
    assert (
        nearest(torch.zeros(3), torch.zeros(3), planes).tolist()
        == [every[2 ** (planes - 1) - 1].item()] * 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2])
def test_more_rounds_of_signed_factors_never_hurt_with_planes(planes, rank):
    W, stats, _ = correlated_layer(32, 64)
    d = stats.diagonal.sqrt()
    losses = []
    for rounds in (1, 2, 4, 8):
        U, V, mask = signed_factors(W, d, P24, rank, rounds, planes)
        losses.append(signed_loss(W, d, mask, U, V, planes))
    assert (
        all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(losses))
        if rank == 1
        else losses[-1] <= 1.05 * losses[0]
    )


@pytest.mark.slow
def test_descending_levels_only_falls():
    W, stats, _ = correlated_layer(32, 64)
    U, V, mask = signed_factors(W, stats.diagonal.sqrt(), P24, 1, planes=2)
    magnitude = (U @ V.T).abs()
    now = torch.where(mask, W, nearest(W, magnitude, 2) * magnitude)
    losses = [float(gram_loss(W - now, stats.gram))]
    for _ in range(3):
        now = descend_levels(W, now, mask, magnitude, stats.gram, planes=2)
        losses.append(float(gram_loss(W - now, stats.gram)))
    assert (
        all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses)) and losses[-1] < losses[0]
    )
    multiple = (now / magnitude)[~mask]
    torch.testing.assert_close(
        multiple, nearest(multiple, torch.ones_like(multiple), 2), rtol=1e-3, atol=1e-3
    )


# ---- the shared metric ----


@pytest.mark.slow
def test_truncation_is_the_best_low_rank_part_in_the_metric(layer):
    W, stats, _ = layer
    space = metric(stats.gram)
    T = W * space.scale
    P, Q, basis = space.truncate(T, RANK, iterations=30)
    values, vectors = torch.linalg.eigh(space.gram.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    sigma = torch.linalg.svdvals(T.double() @ root)
    assert space.loss(T - P @ Q.T) == pytest.approx(float(sigma[RANK:].square().sum()), rel=1e-4)
    warm = space.truncate(T, RANK, basis, iterations=1)
    assert space.loss(T - warm[0] @ warm[1].T) == pytest.approx(space.loss(T - P @ Q.T), rel=1e-4)
    L = torch.randn(256, RANK, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        L, R = space.follow(T, L)
    assert space.loss(T - L @ R.T) == pytest.approx(
        space.loss(T - P @ Q.T), rel=1e-3
    )  # no spare columns
    torch.testing.assert_close(L.T @ L, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(space.gram.diagonal(), torch.ones(256))
    torch.testing.assert_close(space.lower @ space.lower.T, space.gram, atol=1e-5, rtol=0)
    inverse = space.inverse(0.1)
    torch.testing.assert_close(
        inverse @ (space.gram + 0.1 * torch.eye(256)), torch.eye(256), atol=1e-4, rtol=0
    )


@pytest.mark.slow
def test_one_matrix_is_factorised_once_for_all_who_read_it():
    calls = []

    @once_per_gram
    def work(gram, scale=1):
        calls.append(scale)
        return gram * scale

    a, b = torch.eye(3), torch.eye(3)
    assert work(a) is work(a) and len(calls) == 1
    work(a, scale=2), work(a, 1), work(b)
    assert len(calls) == 4
    kept = work(b)
    b += 1  # changed in place: another matrix
    assert work(b) is not kept and len(calls) == 5
    del b, kept
    assert work(a) is work(a)


def test_a_matrix_that_comes_between_takes_no_result_from_another():
    @once_per_gram
    def work(gram, scale):
        return len(gram)

    class Meanwhile:  # is equal to all, and another thread has its turn when that is asked
        def __eq__(self, other):
            work(torch.eye(5), 1)
            return True

    a = torch.eye(3)
    assert work(a, Meanwhile()) == 3
    assert work(a, Meanwhile()) == 3


@pytest.mark.slow
def test_admm_splits_warn_when_stopped_early_and_restart_from_too_large_a_penalty(layer):
    W, stats, _ = layer
    space = metric(stats.gram)
    T, config = W * space.scale, ThreeBasilConfig(rank=0, iterations=1000)
    schedule = SCHEDULES["threebasil"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it settles within those iterations
        split = admm(T, space, config, schedule, RANK)
    assert torch.equal(split.S != 0, split.mask)
    assert split.P.shape == (256, RANK) and (split.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    huge = admm(T, space, ThreeBasilConfig(rank=0, rho=1e4), schedule, RANK)
    left, huge_left = (one.without_adapter(T - one.S) for one in (split, huge))
    assert space.loss(huge_left) < 1.6 * space.loss(left)
    with pytest.warns(
        RuntimeWarning,
        match=r"not settled after iterations=40: .*% of the kept positions still moved",
    ):
        admm(T, space, ThreeBasilConfig(rank=0, iterations=40), schedule, RANK)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.filterwarnings("ignore:ADMM had not settled")
def test_admm_may_stop_before_its_first_check(schedule, layer):
    """Fewer iterations than lie between two checks still give a pattern, and a share that moved."""
    W, stats, _ = layer
    space, every = metric(stats.gram), SCHEDULES[schedule].every
    for iterations in range(1, every + 1):
        config = ThreeBasilConfig(rank=0, iterations=iterations)
        split = admm(W[:16] * space.scale, space, config, SCHEDULES[schedule], 2)
        assert split.mask.unflatten(1, (-1, 4)).sum(-1).eq(2).all() and split.S.isfinite().all()
        assert split.P.shape == (16, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("moved", "growth"), [(1.0, 1.3), (0.05, 1.2), (0.005, 1.1), (0.0, 1.1)])
def test_the_penalty_grows_by_what_moved(moved, growth):
    assert SCHEDULES["alps"].growth(moved) == growth


@pytest.mark.slow
def test_a_singular_gram_matrix_is_damped_and_one_that_is_not_positive_definite_is_reported():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d = decompose(W, InputStats.from_inputs(x), "eora", adapter_rank=2)
    assert d.dense().isfinite().all()
    gram = x.T @ x / 3 - 0.05 * torch.eye(32)
    with pytest.warns(RuntimeWarning, match="not positive definite with damping=0.005"):
        decompose(W, InputStats.from_gram(gram), "oats", adapter_rank=2)


# ---- errors of released codes (not to be repeated) ----


@pytest.mark.slow
@pytest.mark.parametrize("values", ["int4", "int8"])
def test_slim_quant_searches_the_quantiser_that_it_applies(values):
    """SLiM's code models a step of a/8 and applies a/7: 6.7 % more squared error on Gaussians."""
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    high = 7 if values == "int4" else 127
    found = slim_quant(W, values)

    def loss(step):
        return float((round_to_grid(W, torch.as_tensor(step), values) - W).square().sum())

    best = min(loss(cap / high) for cap in torch.linspace(0.2, 1.0, 400) * float(W.abs().max()))
    assert loss(found) <= best * 1.01
    assert slim_quant(torch.zeros(4, 4), values) == 1


@pytest.mark.slow
def test_statistics_are_plain_means_whatever_the_order_of_the_sequences():
    """A released code weights sequence j by 1/j^2."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 8, generator=g) * s for n, s in ((5, 1.0), (50, 3.0), (7, 0.1))]
    one, other = InputStats(8), InputStats(8)
    for part in parts:
        one.update(part)
    for part in reversed(parts):
        other.update(part)
    x = torch.cat(parts)
    torch.testing.assert_close(one.gram, x.T @ x / len(x))
    torch.testing.assert_close(one.gram, other.gram)


@pytest.mark.slow
def test_saliency_is_invertible_with_dead_inputs():
    x = saliency(torch.tensor([0.0, 4.0, 1.0]))
    assert x.tolist() == [1.0, 3.0, 2.0] and saliency(torch.zeros(3)).tolist() == [1.0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oats", "sslc", "hassle-free", "threebasil", "eora", "slim"])
def test_rank_zero_is_plain_pruning_and_zeros_stay_zero(name, layer):
    W, stats, _ = layer
    d = decompose(W[:32], stats, name, adapter_rank=0)
    assert (
        d.P is None
        and (d.S[~d.mask] == 0).all()
        and (d.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    )
    d = decompose(W[:32], stats, name)
    assert d.P.shape == (32, METHODS[name].adapter_rank((32, 256), None))
