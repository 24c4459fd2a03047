"""The loss that a layer's error is expected to cause, beside the one that it causes."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from slab_kernels.compression.sensitivity import LayerSensitivity, Sensitivity
from slab_kernels.errors import ArchitectureError
from slab_kernels.models.blocks import find_blocks
from slab_kernels.models.streams import catch_stream
from slab_kernels.text.windows import Windows

TOKENS = tiny_models.tokens(96, 32)


def expected(model: nn.Module) -> dict[str, LayerSensitivity]:
    """What an error of each linear of the blocks is expected to cost, by full name."""
    path, blocks = find_blocks(model)
    dense, probes = copy.deepcopy(blocks), Windows.of(TOKENS)
    stream = catch_stream(model, blocks, probes, lambda i: dense[i], torch.device("cpu"))
    sensitivity = Sensitivity(model, probes, stream)
    found: dict[str, LayerSensitivity] = {}
    for index, block in enumerate(blocks):
        linears = {
            f"{path}.{index}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        found |= sensitivity.of_block(index, block, linears)
        with torch.no_grad():
            stream.advance(index, block)
    return found


@torch.no_grad()
def log_probabilities(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_it_is_the_divergence_that_is_measured(name):
    """Behind the last attention tokens do not meet any more, and only the draw of 3,072 tokens
    makes a difference. Before it a random model's attention adds up errors of many tokens."""
    model = tiny_models.model(name)
    dense, costs = log_probabilities(model), expected(model)
    assert len(costs) >= 8
    behind = ("1.self_attn.o_proj", "1.attention.dense", "1.mlp")
    for number, (layer, cost) in enumerate(costs.items()):
        linear = model.get_submodule(layer)
        generator = torch.Generator().manual_seed(number)
        error = 1e-3 * torch.randn(linear.weight.shape, generator=generator)
        weight = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight -= error
            changed = log_probabilities(model)
            linear.weight.copy_(weight)
        measured = float((dense.exp() * (dense - changed)).sum(-1).mean())
        low, high = (0.8, 1.25) if any(part in layer for part in behind) else (0.2, 2.5)
        assert low < cost.loss(error) / measured < high, layer
        assert cost.loss(2 * error) == pytest.approx(4 * cost.loss(error), rel=1e-5)
        assert cost.loss(torch.zeros_like(error)) == 0


def test_the_model_is_as_before():
    model = tiny_models.model().requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    before = log_probabilities(model)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    first = expected(model)
    assert torch.equal(log_probabilities(model), before)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert [n for n, p in model.named_parameters() if p.requires_grad] in (
        ["lm_head.weight"],
        ["model.embed_tokens.weight"],  # the same tensor, under its first name
    )
    assert all(p.grad is None for p in model.parameters())
    for name, again in expected(model).items():
        error = torch.ones(model.get_submodule(name).weight.shape)
        assert again.loss(error) == first[name].loss(error), "the drawn tokens are the same"


def test_a_linear_that_runs_without_gradients_is_refused():
    model = tiny_models.model()
    linear = model.model.layers[1].mlp.up_proj
    linear.forward = torch.no_grad()(linear.forward)
    with pytest.raises(
        ArchitectureError, match=r"layers.1.mlp.up_proj runs without .*skip='\*.up_proj'"
    ):
        expected(model)


def test_linears_that_no_token_reaches_are_no_fault():
    model = tiny_models.model()
    blocks, probes = find_blocks(model)[1], Windows.of(TOKENS)
    dense = copy.deepcopy(blocks)
    stream = catch_stream(model, blocks, probes, lambda i: dense[i], torch.device("cpu"))
    found = Sensitivity(model, probes, stream).of_block(0, blocks[0], {"idle": nn.Linear(4, 4)})
    assert found["idle"].loss(torch.ones(4, 4)) == 0


def test_an_expert_that_no_token_reaches_costs_nothing():
    cost = LayerSensitivity(tokens=8)
    assert cost.loss(torch.ones(4, 6)) == 0
    cost.add(torch.ones(2, 6), torch.ones(2, 4))
    assert cost.loss(torch.ones(4, 6)) == 2 * (4 * 6) ** 2 / (2 * 8)
