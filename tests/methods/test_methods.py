"""Every method from the outside: patterns, order of quality, grids, packing, and refusal of bad
input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slab_kernels.compression.block import relative_error
from slab_kernels.errors import (
    CalibrationError,
    DtypeError,
    MethodError,
    PatternError,
    RangeError,
    ShapeError,
    ValueTypeError,
)
from slab_kernels.format import pack, round_factors, unpack
from slab_kernels.methods import METHODS, decompose
from slab_kernels.methods.inputs import InputStats
from slab_kernels.methods.solvers.masks import parse_pattern
from slab_kernels.methods.solvers.quantize import expand_scales

PATTERNS = ["2:4", "4:8", "1:4", "50%", "60%", "70%", "80%"]


def correlated_layer(N: int, K: int, seed: int = 0, tokens: int = 6000):
    """W [N,K] and held-out and calibration statistics: power-law x AR(1) covariance, outlier
    channels, Student-t weights."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(K, K, generator=g)).Q
    root = basis * torch.arange(1, K + 1).float().pow(-0.4) @ basis.T
    lag = (torch.arange(K)[:, None] - torch.arange(K)[None]).abs()
    mix = root @ torch.linalg.cholesky(0.6**lag + 1e-5 * torch.eye(K)).T
    mix = mix / mix.norm(dim=0)
    loud = torch.exp(0.5 * torch.randn(K, generator=g))
    loud[torch.randperm(K, generator=g)[: max(2, K // 64)]] *= 8 + 32 * torch.rand(
        max(2, K // 64), generator=g
    )

    def stats() -> InputStats:
        return InputStats.from_inputs(torch.randn(tokens, K, generator=g) @ mix * loud)

    chi = torch.randn(N, K, 4, generator=g).square().sum(-1) / 4
    W = torch.randn(N, K, generator=g) / chi.sqrt() / math.sqrt(K) / loud.clamp(min=0.3).sqrt()
    return W, stats(), stats()


@pytest.fixture(scope="module")
def layer():
    return correlated_layer(96, 128)


def error(W, approximation, stats) -> float:
    E = W - approximation
    return math.sqrt(float(((E @ stats.gram) * E).sum() / ((W @ stats.gram) * W).sum()))


# ------------------------------------------------------------------------------------------------
# patterns
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:ADMM had not settled")
def test_every_method_keeps_exactly_the_pattern(method, pattern, layer):
    W, stats, _ = layer
    d = decompose(W, stats, method, pattern)
    parsed = parse_pattern(pattern)
    if parsed.structured:
        assert (d.mask.unflatten(1, (-1, parsed.group)).sum(-1) == parsed.keep).all()
    else:
        assert (d.mask.sum(1) == parsed.kept_in_row(128)).all()
    assert (d.S[~d.mask] == 0).all()
    assert d.dense().isfinite().all() and d.S.dtype == torch.float32
    assert (d.U is None) == (not METHODS[method].signs)
    assert (d.P is None) == (not METHODS[method].adapter)
    if d.U is not None:
        assert d.B.dtype == torch.int8 and (d.B[~d.mask].abs() == 1).all()
        pruned = d.dense()[~d.mask].abs()
        torch.testing.assert_close(pruned, (d.U @ d.V.T).abs()[~d.mask])


@settings(max_examples=15, deadline=None)
@given(
    method=st.sampled_from(list(METHODS)),
    pattern=st.sampled_from(["2:4", "50%"]),
    N=st.integers(1, 9),
    groups=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    zero_rows=st.booleans(),
)
def test_any_small_layer_with_little_data_gives_finite_numbers(
    method, pattern, N, groups, seed, zero_rows
):
    g = torch.Generator().manual_seed(seed)
    K = 4 * groups
    x = torch.randn(3, K, generator=g)  # fewer tokens than inputs: a singular Gram matrix
    x[:, 0] = 0  # a dead input
    W = torch.randn(N, K, generator=g)
    if zero_rows:
        W[0] = 0
    before = W.clone()
    d = decompose(W, InputStats.from_inputs(x), method, pattern)
    assert d.dense().isfinite().all()
    assert torch.equal(W, before)
    assert (d.mask.sum(1) == K // 2).all()


# ------------------------------------------------------------------------------------------------
# quality
def test_order_of_the_methods_on_held_out_inputs(layer):
    W, stats, heldout = layer
    e = {name: error(W, decompose(W, stats, name).dense(), heldout) for name in METHODS}
    assert e["slab"] < 0.6 * e["slab-paper"]
    assert e["slab-paper"] < e["wanda"] < e["magnitude"]
    assert e["sparsegpt"] < 0.85 * e["wanda"]
    assert e["slab"] < 0.6 * e["sparsegpt"]


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_slab_beats_the_paper_at_every_pattern(pattern, layer):
    W, stats, heldout = layer
    ours = error(W, decompose(W, stats, "slab", pattern).dense(), heldout)
    paper = error(W, decompose(W, stats, "slab-paper", pattern).dense(), heldout)
    sparse = error(W, decompose(W, stats, "sparsegpt", pattern).dense(), heldout)
    assert ours < 0.8 * paper and ours < 0.8 * sparse


@pytest.mark.parametrize("method", ["slab", "slab-paper"])
def test_more_rank_and_more_kept_entries_never_hurt(method, layer):
    W, stats, _ = layer
    ranks = [error(W, decompose(W, stats, method, rank=r).dense(), stats) for r in (1, 2, 4)]
    assert ranks[0] > ranks[1] > ranks[2]
    removed = [
        error(W, decompose(W, stats, method, f"{p}%").dense(), stats) for p in (50, 60, 70, 80)
    ]
    assert removed == sorted(removed)


def test_a_wider_choice_of_positions_never_hurts(layer):
    W, stats, _ = layer
    e = [error(W, decompose(W, stats, "slab", p).dense(), stats) for p in ("2:4", "4:8", "50%")]
    assert e[0] > e[1] > e[2]


def test_rounds_only_improve(layer):
    W, stats, _ = layer
    e = [
        error(W, decompose(W, stats, rounds=r, tolerance=0.0).dense(), stats) for r in (0, 1, 2, 4)
    ]
    assert e[0] > e[1] > e[2] and e[3] <= e[2] * 1.0005


def test_kept_values_solve_the_damped_normal_equations(layer):
    """The ridge is the share of the diagonal that was asked for, and pulls towards the weight."""
    W, stats, _ = layer
    G = stats.gram.double()
    for share in (0.0, 0.3):
        d = decompose(W, stats, refit_damping=share, iterations=200)
        damped = G + torch.diag(share * G.diagonal() + 1e-5 * G.diagonal().mean())
        E = W.double() - d.dense().double()
        slope = ((E @ damped) / G.diagonal())[d.mask].norm() / E[~d.mask].norm()
        assert slope < 2e-3, (share, slope)
        undamped = ((E @ G) / G.diagonal())[d.mask].norm() / E[~d.mask].norm()
        assert (undamped > 0.02) == (share > 0)


@pytest.mark.parametrize("values, planes", [("fp16", 1), ("int4", 2)])
def test_damping_keeps_a_layer_from_learning_a_short_text_by_heart(values, planes):
    """On four tokens per input: less error on other text, and less of it hidden in the text."""
    W, stats, _ = correlated_layer(64, 128, tokens=512)
    _, heldout, _ = correlated_layer(64, 128)  # the same weight, other inputs
    weak = {"refit_damping": 0.001, "relative_damping": 0.01}
    found = {}
    for name, options in (("usual", {}), ("weak", weak)):
        dense = decompose(W, stats, values=values, planes=planes, group_size=64, **options).dense()
        found[name] = error(W, dense, heldout), error(W, dense, stats)
    ratio = {name: other / own for name, (other, own) in found.items()}
    assert found["usual"][0] < 0.985 * found["weak"][0] and ratio["usual"] < 0.98 * ratio["weak"]


def test_independent_inputs_leave_nothing_to_push_but_slab_still_wins(layer):
    W, stats, _ = layer
    alone = InputStats.from_gram(torch.diag(stats.diagonal))
    assert error(W, decompose(W, alone).dense(), alone) <= error(
        W, decompose(W, alone, "slab-paper").dense(), alone
    )


def test_a_weight_of_the_format_is_found_again():
    """W that already is S + (u v^T) * B comes back almost exactly."""
    g = torch.Generator().manual_seed(0)
    B = torch.randint(0, 2, (32, 64), generator=g) * 2.0 - 1
    W = (torch.rand(32, 1, generator=g) + 0.5) * (torch.rand(64, generator=g) + 0.5) * B
    W = W.unflatten(1, (-1, 4))
    W[..., 1] *= 4
    W[..., 2] *= -5
    W = W.flatten(1)
    assert (
        error(
            W,
            decompose(W, InputStats.from_gram(torch.eye(64))).dense(),
            InputStats.from_gram(torch.eye(64)),
        )
        < 1e-3
    )


def test_drift_moves_the_layer_towards_the_dense_output():
    """Inputs that reach the layer damaged: matching the dense output beats copying the weight."""
    W, _, _ = correlated_layer(32, 64)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4000, 64, generator=g)
    noise = 0.3 * torch.randn(4000, 64, generator=g) @ torch.randn(64, 64, generator=g) / 8
    damaged, dense = x + noise, x @ W.T
    measured = InputStats(64)
    measured.update(damaged, dense - damaged @ W.T)
    miss = [
        (dense - damaged @ decompose(W, measured, drift=share).dense().T).norm() / dense.norm()
        for share in (0.0, 0.5, 1.0)
    ]
    assert miss[2] < miss[1] < miss[0]
    plain = decompose(W, measured.with_drift(None))
    torch.testing.assert_close(plain.dense(), decompose(W, measured, drift=0.0).dense())


# ------------------------------------------------------------------------------------------------
# grids, packing
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "group_size"), [("int8", 128), ("int8", None), ("int4", 32), ("int4", 64)]
)
def test_integer_values_lie_on_the_stored_grid(method, values, group_size, layer):
    W, stats, _ = layer
    d = decompose(
        W[:, :96],
        InputStats.from_gram(stats.gram[:96, :96]),
        method,
        values=values,
        group_size=group_size,
    )
    assert (d.values, d.group_size) == (values, group_size)
    assert d.scales.shape == (96, 1 if group_size in (None, 128) else math.ceil(96 / group_size))
    assert torch.equal(d.scales, d.scales.to(torch.bfloat16).float())
    q = d.folded().S / expand_scales(d.scales, 96, group_size)
    torch.testing.assert_close(q, q.round(), rtol=0, atol=1e-4)
    low, high = (-127, 127) if values == "int8" else (-8, 7)
    assert q.min() >= low and q.max() <= high


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "tolerance"), [("fp16", 2**-10), ("bf16", 2**-7), ("int8", 1e-4), ("int4", 1e-4)]
)
def test_packing_changes_no_more_than_one_rounding(method, values, tolerance, layer):
    W, stats, _ = layer
    d = decompose(W, stats, method, values=values, group_size=32)
    packed = pack(d, values, 32)
    difference = (packed.dense() - d.dense()).abs()
    one_rounding = torch.where(
        d.mask, tolerance, 2**-10 if method == "slab-paper" else 2**-22
    )  # factors: fp16
    assert (
        difference <= one_rounding * (d.folded().S.abs() + (d.dense() - d.S).abs()) + 1e-7
    ).all()
    torch.testing.assert_close(unpack(packed).dense(), packed.dense())


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("method", ["slab", "slab-paper", "threebasil", "wanda"])
def test_the_size_of_the_weights_changes_no_relative_error(method, values):
    """1e-12 times a weight: nothing in a method, its grids or its factors has a size of its own."""
    W, _, stats = correlated_layer(24, 64)
    errors = []
    for scale in (1.0, 1e-12):
        d = decompose(W * scale, stats, method=method, values=values, group_size=32)
        errors.append(error(W, pack(d, values).dense() / scale, stats))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_integers_at_patterns_that_are_not_enumerated(method, layer):
    W, stats, _ = layer
    for pattern in ("50%", "4:8"):
        d = decompose(W, stats, method, pattern, values="int8", group_size=32)
        q = d.folded().S / expand_scales(d.scales, 128, 32)
        torch.testing.assert_close(q, q.round(), rtol=0, atol=1e-4)
        assert (d.mask.sum(1) == 64).all()


