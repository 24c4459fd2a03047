"""One budget of stored bits for a whole model, spent layer by layer where the measured loss says it helps most.

SLaB's authors name adaptive rank as future work (arXiv 2604.04493); here value type, sign planes and rank are chosen together:
1. With the dense model's own inputs every layer is decomposed by each row of LADDER (the sweep alone, without refits: the order
   of the rows is what counts) and its relative output error e is noted.
2. The layer's weight is replaced by its coarsest row, everything else dense, and the divergence of the model's next-token
   distribution from the dense one, D = KL in nats a token, is measured. Near the dense model D grows with e^2, so each row
   is expected to cost D (e / e_coarsest)^2, and layers to add up.
3. The sum is minimised under the budget: every layer climbs its rows in order of loss saved per bit.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import BudgetError
from ..methods.inputs import InputStats
from ..models.blocks import batch_size, find_blocks
from ..models.groups import find_groups, layer_inputs
from ..models.streams import catch_stream
from ..settings import Rule
from .plan import Plan

PROBES = 8  # windows on which the divergence is measured
# Coarse to fine. Below two planes a bit is better spent on the pruned positions than on kept values (README, methods); ranks
# above 1 pay for themselves only on wide layers, where U and V are cheap, and the search finds out which.
LADDER: tuple[dict, ...] = (
    {"values": "int3", "planes": 1, "rank": 1},
    {"values": "int4", "planes": 1, "rank": 1},
    {"values": "int3", "planes": 2, "rank": 1},
    {"values": "int3", "planes": 2, "rank": 4},
    {"values": "int4", "planes": 2, "rank": 1},
    {"values": "int4", "planes": 2, "rank": 4},
    {"values": "int4", "planes": 3, "rank": 1},
    {"values": "int4", "planes": 3, "rank": 4},
    {"values": "int8", "planes": 2, "rank": 4},
    {"values": "int8", "planes": 3, "rank": 4},
    {"values": "fp16", "planes": 2, "rank": 4},
    {"values": "fp16", "planes": 3, "rank": 4},
)


@dataclass(frozen=True)
class Choice:
    """A row of LADDER for one layer: its settings, stored bits in all, and the loss that is expected of it."""

    settings: dict
    bits: float
    loss: float


BITS = Rule("stored bits a weight over the whole model", float, 0, above=True)


def check_bits(bits: float, plan: Plan) -> float:
    """`bits`; refuses what is no budget, and one beside settings that it chooses itself.

    Raises: BudgetError.
    """
    bits = BITS.accept("bits", bits, BudgetError)
    if plan.method != "slab" or not plan.packed:
        raise BudgetError(
            f"bits={bits:g} chooses among the packed forms of method 'slab', not of {plan.method!r} with pattern {plan.pattern!r}"
        )
    for name, usual in (("values", "fp16"), ("planes", 1), ("rank", 1), ("adapter_rank", None)):
        if getattr(plan, name) != usual:
            raise BudgetError(
                f"bits={bits:g} chooses {name} layer by layer, so {name}={getattr(plan, name)!r} contradicts it; leave one out"
            )
    return bits


def search(
    open_model: Callable[[], nn.Module],
    shapes: dict[str, tuple[int, int]],
    plan: Plan,
    bits: float,
    tokens: Tensor,
    device: torch.device,
    known: dict[str, list[float]],
    note: Callable[[str, list[float]], None] = lambda name, losses: None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, dict]:
    """Module name -> settings of `Plan.layer`, at most `bits` stored bits a weight over all of them.

    Args:
        open_model: gives the dense model, in memory on `device`; not called where `known` holds every layer.
        shapes: module name -> (N, K) of the linears to compress.
        plan: method, pattern and group size that all layers share.
        tokens: [samples, window] int64, calibration text.
        known, note: module name -> the expected loss of each of its rows, from an interrupted search and for the next.

    Raises: BudgetError naming the range if `bits` is outside of what the rows reach.
    """
    rows = {
        name: [
            (row, replace(plan, **row).layout(shape).bits_per_weight() * math.prod(shape))
            for row in LADDER
            if row["rank"] <= min(shape)
        ]
        for name, shape in shapes.items()
    }
    total = sum(map(math.prod, shapes.values()))
    least = sum(min(cost for _, cost in options) for options in rows.values()) / total
    most = sum(max(cost for _, cost in options) for options in rows.values()) / total
    if not least <= bits:
        raise BudgetError(
            f"bits={bits:g} is below what this model's layers reach: {least:.3f} to {most:.3f} stored bits per weight"
        )
    if bits > most:
        raise BudgetError(
            f"bits={bits:g} is above what this model's layers reach: {least:.3f} to {most:.3f} stored bits per weight; "
            "give values, planes and rank yourself"
        )
    losses = {name: known[name] for name in shapes if len(known.get(name, ())) == len(rows[name])}
    if len(losses) < len(shapes):
        for name, found in _measure(open_model(), shapes, plan, rows, tokens, device, losses):
            losses[name] = found
            note(name, found)
            say(f"budget: {name} {found[0]:.2e} nats a token at its coarsest")
    choices = {
        name: [
            Choice(row, cost, loss)
            for (row, cost), loss in zip(rows[name], losses[name], strict=True)
        ]
        for name in shapes
    }
    chosen = spend(choices, bits * total)
    return {name: choice.settings for name, choice in chosen.items()}


def _measure(
    model: nn.Module,
    shapes: dict,
    plan: Plan,
    rows: dict,
    tokens: Tensor,
    device: torch.device,
    known: dict[str, list[float]],
) -> Iterator[tuple[str, list[float]]]:
    """Steps 1 and 2 for every layer that `known` lacks: its name, and its rows' expected losses."""
    path, blocks = find_blocks(model)
    probes = tokens[: max(1, min(PROBES, len(tokens)))].to(device)
    dense = _log_probabilities(model, probes)
    stream = catch_stream(model, blocks, tokens, lambda index: _bare(blocks[index]), device)
    for index, block in enumerate(blocks):
        prefix = f"{path}.{index}."
        linears = {
            n: block.get_submodule(n.removeprefix(prefix)) for n in shapes if n.startswith(prefix)
        }
        if linears.keys() - known.keys():
            for group in find_groups(stream, index, block, linears):
                first = linears[group.names[0]]
                stats = InputStats(first.in_features)
                for batch in range(len(stream.hidden)):
                    stats.update(layer_inputs(stream, index, block, first, group, batch))
                for name in group.names:
                    if name not in known:
                        yield (
                            name,
                            _layer(model, linears[name], plan, rows[name], stats, probes, dense),
                        )
        with torch.no_grad():
            stream.advance(index, block)


