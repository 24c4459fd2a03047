"""Packed folders served by vLLM against `slab_kernels.load(...).generate`.

These tests run only where vLLM is installed (`make test-vllm`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slab_kernels
from slab_kernels.errors import ArchitectureError, CheckpointError, ShapeError
from slab_kernels.format import PackedWeight
from slab_kernels.models.packed_config import read_layouts
from slab_kernels.testing import random_packed

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; the default is most of the memory
pytest.importorskip("vllm")

DTYPE = "float16" if ON_GPU else "float32"
SIZES = {  # heads of a size that vLLM's attention has, and slices of whole groups on two ranks
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "max_position_embeddings": 128,
}  # fmt: skip
SIZES_OF = {
    "gemma": SIZES | {"head_dim": 32},
    "gptj": {"n_embd": 128, "rotary_dim": 32},
    "bloom": {"hidden_size": 192, "n_head": 2},
    "opt": {
        "hidden_size": 128, "num_attention_heads": 4, "word_embed_proj_dim": 128, "ffn_dim": 256,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
PROMPTS = [tiny_models.tokens(1, length, seed=length)[0].tolist() for length in (3, 8, 17)]
SERVE = """
import json, shutil, sys
def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    folder, arguments, prompts, reloads, adapter = sys.argv[1], *map(json.loads, sys.argv[2:])
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    model = LLM(folder, max_model_len=64, gpu_memory_utilization=0.3, **arguments)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    def generate():
        asked = [{"prompt_token_ids": p} for p in prompts]
        found = model.generate(asked, greedy, use_tqdm=False, lora_request=lora)
        found = [f.outputs[0] for f in found]
        return [[list(f.token_ids), f.cumulative_logprob] for f in found]
    answers = [generate()]
    for other in reloads:
        shutil.copytree(other, folder, dirs_exist_ok=True)
        model.collective_rpc("reload_weights")
        answers.append(generate())
    print("ANSWERS", json.dumps(answers), flush=True)
if __name__ == "__main__":
    main()
"""


def serve(folder, reloads=(), adapter=None, **arguments) -> list[list]:
    """Greedy tokens and the sum of their log probabilities for each prompt, by a vLLM of its own.

    reloads: folders that are then copied over the first one by one, each followed by a reload and
    the same prompts. adapter: a folder of LoRA matrices.

    Raises: RuntimeError with all it said.
    """
    world = arguments.get("tensor_parallel_size", 1)
    if ON_GPU and torch.cuda.device_count() < world:
        pytest.skip(f"{world} GPUs wanted")
    binding = (
        {}
        if ON_GPU or world == 1
        else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(world)))}
    )
    settings = json.dumps({"dtype": DTYPE, "enforce_eager": True, **arguments})
    given = PROMPTS, [str(other) for other in reloads], adapter and str(adapter)
    command = [sys.executable, "-c", SERVE, str(folder), settings, *map(json.dumps, given)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **binding}
    )
    found = re.search("^ANSWERS (.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(found[1])


def assert_ours(answers: list, folder) -> None:
    """The answers of `serve` are those of `slab_kernels.load(folder).generate`."""
    assert_same(answers, slab_kernels.load(folder, device="auto", dtype=getattr(torch, DTYPE)))


def assert_same(answers: list, model) -> None:
    """The answers of `serve` are those of `model.generate`."""
    settings = {
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    for prompt, (tokens, logprob) in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert tokens == found.sequences[0, len(prompt) :].tolist()
        want = sum(float(torch.log_softmax(scores.float(), -1).max()) for scores in found.scores)
        assert abs(logprob - want) < (0.2 if ON_GPU else 1e-3), (logprob, want)


def scaled(packed: PackedWeight, norm: float) -> PackedWeight:
    """The same weight with rows of this norm on average."""
    factor = norm / float(packed.dense().norm(dim=1).mean())
    changed = {
        name: packed.tensors()[name]
        for name in ("values" if packed.scales is None else "scales", "U", "P")
        if name in packed.tensors()
    }
    return replace(
        packed,
        **{name: (tensor.float() * factor).to(tensor.dtype) for name, tensor in changed.items()},
    )


def randomly_packed(folder, architecture: str, forms: list[dict], seed: int = 0, **sizes) -> None:
    """A model whose linears are random packed weights of these forms in turn, with a tokenizer.

    Queries and keys are large: attention is then far from uniform, and a wrong one of them changes
    the tokens.
    """
    tiny_models.write(folder / "dense", architecture, **sizes)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    linears = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    packed = {}
    for i, (name, linear) in enumerate(linears):
        layout = slab_kernels.PackedLayout(
            linear.out_features, linear.in_features, **forms[i % len(forms)]
        )
        packed[name] = scaled(
            random_packed(layout, seed=100 * seed + i),
            1.5 if re.search("q_proj|k_proj|qkv", name) else 0.6,
        )
    slab_kernels.save(
        slab_kernels.replace_linear(model, packed), folder / "packed", tiny_models.tokenizer()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama compressed to int4 with adapters, and with the default's int8 rows, tied."""
    top = tmp_path_factory.mktemp("llama")
    tiny_models.write(top / "dense", "llama", **SIZES)
    settings = {
        "values": "int4",
        "group_size": 32,
        "adapter_rank": 4,
        "calibration": tiny_models.tokens(),
    }
    slab_kernels.compress(top / "dense", top / "packed", progress=False, **settings)
    return top / "packed"


