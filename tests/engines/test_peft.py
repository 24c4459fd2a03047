"""LoRA of PEFT on packed layers, against the dense twin: the same weights as nn.Linear."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import tiny_models
import torch
from torch import nn

import slab_kernels
from slab_kernels import engines
from slab_kernels.errors import ArchitectureError, ArgumentError, RangeError, UnsupportedError
from slab_kernels.format import PackedLayout
from slab_kernels.nn import FusedSlabLinear, SlabLinear
from slab_kernels.testing import random_packed

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS = tiny_models.tokens(2, 9)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2, which has biases, with int8 adapters, int8 rows and a packed head."""
    top = tmp_path_factory.mktemp("qwen2")
    tiny_models.write(top / "dense", "qwen2")
    settings = {"values": "int4", "group_size": None, "adapter_rank": 2, "head": True}
    settings |= {"samples": 6, "calibration": tiny_models.tokens(), "progress": False}
    slab_kernels.compress(top / "dense", top / "packed", **settings)
    return top / "packed"


@pytest.fixture(params=["load", "from_pretrained"])
def opened(request, folder):
    """The same model, opened in both ways."""
    if request.param == "load":
        return slab_kernels.load(folder, activations="exact")
    config = slab_kernels.SlabConfig(activations="exact")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def adapted(model, seed: int = 0, name: str = "default", **settings):
    """The model with LoRA, whose B is not zero."""
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, peft.LoraConfig(**settings))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**settings), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}" in key:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


