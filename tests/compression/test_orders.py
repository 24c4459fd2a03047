"""Channels in new orders: the model's function stays, and groups of four get cheaper."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import slab_kernels
from slab_kernels.compression import orders as search
from slab_kernels.compression import run
from slab_kernels.compression.job import Job
from slab_kernels.compression.orders import find_orders
from slab_kernels.compression.plan import Plan
from slab_kernels.errors import ArgumentError, CheckpointError
from slab_kernels.methods import LayerSettings
from slab_kernels.methods.solvers.orders import pruning_cost
from slab_kernels.models.packed import packed_modules
from slab_kernels.models.source import open_source

INT4 = {"values": "int4", "planes": 2, "group_size": 32}
CPU = torch.device("cpu")


def orders(model, **settings):
    """The moves for a dense model, and the sentences about what keeps its order."""
    job = Job.of(open_source(model), Plan(LayerSettings(**settings)), (), CPU)
    said: list[str] = []
    return find_orders(job, tiny_models.tokens(), said.append), said


def moved(model, moves):
    """The same module with its parameters moved."""
    source = open_source(model).in_orders(moves)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.get(name))
    return model


MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("granite", {}),
]


@pytest.mark.parametrize(("name", "changes"), MODELS, ids=lambda value: str(value)[:40])
def test_the_dense_model_computes_the_same(name, changes):
    model, ids = tiny_models.model(name, **changes), tiny_models.tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        moves, said = orders(model, **INT4)
        assert not said
        # An order touches the embedding, the norms, and the seven linears of every block.
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= moves.keys()
        assert sum(name.endswith("_proj.weight") for name in moves) == 14
        after = moved(model, moves)(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_every_set_of_channels_is_ordered_by_what_its_own_readers_lose():
    """Costs of the same weights from plain forwards: two query heads read each value head."""
    model, ids = tiny_models.model("llama"), tiny_models.tokens()
    settings = LayerSettings(**INT4)
    job = Job.of(open_source(model), Plan(settings), (), CPU)
    asked = {}

    def choose(channels, cost):
        asked[channels.name] = cost
        return torch.arange(channels.size)

    find_orders(job, ids, lambda sentence: None, choose)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, a, n=name: inputs.update({n: a[0]}))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)

    def shares(name):
        """[N,K]: what pruning a weight of this linear costs, as a share of its output."""
        W, x = model.get_submodule(name).weight.detach(), inputs[name].detach().flatten(0, -2)
        gram = x.T @ x
        return pruning_cost(W, gram, settings.config(tuple(W.shape))) / (x @ W.T).square().sum()

    for index in range(2):
        block = f"model.layers.{index}"
        o, down = shares(f"{block}.self_attn.o_proj"), shares(f"{block}.mlp.down_proj")
        torch.testing.assert_close(asked[f"{block}.mlp"], down, rtol=1e-3, atol=1e-6)
        for head in range(2):
            first = 16 * head
            right = torch.cat([o[:, first : first + 8], o[:, first + 8 : first + 16]])
            found = asked[f"{block}.self_attn, value head {head}"]
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-6)
    readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
               "mlp.up_proj")  # fmt: skip
    every = [shares(f"model.layers.{i}.{name}") for i in range(2) for name in readers]
    found, right = asked["the residual stream"].sum(0), torch.cat(every).sum(0)
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-6)


UNKNOWN = [("phi3", "no module with the linears"), ("opt", "no module"), ("gpt_neox", "no module")]


@pytest.mark.parametrize(("name", "why"), UNKNOWN)
def test_what_is_not_known_keeps_its_order_and_that_is_said(name, why):
    moves, said = orders(tiny_models.model(name), **INT4)
    assert not moves
    assert said and all("keep their order" in sentence for sentence in said)
    assert any(why in sentence for sentence in said)


def test_a_block_that_computes_otherwise_keeps_the_order_that_matters_to_it():
    """Names alone are not believed: here a block weighs its hidden channels by their places."""
    model = tiny_models.model("llama")

    class Weighed(torch.nn.Module):
        def forward(self, x):
            return x * torch.linspace(0, 2, x.shape[-1])

    for block in model.model.layers:
        block.mlp.act_fn = Weighed()
    moves, said = orders(model, **INT4)
    assert len(said) == 1 and "hidden channels of MLPs keep their order" in said[0]
    assert sum(name.endswith("o_proj.weight") for name in moves) == 2
    assert "model.embed_tokens.weight" in moves


def test_a_folder_opens_everywhere_and_costs_as_many_bits(tmp_path):
    from transformers import AutoModelForCausalLM

    ids = tiny_models.tokens()
    tiny_models.write(tmp_path / "dense")
    settings = {"calibration": ids, "progress": False, "method": "slab", "values": "fp16"}
    plain = slab_kernels.compress(tmp_path / "dense", tmp_path / "plain", **settings)
    record = slab_kernels.compress(tmp_path / "dense", tmp_path / "out", permute=True, **settings)
    assert record.bits_per_weight == plain.bits_per_weight
    assert record.settings["permute"] is True
    with torch.no_grad():
        loaded = slab_kernels.load(tmp_path / "out", device="cpu")(input_ids=ids).logits
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(input_ids=ids).logits
    torch.testing.assert_close(opened, loaded)
    # In another order than its readers expect, every channel would be noise.
    assert (loaded - dense).norm() < 0.7 * dense.norm()
    again = slab_kernels.compress(
        tmp_path / "dense", tmp_path / "out", permute=True, resume=True, **settings
    )
    assert again == record


def test_a_model_in_memory_becomes_what_a_folder_does(tmp_path):
    ids = tiny_models.tokens()
    changes = {"attention_bias": True, "tie_word_embeddings": False}
    tiny_models.write(tmp_path / "dense", **changes)
    settings = {"calibration": ids, "progress": False, "permute": True, "device": "cpu"}
    slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **settings)
    model = slab_kernels.compress(tmp_path / "dense", **settings)
    with torch.no_grad():
        from_folder = slab_kernels.load(tmp_path / "out", device="cpu")(input_ids=ids).logits
        in_memory = model(input_ids=ids).logits
    torch.testing.assert_close(in_memory, from_folder)


@pytest.mark.parametrize("road", ["folder", "in memory"])
def test_a_budget_is_measured_in_the_orders_in_which_it_is_spent(road, tmp_path, monkeypatch):
    ids, measured = tiny_models.tokens(), []
    dense = tiny_models.write(tmp_path / "dense")
    search = run.BudgetSearch

    def watched(open_model, *rest):
        measured.append(open_model())
        return search(open_model, *rest)

    monkeypatch.setattr(run, "BudgetSearch", watched)
    given = dense if road == "in memory" else tmp_path / "dense"
    weights = {name: p.detach().clone() for name, p in dense.named_parameters()}
    slab_kernels.compress(
        given, tmp_path / "out", bits=5.5, permute=True, calibration=ids, progress=False, rounds=0
    )
    (model,), stored = measured, slab_kernels.load(tmp_path / "out")
    assert all(torch.equal(p, weights[name]) for name, p in dense.named_parameters())
    with torch.no_grad():
        logits = [m(input_ids=ids).logits for m in (model, dense)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), stored.get_parameter(name))
        assert not torch.equal(model.get_parameter(name), weights[name])
    for name, packed in packed_modules(stored).items():
        weight = model.get_parameter(f"{name}.weight").detach()
        apart = float((packed.packed().dense() - weight).norm() / weight.norm())
        assert apart < 0.6, "rows or inputs in another order would be as far as 1.4"


def test_a_run_goes_on_with_the_orders_of_its_finished_blocks_alone(tmp_path, monkeypatch):
    """Another number of threads may round so that other orders are found."""
    tiny_models.write(tmp_path / "dense")
    settings = {"calibration": tiny_models.tokens(), "method": "magnitude", "permute": True}

    class Killed(BaseException):
        pass

    def kill(event):
        if event.kind == "block":
            raise Killed

    with pytest.raises(Killed):
        slab_kernels.compress(tmp_path / "dense", tmp_path / "out", progress=kill, **settings)
    again = settings | {"progress": False, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr("slab_kernels.compression.orders.ROUNDS", 0)
        with pytest.raises(CheckpointError, match="cannot resume .* orders of channels"):
            slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **again)
    slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **again)


@pytest.mark.parametrize("permute", [1, "yes", None])
def test_permute_is_yes_or_no(permute, tmp_path):
    with pytest.raises(ArgumentError, match="permute=.* must be True or False"):
        slab_kernels.compress(tiny_models.model(), permute=permute, calibration="stdlib")


def test_a_pattern_without_groups_has_no_orders():
    with pytest.raises(ArgumentError, match="share a group, and pattern='50%' has no groups"):
        slab_kernels.compress(
            tiny_models.model(), permute=True, pattern="50%", method="wanda", calibration="stdlib"
        )


def test_no_gram_matrix_is_gathered_of_linears_whose_inputs_keep_their_order(monkeypatch):
    """A mixture's channels keep their order, so nothing is read; of Llama all linears are."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny_models.CONFIGS, "mixtral", tiny_models._GATED | changes)
    read, real = [], search.inputs_by_name
    monkeypatch.setattr(search, "inputs_by_name", lambda *a: read.append(len(a[3])) or real(*a))
    for name, linears in (("mixtral", set()), ("llama", {7})):
        read.clear()
        said = orders(tiny_models.model(name), method="magnitude")[1]
        assert set(read) == linears and bool(said) == (name == "mixtral")
