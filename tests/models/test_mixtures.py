"""Mixtures of experts that stay dense: read from split names and written back in that form."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slab_kernels.cli import main as cli
from slab_kernels.compression.model import compress
from slab_kernels.errors import CheckpointError
from slab_kernels.models.decompress import decompress
from slab_kernels.models.load import load
from slab_kernels.models.save import save
from slab_kernels.models.source import open_source
from slab_kernels.models.stored_names import stored_forms
from slab_kernels.nn import SlabLinear

EXPERTS = {
    "mixtral": {"num_local_experts": 12},  # two digits: 10 comes after 9
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4},
}
SETTINGS = dict(
    method="magnitude",
    calibration=tiny_models.tokens(),
    progress=False,
    skip=("*.mlp.gate", "*.mlp.experts"),
)


def write(folder, name: str):
    common = {
        **tiny_models._TOKENS,
        **tiny_models._GATED,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **common, **EXPERTS[name])
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return model


def names(folder) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_models.tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", EXPERTS)
def test_attention_is_packed_and_experts_stay(tmp_path, name):
    dense = write(tmp_path / "dense", name)
    record = compress(tmp_path / "dense", tmp_path / "packed", **SETTINGS)
    assert (
        any(layer.name.endswith("q_proj") for layer in record.layers) and not record.ignored_tensors
    )
    compress(dense, tmp_path / "from_memory", **SETTINGS)
    packed = load(tmp_path / "packed")
    assert isinstance(packed.model.layers[0].self_attn.q_proj, SlabLinear)
    assert torch.equal(
        packed.model.layers[1].mlp.experts.down_proj, dense.model.layers[1].mlp.experts.down_proj
    )
    want = logits(packed)
    save(packed, tmp_path / "saved")
    for folder in ("from_memory", "saved"):
        assert torch.equal(logits(load(tmp_path / folder)), want)
        assert names(tmp_path / folder) == names(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), want)
    assert torch.equal(logits(compress(dense, **SETTINGS)), want)
    decompress(tmp_path / "packed", tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "dense")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()) and torch.allclose(logits(again), want, atol=1e-5)


def test_the_advice_leads_to_a_packed_folder_and_eval_of_the_dense_one_runs(tmp_path, capsys):
    write(tmp_path / "dense", "qwen3_moe")
    arguments = [
        "compress",
        str(tmp_path / "dense"),
        str(tmp_path / "out"),
        "--samples",
        "2",
        "--window",
        "16",
    ]
    assert cli.run(arguments) == 3
    said = capsys.readouterr().err
    advice = [
        word.rstrip(",").strip("'")
        for before, word in zip(said.split(), said.split()[1:], strict=False)
        if before == "--skip"
    ]
    assert advice == ["*.mlp.gate", "*.mlp.experts"] or advice == ["*.mlp.experts", "*.mlp.gate"]
    assert cli.run([*arguments, *(part for pattern in advice for part in ("--skip", pattern))]) == 0
    for folder in ("dense", "out"):
        capsys.readouterr()
        assert (
            cli.run(
                ["eval", str(tmp_path / folder), "--window", "16", "--max-tokens", "64", "--json"]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_names_of_a_large_model_are_made_from_one_look_at_it(tmp_path, monkeypatch):
    model, looks = write(tmp_path, "qwen3_moe"), []
    tensors, look = model.state_dict(), type(model).state_dict
    monkeypatch.setattr(type(model), "state_dict", lambda *a, **k: looks.append(a) or look(*a, **k))
    forms = stored_forms(model, tensors)
    assert any(".experts.3." in name for name in forms) and len(looks) == 1


def test_an_expert_that_is_not_there_is_named(tmp_path):
    write(tmp_path / "dense", "mixtral")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.7.w1.weight"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"cannot rebuild 'model\.layers\.1\.mlp\.experts\.gate_up_proj' from tensor "
        r"'model\.layers\.1\.block",
    ):
        open_source(tmp_path / "dense")
