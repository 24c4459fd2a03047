"""Embeddings as int8 rows and packed heads: every way into a folder and out of it."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.engines.transformers import SlabConfig, compare
from slab_kernels.errors import CheckpointError, VersionError, WeightlessError
from slab_kernels.evaluate.inspect import inspect
from slab_kernels.evaluate.perplexity import perplexity
from slab_kernels.models import packed_config
from slab_kernels.nn import Int8Embedding, Int8Head, SlabLinear

IDS = tiny_models.tokens()
QUICK = {"values": "int4", "group_size": 32, "planes": 2, "rounds": 1, "calibration": IDS}
KINDS = {
    f"{name}-{'tied' if tied else 'untied'}-{embeddings}-{'head' if head else 'no-head'}": (
        name,
        tied,
        {"embeddings": embeddings, "head": head},
    )
    for name, tied in (("llama", True), ("llama", False), ("gemma2", True))
    for embeddings, head in (("int8", False), ("dense", True), ("int8", True))
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def made(request, tmp_path_factory):
    """The dense model, its packed folder, and what was asked for."""
    name, tied, asked = request.param
    top = tmp_path_factory.mktemp("whole")
    dense = tiny_models.write(top / "dense", name, tie_word_embeddings=tied)
    slab_kernels.compress(top / "dense", top / "packed", progress=False, **QUICK, **asked)
    return dense, top / "packed", tied, asked


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def entry(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_modules_are_what_was_asked_for_and_the_function_is_that_of_the_stored_numbers(made):
    dense, folder, tied, asked = made
    model = slab_kernels.load(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding) == (asked["embeddings"] == "int8")
    assert isinstance(head, SlabLinear) == asked["head"]
    shared = tied and asked["embeddings"] == "int8" and not asked["head"]
    assert isinstance(head, Int8Head) == shared
    twin = copy.deepcopy(dense)
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.clone())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, SlabLinear):
                twin.get_submodule(name).weight.copy_(layer.packed().dense())
        if isinstance(embedding, Int8Embedding):
            rows = embedding.codes.float() * embedding.scales.float()[:, None]
            apart = (rows - twin.get_input_embeddings().weight).norm() / rows.norm()
            assert 1e-4 < float(apart) < 0.01
            twin.get_input_embeddings().weight.copy_(rows)
            if shared:
                twin.lm_head.weight.copy_(rows)
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-4, rtol=1e-4)


def test_every_road_gives_the_same_model(made, tmp_path):
    _, folder, tied, asked = made
    loaded = slab_kernels.load(folder)
    ours = logits(loaded)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(opened), ours)
    assert compare(folder)["tensors"] == len(loaded.state_dict())
    opened.save_pretrained(tmp_path / "a")
    slab_kernels.save(loaded, tmp_path / "b")
    for again in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(logits(slab_kernels.load(again)), ours)
        assert entry(again).get("embeddings") == entry(folder).get("embeddings")
        assert entry(again)["format_version"] == entry(folder)["format_version"]
    slab_kernels.decompress(folder, tmp_path / "c")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    torch.testing.assert_close(logits(dense), ours, atol=1e-4, rtol=1e-4)
    one = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert one == (tied and not asked["head"])
    back = opened.dequantize()
    torch.testing.assert_close(logits(back), ours, atol=1e-4, rtol=1e-4)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == one
    back.save_pretrained(tmp_path / "d")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "d")), logits(back))


def test_half_precision_and_generation(made):
    _, folder, *_ = made
    model = slab_kernels.load(folder, dtype=torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert model.get_input_embeddings()(IDS[:1]).dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(theirs), logits(model))
    model = slab_kernels.load(folder)
    written = model.generate(IDS[:2, :5], max_new_tokens=4, do_sample=False)
    assert written.shape == (2, 9)
    found = perplexity(model, tiny_models.tokenizer(), tiny_models.text(60), 16)
    assert found["perplexity"] > 1


def test_in_memory_the_numbers_are_those_of_a_folder(made):
    dense, folder, tied, asked = made
    kind = dense.config.model_type
    model = tiny_models.model(kind, tie_word_embeddings=tied)
    slab_kernels.compress(model, progress=False, **QUICK, **asked)
    assert torch.equal(logits(model), logits(slab_kernels.load(folder)))
    slab_kernels.check(model)


def test_sizes_are_told(made):
    _, folder, tied, asked = made
    found = inspect(folder)
    assert [e["name"] for e in found["embeddings"]] == (
        ["model.embed_tokens"] if asked["embeddings"] == "int8" else []
    )
    assert ("lm_head" in {layer["name"] for layer in found["layers"]}) == asked["head"]
    if found["embeddings"]:
        assert found["embeddings"][0]["bytes"] == 96 * (32 + 2)
        names = {n for shard in folder.glob("*.safetensors") for n in _names(shard)}
        assert "model.embed_tokens.weight" not in names
        if tied:
            assert "lm_head.weight" not in names
    assert found["format_version"] == (3 if asked["embeddings"] == "int8" else 2)


def _names(shard):
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as f:
        return list(f.keys())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tied model whose table serves its head too."""
    top = tmp_path_factory.mktemp("shared")
    tiny_models.write(top / "dense", num_hidden_layers=1)
    slab_kernels.compress(top / "dense", top / "packed", progress=False, embeddings="int8", **QUICK)
    return top / "packed"


