"""InputStats: plain means over tokens, whatever the batches, and refusal of what would poison
them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slab_kernels.errors import CalibrationError
from slab_kernels.methods.inputs import InputStats


def inputs(tokens: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_batches_do_not_matter(cuts, seed):
    x = inputs(sum(cuts), 6, seed)
    stats = InputStats(6)
    for part in x.split(cuts):
        stats.update(part)
    exact = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(stats.gram.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.diagonal.double(), exact.diagonal(), rtol=1e-5, atol=1e-6)
    assert stats.tokens == len(x) and stats.gram.dtype == torch.float32


def test_sequences_of_any_shape_weigh_by_tokens():
    x = inputs(24, 5)
    stats = InputStats.from_inputs(x.view(2, 3, 4, 5))
    torch.testing.assert_close(stats.gram, x.T @ x / 24)
    unequal = InputStats(5)
    unequal.update(x[:20].view(4, 5, 5))
    unequal.update(x[20:])
    torch.testing.assert_close(unequal.gram, stats.gram)


def test_many_updates_lose_nothing_in_fp32():
    stats = InputStats(4)
    x = inputs(3000, 4).abs()
    for row in x.split(1):
        stats.update(row)
    torch.testing.assert_close(
        stats.gram.double(), x.double().T @ x.double() / 3000, rtol=1e-5, atol=0
    )


def test_half_precision_inputs_are_squared_in_fp32():
    x = torch.full((10, 4), 1000.0, dtype=torch.float16)  # squares overflow fp16
    stats = InputStats.from_inputs(x)
    torch.testing.assert_close(stats.gram, torch.full((4, 4), 1e6))
    exact = InputStats(4, dtype=torch.float64)
    exact.update(x)
    assert exact.gram.dtype == torch.float64


def test_a_large_common_scale_does_not_overflow():
    x = torch.full((4000, 2), 1e18)  # the sum of squares would reach 4e39, above fp32
    torch.testing.assert_close(InputStats.from_inputs(x).diagonal, torch.full((2,), 1e36))


def test_diagonal_mode_keeps_no_gram():
    x = inputs(50, 7)
    stats = InputStats.from_inputs(x, needs="diagonal")
    assert stats.gram is None
    torch.testing.assert_close(stats.diagonal, (x * x).mean(0))
    with pytest.raises(CalibrationError, match="no mean squares"):
        _ = InputStats.from_inputs(x, needs="none").diagonal
    with pytest.raises(CalibrationError, match="no Gram matrix"):
        _ = stats.matrix


def test_drift_is_the_mean_outer_product():
    x, drift = inputs(30, 3), inputs(30, 5, 1)
    stats = InputStats(3)
    stats.update(x[:7], drift[:7])
    stats.update(x[7:], drift[7:])
    torch.testing.assert_close(stats.drift, drift.T @ x / 30)
    shared = InputStats.from_inputs(x).with_drift(stats.drift)
    assert shared.drift is stats.drift
    with pytest.raises(CalibrationError, match="every update"):
        stats.update(x)


@pytest.mark.parametrize("needs", ["none", "diagonal", "gram"])
@pytest.mark.parametrize(
    ("value", "count"), [(float("nan"), "1 NaN and 0"), (float("inf"), "0 NaN and 1")]
)
def test_nan_and_inf_are_refused_and_nothing_changes(needs, value, count):
    stats = InputStats.from_inputs(inputs(10, 4), needs=needs)
    gram, tokens = None if stats.gram is None else stats.gram.clone(), stats.tokens
    bad = inputs(10, 4)
    bad[3, 1] = value
    with pytest.raises(CalibrationError, match=f"{count} infinite values of 40"):
        stats.update(bad)
    assert stats.tokens == tokens and (gram is None or torch.equal(stats.gram, gram))


def test_bad_calls_say_what_is_wrong():
    with pytest.raises(CalibrationError, match=r"width 5.*in_features=4"):
        InputStats(4).update(inputs(3, 5))
    with pytest.raises(CalibrationError, match="needs='all'"):
        InputStats(4, needs="all")
    with pytest.raises(CalibrationError, match="in_features=0 of a layer must be at least 1"):
        InputStats(0)
    with pytest.raises(CalibrationError, match="overflow when squared"):
        InputStats(2).update(torch.full((3, 2), 1e30))
    with pytest.raises(CalibrationError, match="square"):
        InputStats.from_gram(torch.ones(3, 4))
    with pytest.raises(CalibrationError, match="2 NaN or infinite"):
        InputStats.from_gram(torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]))
    with pytest.raises(CalibrationError, match="drift"):
        InputStats(2).update(torch.ones(1, 2), torch.full((1, 3), float("nan")))


def test_empty_batches_count_nothing():
    stats = InputStats(4)
    stats.update(torch.empty(0, 4))
    assert stats.tokens == 0 and stats.gram is None
