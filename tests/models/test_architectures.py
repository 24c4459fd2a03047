"""One code path for every decoder.

Tested are what the blocks are given, which layers share an input, and what is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from slab_kernels.compression.model import compress
from slab_kernels.errors import ArchitectureError, ArgumentError, CalibrationError
from slab_kernels.models.blocks import block_linears, filled_copy, find_blocks, outside_filled
from slab_kernels.models.decompress import decompress
from slab_kernels.models.groups import find_groups
from slab_kernels.models.load import load
from slab_kernels.models.skeleton import config_skeleton
from slab_kernels.models.source import ModuleSource
from slab_kernels.models.streams import catch_stream

CPU = torch.device("cpu")
NAMES = [name for name in tiny_models.CONFIGS if name != "falcon"]
QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
GROUPS = {
    "llama": [QKV, ("o_proj",), GATED, ("down_proj",)],
    "gemma3_text": [QKV, ("o_proj",), GATED, ("down_proj",)],
    "opt": [QKV, ("out_proj",), ("fc1",), ("fc2",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "phi": [(*QKV, "fc1"), ("dense",), ("fc2",)],  # attention and MLP read the same normed input
    "phi3": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "cohere": [(*QKV, *GATED), ("o_proj",), ("down_proj",)],
}


def streamed(model: nn.Module, tokens: torch.Tensor, groups: list | None = None) -> torch.Tensor:
    """The last block's output, by feeding one materialised block after another."""
    source = ModuleSource(model)
    path, blocks = find_blocks(source.model)

    def materialise(index: int) -> nn.Module:
        prefix = f"{path}.{index}."
        names = [n for n in source.names if n.startswith(prefix)]
        return filled_copy(
            blocks[index],
            {n.removeprefix(prefix): source.get(n) for n in names},
            CPU,
            torch.float32,
        )

    with outside_filled(source, path, CPU, torch.float32) as skeleton:
        stream = catch_stream(skeleton, blocks, tokens, materialise, CPU)
    assert all(p.is_meta for p in source.model.parameters())
    linears = block_linears(path, blocks, 1)
    for index in range(len(blocks)):
        block = materialise(index)
        if groups is not None:
            inside = {
                n: block.get_submodule(n.removeprefix(f"{path}.{index}.")) for n in linears[index]
            }
            groups.append(
                [
                    tuple(n.rpartition(".")[2] for n in g.names)
                    for g in find_groups(stream, index, block, inside)
                ]
            )
        with torch.no_grad():
            stream.advance(index, block)
    return torch.cat(stream.hidden)


def real(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = find_blocks(model)[1][-1].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_streaming_blocks_equals_the_model(name, monkeypatch):
    monkeypatch.setattr(
        "slab_kernels.models.blocks.TOKENS_PER_BATCH", 64
    )  # batches of 4 and 2 samples
    model, tokens, groups = tiny_models.model(name), tiny_models.tokens(), []
    found, want = streamed(model, tokens, groups), real(model, tokens)
    assert torch.allclose(found, want, atol=1e-5), float((found - want).abs().max())
    assert name not in GROUPS or groups == [GROUPS[name]] * 2
    assert not any("forward" in block.__dict__ for block in find_blocks(model)[1])


@pytest.mark.parametrize("name", NAMES)
def test_compress_load_and_decompress(name, tmp_path):
    model, tokens = tiny_models.write(tmp_path / "dense", name), tiny_models.tokens()
    record = compress(
        tmp_path / "dense",
        tmp_path / "packed",
        method="magnitude",
        calibration=tokens,
        progress=False,
    )
    linears = [layer for block in block_linears(*find_blocks(model), 4) for layer in block]
    assert sorted(layer.name for layer in record.layers) == sorted(linears)
    assert all(0 < layer.error < 1 for layer in record.layers)
    decompress(tmp_path / "packed", tmp_path / "again")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        packed, dense, original = (
            m(input_ids=tokens).logits for m in (load(tmp_path / "packed"), again.eval(), model)
        )
    assert torch.allclose(packed, dense, atol=1e-4) and not torch.allclose(
        packed, original, atol=1e-2
    )


def refused(model: nn.Module, message: str, **settings) -> None:
    with pytest.raises(ArchitectureError, match=message):
        compress(
            model, method="magnitude", calibration=tiny_models.tokens(), progress=False, **settings
        )


def built(name: str, **config) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config))


def test_gpt2_keeps_weights_outside_linear():
    model = built("gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    refused(
        model,
        r"transformer\.h\.0\.attn\.c_attn \(Conv1D\) keeps its weight 'weight' \[32, 96\] "
        r"outside nn\.Linear",
    )


def test_a_subclass_of_linear_is_not_taken_for_one():
    refused(tiny_models.model("falcon"), r"query_key_value \(FalconLinear\)")


