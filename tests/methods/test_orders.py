"""Orders of inputs: costs against a count by hand, and searches against all permutations."""

from __future__ import annotations

import itertools

import pytest
import torch

from slab_kernels.methods import LayerSettings
from slab_kernels.methods.solvers.masks import parse_pattern
from slab_kernels.methods.solvers.orders import (
    assign_groups,
    exchange,
    order_cost,
    pruning_cost,
)

PATTERNS = ("2:4", "1:4", "3:4", "4:8")


def by_hand(cost, order, keep, group):
    total = 0.0
    for row in cost.double():
        for start in range(0, len(order), group):
            taken = sorted(float(row[j]) for j in order[start : start + group])
            total += sum(taken[: group - keep])
    return total


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_order_costs_what_its_groups_prune(pattern):
    torch.manual_seed(0)
    cost, order, found = torch.rand(5, 16), torch.randperm(16), parse_pattern(pattern)
    wanted = by_hand(cost, order.tolist(), found.keep, found.group)
    assert order_cost(cost, order, found) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_round_of_assignment_raises_the_cost(pattern):
    torch.manual_seed(0)
    cost, found = torch.rand(40, 64) ** 4, parse_pattern(pattern)
    orders = [assign_groups(cost, found, rounds) for rounds in range(12)]
    assert all(sorted(order.tolist()) == list(range(64)) for order in orders)
    costs = [order_cost(cost, order, found) for order in orders]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))
    assert costs[-1] < 0.95 * costs[0]


def test_a_perfect_order_is_found():
    """Two inputs of each four cost nothing to prune, and are hidden among the others."""
    torch.manual_seed(0)
    costly = torch.rand(64) < 0.5
    costly[torch.randperm(64)[:32]] = True
    costly[costly.nonzero().flatten()[32:]] = False
    costly[(~costly).nonzero().flatten()[: 32 - int(costly.sum())]] = True
    cost = costly.float().expand(10, 64)
    pattern = parse_pattern("2:4")
    assert order_cost(cost, assign_groups(cost, pattern, 60), pattern) == 0


def test_more_groups_than_one_chunk(monkeypatch):
    monkeypatch.setattr("slab_kernels.methods.solvers.orders.CHUNK", 4)
    torch.manual_seed(0)
    cost, pattern = torch.rand(30, 96) ** 4, parse_pattern("2:4")
    order = assign_groups(cost, pattern, 30)
    assert sorted(order.tolist()) == list(range(96))
    assert order_cost(cost, order, pattern) < 0.95 * order_cost(cost, torch.arange(96), pattern)


@pytest.mark.parametrize("seed", range(8))
def test_no_exchange_of_two_pays_any_more(seed):
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed))
    found = exchange(table)
    rows = torch.arange(9)
    total = float(table[rows, found].sum())
    assert sorted(found.tolist()) == list(range(9))
    for a, b in itertools.combinations(range(9), 2):
        other = found.clone()
        other[[a, b]] = found[[b, a]]
        assert float(table[rows, other].sum()) >= total - 1e-4


def test_pruning_costs_the_square_where_pruned_weights_are_zero():
    """Inputs that do not correlate: the rest of an error cannot be taken over by other columns."""
    W, energy = torch.tensor([[1.0, -2.0, 3.0, 0.5]]), torch.tensor([1.0, 4.0, 1.0, 2.0])
    config = LayerSettings(method="sparsegpt").config((1, 4))
    damping = 0.001 * energy.mean() + 0.01 * energy
    cost = pruning_cost(W, torch.diag(energy), config)
    torch.testing.assert_close(cost, W.square() * (energy + damping))


def test_a_weight_on_a_level_costs_nothing_and_an_integer_is_not_exact():
    torch.manual_seed(0)
    magnitude = (1 + torch.rand(16, 1)) * (1 + torch.rand(32))
    far = torch.rand(16, 8, 4).argsort(-1).flatten(1) < 2  # two of each four, of ten times the size
    W = magnitude * torch.where(far, 10.0, 1.0) * torch.where(torch.rand(16, 32) < 0.5, -1.0, 1.0)
    cost = pruning_cost(W, torch.eye(32), LayerSettings(values="fp16").config((16, 32)))
    assert float(cost[~far].max()) < 1e-4 < 1 < float(cost[far].min())
    rounded = LayerSettings(values="int4", group_size=32).config((16, 32))
    assert float(pruning_cost(W, torch.eye(32), rounded)[~far].max()) < 0
