"""`Experts` against transformers' own module with the same stacked weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)

from slab_kernels.models.experts import is_stacked, restack, unstack
from slab_kernels.nn.experts import Experts

SIZES = {"intermediate_size": 24, "num_local_experts": 5}
KINDS = {  # gated, with a gate of its own that clamps, without a gate; then transposed: with biases
    # and gate and up in turns, with biases alone, and without
    "mixtral": (MixtralExperts, SIZES),
    "deepseek_v4": (DeepseekV4Experts, {"moe_intermediate_size": 24, "n_routed_experts": 5}),
    "nemotron_h": (NemotronHExperts, {"moe_intermediate_size": 24, "n_routed_experts": 5}),
    "gpt_oss": (GptOssExperts, SIZES),
    "openai_privacy_filter": (OpenAIPrivacyFilterExperts, SIZES),
    "aria_text": (
        AriaExperts,
        {"intermediate_size": 24, "moe_num_experts": 5, "num_attention_heads": 4},
    ),
}


def both(name: str) -> tuple[nn.Module, Experts]:
    """transformers' module in fp64, and the same experts taken apart."""
    kind, sizes = KINDS[name]
    config = AutoConfig.for_model(name, hidden_size=40, **sizes)
    config._experts_implementation = "eager"
    stacked = kind(config).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.copy_(torch.randn_like(parameter))
    holder = nn.Module()
    holder.experts = copy.deepcopy(stacked)
    unstack(holder, "experts")
    return stacked, holder.experts


def routed(tokens: int, slots: int, allowed: list[int]) -> tuple[torch.Tensor, ...]:
    """Hidden states, the experts of each token, all different, and their weights."""
    torch.manual_seed(tokens)
    scores = torch.full((tokens, 5), -1.0).scatter_(1, torch.tensor([allowed] * tokens), 0.0)
    index = (scores + torch.rand(tokens, 5) / 2).topk(slots).indices
    return torch.randn(tokens, 40).double(), index, torch.rand(tokens, slots).double()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("tokens", "slots", "allowed"),
    [(1, 1, [3]), (1, 5, [0, 1, 2, 3, 4]), (37, 2, [0, 1, 2, 3, 4]), (16, 1, [4]), (9, 2, [0, 3])],
)
def test_the_same_numbers_and_gradients_as_stacked(name, tokens, slots, allowed):
    stacked, apart = both(name)
    x, index, weights = routed(tokens, slots, allowed)
    results = []
    for module in (stacked, apart):
        given = [t.clone().requires_grad_() for t in (x, weights)]
        out = module(given[0], index, given[1])
        out.square().sum().backward()
        results.append((out.detach(), given[0].grad, given[1].grad))
    # One of them computes in fp32 whatever it is given.
    bound = 1e-4 if name == "openai_privacy_filter" else 1e-10
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound * float(want.abs().max()))


def test_linears_are_views_of_the_stacks_in_the_order_of_their_rows():
    stacked, apart = both("mixtral")
    for number in range(5):
        expert = apart.expert(number)
        gate, up = stacked.gate_up_proj[number].chunk(2)
        assert torch.equal(expert.gate_proj.weight, gate) and torch.equal(expert.up_proj.weight, up)
        assert torch.equal(expert.down_proj.weight, stacked.down_proj[number])
    pointers = {p.untyped_storage().data_ptr() for p in apart.parameters()}
    assert len(pointers) == 2  # nothing was copied


