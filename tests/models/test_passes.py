"""Passes of a text through one block: what is kept of them changes no number."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from slab_kernels.compression.routing import Feeding
from slab_kernels.compression.statistics import Streams
from slab_kernels.models.groups import find_groups, layer_inputs
from slab_kernels.models.passes import DensePasses, Passes, Room, may_replay
from slab_kernels.models.streams import _HIDDEN, Stream, catch_stream

CPU = torch.device("cpu")
TOKENS = tiny_models.tokens(5, 16)


class WritesInto(modeling_llama.LlamaDecoderLayer):
    """Works in place on its input and on what its modules put out."""

    def forward(self, hidden_states, **kwargs):
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states += attended.mul_(2)
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states)).mul_(0.5)
        return hidden_states


class Whispers(modeling_llama.LlamaDecoderLayer):
    """Its attention leaves a number that its mlp takes, past arguments and results."""

    def forward(self, hidden_states, **kwargs):
        def leave(module, args, output):
            self.left = output[0].mean()

        if not self.self_attn._forward_hooks:
            inner = self.self_attn.o_proj
            inner._forward_hooks.clear()
            inner.register_forward_hook(leave)
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(attended) * self.left


class WritesAndReturnsNothing(modeling_llama.LlamaDecoderLayer):
    """Its mlp adds to the tensor that it is given."""

    def forward(self, hidden_states, **kwargs):
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states += attended
        self.mlp.__class__ = AddsTo
        self.mlp(hidden_states)
        return hidden_states


class AddsTo(modeling_llama.LlamaMLP):
    def forward(self, x):
        x += super().forward(x)


class Experts(nn.Module):
    """The first batch passes by `rare`, which comes last therefore, and runs before `often`.

    What `often` puts out on the way to `last` is so not what it puts out in the end.
    """

    def __init__(self):
        super().__init__()
        for name in ("rare", "often", "last", "twice"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        x = x + self.twice(x)
        few = x[..., :1] > 1
        if bool(few.any()):
            x = x + self.rare(x) * few
        return self.twice(x + self.last(self.often(x)))


def llama(block: type | None = None) -> tuple[Stream, nn.Module, dict[str, nn.Linear]]:
    model = tiny_models.model()
    layer = model.model.layers[1]
    layer.__class__ = block or layer.__class__
    own = copy.deepcopy(model.model.layers)
    stream = catch_stream(model, model.model.layers, TOKENS, lambda index: own[index], CPU)
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    return stream, layer, linears


def experts() -> tuple[Stream, nn.Module, dict[str, nn.Linear]]:
    torch.manual_seed(0)
    block = Experts()
    hidden = [torch.randn(1, 6, 4) * scale for scale in (0.01, 2, 0.01, 2)]
    stream = Stream(hidden, [[((_HIDDEN,), {})] * 4] * 2, CPU)
    return stream, block, dict(block.named_children())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def two_windows_at_once(monkeypatch):
    monkeypatch.setattr("slab_kernels.models.blocks.TOKENS_PER_BATCH", 32)


@pytest.mark.parametrize("room", [1 << 30, 6000, 0])
@pytest.mark.parametrize("made", [llama, lambda: llama(WritesInto), experts])
def test_kept_outputs_change_no_number(made, room):
    """Every group's inputs, and the outputs at the end, are those of a plain forward."""
    stream, block, linears = made()
    with torch.no_grad():
        limit = Room(room)
        text = Passes(stream.twin(), 1, block, linears, limit)
        for group in find_groups(stream, 1, block, linears):
            for batch in text.batches:
                linear = linears[group.names[0]]
                want = layer_inputs(stream, 1, block, linear, group, batch)
                assert torch.equal(text.inputs([group], batch)[0], want)
            for name in group.names:
                linears[name].weight.data.mul_(0.9).add_(0.01)
            text.finish(group.names)
        assert 0 <= limit.bytes <= room
        want = [stream.run(1, block, batch) for batch in text.batches]
        text.advance()
    assert all(torch.equal(x, y) for x, y in zip(text.stream.hidden, want, strict=True))
    assert limit.bytes == room and not any("forward" in m.__dict__ for m in block.modules())


