"""The grids are smaller than their product and miss no pair."""

from __future__ import annotations

import itertools

import pytest
from pairwise import grid, grid_of, pairwise, subset

pytest_plugins = ("pytester",)

GRIDS = (
    {"a": (1, 2), "b": ("x", "y", "z")},
    {"a": (1, 2), "b": (3, 4), "c": (5, 6), "d": (7, 8)},
    {"a": range(2), "b": range(7), "c": range(3), "d": range(7), "e": range(3), "f": range(4)},
    {"a": range(19), "b": range(2), "c": range(7), "d": (None,), "e": range(5)},
    {"a": (True, False, 1, 0), "b": ((1, 2), (3, 4)), "c": ("x",)},
)


@pytest.mark.parametrize("choices", GRIDS)
def test_any_two_values_of_two_choices_meet(choices):
    cases = pairwise(choices)
    for (i, left), (j, right) in itertools.combinations(enumerate(choices.values()), 2):
        met = [(case[i], case[j]) for case in cases]
        assert all(pair in met for pair in itertools.product(left, right))
    assert all(
        value in values
        for case in cases
        for value, values in zip(case, choices.values(), strict=True)
    )


def test_a_grid_is_not_much_larger_than_its_two_largest_choices():
    for choices in GRIDS:
        largest, second = sorted(map(len, choices.values()), reverse=True)[:2]
        assert largest * second <= len(pairwise(choices)) <= 1.4 * largest * second + 2


def test_a_grid_is_the_same_every_time():
    assert all(pairwise(choices) == pairwise(choices) for choices in GRIDS)


def test_a_single_choice_and_none():
    assert pairwise({"a": (1, 2)}) == [(1,), (2,)] and pairwise({}) == []


@grid(**{"number, letter": [(1, "a"), (2, "b")], "flag": (True, False)})
def test_a_joined_choice_stays_together(number, letter, flag):
    assert (number, letter) in {(1, "a"), (2, "b")} and flag in (True, False)


POSSIBLE = [(a, b, c) for a in range(4) for b in range(a + 1) for c in "xyz"]


def pairs(cases):
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


def test_a_subset_holds_every_pair_that_is_possible():
    chosen = subset(POSSIBLE)
    assert len(chosen) < len(POSSIBLE)
    assert set(chosen) <= set(POSSIBLE) and pairs(chosen) == pairs(POSSIBLE)
    backwards = subset(POSSIBLE, lambda case: (case[2], case[1]))
    assert pairs((c, b) for _, b, c in backwards) == pairs((c, b) for _, b, c in POSSIBLE)


def test_a_subset_holds_each_value_of_something_else():
    chosen = subset(POSSIBLE, lambda case: case[1:], each=lambda case: case[0] * case[1])
    assert pairs(case[1:] for case in chosen) == pairs(case[1:] for case in POSSIBLE)
    assert {a * b for a, b, _ in chosen} == {a * b for a, b, _ in POSSIBLE}
    assert len(chosen) < len(subset([(b, c, a * b) for a, b, c in POSSIBLE]))


def test_a_subset_may_hold_each_setting_alone():
    chosen = subset(POSSIBLE, together=1)
    assert len(chosen) == 4 and all(
        {*some} == {*every}
        for some, every in zip(zip(*chosen, strict=True), zip(*POSSIBLE, strict=True), strict=True)
    )


@grid_of("a, b, c", POSSIBLE)
def test_a_grid_of_possible_cases(a, b, c):
    assert b <= a and c in "xyz"


def test_the_whole_grid_is_an_option(pytester):
    pytester.makeconftest(
        "import pairwise\n"
        "def pytest_addoption(parser): parser.addoption('--full', action='store_true')\n"
        "def pytest_generate_tests(metafunc):\n"
        "    pairwise.parametrise(metafunc, metafunc.config.getoption('full'))\n"
    )
    pytester.makepyfile(
        "from pairwise import grid, grid_of\n"
        "@grid(a=range(2), b=range(2), c=range(2))\n"
        "def test_grid(a, b, c): pass\n"
        "@grid_of('a, b, c', [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])\n"
        "def test_grid_of(a, b, c): pass\n"
    )
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=8)
    pytester.runpytest("-p", "no:cacheprovider", "--full").assert_outcomes(passed=16)