@pytest.mark.parametrize(
    "mode",
    [{}, {"enforce_eager": False}, {"tensor_parallel_size": 2}],
    ids=["eager", "compiled", "tensor-parallel-2"],
)
def test_the_tokens_are_those_of_transformers(folder, mode):
    assert_ours(*serve(folder, **mode), folder)


@pytest.fixture
def whole(request, tmp_path):
    """A model compressed to int4 with its embedding and its head as the test asks for them.

    Of the 96 tokens, padded to 128, the second of two ranks has 32 rows of its 64.
    """
    architecture, changes, asked = request.param
    tiny_models.write(
        tmp_path / "dense", architecture, **SIZES_OF.get(architecture, SIZES), **changes
    )
    settings = {"values": "int4", "group_size": 32, "calibration": tiny_models.tokens()}
    slab_kernels.compress(
        tmp_path / "dense", tmp_path / "packed", progress=False, **settings, **asked
    )
    return tmp_path / "packed"


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
DENSE, INT8 = {"embeddings": "dense"}, {"embeddings": "int8"}
HEAD, BOTH = DENSE | {"head": True}, INT8 | {"head": True}
WHOLE = [
    ("llama", TIED, INT8),
    ("llama", TIED, HEAD),
    ("llama", TIED, BOTH),
    ("llama", UNTIED, INT8),
    ("llama", UNTIED, BOTH),
    ("llama", TIED, DENSE),
]


def name_of(case: tuple) -> str:
    architecture, changes, asked = case
    head = ["head"] if "head" in asked else []
    return "-".join(
        [architecture, "tied" if changes == TIED else "untied", asked["embeddings"], *head]
    )


def assert_dense(answers: list, folder, top) -> None:
    """The answers are those of transformers on the dense folder that `decompress` writes."""
    from transformers import AutoModelForCausalLM

    slab_kernels.decompress(folder, top / "again")
    assert_same(answers, AutoModelForCausalLM.from_pretrained(top / "again", dtype=DTYPE))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("whole", WHOLE, ids=name_of, indirect=True)
def test_int8_rows_and_packed_heads(whole, ranks, tmp_path):
    (answers,) = serve(whole, tensor_parallel_size=ranks)
    assert_ours(answers, whole)
    if not ON_GPU:
        assert_dense(answers, whole, tmp_path)


@pytest.mark.parametrize(
    "whole",
    [
        ("gemma", TIED, INT8),  # vLLM does not tell the quantization of its embedding
        ("cohere", TIED, INT8),  # its model in vLLM has no module for the head
        ("opt", TIED, INT8),
        ("gptj", UNTIED, BOTH),  # a head with a bias
    ],
    ids=name_of,
    indirect=True,
)
def test_int8_rows_and_packed_heads_of_other_models(whole):
    assert_ours(*serve(whole), whole)


