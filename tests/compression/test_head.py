"""The output head: what it is fitted to, in pieces and whole, interrupted, and refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import tiny_models
import torch
from torch import nn

import slab_kernels
from slab_kernels.cli import main as cli
from slab_kernels.compression import head as head_of
from slab_kernels.compression import job as job_of
from slab_kernels.compression import presets
from slab_kernels.compression.arguments import Arguments
from slab_kernels.compression.job import Job
from slab_kernels.compression.outside import readable
from slab_kernels.compression.plan import Plan
from slab_kernels.compression.statistics import GroupInputs
from slab_kernels.compression.vocabulary import Wanted
from slab_kernels.errors import ArchitectureError, ArgumentError, ShapeError
from slab_kernels.methods import LayerSettings
from slab_kernels.methods.inputs import InputStats
from slab_kernels.models.source import open_source
from slab_kernels.models.totals import read_totals
from slab_kernels.text.windows import Windows

IDS = tiny_models.tokens()
FITTED = torch.arange(len(IDS)) % 8 != 7 if len(IDS) > 7 else torch.arange(len(IDS)) < len(IDS) - 1
QUICK = {"values": "int4", "group_size": 32, "rounds": 1, "calibration": IDS, "progress": False}


def gram(x: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "opt", "stablelm"])
def test_the_head_is_fitted_to_what_it_reads_behind_the_compressed_blocks(name, monkeypatch):
    """Its Gram matrix is that of the head's inputs in the finished model, norm and all."""
    seen = {}
    solve = head_of.solve

    def see(weight, inputs, settings):
        seen["gram"], seen["heldout"] = inputs.stats.gram, inputs.heldout.gram
        seen["held_back"] = inputs.stats.held_back
        return solve(weight, inputs, settings)

    monkeypatch.setattr(head_of, "solve", see)
    monkeypatch.setattr(job_of, "native_products", lambda device: None)  # all products in fp32
    model = tiny_models.model(name)
    slab_kernels.compress(model, head=True, embeddings="int8", heldout=IDS[:2], **QUICK)
    inputs = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    fitted, held_back = IDS[FITTED], IDS[~FITTED]
    for text, found in (
        (fitted, seen["gram"]),
        (held_back, seen["held_back"]),
        (IDS[:2], seen["heldout"]),
    ):
        inputs.clear()
        with torch.no_grad():
            model(input_ids=text, use_cache=False)
        torch.testing.assert_close(found.double(), gram(inputs[0]), atol=1e-4, rtol=1e-4)


