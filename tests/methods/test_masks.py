"""Patterns and masks: exact counts, optimality against brute force, deterministic ties."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slab_kernels.errors import PatternError
from slab_kernels.methods.solvers.masks import (
    Pattern,
    parse_pattern,
    select,
    top_of_groups,
    top_of_rows,
)
from slab_kernels.methods.solvers.states import enumerable, group_states


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", Pattern(2, 4)),
        ("4:8", Pattern(4, 8)),
        ("1:4", Pattern(1, 4)),
        ("50%", Pattern(removed=0.5)),
    ],
)
def test_patterns_are_read(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["4:4", "0:4", "5:4", "0%", "100%", "50", "2/4", "", "-1:4", "2:4:8", "120%"]
)
def test_what_is_no_pattern_is_refused_with_its_text(text):
    with pytest.raises(PatternError, match="n of every m"):
        parse_pattern(text)


@settings(max_examples=60, deadline=None)
@given(
    nm=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (2, 16), (1, 2)]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    coarse=st.booleans(),
)
def test_n_of_m_is_exact_and_best(nm, rows, groups, seed, coarse):
    n, m = nm
    score = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    if coarse:
        score = (score * 3).round()  # many ties
    mask = select(score, Pattern(n, m))
    kept = mask.view(rows, groups, m)
    assert (kept.sum(-1) == n).all()
    grouped = score.view(rows, groups, m)
    best = torch.stack([grouped[..., list(c)].sum(-1) for c in combinations(range(m), n)]).amax(0)
    torch.testing.assert_close((grouped * kept).sum(-1), best)


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 90),
    percent=st.sampled_from([10, 50, 60, 70, 80, 95]),
    seed=st.integers(0, 10**6),
)
def test_unstructured_rows_keep_an_exact_count_of_the_highest(K, percent, seed):
    score = torch.rand(4, K, generator=torch.Generator().manual_seed(seed))
    pattern = Pattern(removed=percent / 100)
    mask = select(score, pattern)
    assert (mask.sum(1) == K - round(K * pattern.removed)).all()
    for row, keep in zip(score, mask, strict=True):
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


@pytest.mark.parametrize("m", [4, 8, 16])
def test_ties_go_to_the_lowest_index(m):
    mask = top_of_groups(torch.ones(2, 3, m), m // 2)
    assert (mask == (torch.arange(m) < m // 2)).all()
    assert (select(torch.zeros(2, 10), Pattern(removed=0.7)) == (torch.arange(10) < 3)).all()


def test_ranks_by_comparison_and_by_sorting_agree_on_ties():
    score = torch.randint(0, 3, (50, 8), generator=torch.Generator().manual_seed(0)).float()
    keep = torch.full((50, 1), 3)
    assert torch.equal(top_of_groups(score, 3), top_of_rows(score, keep))


def test_rows_may_keep_different_counts():
    mask = top_of_rows(
        torch.tensor([[3.0, 1, 2], [3, 1, 2], [3, 1, 2]]), torch.tensor([[0], [1], [2]])
    )
    assert mask.tolist() == [[False] * 3, [True, False, False], [True, False, True]]


@pytest.mark.parametrize(
    ("text", "planes", "count"), [("2:4", 1, 24), ("2:4", 0, 6), ("1:4", 1, 32), ("2:4", 2, 24)]
)
def test_states_of_a_group_are_all_there_once(text, planes, count):
    pattern = parse_pattern(text)
    states = group_states(pattern, planes, torch.device("cpu"))
    assert enumerable(pattern, planes) and len(states.mask) == count
    assert (
        len({tuple(row) for row in (2 * states.mask.int() + states.takes_upper.int()).tolist()})
        == count
    )
    assert (states.mask.sum(1) == pattern.keep).all()
    assert not (states.mask & states.takes_upper).any()


def test_large_or_unstructured_patterns_are_not_enumerated():
    assert not enumerable(parse_pattern("4:8"))
    assert not enumerable(parse_pattern("50%"))
