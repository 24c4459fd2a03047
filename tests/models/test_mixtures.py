"""Mixtures of experts on every road, packed or dense: read from split names and written so."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import tiny_models
import torch
from matrix.configs import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.aria import modeling_aria

from slab_kernels.cli import main as cli
from slab_kernels.compression.model import compress
from slab_kernels.errors import ArchitectureError, CheckpointError
from slab_kernels.evaluate.inspect import inspect
from slab_kernels.models.decompress import decompress
from slab_kernels.models.experts import expert_slices, is_stacked, stored_slices, unstack
from slab_kernels.models.folder import Checkpoint
from slab_kernels.models.load import load
from slab_kernels.models.save import save
from slab_kernels.models.skeleton import config_skeleton
from slab_kernels.models.source import open_source
from slab_kernels.models.stored_names import stored_forms
from slab_kernels.models.totals import read_totals
from slab_kernels.nn import SlabLinear

EXPERTS = {
    "mixtral": {"num_local_experts": 11},  # two digits: 10 comes after 9
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4},
    # Transposed stacks: with biases, gate and up in turns; and without.
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 6},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "head_dim": 8},
}
COUNT = {
    name: next(n for key, n in given.items() if "experts" in key) for name, given in EXPERTS.items()
}
ROUTERS = {"gpt_oss": "router", "aria_text": "router"}  # the others have a `gate`
SETTINGS = dict(method="magnitude", calibration=tiny_models.tokens(), progress=False)
DENSE_EXPERTS = {**SETTINGS, "skip": "*.mlp.experts"}


def stacked_weight(name: str, experts, number: int, leaf: str) -> torch.Tensor:
    """The weight [rows, columns] of an expert's linear, from transformers' own stacks."""
    transposed = name in ("gpt_oss", "aria_text")
    stack = getattr(experts, "down_proj" if leaf == "down_proj" else "gate_up_proj")[number]
    rows = stack.T if transposed else stack
    if leaf == "down_proj":
        return rows
    half = 0 if leaf == "gate_proj" else 1
    return rows[half::2] if name == "gpt_oss" else rows.chunk(2)[half]


def write(folder, name: str):
    if name == "aria_text" and hasattr(modeling_aria, "AriaGroupedExpertsGemm"):
        pytest.skip("this transformers runs Aria's experts in a form of its own")
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
def test_every_road_computes_what_the_decompressed_twin_does(tmp_path, name):
    dense = write(tmp_path / "dense", name)
    before = copy.deepcopy(dense)
    record = compress(tmp_path / "dense", tmp_path / "packed", **SETTINGS)
    packed = load(tmp_path / "packed")
    linears = {n for n, m in packed.model.layers.named_modules() if isinstance(m, SlabLinear)}
    assert {layer.name.removeprefix("model.layers.") for layer in record.layers} == linears
    experts, router = COUNT[name], ROUTERS.get(name, "gate")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        assert {f"1.mlp.experts.{n}.{leaf}" for n in range(experts)} <= linears
    routers = [getattr(model.model.layers[1].mlp, router) for model in (packed, dense)]
    assert type(routers[0]) is type(routers[1])
    assert torch.equal(routers[0].weight, routers[1].weight)
    want = logits(packed)

    compress(dense, tmp_path / "from_memory", **SETTINGS)
    save(packed, tmp_path / "saved")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(opened), want)
    opened.save_pretrained(tmp_path / "by_transformers")
    for folder in ("from_memory", "saved", "by_transformers"):
        assert torch.equal(logits(load(tmp_path / folder)), want), folder
        if folder != "by_transformers":  # which renames Mixtral's
            assert names(tmp_path / folder) == names(tmp_path / "packed")
        assert read_totals(tmp_path / folder) == read_totals(tmp_path / "packed")
        decompress(tmp_path / folder, tmp_path / f"dense_{folder}")
        assert names(tmp_path / f"dense_{folder}") == names(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "by_transformers")
    assert torch.equal(logits(again), want)
    again.dequantize()
    again.save_pretrained(tmp_path / "dequantized")
    assert names(tmp_path / "dequantized") == names(tmp_path / "dense")
    assert torch.allclose(logits(again), want, atol=1e-5)
    assert torch.equal(logits(compress(dense, **SETTINGS)), want)

    twin, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense_saved", output_loading_info=True
    )
    assert not any(info.values()) and torch.allclose(logits(twin), want, atol=1e-5)
    for packed_layer, layer, was in zip(
        packed.model.layers, twin.model.layers, before.model.layers, strict=True
    ):
        for e in range(experts):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                linear = packed_layer.mlp.experts.expert(e).get_submodule(leaf)
                weight = stacked_weight(name, layer.mlp.experts, e, leaf)
                assert torch.equal(linear.packed().dense(), weight)
                # Half of the weights of the same expert are what they were, in fp16.
                had = stacked_weight(name, was.mlp.experts, e, leaf)
                kept = (weight - had).abs() <= 1e-3 * had.abs()
                assert float(kept.float().mean()) == 0.5
                assert (linear.bias is not None) == (name == "gpt_oss")
        for stack in ("gate_up_proj_bias", "down_proj_bias") if name == "gpt_oss" else ():
            biases = [getattr(each.mlp.experts, stack) for each in (layer, was)]
            assert torch.equal(*biases) and bool(biases[0].all())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_skipped_experts_stay_in_the_form_of_the_checkpoint(tmp_path, name):
    dense = write(tmp_path / "dense", name)
    record = compress(tmp_path / "dense", tmp_path / "packed", **DENSE_EXPERTS)
    assert (
        any(layer.name.endswith("q_proj") for layer in record.layers) and not record.ignored_tensors
    )
    packed = load(tmp_path / "packed")
    assert isinstance(packed.model.layers[0].self_attn.q_proj, SlabLinear)
    assert torch.equal(
        packed.model.layers[1].mlp.experts.down_proj, dense.model.layers[1].mlp.experts.down_proj
    )
    want = logits(packed)
    save(packed, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), want)
    assert names(tmp_path / "saved") == names(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), want)
    decompress(tmp_path / "packed", tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "dense")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()) and torch.allclose(logits(again), want, atol=1e-5)


def test_a_folder_of_stacked_tensors_gives_the_same_shards(tmp_path):
    model = write(tmp_path / "split", "mixtral")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names(tmp_path / "stacked")
    for form in ("split", "stacked"):
        compress(tmp_path / form, tmp_path / f"{form}_out", **SETTINGS)
    assert torch.equal(logits(load(tmp_path / "split_out")), logits(load(tmp_path / "stacked_out")))
    for file in (tmp_path / "split_out").glob("*.safetensors"):
        one, two = load_file(file), load_file(tmp_path / "stacked_out" / file.name)
        packed = {key for key in one if ".experts." in key}
        assert packed or any("norm" in key for key in one)  # the last shard is outside the blocks
        assert all(torch.equal(one[key], two[key]) for key in packed)


def test_bits_and_bytes_count_every_expert_once(tmp_path):
    write(tmp_path / "dense", "olmoe")
    record = compress(tmp_path / "dense", tmp_path / "packed", values="int4", **SETTINGS)
    totals, dense = read_totals(tmp_path / "packed"), read_totals(tmp_path / "dense")
    entries = Checkpoint(tmp_path / "packed").entries
    of_linears = [e.nbytes for n, e in entries.items() if "_proj." in n]
    assert totals.packed_bytes == sum(of_linears)
    per_block = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 3 * 48 * 32  # q and o, k and v, four experts
    assert totals.packed_weights == record.weights == 2 * per_block
    assert totals.parameters == dense.parameters
    assert record.bits_per_weight == pytest.approx(totals.bits_per_weight)
    inspected = inspect(tmp_path / "packed")
    assert inspected["weights"] == record.weights and len(inspected["layers"]) == len(record.layers)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss"])
def test_patterns_that_cannot_be_packed_give_a_dense_folder_for_transformers(tmp_path, name):
    dense = write(tmp_path / "dense", name)
    record = compress(tmp_path / "dense", tmp_path / "out", pattern="50%", **SETTINGS)
    assert names(tmp_path / "out") == names(tmp_path / "dense")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer, was in zip(pruned.model.layers, dense.model.layers, strict=True):
        for stack in ("gate_up_proj", "down_proj"):
            now, before = getattr(layer.mlp.experts, stack), getattr(was.mlp.experts, stack)
            kept = now != 0
            assert float(kept.float().mean()) == 0.5 and torch.equal(now[kept], before[kept])
        for stack in ("gate_up_proj_bias", "down_proj_bias") if name == "gpt_oss" else ():
            assert torch.equal(getattr(layer.mlp.experts, stack), getattr(was.mlp.experts, stack))
    assert {layer.bits_per_weight for layer in record.layers} == {32.0}
    assert inspect(tmp_path / "out")["bits_per_weight"] == 32.0
    in_memory = compress(dense, pattern="50%", **SETTINGS)
    assert torch.equal(logits(in_memory), logits(pruned))


def test_parts_of_the_experts_of_a_block_are_not_skipped(tmp_path):
    model = write(tmp_path / "dense", "qwen2_moe")
    for pattern in ("*.down_proj", "*.experts.3", "*.experts.gate_up_proj", "*.experts.1.up_proj"):
        with pytest.raises(
            ArchitectureError, match=r"packed all or none; .*skip='\*\.mlp\.experts'"
        ):
            compress(model, **{**SETTINGS, "skip": pattern})
    skip = ("*.experts.gate_up_proj", "*.experts.down_proj", "*.shared_expert.down_proj")
    left = compress(model, **{**SETTINGS, "skip": skip}).slab_record.layers
    assert {layer.name.rpartition(".")[2] for layer in left} >= {"q_proj", "gate_proj"}
    assert not any(".experts." in layer.name for layer in left)


def test_biases_are_not_skipped_alone_either(tmp_path):
    model = write(tmp_path / "dense", "gpt_oss")
    for pattern in ("*.experts.gate_up_proj_bias", "*.experts.2.gate_proj", "*.down_proj"):
        with pytest.raises(
            ArchitectureError, match=r"packed all or none; .*skip='\*\.mlp\.experts'"
        ):
            compress(model, **{**SETTINGS, "skip": pattern})


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_widths_that_groups_do_not_divide_are_named(name):
    config = AutoConfig.for_model(
        name,
        **{**tiny_models._TOKENS, **tiny_models._GATED, "intermediate_size": 46},
        num_local_experts=2,
        num_experts_per_tok=2,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ArchitectureError, match=r"down_proj has in_features=46.*skip='\*\.mlp\.experts'"
    ):
        compress(model, **SETTINGS)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_command_line_compresses_and_reads_a_mixture(tmp_path, capsys, name):
    write(tmp_path / "dense", name)
    out = str(tmp_path / "out")
    text = ["--window", "16"]
    given = ["--method", "wanda", "--samples", "2", *text]
    assert cli.run(["compress", str(tmp_path / "dense"), out, *given]) == 0
    said = capsys.readouterr()
    assert "model.layers.0.mlp.experts: of " in said.err + said.out
    for folder in ("dense", "out"):
        assert cli.run(["eval", str(tmp_path / folder), *text, "--max-tokens", "64", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    assert cli.run(["inspect", out, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert sum(".experts." in layer["name"] for layer in layers) == 2 * 4 * 3
    assert (
        cli.run(["check", out]) == 0
        and cli.run(["generate", out, "--prompt", "a b", "--tokens", "3"]) == 0
    )


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


def test_experts_of_unequal_shapes_are_refused_in_one_sentence(tmp_path):
    write(tmp_path / "dense", "mixtral")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.7.w1.weight"
    tensors[name] = tensors[name][:40].clone()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"cannot rebuild 'model\.layers\.1\.mlp\.experts\.gate_up_proj' .*equal size",
    ) as raised:
        compress(tmp_path / "dense", tmp_path / "out", **SETTINGS)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


FORMS = {  # type -> whether a tensor holds one weight, a stack under another name, or as it is
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w3.weight",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "inkling2_text": "model.layers.0.mlp.experts.gate_up_proj",  # rows interleaved on disk
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj_bias",
    "aria_text": "model.layers.0.mlp.experts.fc1.weight",
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_on_disk_is_told_by_numbers_that_go_through_the_conversion(name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    if not dataclasses.is_dataclass(CONFIG_MAPPING[name]):
        pytest.skip("this transformers does not list the settings of a configuration")
    model = config_skeleton(tiny(name))
    stack = next(n for n, m in model.named_modules() if is_stacked(m))
    unstack(model, stack)
    slices = expert_slices(model)
    held = stored_slices(model, slices)
    part = held[FORMS[name]]
    assert part.whole == (name != "mixtral")
    if not part.whole:
        assert part.names == (f"{stack}.1.up_proj.weight",)
    named = [n for each in held.values() for n in each.names]
    assert sorted(named) == sorted(slices)
    weights = {n: torch.full((2, 2), float(i)) for i, n in enumerate(part.names)}
    apart = part.apart(part.joined(weights, slices), slices)
    assert all(torch.equal(apart[n], weights[n]) for n in part.names)
