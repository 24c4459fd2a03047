"""`save` writes what `load` opens, or says what of the model does not fit its config."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from slab_kernels import FusedSlabLinear, compress, load, save
from slab_kernels.errors import ArchitectureError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("saving")
    tiny_models.write(top / "dense")
    tokens = tiny_models.tokens()
    compress(top / "dense", top / "out", method="magnitude", calibration=tokens, progress=False)
    return top / "out"


def fuse_beside(model):
    mlp = model.model.layers[0].mlp
    mlp.gate_up = FusedSlabLinear([mlp.gate_proj, mlp.up_proj])


def fuse_instead(model):
    fuse_beside(model)
    del model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj


def add(model):
    model.model.layers[1].mlp.extra = nn.Linear(3, 3)


def drop(model):
    del model.model.layers[1:]


def widen(model):
    model.model.embed_tokens.weight = nn.Parameter(torch.ones(97, 32))
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fuse_beside, "gate_up.parts.0' is packed, and LlamaForCausalLM of the config has no such"),
        (fuse_instead, "put the parts of a FusedSlabLinear back where they were"),
        (add, "the model has the further tensor 'model.layers.1.mlp.extra.bias'"),
        (drop, "the model lacks tensor 'model.layers.1.input_layernorm.weight'"),
        (widen, r"has shape \[97, 32\], and \[96, 32\] by the model's config"),
    ],
)
def test_a_model_that_its_config_does_not_describe(folder, tmp_path, change, message):
    model = load(folder)
    change(model)
    with pytest.raises(ArchitectureError, match=message):
        save(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_layer_made_dense_again_stays_dense(folder, tmp_path):
    model = load(folder)
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.to_linear()
    save(model, tmp_path / "saved")
    want, found = model.state_dict(), load(tmp_path / "saved").state_dict()
    assert want.keys() == found.keys() and all(torch.equal(found[n], want[n]) for n in want)


def test_what_is_no_model_or_no_tokenizer(folder, tmp_path):
    for model in (5, None, "folder"):
        with pytest.raises(ArchitectureError, match="is no model"):
            save(model, tmp_path / "never")
    with pytest.raises(ValueError, match="tokenizer=5 must be one of transformers"):
        save(load(folder), tmp_path / "never", tokenizer=5)
    for path in (5, None, b"folder", ["folder"]):
        with pytest.raises(ValueError, match="cannot be used as a path"):
            load(path)
    with pytest.raises(ValueError, match="cannot be used as a path"):
        save(load(folder), 5)
    assert not (tmp_path / "never").exists()
    with pytest.raises(OSError, match="config.json is a file; give the folder"):
        load(folder / "config.json")