def test_slab_returns_factors_as_they_are_stored(layer):
    W, stats, _ = layer
    d = decompose(W, stats, rank=2)
    U, V = round_factors(d.U, d.V)
    assert torch.equal(U, d.U) and torch.equal(V, d.V)
    assert (d.B[d.mask] == 0).all()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rounding_inside_beats_rounding_afterwards(values, layer):
    W, stats, heldout = layer
    inside = error(W, decompose(W, stats, values=values, group_size=32).dense(), heldout)
    after = error(W, pack(decompose(W, stats), values, 32).dense(), heldout)
    assert inside < after
    assert error(W, decompose(W, stats).dense(), stats) < error(
        W, decompose(W, stats, values=values).dense(), stats
    )


# ------------------------------------------------------------------------------------------------
# purity
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_pure_and_repeatable(method, layer):
    W, stats, _ = layer
    W, stats = W[:20], InputStats.from_gram(stats.gram.clone())
    weight, gram, state = W.clone(), stats.gram.clone(), torch.get_rng_state()
    first = decompose(W, stats, method)
    torch.manual_seed(1234)
    second = decompose(W.clone().requires_grad_(), stats, method)
    torch.set_rng_state(state)
    assert torch.equal(first.dense(), second.dense())
    assert torch.equal(W, weight) and torch.equal(stats.gram, gram)
    assert not second.S.requires_grad


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_weights_and_inputs_does_not_matter(scale, layer):
    W, stats, _ = layer
    plain = error(W, decompose(W, stats).dense(), stats)
    scaled = InputStats.from_gram(stats.gram * scale)
    assert error(W, decompose(W, scaled).dense(), stats) == pytest.approx(plain, rel=2e-2)
    V = W * min(scale, 1e3)
    assert error(V, decompose(V, stats).dense(), stats) == pytest.approx(plain, rel=2e-2)