def exact(model):
    return slab_kernels.prepare(model, activations="exact")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def dense_twin(model):
    """The same model with nn.Linear in place of every packed layer; adapters stay."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, SlabLinear):
            twin.set_submodule(name, module.to_linear())
    return twin


LAYOUTS = {
    "fp16": {"rank": 2},
    "int8 with an adapter, ragged": {"values": "int8", "group_size": 32, "adapter_rank": 3},
    "int4, two planes, int8 adapter": {
        "values": "int4", "rank": 1, "planes": 2, "adapter_rank": 2, "adapter_values": "int8",
    },
}  # fmt: skip


def layers(form: dict, bias: bool = True) -> nn.Sequential:
    """Two packed layers, 40 -> 24 -> 20."""
    sizes = ((24, 40), (20, 24))
    packed = [random_packed(PackedLayout(*size, **form), seed=i) for i, size in enumerate(sizes)]
    biases = [torch.randn(size[0]) if bias else None for size in sizes]
    return exact(nn.Sequential(*map(SlabLinear.from_packed, packed, biases)))


@pytest.mark.parametrize("form", LAYOUTS.values(), ids=LAYOUTS)
def test_results_and_gradients_are_those_of_the_dense_twin(form):
    ours = adapted(layers(form), r=4, lora_alpha=6, target_modules=["0", "1"])
    theirs = dense_twin(ours)
    found = []
    for model in (ours, theirs):
        x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 4
        found.append([y, x.grad, *(p.grad for p in trained)])
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm()


@pytest.mark.parametrize("targets", ["all-linear", TARGETS], ids=["all-linear", "names"])
def test_layers_have_the_names_of_the_dense_model(opened, targets):
    model = peft.get_peft_model(opened, peft.LoraConfig(target_modules=targets))
    found = [n for n, m in model.named_modules() if type(m).__name__ == "SlabLoraLinear"]
    blocks = [f"base_model.model.model.layers.{i}" for i in range(2)]
    places = [*(f"self_attn.{name}" for name in TARGETS[:4]), *(f"mlp.{n}" for n in TARGETS[4:])]
    assert found == [f"{block}.{place}" for block in blocks for place in places]
    again = peft.LoraConfig(target_modules=targets)
    model.add_adapter("second", again)  # the layers lie within those of PEFT now
    assert len([n for n, _ in model.named_modules() if n.endswith("lora_A.second")]) == 14


def test_training_moves_the_adapter_alone_and_saves_and_loads(opened, folder, tmp_path):
    before = {name: t.clone() for name, t in opened.state_dict().items()}
    model = peft.get_peft_model(
        opened, peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=[*TARGETS, "lm_head"])
    )
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    state = model.state_dict()
    for name, tensor in before.items():
        path, _, part = f"base_model.model.{name}".rpartition(".")
        found = state.get(f"{path}.{part}", state.get(f"{path}.base_layer.{part}"))
        assert torch.equal(found, tensor), name
    model.eval()
    model.save_pretrained(tmp_path)
    base = slab_kernels.load(folder, activations="exact")
    for settings in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **settings)
        assert torch.equal(logits(loaded), logits(model))
    base.load_adapter(tmp_path)  # that of transformers
    assert torch.equal(logits(base), logits(model))


def test_a_merged_model_is_packed_saved_and_opened_again(opened, tmp_path, caplog):
    caplog.set_level(logging.INFO, "slab_kernels.engines")
    model = adapted(
        opened, r=3, lora_alpha=12, use_rslora=True, target_modules=[*TARGETS, "lm_head"]
    )
    wanted, plain = logits(model), logits(model.base_model.model)
    with model.disable_adapter():
        plain = logits(model)
    with pytest.raises(ArchitectureError, match="merge LoRA first"):
        slab_kernels.save(model.base_model.model, tmp_path / "no")
    merged = model.merge_and_unload()
    found = [m.layout for m in merged.modules() if isinstance(m, SlabLinear)]
    assert [layout.adapter_rank for layout in found] == [5] * 15
    (said,) = caplog.messages
    size = sum(
        layout.bits_per_weight() * layout.out_features * layout.in_features for layout in found
    )
    weights = sum(layout.out_features * layout.in_features for layout in found)
    assert f"15 packed layers, which have {size / weights:.3f} bits per weight now" in said
    change = (wanted - plain).norm()
    assert (logits(exact(merged)) - wanted).norm() < 0.05 * change
    slab_kernels.save(merged, tmp_path / "saved")
    merged.save_pretrained(tmp_path / "by transformers")
    for name in ("saved", "by transformers"):
        again = slab_kernels.load(tmp_path / name, activations="exact")
        assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("form", LAYOUTS.values(), ids=LAYOUTS)
def test_merging_adds_s_b_a_and_is_undone_to_the_bit(form):
    model = adapted(layers(form), r=4, lora_alpha=6, target_modules=["0", "1"])
    adapted(model, 1, "second", r=2, lora_alpha=1, target_modules=["0"])
    parts = model.base_model.model
    base = [part.get_base_layer().packed() for part in parts]
    deltas = [part.get_delta_weight("default") for part in parts]
    deltas[0] = deltas[0] + parts[0].get_delta_weight("second")
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    for part, packed, delta in zip(parts, base, deltas, strict=True):
        now = part.get_base_layer().packed()
        assert (now.dense() - packed.dense() - delta).norm() < 0.04 * delta.norm()
        ranks = sum(part.r.values())
        assert now.layout.adapter_rank == packed.layout.adapter_rank + ranks
    model.unmerge_adapter()
    for part, packed in zip(parts, base, strict=True):
        now = part.get_base_layer().packed()
        assert now.layout == packed.layout
        assert all(torch.equal(t, packed.tensors()[name]) for name, t in now.tensors().items())


def test_what_cannot_be_merged_leaves_all_layers_as_they_are():
    model = adapted(layers(LAYOUTS["fp16"]), r=4, target_modules=["0", "1"])
    model.base_model.model[1].lora_B["default"].weight.data[3, 1] = float("nan")
    before = [part.get_base_layer().layout for part in model.base_model.model]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RangeError, match="LoRA cannot be merged into 1: .*nan"):
            merge()
        assert [part.get_base_layer().layout for part in model.base_model.model] == before
        assert not any(part.merged for part in model.base_model.model)


REFUSED = {
    "rank": ({"r": 33}, ArgumentError, "rank 33 .*layers.0.self_attn.q_proj .* 32x32 .* most 32"),
    "rank of a layer": (
        {"rank_pattern": {"k_proj": 17}, "target_modules": ["q_proj", "k_proj"]},
        ArgumentError, "rank 17 is more than model.layers.0.self_attn.k_proj can use: it is 16x32",
    ),
    "DoRA": ({"use_dora": True}, UnsupportedError, "use_dora=True .* plain B A"),
    "bias": ({"lora_bias": True}, UnsupportedError, "lora_bias=True .* holds no bias"),
    "start": ({"init_lora_weights": "pissa"}, UnsupportedError, "'pissa' .* dense weight"),
    "embedding": (
        {"target_modules": ["v_proj", "embed_tokens"]}, UnsupportedError,
        "embed_tokens is a Int8Embedding, .* embeddings='dense'",
    ),
    "whole": ({"modules_to_save": ["lm_head"]}, UnsupportedError, "train lm_head, a frozen"),
    "end": ({"modules_to_save": ["head"]}, UnsupportedError, "'head' would train lm_head"),
    "around": ({"modules_to_save": ["mlp"]}, UnsupportedError, "'mlp' would train .*mlp.gate_proj"),
    "rows": ({"trainable_token_indices": [1]}, UnsupportedError, "rows of model.embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_in_words_before_anything_is_replaced(folder, case):
    settings, error, words = case
    model = slab_kernels.load(folder)
    kinds = {name: type(m) for name, m in model.named_modules()}
    config = peft.LoraConfig(**{"target_modules": "all-linear", **settings})
    asked_for = config.target_modules
    with pytest.raises(error, match=words):
        peft.get_peft_model(model, config)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert config.target_modules == asked_for and not hasattr(model, "peft_config")


def test_a_refused_adapter_is_forgotten():
    model = adapted(layers(LAYOUTS["fp16"]), r=18, target_modules=["0"])
    adapted(model, 1, "second", r=18, target_modules=["0"])
    for _ in range(2):
        with pytest.raises(ArgumentError, match="rank 36"):
            model.base_model.add_weighted_adapter(["default", "second"], [1, 1], "both", "cat")
        assert set(model.peft_config) == {"default", "second"}


@pytest.mark.parametrize("start", ["eva", "Gaussian"])
def test_starts_that_do_not_read_the_weight(start):
    model = layers(LAYOUTS["fp16"])
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
    assert hasattr(peft.get_peft_model(model, config).base_model.model[0], "lora_A")


def test_scaling_is_in_fp32_before_numbers_are_stored():
    """s B alone would leave fp16's range, and s B A does not."""
    model = layers(LAYOUTS["fp16"])
    config = peft.LoraConfig(r=2, lora_alpha=512, target_modules=["0"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    part = model.base_model.model[0]
    part.lora_A.half(), part.lora_B.half()
    part.lora_A["default"].weight.data.fill_(2.0**-16)
    part.lora_B["default"].weight.data.fill_(300.0)
    dense = part.get_base_layer().packed().dense()
    model.merge_adapter()
    added = part.get_base_layer().packed().dense() - dense
    torch.testing.assert_close(
        added, torch.full_like(added, 256 * 300 * 2 * 2.0**-16), rtol=0.01, atol=0
    )


def test_what_adds_nothing_takes_no_bits():
    layout = PackedLayout(24, 64, "int4", 32, rank=1, adapter_rank=2, adapter_values="int8")
    packed, P, Q = random_packed(layout), torch.zeros(24, 3), torch.randn(64, 3)
    assert slab_kernels.format.with_adapter(packed, P, Q) is packed
    P[:, 1] = 1
    assert slab_kernels.format.with_adapter(packed, P, Q).layout.adapter_rank == 3


def test_other_adapters_of_peft_are_refused(folder):
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    with pytest.raises(UnsupportedError, match="takes LoRA and no ADALORA"):
        peft.get_peft_model(slab_kernels.load(folder), config)


@pytest.mark.parametrize("wrapped", [["parts.1"], ["parts.0", "parts.1", "parts.2"]], ids=len)
def test_parts_of_a_fused_layer(wrapped):
    """Each part gets its own adapter; merged, they are one layer again."""
    sizes = (24, 8, 8)
    made = [random_packed(PackedLayout(n, 32, rank=1), seed=i) for i, n in enumerate(sizes)]
    # PEFT asks a model's first parameter where the model lies, so there has to be one.
    norm = nn.LayerNorm(32)
    fused = exact(nn.Sequential(norm, FusedSlabLinear(map(SlabLinear.from_packed, made))))
    x = torch.randn(5, 32)
    plain = fused(x)
    model = adapted(fused, r=2, target_modules=wrapped)
    deltas = [
        part.get_delta_weight("default") if hasattr(part, "lora_A") else torch.zeros(n, 32)
        for part, n in zip(fused[1].parts, sizes, strict=True)
    ]
    wanted = [y + norm(x) @ delta.T for y, delta in zip(plain, deltas, strict=True)]
    torch.testing.assert_close(list(exact(model)(x)), wanted)
    merged = model.merge_and_unload()
    assert not merged[1].wrapped
    exact(merged)(x)
    assert not any(part._linears for part in merged[1].parts), "weights are prepared once"
    torch.testing.assert_close(list(exact(merged)(x)), wanted, rtol=1e-3, atol=1e-3)


def test_a_replacement_that_fails_leaves_no_stale_weights():
    """PEFT replaces one part and then meets what it cannot adapt."""
    made = [random_packed(PackedLayout(8, 32, rank=1), seed=i) for i in range(2)]
    model = nn.Sequential(nn.LayerNorm(32), FusedSlabLinear(map(SlabLinear.from_packed, made)))
    model.add_module("z", nn.Bilinear(2, 2, 2))
    fused, x = exact(model)[1], torch.randn(3, 32)
    fused(x)
    with pytest.raises(ValueError, match="Bilinear"):
        adapted(model, r=2, target_modules=["parts.1", "z"])
    part = fused.parts[1]
    if fused.wrapped:
        part.lora_B["default"].weight.data.fill_(0.1)
    assert torch.equal(fused(x)[1], part(x))


def test_experts_that_peft_takes_for_stacked_ones_are_refused(tmp_path, monkeypatch):
    sizes = tiny_models.CONFIGS["llama"] | {"num_experts": 4, "moe_intermediate_size": 16}
    sizes |= {"head_dim": 8, "decoder_sparse_step": 1, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny_models.CONFIGS, "qwen3_moe", sizes)
    tiny_models.write(tmp_path / "dense", "qwen3_moe")
    settings = {"calibration": tiny_models.tokens(), "progress": False, "group_size": None}
    slab_kernels.compress(tmp_path / "dense", tmp_path / "packed", **settings)
    model = slab_kernels.load(tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="experts that are packed one by one"):
        peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "up_proj", "gate_proj"])
        )
    wrapped = adapted(model, target_modules=["q_proj"])
    assert logits(wrapped).shape == (*IDS.shape, tiny_models.VOCABULARY)


@pytest.mark.slow
def test_the_trainer_of_transformers(opened, tmp_path):
    model = peft.get_peft_model(opened, peft.LoraConfig(target_modules=["q_proj"]))
    settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(tmp_path, disable_tqdm=True, **settings)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    changed = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in changed)


PEFT_FIRST = """
import peft, torch
config = peft.LoraConfig(target_modules=["0"], r=2)
import slab_kernels
layer = slab_kernels.SlabLinear(slab_kernels.PackedLayout(16, 16))
model = peft.get_peft_model(torch.nn.Sequential(layer, torch.nn.LayerNorm(16)), config)
assert type(model.base_model.model[0]).__module__ == "slab_kernels.engines.peft"
"""


@pytest.mark.slow
def test_peft_may_be_imported_first():
    done = subprocess.run([sys.executable, "-c", PEFT_FIRST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_peft_that_has_changed_is_named_and_nothing_is_raised(monkeypatch, caplog):
    def moved() -> None:
        raise AttributeError("moved")

    monkeypatch.setattr("slab_kernels.engines.peft.register", moved)
    engines.register_with_peft()
    assert "The reason: AttributeError: moved" in caplog.text
