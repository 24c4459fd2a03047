"""Packed folders served by vLLM against `slab_kernels.load(...).generate`. Opt-in: only where vLLM is installed (`make test-vllm`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slab_kernels
from slab_kernels.packed_checkpoint import read_layouts
from slab_kernels.testing import random_packed

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; the default is most of the memory
pytest.importorskip("vllm")

DTYPE = "float16" if ON_GPU else "float32"
SIZES = {  # heads of a size that vLLM's attention has, and slices of whole groups on two ranks
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 128,
}  # fmt: skip
PROMPTS = [tiny_models.tokens(1, length, seed=length)[0].tolist() for length in (3, 8, 17)]
SERVE = """
import json, sys
def main():
    from vllm import LLM, SamplingParams
    folder, arguments, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    model = LLM(folder, max_model_len=64, gpu_memory_utilization=0.3, **arguments)
    found = model.generate([{"prompt_token_ids": p} for p in prompts], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    print("TOKENS", json.dumps([list(f.outputs[0].token_ids) for f in found]), flush=True)
if __name__ == "__main__":
    main()
"""


def serve(folder, **arguments) -> list[list[int]]:
    """Greedy tokens from a vLLM of its own. Raises: RuntimeError with all it said."""
    world = arguments.get("tensor_parallel_size", 1)
    if ON_GPU and torch.cuda.device_count() < world:
        pytest.skip(f"{world} GPUs wanted")
    binding = {} if ON_GPU or world == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(world)))}
    settings = json.dumps({"dtype": DTYPE, "enforce_eager": True, **arguments})
    command = [sys.executable, "-c", SERVE, str(folder), settings, json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **binding})
    found = re.search("^TOKENS (.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(found[1])


def ours(folder) -> list[list[int]]:
    model, found = slab_kernels.load(folder, device="auto", dtype=getattr(torch, DTYPE)), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        every = torch.ones_like(ids)
        found.append(model.generate(ids, attention_mask=every, max_new_tokens=16, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist())
    return found


def randomly_packed(folder, architecture: str, forms: list[dict], **sizes) -> None:
    """A model whose linears are random packed weights of these forms in turn, with a tokenizer."""
    tiny_models.write(folder / "dense", architecture, **sizes)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    packed = {}
    for i, (name, linear) in enumerate(linears):
        layout = slab_kernels.PackedLayout(linear.out_features, linear.in_features, **forms[i % len(forms)])
        packed[name] = random_packed(layout, seed=i)
    slab_kernels.save(slab_kernels.replace_linear(model, packed), folder / "packed", tiny_models.tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama compressed to int4 with adapters, tied embeddings."""
    top = tmp_path_factory.mktemp("llama")
    tiny_models.write(top / "dense", "llama", **SIZES)
    settings = {"values": "int4", "group_size": 32, "adapter_rank": 4, "calibration": tiny_models.tokens()}
    slab_kernels.compress(top / "dense", top / "packed", progress=False, **settings)
    return top / "packed"


@pytest.mark.parametrize("mode", [{}, {"enforce_eager": False}, {"tensor_parallel_size": 2}], ids=["eager", "compiled", "tensor-parallel-2"])
def test_the_tokens_are_those_of_transformers(folder, mode):
    assert serve(folder, **mode) == ours(folder)


def test_weights_of_different_types_in_one_fused_layer_with_biases(tmp_path):
    forms = [{"values": "int4", "planes": 2, "rank": 1}, {"values": "fp16", "rank": 2}, {"values": "int8", "group_size": 32, "adapter_rank": 3}]
    randomly_packed(tmp_path, "qwen2", forms, **SIZES, use_sliding_window=False)
    assert serve(tmp_path / "packed") == ours(tmp_path / "packed")


def test_weights_that_are_fused_on_disk(tmp_path):
    randomly_packed(tmp_path, "phi3", [{"values": "int4", "group_size": 32, "rank": 1}], **SIZES)
    assert serve(tmp_path / "packed", tensor_parallel_size=2) == ours(tmp_path / "packed")


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("self_attn.k_proj.signs", None, r"lacks tensor 'model\.layers\.1\.self_attn\.k_proj\.signs'"),
        ("mlp.down_proj.metadata", torch.zeros_like, r"model\.layers\.1\.mlp\.down_proj: metadata holds"),
        ("mlp.up_proj.values", lambda t: t[:, :8].contiguous(), r"model\.layers\.1\.mlp\.up_proj: values is torch\.uint8 \[256, 8\]"),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, tensor, change, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    name = f"model.layers.1.{tensor}"
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"][name]
    state = load_file(file)
    if change is None:
        del state[name], index["weight_map"][name]
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        state[name] = change(state[name])
    save_file(state, file)
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

    from slab_kernels.checkpoint import Checkpoint
    from slab_kernels.engines import register_with_vllm
    from slab_kernels.engines.vllm import SlabLinearMethod, SlabVllmConfig

    register_with_vllm()
    layouts = read_layouts(Checkpoint(folder))
    config = SlabVllmConfig(layouts | {"model.layers.0.moe.experts.0.up_proj": next(iter(layouts.values())), "lm_head": next(iter(layouts.values()))})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    where = "model.layers.0.self_attn"
    assert isinstance(config.get_quant_method(a_layer(QKVParallelLinear), f"{where}.qkv_proj"), SlabLinearMethod)
    assert isinstance(config.get_quant_method(a_layer(RowParallelLinear), f"{where}.o_proj"), SlabLinearMethod)
    assert isinstance(config.get_quant_method(a_layer(RowParallelLinear), "visual.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(a_layer(nn.Module), f"{where}.attn") is None
    with pytest.raises(NotImplementedError, match=r"experts\.0\.up_proj is packed.*RoutedExperts.*decompress"):
        config.get_quant_method(a_layer(RoutedExperts), "model.layers.0.moe.experts")
    with pytest.raises(NotImplementedError, match=r"lm_head is packed.*ParallelLMHead"):
        config.get_quant_method(a_layer(ParallelLMHead), "lm_head")
    del config.layouts[f"{where}.k_proj"]
    with pytest.raises(NotImplementedError, match=r"q_proj is packed and .*k_proj is not; compress all of them or none"):
        config.get_quant_method(a_layer(QKVParallelLinear), f"{where}.qkv_proj")
