"""A tiny random language model of each family that transformers can make from its configuration alone, on a CPU."""

from itertools import product
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LONGEST, MOST_PARAMETERS = 101, 256, 15_000_000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")
_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "dim", "dim_model", "embed_dim", "emb_dim", "word_embed_proj_dim"),
    "embedding_size",
)
_INNER = (
    *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "dff"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"),
    *("feed_forward_hidden_size", "mlp_hidden_size", "intermediate_size_mlp", "lru_width", "ffn_config_hidden_size"),
    "attention_hidden_size",
)
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("kv_n_heads",),
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# what makes a model look at few keys is made smaller than the texts, so that it shows
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "n_positions": LONGEST,
    "max_seq_len": LONGEST,
    "decoder_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 24,
    "sliding_window_size": 24,
    "attention_chunk_size": 24,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "mamba_ngroups": 1,
    "n_mamba_heads": 2,
    "n_groups": 1,
    "n_group": 1,
    "topk_group": 1,
    "state_size": 8,
    "ssm_state_size": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
    "use_cache": True,
    "ngram_vocab_size": 64,
}


# what a family needs beside the shared sizes
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24, "num_layers": 4},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX"},
}
# left out in many configurations, and set all the same
_ALWAYS = frozenset(
    ("eos_token_id", "pad_token_id", "bos_token_id", "num_key_value_heads", "head_dim", "is_decoder", "num_experts_per_tok")
)


def families() -> list[str]:
    """List the families that transformers makes causal language models of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family: str) -> PreTrainedModel:
    """Make one, of the first of several shapes that its configuration allows."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    kind = kind[0] if isinstance(kind, tuple) else kind
    problems = []
    for layers, head_dim, kv_heads in product((4, 2, 6), (16, None, 32), (2, 4)):
        shape = {"head_dim": head_dim, "kv_channels": head_dim} if head_dim else {}
        shape |= dict.fromkeys(_LAYERS, layers) | dict.fromkeys(_KV_HEADS, kv_heads) | _OWN.get(family, {})
        try:
            config = kind.config_class(**_overrides(kind.config_class, shape))
            with torch.device("meta"):
                size = sum(weight.numel() for weight in kind(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = kind(config).eval()
            with torch.no_grad():
                model(torch.arange(2, 34)[None])
            return model
        except Exception as problem:
            problems.append(f"{type(problem).__name__}: {problem}")
    raise LookupError("; ".join(dict.fromkeys(each.strip().split("\n")[0][:120] for each in problems)))


def _overrides(kind: type[PreTrainedConfig], shape: dict[str, Any]) -> dict[str, Any]:
    example = kind()
    wanted = _SMALL | dict.fromkeys(_WIDTHS, 64) | dict.fromkeys(_INNER, 64) | dict.fromkeys(_HEADS, 4) | shape
    known = set(vars(example)) | set(example.attribute_map)
    chosen = {name: value for name, value in wanted.items() if name in known and _replaces(example, name)}
    if "kv_lora_rank" in known:
        # latent attention makes keys for every head
        chosen |= {name: 4 for name in _KV_HEADS if name in known}
    chosen |= {name: value for name, value in shape.items() if name in known and name not in _LAYERS + _KV_HEADS}
    for name in example.sub_configs:
        sub = getattr(example, name, None)
        if isinstance(sub, PreTrainedConfig) and name not in chosen:
            chosen[name] = type(sub)(**_overrides(type(sub), shape))
    return chosen


def _replaces(example: PreTrainedConfig, name: str) -> bool:
    # a number that a family leaves out switches a part off, which stays off
    return name in _ALWAYS or getattr(example, name, None) is not None
