"""Inputs of linears, caught when they are read, whatever a block writes into them later."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from slab_kernels.compression.model import compress
from slab_kernels.errors import ArchitectureError, CalibrationError
from slab_kernels.models.groups import Group, find_groups, layer_inputs
from slab_kernels.models.streams import _HIDDEN, Stream, catch_stream

TOKENS = tiny_models.tokens(16, 32)


class WritesHidden(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states += self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), **kwargs
        )[0]
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class WritesArguments(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, position_embeddings, **kwargs):
        out = super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        for table in position_embeddings:
            table.zero_()
        return out


def scaling(in_place: bool) -> type:
    class Scaling(modeling_llama.LlamaMLP):
        def forward(self, x):
            gate = self.act_fn(self.gate_proj(x))
            scale = torch.linspace(0, 4, x.shape[-1])
            x = x.mul_(scale) if in_place else x * scale
            return self.down_proj(gate * self.up_proj(x))

    return Scaling


def layers(block: type | None = None, mlp: type | None = None) -> list[tuple]:
    model = tiny_models.model()
    for layer in model.model.layers:
        layer.__class__ = block or layer.__class__
        layer.mlp.__class__ = mlp or layer.mlp.__class__
    record = compress(model, method="sparsegpt", calibration=TOKENS, progress=False).slab_record
    return [(layer.name, layer.group, layer.error) for layer in record.layers]


def test_blocks_that_write_into_what_they_are_given():
    plain = layers()
    assert layers(WritesHidden) == plain
    assert layers(WritesArguments) == plain


def test_an_mlp_that_works_in_place_on_its_input():
    found, want = layers(mlp=scaling(True)), layers(mlp=scaling(False))
    assert found == want and len(found[5][1]) == 1


class Reads(nn.Module):
    """Linears that read x, x after a write that leaves no trace, a copy of x, x without some."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c", "d"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        self.a(x)
        x.data.add_(1)
        self.b(x)
        x.data.sub_(1)
        self.c(x.clone())
        self.d(x.where(x != 5, 0))
        return x


def test_contents_decide_about_groups_in_every_batch():
    block = Reads()
    hidden = [torch.arange(8.0).reshape(1, 2, 4) / 2, torch.full((1, 2, 4), 5.0)]
    stream = Stream([h.clone() for h in hidden], [[((_HIDDEN,), {})] * 2], torch.device("cpu"))
    linears = {name: getattr(block, name) for name in "abcd"}
    assert [group.names for group in find_groups(stream, 0, block, linears)] == [
        ("a", "c"),
        ("d",),
        ("b",),
    ]
    seen = [layer_inputs(stream, 0, block, block.b, Group(("b",), 1), batch) for batch in (0, 1)]
    assert all(torch.equal(x, h.flatten(0, 1) + 1) for x, h in zip(seen, hidden, strict=True))
    assert all(torch.equal(x, h) for x, h in zip(stream.hidden, hidden, strict=True))


def test_a_linear_without_tokens_in_a_batch_joins_no_group():
    class Experts(Reads):
        def forward(self, x):
            few = x[x[..., 0] > 4]
            for name, part in zip("abcd", (few, few[:0], x, x * 2), strict=True):
                getattr(self, name)(part)
            self.b(x * 3) if len(few) else None
            return x

    block = Experts()
    stream = Stream(
        [torch.ones(1, 2, 4), torch.full((1, 2, 4), 5.0)],
        [[((_HIDDEN,), {})] * 2],
        torch.device("cpu"),
    )
    groups = find_groups(stream, 0, block, {name: getattr(block, name) for name in "abcd"})
    assert [group.names for group in groups] == [("c",), ("d",), ("a",), ("b",)]


def test_a_hidden_state_that_the_model_writes_into_between_blocks_is_seen():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = (
                nn.Embedding(8, 4),
                nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
            )

        def forward(self, input_ids, use_cache):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
                x += 1
            return x

    model = Model()
    with pytest.raises(ArchitectureError, match="changes the hidden state between blocks 0 and 1"):
        catch_stream(
            model,
            model.blocks,
            torch.zeros(1, 2, dtype=torch.long),
            lambda index: nn.Linear(4, 4),
            torch.device("cpu"),
        )


def test_a_model_that_does_not_run_is_named_in_one_sentence():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, input_ids, use_cache):
            raise ValueError("no such layer\nand a page of advice")

    model = Model()
    tokens, cpu = torch.zeros(1, 2, dtype=torch.long), torch.device("cpu")
    said = r"^Model does not run on the calibration text: ValueError: no such layer$"
    with pytest.raises(ArchitectureError, match=said):
        catch_stream(model, model.blocks, tokens, lambda index: model.blocks[index], cpu)


class Idle(nn.Module):
    """Linears in modules of which some never run; numbered: inside a list of experts."""

    def __init__(self, numbered: bool):
        super().__init__()
        self.used, self.part = (
            nn.Linear(32, 32),
            nn.ModuleDict(dict(a=nn.Linear(32, 32), b=nn.Linear(32, 32))),
        )
        self.cross = nn.ModuleDict(dict(k=nn.Linear(32, 32), deep=nn.Sequential(nn.Linear(32, 32))))
        if numbered:
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        x = self.part["a"](self.used(x))
        return self.experts[0](x) if hasattr(self, "experts") else x


@pytest.mark.parametrize(
    ("numbered", "advice"),
    [
        (False, r"skip='\*\.part\.b', skip='\*\.cross'$"),
        (True, r"skip='h\.0\.part\.b', skip='h\.0\.cross', skip='h\.0\.experts\.1'$"),
    ],
)
def test_the_advice_covers_all_that_never_ran(numbered, advice):
    block = Idle(numbered)
    linears = {f"h.0.{n}": m for n, m in block.named_modules() if type(m) is nn.Linear}
    stream = Stream([torch.ones(1, 2, 32)], [[((_HIDDEN,), {})]], torch.device("cpu"))
    with pytest.raises(CalibrationError, match=rf"h\.0\.part\.b never ran .*, with {advice}"):
        find_groups(stream, 0, block, linears)
