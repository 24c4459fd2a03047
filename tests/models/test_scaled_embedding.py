"""Embeddings whose rows the model multiplies with a number (Gemma 3), as int8 rows: on every road
from a compressed model, against the dense model's rows."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import slab_kernels
from slab_kernels.errors import ArchitectureError
from slab_kernels.models.vocabulary import find_embedding

IDS = tiny_models.tokens()
QUICK = {"method": "magnitude", "embeddings": "int8", "calibration": IDS, "progress": False}


def in_memory(dense, out):
    return slab_kernels.compress(AutoModelForCausalLM.from_pretrained(dense), **QUICK)


def saved(dense, out):
    slab_kernels.save(slab_kernels.load(out), out.parent / "saved")
    return slab_kernels.load(out.parent / "saved")


def decompressed(dense, out):
    slab_kernels.decompress(out, out.parent / "plain")
    return AutoModelForCausalLM.from_pretrained(out.parent / "plain")


ROADS = {
    "in memory": in_memory,
    "load": lambda dense, out: slab_kernels.load(out),
    "from_pretrained": lambda dense, out: AutoModelForCausalLM.from_pretrained(out),
    "saved": saved,
    "dequantize": lambda dense, out: slab_kernels.load(out).dequantize(),
    "decompress": decompressed,
}


def half_steps(weight: Tensor) -> Tensor:
    """[V,1]: the most that an int8 row may be away, its scale rounded to bf16."""
    return weight.abs().amax(1, keepdim=True) / 127 * 0.5 * (1 + 2**-8)


@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
def test_rows_are_multiplied_once_and_the_head_s_are_not(road, tmp_path):
    dense = tiny_models.write(tmp_path / "dense", "gemma3_text")
    slab_kernels.compress(tmp_path / "dense", tmp_path / "out", **QUICK)
    model = road(tmp_path / "dense", tmp_path / "out")
    weight = dense.get_input_embeddings().weight
    factor = float(dense.get_input_embeddings().embed_scale)
    assert factor == pytest.approx(32**0.5)
    every = torch.arange(len(weight))
    with torch.no_grad():
        rows, right = model.get_input_embeddings()(every), dense.get_input_embeddings()(every)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        logits, wanted = model.get_output_embeddings()(x), x @ weight.T
    assert bool(((rows - right).abs() <= half_steps(weight) * factor).all())
    bound = x.abs().sum(1, keepdim=True) * half_steps(weight).T
    assert bool(((logits - wanted).abs() <= bound).all())
    assert not torch.equal(rows, right), "int8 rows are not the dense ones"


class Shifted(nn.Embedding):
    """Has a number like Gemma's, and does more with it."""

    embed_scale = 2.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale + 1


class Unscaled(nn.Embedding):
    """Has a number like Gemma's that changes nothing here."""

    embed_scale = 1.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("kind", [Shifted, Unscaled])
def test_a_class_that_does_something_else_is_refused(kind):
    model = tiny_models.model()
    old = model.model.embed_tokens
    model.model.embed_tokens = kind(old.num_embeddings, old.embedding_dim)
    with pytest.raises(ArchitectureError, match="does more than look up a row"):
        find_embedding(model)