@pytest.mark.parametrize(
    ("name", "gate", "up"),
    [
        ("gpt_oss", slice(0, None, 2), slice(1, None, 2)),
        ("openai_privacy_filter", slice(24), slice(24, None)),
    ],
)
@pytest.mark.parametrize("said", [True, False])
def test_linears_of_transposed_stacks_with_biases(name, gate, up, said):
    """said: whether transformers says that gate and up take turns; 5.0 does not."""
    stacked, _ = both(name)
    holder = nn.Module()
    holder.experts = copy.deepcopy(stacked)
    if not said:
        del holder.experts.is_concatenated
    unstack(holder, "experts")
    for number in range(5):
        expert = holder.experts.expert(number)
        for leaf, columns in (("gate_proj", gate), ("up_proj", up)):
            linear = expert.get_submodule(leaf)
            assert torch.equal(linear.weight, stacked.gate_up_proj[number][:, columns].T)
            assert torch.equal(linear.bias, stacked.gate_up_proj_bias[number][columns])
            assert linear.bias.untyped_storage().nbytes() == linear.bias.nbytes  # saved by itself
        assert torch.equal(expert.down_proj.weight, stacked.down_proj[number].T)
        assert torch.equal(expert.down_proj.bias, stacked.down_proj_bias[number])
    pointers = {
        m.weight.untyped_storage().data_ptr() for m in holder.modules() if isinstance(m, nn.Linear)
    }
    assert len(pointers) == 2  # no weight was copied
    restack(holder, "experts")
    for key, value in stacked.state_dict().items():
        assert torch.equal(holder.experts.get_parameter(key), value), key


def test_a_gate_that_does_not_tell_its_halves_apart_is_not_taken():
    stacked, _ = both("gpt_oss")
    del stacked.is_concatenated
    with torch.device("meta"):  # as transformers opens a model
        assert is_stacked(stacked)
    stacked._apply_gate = lambda both: both.sum(-1, keepdim=True).expand(-1, both.shape[-1] // 2)
    assert not is_stacked(stacked)


def test_no_token_gives_no_output():
    _, apart = both("mixtral")
    out = apart(torch.zeros(0, 40).double(), torch.zeros(0, 2).long(), torch.zeros(0, 2).double())
    assert out.shape == (0, 40)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("fed", [{0}, {1, 4}, {0, 1, 2, 3, 4}])
def test_fed_experts_show_all_tokens_and_change_no_bit(fed, name):
    _, apart = both(name)
    x, index, weights = routed(23, 2, [0, 1, 3, 4])  # nobody asks for expert 2
    want, seen = apart(x, index, weights), {}
    for name, module in apart.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
            )
    apart.fed = frozenset(fed)
    assert torch.equal(apart(x, index, weights), want)
    for number in range(5):
        reads = seen.get(f"{number}.gate_proj", [])
        rows = x if number in fed else x[(index == number).any(-1)]
        if not len(rows):
            assert not reads
            continue
        assert len(reads) == 1 and torch.equal(reads[0], rows)
        assert len(seen[f"{number}.down_proj"]) == 1
        assert len(seen[f"{number}.down_proj"][0]) == len(rows)


@pytest.mark.parametrize("name", ["deepseek_v4", "gpt_oss"])
def test_a_copy_and_a_pickle_compute_the_same(name):
    _, apart = both(name)
    x, index, weights = routed(7, 2, [0, 1, 2, 3, 4])
    for other in (copy.deepcopy(apart), pickle.loads(pickle.dumps(apart))):
        assert torch.equal(other(x, index, weights), apart(x, index, weights))


def test_other_experts_are_not_taken_for_stacked_ones():
    stacked, apart = both("mixtral")
    assert is_stacked(stacked) and not is_stacked(apart)
    for change in ({"is_transposed": True}, {"has_bias": True}, {"has_post_expert_norm": True}):
        other = copy.deepcopy(stacked)
        vars(other).update(change)
        assert not is_stacked(other)
    for kind, stack, shape in (
        ("mixtral", "down_proj", (5, 40, 23)),
        ("gpt_oss", "down_proj", (5, 40, 24)),
        ("gpt_oss", "down_proj_bias", (5, 24)),
        ("gpt_oss", "gate_up_proj_bias", (5, 24)),
        ("gpt_oss", "gate_up_proj_scale", (5, 48)),
    ):
        other = both(kind)[0]
        assert is_stacked(other)
        setattr(other, stack, nn.Parameter(torch.zeros(*shape)))
        assert not is_stacked(other)
    assert not is_stacked(nn.Linear(4, 4))
