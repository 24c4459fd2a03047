"""A tiny config for every model type, by one table of sizes and a few corrections."""

from __future__ import annotations

import dataclasses

VOCABULARY, HEADS = 96, 4

# A key of one of these names gets the size in front of its line, inside sub-configs too.
SIZES = """
96  vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size
32  hidden_size out_hidden_size d_model n_embd dim embedding_size emb_dim lru_width
    attention_hidden_size input_embedding_size output_embedding_size word_embed_proj_dim
    cross_attention_hidden_size embedding_dim backbone_hidden_size dim_model_base
    hidden_size_per_layer_input router_hidden_size ple_embed_dim
48  intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff d_inner
    moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    moe_shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size
    dense_intermediate_size intermediate_size_mlp shared_experts_intermediate_size
    prefix_dense_intermediate_size feed_forward_size block_ffn_dim moe_latent_size
2   depth num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
    num_encoder_layers num_decoder_layers num_blocks
4   num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads attention_heads
    swa_num_attention_heads index_n_heads indexer_n_heads linear_num_heads linear_num_value_heads
    mamba_n_heads mamba_num_heads
2   num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads
    mamba_n_groups n_groups mamba_ngroups num_experts_per_tok moe_topk top_k_experts moe_k
    num_mem_blocks topk_group n_group rotary_dim indexer_kv_heads o_groups hc_mult hc_count
8   head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim indexer_head_dim
    kv_lora_rank q_lora_rank o_lora_rank d_head dim_head swa_head_dim linear_head_dim
    linear_key_head_dim linear_value_head_dim kv_channels mamba_d_head mamba_head_dim
    mamba_d_state state_size ssm_state_size attention_head_size attention_head_dim mamba_dt_rank
    time_step_rank laurel_rank adapter_rank gated_norm_rank hc_lowrank prompt_length chunk_size
    mamba_chunk_size index_topk sliding_window sliding_window_size window_size local_attention
    attention_window_size patch_size
4   num_experts num_local_experts n_routed_experts moe_num_experts rel_extent
16  global_head_dim d_rel qk_head_dim image_size index_block_size attention_chunk_size
64  num_position_embeddings max_position_embeddings n_positions n_ctx max_seq_len
    max_source_positions max_target_positions context_length original_max_position_embeddings
1   num_nextn_predict_layers n_shared_experts num_shared_experts moe_num_shared_experts
    first_k_dense_replace num_dense_layers type_vocab_size
"""
GENERIC: dict[str, int] = {}
SIZE = 0
for line in SIZES.strip().splitlines():
    SIZE = int(line[:4].strip() or SIZE)
    GENERIC |= dict.fromkeys(line[4:].split(), SIZE)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What the table of sizes does not build, or not with every kind of layer in it.
CORRECTIONS: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba",
        "attention"]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "vocab_size": 260},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_kv_heads": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 16, "shape_embed_dim": 8,
        "shape_vocab_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note": {"text_config": {"per_layer_config": None}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}},
    "gemma4_unified_assistant": {"text_config": {"hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}},
}  # fmt: skip


def small(kind, corrections: dict | None = None, sizes: dict[str, int] = GENERIC) -> dict:
    """Keywords for the config class `kind`: small sizes, its sub-configs too, then corrections."""
    names = {field.name for field in dataclasses.fields(kind)}
    given = {key: size for key, size in sizes.items() if key in names}
    given |= {key: token for key, token in TOKENS.items() if key in names}
    if "kv_lora_rank" in names:  # latent attention has a key for every head
        given["num_key_value_heads"] = HEADS
    for name, inner in inner_kinds(kind).items():
        given[name] = small(inner, CORRECTIONS.get(inner.model_type), sizes)
        if name in (corrections or {}):
            given[name] |= corrections[name]
    return {
        **given,
        **{
            key: value
            for key, value in (corrections or {}).items()
            if not isinstance(given.get(key), dict)
        },
    }


def inner_kinds(kind) -> dict[str, type]:
    """Sub-config -> its class; where any would do, the one that transformers takes by default."""
    from transformers import CONFIG_MAPPING

    found = {
        name: inner
        for name, inner in (getattr(kind, "sub_configs", None) or {}).items()
        if dataclasses.is_dataclass(inner)
    }
    for name, spec in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        model_type = getattr(spec, "model_type", None)
        if model_type in CONFIG_MAPPING:
            found[name] = CONFIG_MAPPING[model_type]
    return {name: inner for name, inner in found.items() if dataclasses.is_dataclass(inner)}


def tiny(model_type: str, sizes: dict[str, int] | None = None, corrections: dict | None = None):
    """The config of a type.

    sizes: instead of those of the table. corrections: instead of those of CORRECTIONS.

    Raises: whatever transformers makes of it.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    corrections = CORRECTIONS.get(model_type, {}) | (corrections or {})
    return kind(**small(kind, corrections, GENERIC | (sizes or {})))


def types() -> list[str]:
    """Every type of which the installed transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
