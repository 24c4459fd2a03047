"""A packed folder opens with exactly its own weights, by `load` as by `from_pretrained`, or not."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slab_kernels
from slab_kernels.errors import ArchitectureError, CheckpointError, VersionError
from slab_kernels.format import PackedLayout
from slab_kernels.nn import SlabLinear
from slab_kernels.nn.replacement import replace_linear

transformers = pytest.importorskip("transformers")
AutoModel = transformers.AutoModelForCausalLM
TOKENS = tiny_models.tokens()


def compress(dense, out, **settings):
    return slab_kernels.compress(
        dense, out, method="magnitude", calibration=TOKENS, progress=False, **settings
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed folder in one file, as `save_pretrained` writes it."""
    top = tmp_path_factory.mktemp("opening")
    tiny_models.write(top / "dense")
    compress(top / "dense", top / "shards")
    slab_kernels.load(top / "shards").save_pretrained(top / "packed")
    return top / "packed"


def edited(folder, tmp_path, config=None, tensors=None):
    """A copy after `config(content)` and `tensors(state)` have changed it."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    if config is not None:
        content = json.loads((copy / "config.json").read_text())
        config(content)
        (copy / "config.json").write_text(json.dumps(content))
    if tensors is not None:
        state = load_file(copy / "model.safetensors")
        tensors(state)
        save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            lambda c: c["quantization_config"]["modules"].pop(UP),
            None,
            f"lacks tensor '{UP}.weight'",
        ),
        (
            lambda c: c.update(num_hidden_layers=3),
            None,
            r"lacks tensor 'model\.layers\.2\..* and 8 more",
        ),
        (
            lambda c: c.update(num_hidden_layers=1),
            None,
            r"module 'model\.layers\.1\..*has not as nn\.Linear",
        ),
        (None, lambda t: t.pop(NORM), f"lacks tensor '{NORM}'"),
        (None, lambda t: t.update(more=torch.ones(2)), "unexpected tensor 'more'"),
        (
            None,
            lambda t: t.update({NORM: torch.ones(31)}),
            rf"'{NORM}' has shape \[31\], expected \[32\]",
        ),
        (None, lambda t: t[NORM].fill_(torch.nan), f"'{NORM}' holds NaN"),
        (
            None,
            lambda t: t["model.embed_tokens.weight"][3].fill_(torch.inf),
            "embed_tokens.weight' holds NaN or inf",
        ),
    ],
)
def test_weights_that_are_not_its_own_are_refused(packed, tmp_path, config, tensors, message):
    folder = edited(packed, tmp_path, config, tensors)
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            opening(folder)
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_other_classes_and_arguments_are_refused(packed):
    with pytest.raises(CheckpointError, match="has not as nn.Linear"):
        transformers.AutoModel.from_pretrained(packed)
    with pytest.raises(CheckpointError, match=r"lacks tensor 'score\.weight'"):
        transformers.AutoModelForSequenceClassification.from_pretrained(packed)
    with pytest.raises(
        CheckpointError,
        match=r"no weight for 'model\.layers\.0\.input_layernorm\.weight' and 1 more",
    ):
        AutoModel.from_pretrained(
            packed, key_mapping={"input_layernorm": "post_attention_layernorm"}
        )
    config = transformers.AutoConfig.from_pretrained(packed)
    with pytest.raises(CheckpointError, match="from its folder only"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=load_file(packed / "model.safetensors")
        )


def test_a_cast_that_overflows_is_refused(packed, tmp_path):
    folder = edited(packed, tmp_path, None, lambda t: t[NORM].fill_(1e6))
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        with pytest.raises(
            CheckpointError, match=rf"'{NORM}' holds NaN or infinite numbers of torch\.float16"
        ):
            opening(folder, dtype=torch.float16)


@pytest.mark.parametrize("key", ["weight_map", "transformers_weights"])
@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_the_folder_are_refused(packed, tmp_path, key, absolute):
    """The other folder is whole, so that only the place of the file can be the reason."""
    other, folder = (
        shutil.copytree(packed, tmp_path / "other"),
        shutil.copytree(packed, tmp_path / "folder"),
    )
    file = (
        str(other / "model.safetensors")
        if absolute
        else os.path.join("..", "other", "model.safetensors")
    )
    (folder / "model.safetensors").unlink()
    if key == "weight_map":
        listed = {name: file for name in load_file(other / "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": listed})
        )
    else:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {key: file}))
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        with pytest.raises(
            (CheckpointError, ValueError),
            match=r"does not lie in|in the same folder|inside the model dir",
        ):
            opening(folder)


@pytest.mark.parametrize("arguments", [{"subfolder": "inside"}, {"variant": "fp32"}])
def test_files_elsewhere_in_the_folder_open(packed, tmp_path, arguments):
    model = slab_kernels.load(packed)
    model.save_pretrained(
        tmp_path / arguments.get("subfolder", ""), variant=arguments.get("variant")
    )
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path, **arguments)), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": None}, "lists no compressed modules"),
        ({"modules": [1]}, "lists no compressed modules"),
        ({"modules": {UP: {"self": 1}}}, "up_proj"),
        ({"format_version": 10**30}, "format_version"),
        ({"format_version": None}, "format_version"),
        ({"modules": {UP: {"out_features": "48", "in_features": 32}}}, "up_proj"),
        ({"modules": {UP: {"out_features": 10**30, "in_features": 32}}}, "up_proj"),
    ],
)
def test_a_malformed_quantization_config_is_refused(packed, tmp_path, change, message):
    folder = edited(packed, tmp_path, lambda c: c["quantization_config"].update(change))
    with pytest.raises((CheckpointError, VersionError), match=message):
        AutoModel.from_pretrained(folder)


def test_what_a_quantization_config_holds_beside_modules_does_no_harm(packed, tmp_path):
    deep: list = []
    for _ in range(40):
        deep = [deep]
    more = {"self": 1, "cls": 2, "rank": deep, "settings": {"a": 1}, "colour": deep}
    folder = edited(packed, tmp_path, lambda c: c["quantization_config"].update(more))
    model = AutoModel.from_pretrained(folder)
    assert torch.equal(logits(model), logits(slab_kernels.load(packed)))
    assert "colour" not in model.config.quantization_config.to_dict()


MIXTURE = {**tiny_models._GATED, "num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    **tiny_models._COMMON, "intermediate_size": 48, "num_key_value_heads": 4, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MODERNBERT = {**tiny_models._COMMON, "intermediate_size": 48}
BIGCODE = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
}


@pytest.mark.parametrize(
    ("kind", "config", "skip"),
    [
        (
            "youtu",
            LATENT,
            (),
        ),  # transformers zeroes the embedding's padding row wherever it initialises
        ("gpt_bigcode", BIGCODE, ()),  # these three ask their linears for `weight` there
        ("nanochat", tiny_models._GATED | {"head_dim": 8}, ()),
        ("modernbert-decoder", MODERNBERT, ()),
        ("gpt_neox", tiny_models.CONFIGS["gpt_neox"], ()),  # renamed by save_pretrained
        ("mixtral", MIXTURE, ("*.experts", "*.gate")),  # taken apart by save_pretrained
    ],
)
def test_every_road_gives_one_function(tmp_path, kind, config, skip):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    given = transformers.AutoConfig.for_model(kind, **{**tiny_models._TOKENS, **config})
    torch.manual_seed(0)
    dense = AutoModel.from_config(given)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    dense.save_pretrained(tmp_path / "given")
    compress(tmp_path / "given", tmp_path / "packed", skip=skip)
    ours, theirs = (
        slab_kernels.load(tmp_path / "packed"),
        AutoModel.from_pretrained(tmp_path / "packed"),
    )
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    slab_kernels.save(theirs, tmp_path / "saved")
    again = [
        opening(tmp_path / name)
        for name in ("ours", "theirs")
        for opening in (slab_kernels.load, AutoModel.from_pretrained)
    ]
    for model in (theirs, *again, slab_kernels.load(tmp_path / "saved")):
        assert torch.equal(logits(model), logits(ours))
    slab_kernels.decompress(tmp_path / "theirs", tmp_path / "dense")
    torch.testing.assert_close(
        logits(AutoModel.from_pretrained(tmp_path / "dense")), logits(ours), rtol=1e-4, atol=1e-4
    )


def test_no_weight_is_initialised_again(tmp_path):
    """transformers zeroes the padding row of this embedding wherever it initialises."""
    if "youtu" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no youtu")
    torch.manual_seed(0)
    dense = AutoModel.from_config(
        transformers.AutoConfig.for_model("youtu", **{**tiny_models._TOKENS, **LATENT})
    )
    nn.init.ones_(dense.model.embed_tokens.weight)
    compress(dense, tmp_path / "packed")
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        assert bool((opening(tmp_path / "packed").model.embed_tokens.weight == 1).all())


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class XConfig(LlamaConfig):
    model_type = "KIND"

class XForCausalLM(LlamaForCausalLM):
    config_class = XConfig

    def _init_weights(self, module):  # whatever is loaded already
        super()._init_weights(module)
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.data.normal_()
"""


