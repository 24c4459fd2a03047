"""Every decoder that transformers builds and vLLM has, compressed and served: a Markdown table.

    .venv-vllm/bin/python tests/engines/vllm_table.py [TYPE ...]

It takes about 20 seconds per type on a CPU.

Each step runs in a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

# Before vLLM is imported. Without dynamo vLLM compiles nothing, which takes most of its start.
os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the tests' modules lie

import tiny_models
import torch
from matrix.configs import tiny

import slab_kernels
from slab_kernels.errors import ArchitectureError

# Heads, latents and states as vLLM's attention has them; other sizes are those of the matrix.
SIZES = {
    "hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "ffn_dim": 256,
    "ffn_hidden_size": 256, "n_inner": 256, "expansion_ratio": 2, "word_embed_proj_dim": 128,
    "max_position_embeddings": 128, "max_seq_len": 128, "model_max_length": 128, "rotary_dim": 32,
    "sliding_window": 6, "query_pre_attn_scalar": 32, "global_head_dim": 32,
    "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
    "num_nextn_predict_layers": 0, "moe_intermediate_size": 128, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 128, "shared_intermediate_size": 128, "q_lora_rank": 32,
    "o_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "index_n_heads": 2, "index_head_dim": 64, "indexer_head_dim": 64,
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
CORRECTIONS = {
    "axk1": {"head_dim": 64},
    "cohere2": {"head_dim": 32},
    "deepseek_v3": {"head_dim": 64, "topk_method": "noaux_tc"},  # as in the published folders
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 256},
    "granitemoehybrid": {"mamba_d_head": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4_text": {"num_experts_per_tok": 1},  # vLLM has no other on CPU
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "minicpm3": {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 32},
    "qwen3_5_moe_text": LINEAR_AND_FULL,
    "qwen3_5_text": LINEAR_AND_FULL,
    "qwen3_next": LINEAR_AND_FULL,
    "zamba2": {"n_mamba_heads": 4},
}
PROMPTS = [tiny_models.tokens(1, length, seed=length)[0].tolist() for length in (3, 8, 17)]
LARGEST = 12e6  # weights


def types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS as KNOWN

    here = (name for name, architecture in CLASSES.items() if architecture in KNOWN)
    return sorted({*here, *tiny_models.CONFIGS})


def build(name: str, folder: Path) -> None:
    """A random model of that type, with a tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny(name, SIZES, CORRECTIONS.get(name))
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).parameters()
    count = sum(parameter.numel() for parameter in parameters)
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million weights at this size")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)


def pack(dense: Path, out: Path, skip: list[str]) -> list[str]:
    """Compress to int4 and leave dense what cannot be packed; returns the patterns of that."""
    settings = {"values": "int4", "group_size": 32, "calibration": tiny_models.tokens()}
    settings["embeddings"] = "dense"
    while True:
        try:
            slab_kernels.compress(dense, out, skip=skip, progress=False, **settings)
            return skip
        except ArchitectureError as error:
            if not (skip_too := advised(error, skip)):
                raise
            skip = skip_too


def advised(error: Exception, skip: list[str]) -> list[str] | None:
    """`skip` with what the message asks to leave dense; None if it asks for nothing new."""
    advice = re.search(r"skip='([^']+)'", str(error))
    return [*skip, advice[1]] if advice and advice[1] not in skip else None


def by_transformers(model) -> list:
    """Greedy tokens and the sum of their log probabilities for each prompt."""
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        logprob = sum(float(torch.log_softmax(scores.float(), -1).max()) for scores in found.scores)
        answers.append([found.sequences[0, len(prompt) :].tolist(), logprob])
    return answers


def by_vllm(folder: Path) -> list:
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", max_model_len=64, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = [f.outputs[0] for f in model.generate(asked, greedy, use_tqdm=False)]
    return [[list(f.token_ids), f.cumulative_logprob] for f in found]


def same(one: list, other: list) -> bool:
    return all(a[0] == b[0] and abs(a[1] - b[1]) < 1e-3 for a, b in zip(one, other, strict=True))


class Refused(Exception):
    """A forked process ended in an error: its sentence, and whether it is of this library."""


def forked(function: Callable, *arguments):
    """The function's value from a process of its own. Raises: Refused."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        with open(os.environ.get("TABLE_LOG", os.devnull), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                answer = {"value": function(*arguments)}
            except BaseException as error:
                traceback.print_exc()
                ours = type(error).__module__.startswith("slab_kernels") or "packed" in str(error)
                answer = {"error": f"{type(error).__name__}: {error}", "ours": ours}
            os.write(send, json.dumps(answer).encode())
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    answer = json.loads(text or '{"error": "the process died", "ours": false}')
    if "error" in answer:
        raise Refused(" ".join(answer["error"].split("[type=")[0].split()), answer["ours"])
    return answer["value"]


def outcome(name: str, top: Path) -> str:
    """One table cell."""
    try:
        forked(build, name, top / "dense")
    except Refused as error:
        return f"not built here: {error.args[0]}"
    return served(top, [])


def served(top: Path, skip: list[str]) -> str:
    """The cell of a folder that is compressed with `skip`, and with what the messages add to it."""
    dense, packed, again = top / "dense", top / "packed", top / "again"
    try:
        left = forked(pack, dense, packed, skip)
        want = forked(lambda: by_transformers(slab_kernels.load(packed)))
    except Refused as error:
        return f"not compressed: {error.args[0]}"
    note = f"; dense: {', '.join(f'`{pattern}`' for pattern in left)}" if left else ""
    reason = None
    try:
        got = forked(by_vllm, packed)
        if same(got, want):
            return f"same tokens{note}"
    except Refused as error:
        got, reason = None, error
        if skip_too := advised(error, left):
            shutil.rmtree(packed)
            return served(top, skip_too)
    try:
        forked(slab_kernels.decompress, packed, again)
        plain = forked(by_vllm, again)
    except Refused as error:
        return f"vLLM does not run the dense folder either: {error.args[0]}"
    if got is not None:
        if not same(got, plain):
            return "**WRONG**"
        return f"tokens of the dense folder in vLLM, which differ from transformers'{note}"
    return f"refused: {reason.args[0]}" if reason.args[1] else f"**FAULT**: {reason.args[0]}"


def main() -> None:
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    torch.set_num_threads(1)
    print("| model type | outcome |\n|---|---|")
    for name in sys.argv[1:] or types():
        with tempfile.TemporaryDirectory() as top:
            cell = outcome(name, Path(top)).replace(top + "/", "").replace("|", "\\|")
        print(f"| {name} | {cell} |", flush=True)


if __name__ == "__main__":
    main()