def mixtral() -> nn.Module:
    return built("mixtral", **tiny_models._GATED, num_local_experts=2, num_experts_per_tok=1)


def test_experts_are_left_dense_with_skip():
    model = compress(
        mixtral(),
        method="magnitude",
        calibration=tiny_models.tokens(),
        skip="*.mlp.experts",
        progress=False,
    )
    assert {layer.name.rpartition(".")[2] for layer in model.slab_record.layers} == {*QKV, "o_proj"}


STATES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def follows_advice(
    tmp_path, name: str, steps: list[tuple[str, list[str]]], layers: set[str], **config
) -> None:
    """Every refusal names what to skip, and what is left is compressed, loaded and runs."""
    model, skip = built(name, **STATES, **config), []
    for message, patterns in steps:
        refused(model, message, skip=skip)
        skip += patterns
    settings = dict(method="magnitude", calibration=tiny_models.tokens(), skip=skip, progress=False)
    compress(model, tmp_path / "out", **settings)
    found = compress(model, **settings)
    assert {layer.name.partition(".0.")[2] for layer in found.slab_record.layers} - {""} == layers
    with torch.no_grad():
        outputs = [
            m.eval()(input_ids=tiny_models.tokens()).logits for m in (found, load(tmp_path / "out"))
        ]
    assert torch.equal(*outputs)


def test_mamba_is_compressed_but_for_its_state_matrix(tmp_path):
    """Newer transformers reads the weight of dt_proj too."""
    message = r"'A_log' \[256, 8\] outside nn\.Linear; .* skip='\*\.mixer\.A_log' leaves it dense"
    steps = [(message, ["*.mixer.A_log", "*.mixer.dt_proj"])]
    linears = {"mixer.in_proj", "mixer.x_proj", "mixer.out_proj"}
    follows_advice(tmp_path, "mamba", steps, linears, state_size=8, expand=8, time_step_rank=4)


def test_rwkv_is_compressed_but_for_what_its_code_reads(tmp_path):
    """Its model rescales two weights of every block, outside of the block's own forward."""
    message = (
        r"reads the weight of attention\.output, feed_forward\.value "
        r".* skip='\*\.attention\.output', skip='\*\.feed_f"
    )
    linears = {f"attention.{n}" for n in ("key", "value", "receptance")} | {
        "feed_forward.key",
        "feed_forward.receptance",
    }
    skip = ["*.attention.output", "*.feed_forward.value"]
    follows_advice(
        tmp_path, "rwkv", [(message, skip)], linears, attention_hidden_size=32, intermediate_size=48
    )


def test_a_weight_that_is_looked_for_politely_is_no_obstacle():
    class Polite(ToyBlock):
        def forward(self, hidden_states):
            return (
                hidden_states
                + self.linear(hidden_states)
                + self.idle(hidden_states) * hasattr(self.idle, "weight")
            )

    class Rude(ToyBlock):
        def forward(self, hidden_states):
            return hidden_states @ self.linear.weight + self.idle.weight.sum()

    for block in (Polite, Rude):
        model = Toy("plain")
        model.layers = nn.ModuleList(block("plain") for _ in range(2))
        if block is Rude:
            refused(
                model,
                "reads the weight of linear, idle in its own code, .*; "
                "no other linear is left to compress",
            )
        else:
            compress(model, method="magnitude", calibration=tiny_models.tokens(), progress=False)


def share_block(model):
    model.model.layers[1] = model.model.layers[0]


def share_linear(model):
    attention = model.model.layers[0].self_attn
    attention.v_proj = attention.k_proj


def share_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("share", "message", "skip"),
    [
        (
            share_block,
            r"layers\.0\.self_attn\.q_proj .* share one weight "
            r"\(14 linears are shared in all\), .* before compression$",
            None,
        ),
        (
            share_linear,
            r"k_proj and model\.layers\.0\.self_attn\.v_proj share one weight, .* skip='model",
            ("*.k_proj", "*.v_proj"),
        ),
        (
            share_weight,
            r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share one weight",
            "*.up_proj",
        ),
    ],
)
def test_linears_that_are_one_are_refused_before_any_work(tmp_path, share, message, skip):
    model, events = tiny_models.model(), []
    share(model)
    settings = dict(method="magnitude", calibration=tiny_models.tokens(), progress=events.append)
    for out in (None, tmp_path / "out"):
        with pytest.raises(ArchitectureError, match=message):
            compress(model, out, **settings)
    assert not events and not (tmp_path / "out").exists()
    if skip is not None:
        compress(model, tmp_path / "out", **settings, skip=skip)
        model = compress(model, **settings, skip=skip)
        tokens = tiny_models.tokens()
        assert torch.equal(load(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_weights_that_are_not_in_memory_are_named(tmp_path):
    tiny_models.write(tmp_path / "m")
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb", "model.layers.0"), "cpu"
    )
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        device_map={**places, "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "disk"),
    )
    refused(
        offloaded,
        r"the weight model\.layers\.1\.self_attn\.q_proj\.weight of .* is not in memory "
        r".* give its folder",
    )
    refused(
        config_skeleton(tiny_models.config("llama")),
        r"the weight model\.embed_tokens\.weight of .* is not in memory",
    )


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
    )
    refused(model, "is an encoder-decoder model")