HOSTILE = {
    "a list": [],
    "a number": 7,
    "entries that are no objects": {"model.embed_tokens": 3},
    "values": {"model.embed_tokens": {"values": "int2", "tied": None}},
    "tied": {"model.embed_tokens": {"values": "int8", "tied": 5}},
    "a module that is not there": {"no.such": {"values": "int8", "tied": None}},
    "a linear": {"lm_head": {"values": "int8", "tied": None}},
    "a head that is not there": {"model.embed_tokens": {"values": "int8", "tied": "no.head"}},
    "a head of another size": {
        "model.embed_tokens": {"values": "int8", "tied": "model.layers.0.mlp.up_proj"}
    },
    "tied to itself": {"model.embed_tokens": {"values": "int8", "tied": "model.embed_tokens"}},
    "a long name": {"x" * 100_000: {"values": "int8", "tied": None}},
    "nothing": {},
    "null": None,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_senseless_entry_is_one_sentence(shared, tmp_path, hostile):
    folder = tmp_path / "m"
    shutil.copytree(shared, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["embeddings"] = hostile
    (folder / "config.json").write_text(json.dumps(config))
    for opened in (
        slab_kernels.load,
        AutoModelForCausalLM.from_pretrained,
        lambda f: slab_kernels.decompress(f, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError) as error:
            opened(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1500
        assert not (tmp_path / "out").exists()


def test_a_damaged_table_is_named(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(shared, folder)
    shard = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.codes"][3, 3] = -128
    save_file(tensors, shard, {"format": "pt"})
    for opened in (slab_kernels.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens: codes holds -128"):
            opened(folder)


def test_a_library_of_before_refuses_the_folder(shared, monkeypatch):
    """With the number that it knew; everything else in it looked for `modules` alone."""
    assert entry(shared)["format_version"] == 3
    monkeypatch.setattr(packed_config, "FORMAT_VERSION", 2)
    for opened in (slab_kernels.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(VersionError, match="update slab_kernels"):
            opened(shared)


def test_resizing_is_refused_in_words(shared):
    model = slab_kernels.load(shared)
    with pytest.raises(WeightlessError, match="cannot be resized"):
        model.resize_token_embeddings(100)
    assert logits(model).shape[-1] == 96


def test_slab_config_takes_the_same_words(tmp_path):
    dense = tiny_models.write(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=SlabConfig(embeddings="int8", head=True, **QUICK)
    )
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert isinstance(model.get_output_embeddings(), SlabLinear)
    assert float((logits(model) - logits(dense)).norm() / logits(dense).norm()) < 0.3
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(slab_kernels.load(tmp_path / "packed")), logits(model))


def test_adapters_learn_through_a_shared_head(tmp_path):
    from slab_kernels.compression.training import Training, train

    tiny_models.write(tmp_path / "dense", num_hidden_layers=1)
    slab_kernels.compress(
        tmp_path / "dense", tmp_path / "packed", progress=False, embeddings="int8", **QUICK
    )
    settings = Training(steps=3, batch=2, adapter_rank=2, rate=1e-2)
    found = train(tmp_path / "packed", tmp_path / "out", IDS, settings)
    assert found["after"] != found["before"]
    assert isinstance(slab_kernels.load(tmp_path / "out").get_output_embeddings(), Int8Head)