def test_with_room_every_linear_computes_once_for_each_batch(monkeypatch):
    stream, block, linears = llama()
    text = Passes(stream, 1, block, linears, Room(1 << 30))
    groups, counts = find_groups(stream, 1, block, linears), dict.fromkeys(linears, 0)
    real, names = nn.functional.linear, {m.weight.data_ptr(): n for n, m in linears.items()}

    def counted(x, weight, bias=None):
        counts[names[weight.data_ptr()]] += 1
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    with torch.no_grad():
        for group in groups:
            for batch in text.batches:
                text.inputs([group], batch)
            text.finish(group.names)
        text.advance()
    assert len(text.batches) == 3 and counts == dict.fromkeys(linears, 3)


@pytest.mark.parametrize(("block", "may"), [(None, True), (WritesInto, True), (Whispers, False)])
def test_a_block_whose_modules_whisper_is_not_replayed(block, may):
    stream, layer, linears = llama(block)
    with torch.no_grad():
        assert may_replay(stream, 1, layer, linears) == may


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_a_module_that_returns_nothing_runs_every_time(room):
    stream, layer, linears = llama(WritesAndReturnsNothing)
    with torch.no_grad():
        assert may_replay(stream, 1, layer, linears)
        text = Passes(stream.twin(), 1, layer, linears, Room(room))
        text.finish(tuple(linears))
        want = stream.run(1, layer, 0)
        assert torch.equal(text.output(0), want) and torch.equal(text.output(0), want)


def test_a_block_of_which_linears_were_skipped_says_nothing_of_others():
    stream, layer, linears = llama(Whispers)
    streams = Streams(stream, None, None, None, None)
    mlp = {name: linear for name, linear in linears.items() if name.startswith("mlp")}
    for found, replayed in ((mlp, True), (linears, False)):
        _, inside = streams.enter(1, layer, None, found, "", Feeding())
        assert (inside.calibration.room.bytes > 0) == replayed


@pytest.mark.parametrize("room", [1 << 30, 20_000, 0])
@pytest.mark.parametrize("made", [llama, lambda: llama(WritesInto), experts])
def test_the_dense_block_runs_once_where_there_is_room(made, room):
    stream, block, linears = made()
    groups, runs = find_groups(stream, 1, block, linears), []
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        dense = DensePasses(stream.twin(), 1, block, linears, groups, Room(room))
        for group in groups:
            for batch in range(len(stream.hidden)):
                linear = linears[group.names[0]]
                want = layer_inputs(stream, 1, block, linear, group, batch)
                runs.pop()
                assert torch.equal(dense.inputs([group], batch)[0], want)
        want = [stream.run(1, block, batch) for batch in range(len(stream.hidden))]
        del runs[-len(want) :]
        dense.advance()
    assert all(torch.equal(x, y) for x, y in zip(dense.stream.hidden, want, strict=True))
    assert room < 1 << 30 or len(runs) == len(want)


def test_rounded_products_are_left_where_a_block_does_not_run_so():
    """Code of a model that takes its tensors to be of one type; sums stay fp32 elsewhere."""

    class OneType(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            rows = torch.arange(len(hidden_states))
            return hidden_states.index_add(0, rows, self.mlp(hidden_states))

    for block, products in ((None, torch.bfloat16), (OneType, None)):
        model = tiny_models.model()
        layers = model.model.layers
        for layer in layers:
            layer.__class__ = block or layer.__class__
        own = copy.deepcopy(layers)
        stream = catch_stream(model, layers, TOKENS, own.__getitem__, CPU, products=torch.bfloat16)
        assert stream.products == products
        with torch.no_grad():
            rounded, exact = stream.run(0, layers[0], 0), stream.exact().run(0, layers[0], 0)
        error = float((rounded - exact).norm() / exact.norm())
        assert rounded.dtype == torch.float32 and (0 < error < 0.01 if products else error == 0)
