"""The speed of decoding, and that the parts of a step are those that take the time."""

from __future__ import annotations

import functools
import time

import pytest
import tiny_models
from torch import nn

from slab_kernels.errors import ArgumentError
from slab_kernels.evaluate.decoding import PARTS, decoding, module_parts
from slab_kernels.format import PackedLayout
from slab_kernels.nn.replacement import replace_linear
from slab_kernels.testing import random_packed


def slowed(module: nn.Module, seconds: float) -> None:
    """Let every call of a module last so much longer."""
    plain = module.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return plain(*args, **kwargs)

    module.forward = forward


@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_are_those_that_take_the_time(batch):
    """Sleeps of known length in each kind of module; the model itself takes a few milliseconds."""
    model, tokenizer = tiny_models.model(), tiny_models.tokenizer()
    layer = model.model.layers[1]
    slept = {"linears": 0.06, "head": 0.04, "attention": 0.03, "modules": 0.02, "overhead": 0.05}
    slowed(layer.mlp.up_proj, slept["linears"] / 2)
    slowed(layer.self_attn.q_proj, slept["linears"] / 2)
    slowed(model.lm_head, slept["head"])
    slowed(layer.self_attn, slept["attention"])
    slowed(layer.mlp, slept["modules"])
    slowed(model.model, slept["overhead"])
    own = {module: module.forward for module in model.modules()}
    found = decoding(model, tokenizer, "a prompt", tokens=5, batch=batch)
    assert {module: module.forward for module in model.modules()} == own, "all is as it was"
    assert list(found["split"]) == list(PARTS)
    assert sum(found["split"].values()) == pytest.approx(1)
    assert 0.2 < found["seconds_per_step"] < 0.5
    whole = found["seconds_per_step"]
    for part, share in found["split"].items():
        assert share * whole == pytest.approx(slept[part], abs=0.35 * slept[part] + 0.01), part
    assert found["tokens"] == 4 and found["batch"] == batch and found["prompt_tokens"] == 8
    assert found["tokens_per_second"] == pytest.approx(batch / whole)
    assert 0.2 < found["prompt_seconds"] < 0.5


def test_every_module_has_one_part():
    model = tiny_models.model()
    layout = PackedLayout(48, 32, "fp16", None, rank=1)
    name = "model.layers.0.mlp.up_proj"
    replace_linear(model, {name: random_packed(layout)})
    parts = {n: part for n, m in model.named_modules() if (part := module_parts(model).get(m))}
    assert parts[name] == "linears" and parts["model.layers.1.mlp.up_proj"] == "linears"
    assert parts["lm_head"] == "head" and parts["model.layers.0.self_attn"] == "attention"
    assert parts["model.norm"] == parts["model.embed_tokens"] == "modules"
    assert "model" not in parts and "model.layers" not in parts and "" not in parts


def test_too_few_tokens_are_refused():
    model, tokenizer = tiny_models.model("opt"), tiny_models.tokenizer()
    for more in ({"tokens": 2}, {"batch": 0}):
        with pytest.raises(ArgumentError, match="on 3 tokens at least"):
            decoding(model, tokenizer, "abc", **more)
    with pytest.raises(ArgumentError, match="leaves 2 of the model's positions"):
        decoding(model, tokenizer, "a" * 62, 8)