@pytest.mark.parametrize("whole", WHOLE[:1], ids=name_of, indirect=True)
@pytest.mark.parametrize(
    "mode", [{"enforce_eager": False}, {"pipeline_parallel_size": 2}], ids=["compiled", "pipeline"]
)
def test_int8_rows_in_other_modes(whole, mode):
    assert_ours(*serve(whole, **mode), whole)


@pytest.mark.parametrize("asked", [INT8, BOTH], ids=["shared", "head"])
def test_int8_rows_and_packed_heads_loaded_anew(tmp_path, asked):
    """Also on a rank whose last rows only pad."""
    folders = []
    for seed in (1, 2):
        top = tmp_path / str(seed)
        tiny_models.write(top / "dense", "llama", seed=seed, **SIZES)
        settings = {"values": "int4", "group_size": 32, "calibration": tiny_models.tokens()}
        slab_kernels.compress(top / "dense", top / "packed", progress=False, **settings, **asked)
        folders.append(top / "packed")
    first, second = folders
    live = shutil.copytree(first, tmp_path / "live")
    answers = serve(live, reloads=[second, first])
    for answer, folder in zip(answers, (first, second, first), strict=True):
        assert_ours(answer, folder)


FORMS = [
    {"values": "int4", "planes": 2, "rank": 1},
    {"values": "fp16", "rank": 2},
    {"values": "int8", "group_size": 32, "adapter_rank": 3},
]


def test_weights_of_different_types_in_one_fused_layer_with_biases_and_loaded_anew(tmp_path):
    for seed, name in enumerate(("first", "second")):
        randomly_packed(tmp_path / name, "qwen2", FORMS, seed, **SIZES, use_sliding_window=False)
    first, second = tmp_path / "first" / "packed", tmp_path / "second" / "packed"
    live = shutil.copytree(first, tmp_path / "live")
    answers = serve(live, reloads=[second, first])
    for answer, folder in zip(answers, (first, second, first), strict=True):
        assert_ours(answer, folder)


def test_one_key_head_for_two_ranks(tmp_path):
    randomly_packed(
        tmp_path, "qwen2", FORMS, **(SIZES | {"num_key_value_heads": 1}), use_sliding_window=False
    )
    assert_ours(*serve(tmp_path / "packed", tensor_parallel_size=2), tmp_path / "packed")


def test_weights_that_are_fused_on_disk(tmp_path):
    randomly_packed(tmp_path, "phi3", FORMS[:1], **SIZES)
    assert_ours(*serve(tmp_path / "packed", tensor_parallel_size=2), tmp_path / "packed")


@pytest.fixture
def compressed(request, tmp_path):
    """A model of the architecture that the test asks for, compressed to int4."""
    tiny_models.write(tmp_path / "dense", request.param, **SIZES_OF.get(request.param, SIZES))
    settings = {"values": "int4", "group_size": 32, "calibration": tiny_models.tokens()}
    slab_kernels.compress(tmp_path / "dense", tmp_path / "packed", progress=False, **settings)
    return tmp_path / "packed"


@pytest.mark.parametrize("compressed", ["stablelm", "gptj"], indirect=True)
def test_models_that_do_not_list_what_they_fuse(compressed):
    assert_ours(*serve(compressed), compressed)


@pytest.mark.parametrize("compressed", ["bloom"], indirect=True)
def test_a_model_whose_loader_reorders_rows_is_refused(compressed):
    message = r"BloomForCausalLM splits or reorders .*query_key_value\.weight while .*decompress"
    with pytest.raises(RuntimeError, match=message):
        serve(compressed)