def test_the_record_has_the_head_s_true_error(tmp_path, monkeypatch):
    monkeypatch.setattr(job_of, "native_products", lambda device: None)  # all products in fp32
    tiny_models.write(tmp_path / "dense", tie_word_embeddings=True)
    asked = QUICK | {"head": True, "embeddings": "dense"}
    record = slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **asked)
    layer = record.layers[-1]
    assert (layer.name, layer.block, layer.shape) == ("lm_head", 2, (96, 32))
    assert layer.group_size == 32
    dense = sum(p.numel() for p in tiny_models.model(tie_word_embeddings=True).parameters())
    assert read_totals(tmp_path / "out").parameters == dense, "a tied matrix counts once"
    model = slab_kernels.load(tmp_path / "out")
    slab_kernels.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "by transformers")
    for again in ("saved", "by transformers"):
        assert read_totals(tmp_path / again) == read_totals(tmp_path / "out")
    inputs = []
    model.lm_head.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        for text, error in ((IDS[FITTED], layer.error), (IDS[~FITTED], layer.heldout_error)):
            inputs.clear()
            found = model(input_ids=text, use_cache=False).logits
            right = inputs[0] @ model.model.embed_tokens.weight.T
            assert float((found - right).norm() / right.norm()) == pytest.approx(error, rel=1e-3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind, count", [("block", 1), ("block", 2), ("layer", 15)])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, kind, count):
    tiny_models.write(tmp_path / "dense")
    asked = QUICK | {"head": True, "embeddings": "int8", "heldout": IDS[:2]}
    slab_kernels.compress(tmp_path / "dense", tmp_path / "whole", **asked)
    seen = []

    def kill(event):
        seen.append(event.kind)
        if event.kind == kind and seen.count(kind) == count:
            raise Killed

    with pytest.raises(Killed):
        slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **asked | {"progress": kill})
    slab_kernels.compress(tmp_path / "dense", tmp_path / "out", resume=True, **asked)
    files = {p.name for p in (tmp_path / "whole").iterdir()}
    assert files == {p.name for p in (tmp_path / "out").iterdir()}
    for name in files - {"slab_run.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("method", ["slab", "sparsegpt", "slab-paper"])
def test_rows_in_pieces_make_one_weight_that_is_hardly_worse(method, monkeypatch):
    torch.manual_seed(0)
    weight, x = torch.randn(160, 64), torch.randn(400, 64) @ torch.randn(64, 64)
    inputs = GroupInputs(InputStats.from_inputs(x), None, torch.randn(64, 64) * 0.01, 0.0)
    settings = LayerSettings(method=method, values="int4", group_size=32)
    whole = head_of.solve(weight, inputs, settings)
    monkeypatch.setattr(head_of, "WEIGHTS_AT_ONCE", 48 * 64)
    pieces = head_of.solve(weight, inputs, settings)
    assert pieces.packed.layout == whole.packed.layout
    right = ((x @ (weight - pieces.packed.dense()).T).norm() / (x @ weight.T).norm()).item()
    found = [(s.errors[0] / s.outputs[0]) ** 0.5 for s in (whole, pieces)]
    assert found[1] == pytest.approx(right, rel=1e-3)
    assert found[1] <= found[0] * 1.1
    if method != "slab":
        assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_pieces_share_a_v_that_suits_rows_throughout_the_vocabulary(monkeypatch):
    """Frequent tokens, which come first, have other columns large than rare ones."""
    torch.manual_seed(0)
    of_frequent, of_rare = (torch.logspace(-0.5, 0.5, 64)[torch.randperm(64)] for _ in range(2))
    frequent = torch.arange(160)[:, None] < 48
    weight = (0.5 + torch.rand(160, 64)) * torch.randn(160, 64).sign()
    weight = weight * torch.where(frequent, of_frequent, of_rare)
    inputs = GroupInputs(InputStats.from_inputs(torch.randn(400, 64)), None, None, 0.0)
    settings = LayerSettings(values="int4", group_size=32)
    errors = []
    for at_once in (160 * 64, 48 * 64):
        monkeypatch.setattr(head_of, "WEIGHTS_AT_ONCE", at_once)
        solved = head_of.solve(weight, inputs, settings)
        errors.append(float((weight - solved.packed.dense()).norm() / weight.norm()))
    assert errors[1] <= errors[0] * 1.2, errors


def test_several_planes_and_ranks_in_pieces(monkeypatch):
    torch.manual_seed(0)
    weight, x = torch.randn(100, 48), torch.randn(300, 48)
    inputs = GroupInputs(InputStats.from_inputs(x), None, None, 0.0)
    monkeypatch.setattr(head_of, "WEIGHTS_AT_ONCE", 48 * 48)
    for settings in (LayerSettings(rank=2), LayerSettings(planes=2, values="int4", group_size=32)):
        packed = head_of.solve(weight, inputs, settings).packed
        assert packed.layout == settings.layout((100, 48))


# What cannot be had.


def test_bad_arguments_are_one_sentence():
    with pytest.raises(ArgumentError, match="embeddings='int4' is unknown"):
        Arguments.of(embeddings="int4")
    with pytest.raises(ArgumentError, match="head=3"):
        Arguments.of(head=3)
    for asked in ({"head": True}, {"embeddings": "int8"}):
        with pytest.raises(ArgumentError, match=r"stores the pattern 2:4 alone and not '50%'"):
            Arguments.of(pattern="50%", **asked)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


class Wide(nn.Linear):
    pass


def scaled_embedding(model):
    old = model.model.embed_tokens
    model.model.embed_tokens = Scaled(old.num_embeddings, old.embedding_dim)


def foreign_head(model):
    model.lm_head = Wide(32, 96, bias=False)


def without_head(model):
    model.get_output_embeddings = lambda: None


def shared_with_more(model):
    model.all_tied_weights_keys = {"model.norm.weight": "model.embed_tokens.weight"}


def one_module(model):
    model.model.second = model.model.embed_tokens


REFUSALS = {
    "scaled embedding": (scaled_embedding, {"embeddings": "int8"}, "embed_tokens is a Scaled"),
    "head of another class": (foreign_head, {"head": True}, "lm_head of .* is a Wide"),
    "no head": (without_head, {"head": True}, "has no output head"),
    "shared with more": (shared_with_more, {"embeddings": "int8"}, "norm.weight .* one tensor"),
    "one module, two names": (one_module, {"embeddings": "int8"}, "are one module"),
}


@pytest.mark.parametrize("change, asked, words", REFUSALS.values(), ids=REFUSALS)
def test_a_model_that_cannot_have_it_is_refused_unless_it_was_not_asked_for(change, asked, words):
    model = tiny_models.model(tie_word_embeddings=False)
    source = open_source(model)
    change(source.model)
    plan, device = Plan(), torch.device("cpu")
    with pytest.raises(ArchitectureError, match=words):
        Job.of(source, plan, (), device, Wanted(**asked))
    job = Job.of(source, plan, (), device, Wanted(**asked, optional=("embeddings", "head")))
    assert not job.tables and job.head is None and len(job.notes) == 1


def test_a_head_that_cannot_have_the_settings_is_named():
    source = open_source(tiny_models.model(tie_word_embeddings=False))
    with pytest.raises(ShapeError, match="lm_head|rank=40"):
        Job.of(source, Plan(LayerSettings(rank=40)), (), torch.device("cpu"), Wanted(head=True))


@pytest.mark.parametrize("asked", [{"embeddings": "int8"}, {"head": True}], ids=str)
def test_code_that_reads_the_weight_is_found_before_any_work(asked, monkeypatch):
    model = tiny_models.model(tie_word_embeddings=False)
    forward = type(model).forward

    class Reading(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            part = self.lm_head if asked.get("head") else self.model.embed_tokens
            output.logits = output.logits + part.weight.sum()
            return output

    model.__class__ = Reading
    events = []
    with pytest.raises(ArchitectureError, match="own code reads the weight of"):
        slab_kernels.compress(model, **QUICK | {"progress": events.append}, **asked)
    assert not any(event.kind == "layer" for event in events)
    plain = {"embeddings": "dense", "head": False}
    by_preset = dataclasses.replace(presets.PRESETS[presets.DEFAULT], **plain | asked)
    monkeypatch.setitem(presets.PRESETS, presets.DEFAULT, by_preset)
    slab_kernels.compress(model, **QUICK | {"progress": events.append})
    assert any("stays dense" in event.message for event in events if event.kind == "warning")
    assert type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) is nn.Linear


def test_code_that_reads_an_embedding_is_found_before_a_head_that_is_no_plain_linear():
    model = tiny_models.model(tie_word_embeddings=False)
    foreign_head(model)
    norm = model.model.norm

    class Reading(type(norm)):
        def forward(self, hidden):
            return super().forward(hidden) + model.model.embed_tokens.weight.mean()

    slab_kernels.compress(copy.deepcopy(model), **QUICK, embeddings="int8", head=False)
    source = open_source(model)
    source.model.model.norm.__class__ = Reading
    model = source.model  # whose weights are hidden while the code is tried
    wanted = Wanted(embeddings="int8")
    with torch.no_grad(), pytest.raises(ArchitectureError, match="own code reads the weight of"):
        readable(Job.of(source, Plan(), (), torch.device("cpu"), wanted), Windows.of(IDS))


def test_the_command_line_has_both(tmp_path):
    tiny_models.write(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(tiny_models.text())
    asked = ["--embeddings", "int8", "--head", "--values", "int4", "--group-size", "32"]
    small = ["--samples", "4", "--window", "16", "--calibration", str(text)]
    folders = [str(tmp_path / "dense"), str(tmp_path / "out")]
    assert cli.run(["compress", *folders, *asked, *small, "--option", "rounds=1"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["embeddings"] and not config["tie_word_embeddings"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "int8" in card