def test_half_precision_weights_are_taken():
    W, stats, _ = correlated_layer(8, 32)
    assert decompose(W.to(torch.bfloat16), stats).S.dtype == torch.float32


def test_dead_inputs_are_approximated_like_any_other():
    W, stats, _ = correlated_layer(16, 32)
    gram = stats.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    d = decompose(W, InputStats.from_gram(gram))
    assert d.dense().isfinite().all()
    assert (W[:, 5] - d.dense()[:, 5]).norm() < W[:, 5].norm()
    assert decompose(W, InputStats.from_gram(torch.zeros(32, 32))).dense().isfinite().all()


# ------------------------------------------------------------------------------------------------
# bad input
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            {"method": "slabb"},
            MethodError,
            "slab, slab-paper, threebasil, .*sparsegpt, wanda, magnitude",
        ),
        ({"method": "wanda", "rounds": 3}, MethodError, "has no option 'rounds'"),
        ({"speed": 3}, MethodError, "damping, relative_damping"),
        ({"pattern": "2:3:4"}, PatternError, "n of every m"),
        ({"pattern": "2:5"}, ShapeError, "in_features=32 must be a multiple of 5"),
        ({"rank": 9}, ShapeError, "rank=9 must lie in 0 .. 8"),
        (
            {"rank": 0, "method": "slab-paper"},
            ShapeError,
            "rank=0: .*'slab-paper' is nothing without its sign term",
        ),
        ({"rank": -1}, ShapeError, "rank=-1 must be an integer of at least 0"),
        ({"adapter_rank": 9}, ShapeError, "adapter_rank=9 must lie in 0 .. 8"),
        (
            {"adapter_rank": 2, "method": "alps"},
            MethodError,
            "'alps' has no adapter .*slab, threebasil, .* have one",
        ),
        ({"planes": 4}, MethodError, "planes=4: only 'slab' .* 1 to 3"),
        ({"planes": 2, "rank": 0}, MethodError, "planes=2"),
        ({"planes": 2, "method": "oats"}, MethodError, "planes=2"),
        (
            {"method": "hassle-free", "inner": "obs"},
            ValueError,
            "inner='obs' is unknown; choose one of sparsegpt, alps",
        ),
        ({"method": "eora", "pruner": "obs"}, ValueError, "pruner='obs' is unknown"),
        ({"values": "int5"}, ValueTypeError, "int5.*fp16"),
        ({"values": "int8", "group_size": 100}, ShapeError, "group_size=100"),
        ({"values": "int8", "group_size": 128, "pattern": "3:16"}, None, ""),
        ({"stats": None}, CalibrationError, "needs the Gram matrix.*needs='gram'"),
        ({"stats": InputStats(32)}, CalibrationError, "needs the Gram matrix"),
        (
            {"stats": InputStats.from_inputs(torch.ones(4, 32), "diagonal")},
            CalibrationError,
            "Gram",
        ),
        ({"stats": None, "method": "wanda"}, CalibrationError, "needs the mean squares"),
        (
            {"stats": InputStats.from_inputs(torch.ones(4, 36))},
            CalibrationError,
            "in_features=36.*8 x 32",
        ),
        (
            {"stats": InputStats.from_inputs(torch.ones(4, 32), drift=torch.ones(4, 7))},
            CalibrationError,
            "drift",
        ),
        ({"weight": [[1.0, 2.0]]}, DtypeError, "weight is a list"),
        ({"stats": torch.eye(32)}, CalibrationError, "needs the Gram matrix"),
        ({"weight": torch.ones(8)}, ShapeError, r"\(8,\)"),
        ({"weight": torch.ones(0, 32)}, ShapeError, "out_features, in_features"),
        ({"weight": torch.ones(8, 32, dtype=torch.int8)}, DtypeError, "int8"),
        ({"weight": torch.full((8, 32), float("nan"))}, RangeError, "256 NaN or infinite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, kind, text):
    stats = InputStats.from_inputs(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    call = {"weight": weight, "stats": stats, **change}
    if kind is None:
        decompose(**call)
        return
    with pytest.raises(kind, match=text):
        decompose(**call)


def test_magnitude_needs_no_statistics():
    d = decompose(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), method="magnitude")
    assert d.dense().tolist() == [[0.0, -3.0, 2.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_gives_what_the_cpu_gives(method, layer):
    W, stats, _ = layer
    here = error(W, decompose(W, stats, method).dense(), stats)
    there = decompose(W.cuda(), stats.to("cuda"), method)
    assert there.S.is_cuda
    assert error(W, there.dense().cpu(), stats) == pytest.approx(here, rel=1e-2)


def test_inputs_of_very_uneven_energy_stay_within_fp16():
    """Energies over 18 decades once gave kept values of 1e5: weak inputs correcting loud ones."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(32, 16, generator=g) * torch.logspace(-6, 3, 16)
        W = torch.randn(8, 16, generator=g)
        stats = InputStats(16)
        stats.update(x)
        d = decompose(W, stats)
        assert float(d.S.abs().max()) < 1e3 * float(W.abs().max())
        pack(d)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-100, -60, 70])
def test_weights_of_any_size_are_decomposed_alike(method, power):
    """Scaled by a power of two: what has no squares in fp32 must not lose its scales."""
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(16, 64, generator=generator), torch.randn(128, 64, generator=generator)
    for values in ("fp16", "int8"):
        drift = torch.randn(128, 16, generator=generator) * 0.1
        want = decompose(W, InputStats.from_inputs(x, drift=drift), method=method, values=values)
        stats = InputStats.from_inputs(x, drift=drift * 2.0**power)
        found = decompose(W * 2.0**power, stats, method=method, values=values)
        torch.testing.assert_close(found.dense() / 2.0**power, want.dense(), rtol=1e-3, atol=1e-3)
        stored = want.dense() * 2.0**power
        error = relative_error(W * 2.0**power, stored, stats.matrix)
        usual = relative_error(W, want.dense(), stats.matrix)
        assert error == pytest.approx(usual, rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(8, 32, device="meta"), "on meta and has no values"),
        (torch.ones(8, 32).to(torch.float8_e4m3fn), "expected a float dtype of 16 bits or more"),
    ],
)
def test_weights_without_usable_values(weight, message):
    with pytest.raises(DtypeError, match=message):
        decompose(weight, method="magnitude")


@pytest.mark.parametrize("inputs", [[1.0, 2.0], None, torch.tensor(1.0)])
def test_inputs_that_are_no_tensor_of_tokens(inputs):
    with pytest.raises(CalibrationError, match=r"expected a tensor \[\.\.\., in_features\]"):
        InputStats.from_inputs(inputs)