MIXTURES = {
    "mixtral": ({"num_local_experts": 4}, ["*.mlp.gate", "*.mlp.experts"]),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        ["*.mlp.gate", "*.mlp.experts", "*.shared_expert_gate"],
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_with_dense_experts_packed_and_decompressed(name, tmp_path, monkeypatch):
    sizes, skip = MIXTURES[name]
    sizes |= {"num_experts_per_tok": 2, "initializer_range": 0.15}
    monkeypatch.setitem(tiny_models.CONFIGS, name, tiny_models.CONFIGS["phi3"] | SIZES | sizes)
    tiny_models.write(tmp_path / "dense", name)
    settings = {"values": "int4", "group_size": 32, "calibration": tiny_models.tokens()}
    packed = tmp_path / "packed"
    slab_kernels.compress(tmp_path / "dense", packed, skip=skip, progress=False, **settings)
    slab_kernels.decompress(packed, tmp_path / "again")
    for folder in (packed, tmp_path / "again"):
        assert_ours(*serve(folder), packed)


@pytest.mark.parametrize("whole", [WHOLE[0], WHOLE[4]], ids=name_of, indirect=True)
def test_an_adapter_on_packed_layers(whole, tmp_path):
    slab_kernels.decompress(whole, tmp_path / "again")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=getattr(torch, DTYPE))
    targets, state = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], {}
    for name, linear in model.named_modules():
        if name.rpartition(".")[2] in targets:
            N, K = linear.weight.shape
            A, B = torch.randn(4, K) * 0.1, torch.randn(N, 4) * 0.1
            for which, matrix in (("A", A), ("B", B)):
                state[f"base_model.model.{name}.lora_{which}.weight"] = matrix
            linear.weight.data += (B @ A).to(linear.weight) * 2  # lora_alpha / r
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(state, adapter / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    assert_same(*serve(whole, adapter=adapter, enable_lora=True, max_lora_rank=8), model)


def test_an_adapter_of_peft_is_served_as_it_is_merged(tmp_path, monkeypatch):
    """q, k, v and gate, up are one layer each in vLLM, and each part has matrices of its own."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    # x is rounded to int8 for P Q^T of a merged adapter, and not for one beside the weight.
    monkeypatch.setenv("SLAB_KERNELS_CPU_ACTIVATIONS", "exact")
    tiny_models.write(tmp_path / "dense", "llama", **SIZES)
    packed, merged, adapter = (tmp_path / name for name in ("packed", "merged", "adapter"))
    settings = {"values": "int4", "group_size": 32, "calibration": tiny_models.tokens()}
    slab_kernels.compress(tmp_path / "dense", packed, progress=False, **settings)
    base = slab_kernels.load(packed, device="auto", dtype=getattr(torch, DTYPE))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(adapter)
    (beside,) = serve(packed, adapter=adapter, enable_lora=True, max_lora_rank=8)
    assert_same(beside, model)
    slab_kernels.save(model.merge_and_unload(), merged, tiny_models.tokenizer())
    (inside,) = serve(merged)
    assert [tokens for tokens, _ in inside] == [tokens for tokens, _ in beside]
    (plain,) = serve(packed)
    assert [tokens for tokens, _ in plain] != [tokens for tokens, _ in beside]


def test_weights_of_a_dummy_load_are_zero(folder):
    (answers,) = serve(folder, load_format="dummy")
    assert len(answers) == len(PROMPTS)


def test_weights_after_a_dummy_load_are_refused(monkeypatch):
    """vLLM itself refuses to reload from the folder then, but takes weights from a program."""
    import vllm.model_executor.layers.linear as layers
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config

    from slab_kernels.engines.vllm import SlabVllmConfig
    from slab_kernels.engines.vllm_probe import probe_model

    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SlabVllmConfig({"o_proj": slab_kernels.PackedLayout(48, 64, "int4", rank=1)})
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = layers.ReplicatedLinear(
            64, 48, bias=False, quant_config=config, params_dtype=torch.float32, prefix="o_proj"
        )
    layer.quant_method.process_weights_after_loading(layer)
    assert not layer.quant_method.apply(layer, torch.randn(3, 64)).any()
    with pytest.raises(ArchitectureError, match=r"load_format='dummy' takes no weights later"):
        probe_model(layer, lambda weights: None)


def edit_tensor(name, change, folder) -> None:
    """Replace a tensor by `change` of it, and its shard by one without checksums; None drops it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    state = load_file(file)
    if change is None:
        del state[name], index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        state[name] = change(state[name])
    save_file(state, file)


def flip_a_byte(folder) -> None:
    shard = min(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def add_other_weights(folder) -> None:
    shutil.copy(min(folder.glob("*.safetensors")), folder / "consolidated.safetensors")


def new_format(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


KEYS, NORM = "model.layers.1.self_attn.k_proj.signs", "model.layers.1.input_layernorm.weight"
UP, DOWN = "model.layers.1.mlp.up_proj.values", "model.layers.1.mlp.down_proj.metadata"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(edit_tensor, KEYS, None), rf"lacks tensor '{KEYS}'"),
        (partial(edit_tensor, NORM, None), rf"lacks tensor '{NORM}'"),
        (
            partial(edit_tensor, UP, lambda t: t[:, :8].contiguous()),
            rf"'{UP}' has shape \[256, 8\]",
        ),
        (flip_a_byte, r"^tensor '\S+' in \S+ is damaged: its checksum is"),
        (add_other_weights, r"^\S+ holds two sets of weights, .*\('consolidated\.safetensors'\)"),
        (new_format, r"^this model has format_version 99, .* update"),
    ],
    ids=["no-keys", "no-norm", "misshapen", "flipped", "two-sets", "newer"],
)
def test_unusable_folders_are_refused_before_the_engine_starts(folder, tmp_path, change, message):
    """In their own sentence, not inside that of pydantic, which prints all of vLLM's settings."""
    from vllm.engine.arg_utils import EngineArgs

    copy = shutil.copytree(folder, tmp_path / "copy")
    EngineArgs(model=str(copy), dtype=DTYPE).create_engine_config()
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        EngineArgs(model=str(copy), dtype=DTYPE).create_engine_config()


