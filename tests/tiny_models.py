"""Random models of a few thousand weights, one config for each architecture, and a tokenizer for
them.
"""

from __future__ import annotations

import torch

VOCABULARY = 96
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": {**_GATED, "tie_word_embeddings": True},
    "mistral": {**_GATED, "sliding_window": 6},
    "qwen2": {**_GATED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_GATED, "head_dim": 8},
    "gemma": {**_GATED, "head_dim": 8},
    "gemma2": {**_GATED, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {
        **_GATED,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
    "gpt_neox": {**_COMMON, "intermediate_size": 48, "use_parallel_residual": True},
    "phi": {**_COMMON, "intermediate_size": 48},
    "phi3": _GATED,
    "stablelm": _GATED,
    "olmo2": _GATED,
    "granite": _GATED,
    "cohere": _GATED,
    "falcon": {**_COMMON, "alibi": True, "new_decoder_architecture": False},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 64,
    },
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 64,
        "expansion_ratio": 2,
    },
}


def config(name: str, **changes):
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**_TOKENS, **CONFIGS[name], **changes})


def model(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model; weights far larger than trained ones, so that every part of a block matters
    to its output.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config(name, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return built


def tokens(samples: int = 6, window: int = 16, seed: int = 0) -> torch.Tensor:
    """Ids [samples, window]."""
    return torch.randint(
        3, VOCABULARY, (samples, window), generator=torch.Generator().manual_seed(seed)
    )


def tokenizer():
    """One token a printable ASCII character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 32 + VOCABULARY - 3)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def text(words: int = 800, seed: int = 0) -> str:
    """Words of random letters."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (words,), generator=generator).tolist()
    letters = torch.randint(97, 123, (sum(lengths),), generator=generator).tolist()
    found, start = [], 0
    for length in lengths:
        found.append("".join(map(chr, letters[start : start + length])))
        start += length
    return " ".join(found)


def write(
    folder, name: str = "llama", dtype: torch.dtype = torch.float32, shards: bool = False, **changes
):
    """A model folder with tokenizer, as transformers writes it; returns the model."""
    built = model(name, dtype=dtype, **changes)
    built.save_pretrained(folder, **({"max_shard_size": "30KB"} if shards else {}))
    tokenizer().save_pretrained(folder)
    return built
