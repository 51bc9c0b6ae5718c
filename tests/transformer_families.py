"""Tiny random models of several families, as transformers saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_IMAGES = {"image_size": 32, "patch_size": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": ("BertForMaskedLM", _TEXT),
    "vit": ("ViTForImageClassification", {k: v for k, v in _TEXT.items() if k in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")} | _IMAGES),
    "mixtral": (
        "MixtralForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # Sliding windows in every other layer.
    "gemma2": ("Gemma2ForCausalLM", _GROUPED | {"sliding_window": 8}),
    # Experts whose matrices are stored transposed, with biases, and sliding windows.
    "gpt_oss": (
        "GptOssForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    # Low-rank attention, experts that all tokens share, a first layer without experts.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _TEXT | _MIXTURE | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2,
         "topk_group": 1, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
         "first_k_dense_replace": 1},
    ),
    "exaone4": (
        "Exaone4ForCausalLM",
        _GROUPED | {"sliding_window": 8, "sliding_window_pattern": 2},
    ),
    # Short convolutions and attention.
    "lfm2": (
        "Lfm2ForCausalLM",
        _GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
}  # fmt: skip
"""Class and settings by model type."""


def write_family(model_type: str, path: Path) -> Path:
    """Save a random model of a type of ``FAMILIES`` into ``path`` and return it."""
    import transformers

    torch.manual_seed(0)
    kind, settings = FAMILIES[model_type]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    getattr(transformers, kind)(config).save_pretrained(path)
    return path