def test_no_blocks_says_what_was_looked_for():
    model = tiny_models.model()
    model.config.num_hidden_layers = 7
    refused(
        model,
        r"looked for an nn\.ModuleList with weights in every element and num_hidden_layers=7 "
        r"elements; found model\.layers \(2\)",
    )


def test_a_module_without_a_config_is_refused():
    refused(nn.Linear(4, 4), "has no Hugging Face config")


def test_in_features_that_the_pattern_does_not_divide():
    model = tiny_models.model(intermediate_size=46)
    refused(
        model,
        r"model\.layers\.0\.mlp\.down_proj has in_features=46, which groups of 4 do not divide; "
        r".* skip='\*\.mlp\.down_proj'",
    )
    compress(
        model,
        method="magnitude",
        calibration=tiny_models.tokens(),
        skip="*.mlp.down_proj",
        progress=False,
    )
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_skip_must_match_and_leave_something():
    with pytest.raises(ArgumentError, match="skip='nothing' matches no module"):
        compress(
            tiny_models.model(),
            method="magnitude",
            calibration=tiny_models.tokens(),
            progress=False,
            skip="nothing",
        )
    refused(tiny_models.model(), "no nn.Linear is left", skip="*")


def test_a_compressed_model_is_not_compressed_again():
    model = compress(
        tiny_models.model(), method="magnitude", calibration=tiny_models.tokens(), progress=False
    )
    refused(model, "compressed already")
    model.config.quantization_config = None
    refused(model, r"model\.layers\.0\.self_attn\.q_proj is compressed already")


def test_a_config_without_a_causal_model():
    with pytest.raises(ArchitectureError, match="no causal language model for 'vit'"):
        config_skeleton(AutoConfig.for_model("vit"))


class Toy(nn.Module):
    """A decoder outside transformers' habits, steered by `kind`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.config = LlamaConfig(**tiny_models._GATED)
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(ToyBlock(kind) for _ in range(2))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):
        hidden, carried = self.embed(input_ids), None
        if self.kind == "nan":
            hidden = hidden / 0
        for layer in self.layers[:1] if self.kind == "missed" else self.layers:
            if self.kind == "carried":
                hidden, carried = layer(hidden, carried=carried)
            elif self.kind in ("tuple", "named"):
                hidden = layer(hidden_states=hidden)[0]
            elif self.kind == "changed":
                hidden = layer(hidden) * 2
            else:
                hidden = layer(hidden)
        return hidden


class ToyBlock(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.linear, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_states, carried=None):
        out = hidden_states + self.linear(hidden_states)
        if self.kind != "idle":
            out = out + self.idle(out)
        more = {"carried": (out, out.mean()), "tuple": (out, "extra"), "named": Named(out, "extra")}
        return more.get(self.kind, out)


class Named(NamedTuple):
    hidden_states: torch.Tensor
    extra: str


@pytest.mark.parametrize("kind", ["tuple", "named"])
def test_a_block_that_takes_keywords_and_returns_a_tuple(kind):
    model, tokens = Toy(kind), tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(streamed(model, tokens), model(tokens))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("changed", ArchitectureError, "changes the hidden state between blocks 0 and 1"),
        ("carried", ArchitectureError, "block 1 takes more than the hidden state from block 0"),
        ("missed", ArchitectureError, "did not call its last decoder block"),
        ("idle", CalibrationError, r"layers\.0\.idle never ran .*, with skip='\*\.idle'$"),
        ("nan", CalibrationError, "embedded calibration text holds NaN"),
    ],
)
def test_what_block_by_block_cannot_do_is_refused(kind, error, message):
    with pytest.raises(error, match=message):
        compress(Toy(kind), method="magnitude", calibration=tiny_models.tokens(), progress=False)


def test_a_head_on_meta_is_not_reached_where_the_blocks_found_are_not_called():
    model = Toy("missed")
    head = nn.Linear(32, 96, device="meta")
    model.get_output_embeddings = lambda: head
    plain, model.forward = model.forward, lambda **inputs: head(plain(**inputs)).float().cpu()
    with pytest.raises(ArchitectureError, match="did not call its last decoder block"):
        streamed(model, tiny_models.tokens())
    assert not head._forward_pre_hooks