def _bare(block: nn.Module) -> nn.Module:
    """The same block with its own forward, while `catch_stream` has put another in its place."""
    other = copy.copy(block)
    other.__dict__ = {name: value for name, value in block.__dict__.items() if name != "forward"}
    return other


def spend(choices: dict[str, list[Choice]], budget: float) -> dict[str, Choice]:
    """The row of every layer: greedy along each layer's lower convex hull of loss over bits, the best step first.

    On hulls this is the optimum of the relaxed problem up to the last step that no longer fits; steps that do not fit are
    skipped, so that cheaper ones can still use what is left. At equal bits no uniform row has a smaller expected loss: each of
    them that fits is compared, and taken if it does.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].bits for hull in hulls.values())
    steps = []
    for name, hull in hulls.items():
        for i in range(1, len(hull)):
            gain = (hull[i - 1].loss - hull[i].loss) / (hull[i].bits - hull[i - 1].bits)
            steps.append((-gain, name, i))
    for _, name, i in sorted(steps):
        extra = hulls[name][i].bits - hulls[name][at[name]].bits
        if at[name] < i and spent + extra <= budget:
            at[name], spent = i, spent + extra
    best = {name: hulls[name][i] for name, i in at.items()}
    for row in LADDER:
        uniform = {
            name: next((c for c in options if c.settings == row), None)
            for name, options in choices.items()
        }
        if all(uniform.values()) and sum(c.bits for c in uniform.values()) <= budget:
            best = min(best, uniform, key=lambda rows: sum(c.loss for c in rows.values()))
    return best


def _hull(options: list[Choice]) -> list[Choice]:
    """The rows on the lower convex hull of (bits, loss), cheapest first."""
    hull: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.bits, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and (hull[-2].loss - hull[-1].loss) * (choice.bits - hull[-1].bits) <= (
            hull[-1].loss - choice.loss
        ) * (hull[-1].bits - hull[-2].bits):
            hull.pop()
        hull.append(choice)
    return hull


def _layer(
    model, linear, plan: Plan, rows, stats: InputStats, probes: Tensor, dense: Tensor
) -> list[float]:
    """Steps 1 and 2 for one layer: the expected loss of each row."""
    weight = linear.weight.detach()
    W = weight.float()
    errors, coarsest = [], None
    for row, _ in rows:
        quick = replace(plan, options={**plan.options, "rounds": 0, "drift": 0.0}, **row)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            approximation = quick.decompose(W, stats).dense()
        E = W - approximation
        errors.append(float(((E @ stats.gram) * E).sum(dtype=torch.float64).clamp_min(0)))
        if errors[-1] == max(errors):
            coarsest = approximation
    try:
        linear.weight = nn.Parameter(coarsest.to(weight.dtype), requires_grad=False)
        loss = _divergence(model, probes, dense)
    finally:
        linear.weight = nn.Parameter(weight, requires_grad=False)
    whole = max(max(errors), 1e-30)
    return [loss * error / whole for error in errors]


@torch.no_grad()
def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """[samples, window, vocabulary] fp16 in host memory: 2 bytes each."""
    parts = [
        model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1).half().cpu()
        for batch in tokens.split(batch_size(tokens.shape[1]))
    ]
    return torch.cat(parts)


@torch.no_grad()
def _divergence(model: nn.Module, tokens: Tensor, dense: Tensor) -> float:
    """Mean over tokens of KL(dense || model), nats."""
    total, start = 0.0, 0
    for batch in tokens.split(batch_size(tokens.shape[1])):
        now = model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        before = dense[start : start + len(batch)].to(now.device).float()
        total += float((before.exp() * (before - now)).sum(dtype=torch.float64))
        start += len(batch)
    return max(total / tokens.numel(), 0.0)