def test_damaged_tensors_without_checksums_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_tensor(DOWN, torch.zeros_like, copy)
    message = r"model\.layers\.1\.mlp\.down_proj: metadata holds"
    with pytest.raises(RuntimeError, match=message):
        serve(copy)


def a_layer(kind) -> nn.Module:
    """An object of that class without its sizes: enough to ask for its method."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


def test_what_cannot_be_packed_is_refused_in_words(folder):
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import (
        QKVParallelLinear,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from slab_kernels.engines import register_with_vllm
    from slab_kernels.engines.vllm import SlabVllmConfig
    from slab_kernels.engines.vllm_linear import SlabLinearMethod
    from slab_kernels.models.folder import Checkpoint

    register_with_vllm()
    layouts = read_layouts(Checkpoint(folder))
    config = SlabVllmConfig(
        layouts
        | {
            "model.layers.0.moe.experts.0.up_proj": next(iter(layouts.values())),
            "lm_head": next(iter(layouts.values())),
        }
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    where = "model.layers.0.self_attn"
    assert isinstance(
        config.get_quant_method(a_layer(QKVParallelLinear), f"{where}.qkv_proj"), SlabLinearMethod
    )
    assert isinstance(
        config.get_quant_method(a_layer(RowParallelLinear), f"{where}.o_proj"), SlabLinearMethod
    )
    assert isinstance(
        config.get_quant_method(a_layer(RowParallelLinear), "visual.o_proj"),
        UnquantizedLinearMethod,
    )
    assert config.get_quant_method(a_layer(nn.Module), f"{where}.attn") is None
    with pytest.raises(
        NotImplementedError, match=r"experts\.0\.up_proj is packed.*RoutedExperts.*decompress"
    ):
        config.get_quant_method(a_layer(RoutedExperts), "model.layers.0.moe.experts")
    assert config.get_quant_method(a_layer(ParallelLMHead), "lm_head") is None  # it comes later
    del config.layouts[f"{where}.k_proj"]
    with pytest.raises(
        NotImplementedError,
        match=r"q_proj is packed and .*k_proj is not; compress all of them or none",
    ):
        config.get_quant_method(a_layer(QKVParallelLinear), f"{where}.qkv_proj")


def test_a_replicated_layer_is_whole_on_every_rank_and_keeps_its_storage(monkeypatch):
    import vllm.model_executor.layers.linear as layers
    from torch.utils._pytree import tree_leaves
    from vllm.config import VllmConfig, set_current_vllm_config

    from slab_kernels.engines.vllm import SlabVllmConfig
    from slab_kernels.engines.vllm_probe import probe_model

    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: 2)
    layout = slab_kernels.PackedLayout(48, 64, "int4", rank=1)
    config = SlabVllmConfig({"mixer.q_a_proj": layout})
    config.packed_modules_mapping = {}
    settings = {"bias": False, "quant_config": config, "params_dtype": torch.float32}
    with set_current_vllm_config(VllmConfig()):
        layer = layers.ReplicatedLinear(64, 48, prefix="mixer.q_a_proj", **settings)
        for sizes, what in (
            ((64, 40), "out_features=48, vLLM's layer 40"),
            ((128, 48), "in_features=64, vLLM's layer 128"),
        ):
            with pytest.raises(ShapeError, match=what):
                layers.RowParallelLinear(*sizes, prefix="mixer.q_a_proj", **settings)
    # A model may ask for these while it is built.
    assert (layer.weight.dtype, layer.weight.shape) == (torch.float32, (48, 64))
    with pytest.raises(ArchitectureError, match=r"mixer\.q_a_proj: vLLM does not load it by"):
        layer.quant_method.process_weights_after_loading(layer)

    def load(weights):
        for name, tensor in weights:
            parameter = layer.get_parameter(name.removeprefix("mixer.q_a_proj."))
            parameter.weight_loader(parameter, tensor)

    probe_model(layer, load)
    assert not hasattr(layer, "weight")
    kept, awaited = None, []
    monkeypatch.setattr(
        "slab_kernels.engines.vllm_linear.wait_until_written",
        lambda tensors: awaited.append([t.data_ptr() for t in tensors]),
    )
    for seed in (1, 2):
        packed = random_packed(layout, seed=seed)
        load((f"mixer.q_a_proj.{name}", tensor) for name, tensor in packed.tensors().items())
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.randn(3, 64)
        torch.testing.assert_close(
            layer.quant_method.apply(layer, x), slab_kernels.SlabLinear.from_packed(packed)(x)
        )
        prepared = [
            t.data_ptr() for t in tree_leaves(layer.slab_state) if isinstance(t, torch.Tensor)
        ]
        assert kept in (None, prepared) and layer.slab_prepared_0.data_ptr() == prepared[0]
        assert awaited.pop() == prepared and not awaited  # kernels read them without waiting
        kept = prepared
        del layer.slab_prepared_0  # as a reload of vLLM does


@pytest.mark.parametrize("turn", [False, True])
def test_a_weight_with_a_loader_of_its_own_is_looked_at_too(monkeypatch, turn):
    """Mamba's in_proj: its model gives the dense weight a loader that packed tensors do not see."""
    import vllm.model_executor.layers.linear as layers
    from vllm.config import VllmConfig, set_current_vllm_config

    from slab_kernels.engines.vllm import SlabVllmConfig
    from slab_kernels.engines.vllm_probe import probe_model

    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SlabVllmConfig({"in_proj": slab_kernels.PackedLayout(48, 64, "int4", rank=1)})
    with set_current_vllm_config(VllmConfig()):
        settings = {"bias": False, "quant_config": config, "params_dtype": torch.float32}
        layer = layers.ReplicatedLinear(64, 48, prefix="in_proj", **settings)
    change = (lambda tensor: tensor.flip(0)) if turn else (lambda tensor: tensor)
    layer.weight.weight_loader = lambda param, tensor: param.data.copy_(change(tensor))

    def load(weights):
        for name, tensor in weights:
            parameter = layer.get_parameter(name.removeprefix("in_proj."))
            parameter.weight_loader(parameter, tensor)

    if turn:
        with pytest.raises(ArchitectureError, match=r"splits or reorders in_proj\.weight"):
            probe_model(layer, load)
    else:
        probe_model(layer, load)
        assert layer.slab_probed