@pytest.mark.parametrize("kind", ["own-llama", "llama"])
def test_remote_code_opens_with_its_own_weights(packed, tmp_path, monkeypatch, kind):
    def mark(content):
        auto_map = {"AutoConfig": "code_x.XConfig", "AutoModelForCausalLM": "code_x.XForCausalLM"}
        content.update(model_type=kind, auto_map=auto_map)

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = edited(packed, tmp_path, mark)
    (folder / "code_x.py").write_text(CODE.replace("KIND", kind))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "XForCausalLM"
    assert torch.equal(logits(model), logits(slab_kernels.load(packed)))
    if kind == "llama":
        assert torch.equal(logits(slab_kernels.load(folder)), logits(model))
    else:
        with pytest.raises(
            ArchitectureError, match="own Python code .* give trust_remote_code=True"
        ):
            slab_kernels.load(folder)


def head_of_its_own(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = torch.randn(96, 32, generator=torch.Generator().manual_seed(5))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state["lm_head.weight"]


@pytest.mark.parametrize("road", ["folder", "module"])
def test_a_head_of_its_own_beside_a_tied_config_is_kept(tmp_path, road):
    tiny_models.write(tmp_path / "dense")
    head = head_of_its_own(tmp_path / "dense")
    source = (
        tmp_path / "dense" if road == "folder" else AutoModel.from_pretrained(tmp_path / "dense")
    )
    compress(source, tmp_path / "packed")
    ours, theirs = (
        slab_kernels.load(tmp_path / "packed"),
        AutoModel.from_pretrained(tmp_path / "packed"),
    )
    theirs.save_pretrained(tmp_path / "again")
    slab_kernels.save(ours, tmp_path / "saved")
    slab_kernels.decompress(tmp_path / "packed", tmp_path / "dense again")
    models = [ours, theirs, AutoModel.from_pretrained(tmp_path / "dense again")]
    models += [
        opening(tmp_path / f)
        for f in ("again", "saved")
        for opening in (slab_kernels.load, AutoModel.from_pretrained)
    ]
    for model in models:
        model.tie_weights()  # which asks the config, not the weights
        assert torch.equal(model.lm_head.weight, head)
        assert not torch.equal(model.model.embed_tokens.weight, head)


def test_a_packed_folder_with_either_or_both_of_a_tied_pair(packed, tmp_path):
    want = logits(slab_kernels.load(packed))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for number, change in enumerate(
        (
            lambda t: t.update({head: t[embedding].clone()}),
            lambda t: t.update({head: t.pop(embedding)}),
        )
    ):
        folder = edited(packed, tmp_path / str(number), None, change)
        for opening in (slab_kernels.load, AutoModel.from_pretrained):
            model = opening(folder)
            assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
            assert torch.equal(logits(model), want)
    folder = edited(packed, tmp_path / "own")
    own = head_of_its_own(folder)
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        assert torch.equal(opening(folder).lm_head.weight, own)
    folder = edited(packed, tmp_path / "lost", lambda c: c.update(tie_word_embeddings=False))
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=r"lacks tensor 'lm_head\.weight'"):
            opening(folder)


def test_a_packed_head_is_no_embedding(packed, tmp_path):
    model = slab_kernels.load(packed)
    layer = SlabLinear(PackedLayout(96, 32, "fp16", None, 1))
    replace_linear(model, {"lm_head": layer.packed()})
    want = logits(model)
    slab_kernels.save(model, tmp_path / "saved")
    for opening in (slab_kernels.load, AutoModel.from_pretrained):
        assert torch.equal(logits(opening(tmp_path / "saved")), want)


def test_what_cannot_be_saved_is_named(packed, tmp_path):
    plain = nn.Sequential(SlabLinear(PackedLayout(32, 32, "fp16", None, 1)))
    with pytest.raises(ArchitectureError, match="Sequential has no Hugging Face config"):
        slab_kernels.save(plain, tmp_path / "never")
    model = slab_kernels.load(packed)
    model.model.norm.to("meta")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is on meta"):
        slab_kernels.save(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_blocks_that_share_a_layer_are_saved_with_both_names(packed, tmp_path):
    model = slab_kernels.load(packed)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    slab_kernels.save(model, tmp_path / "saved")
    assert torch.equal(logits(slab_kernels.load(tmp_path / "saved")), logits(model))
