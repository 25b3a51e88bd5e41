"""Tiny random models of many families, with the tokenizer of the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from staff.models.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
NEOX: dict[str, Any] = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 1024},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": NEOX,
    "phi": LLAMA,
    "phi3": LLAMA,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 2},
    "mixtral": {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {  # every layer is sparse, so that no intermediate_size is used
        **{name: value for name, value in LLAMA.items() if name != "intermediate_size"},
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmo2": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "cohere": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 16},
}
FUSED = ("gpt2", "falcon", "bloom", "gpt_neox", "phi3", "mamba")
"""Families without a `v_proj`."""


def config_of(family: str, **other: Any) -> Any:
    """The transformers configuration of a family's tiny model."""
    from transformers import AutoConfig

    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    known = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**known, **FAMILIES[family], **other})


def save_model(family: str, folder: Path) -> Path:
    """The tiny model of a family with its tokenizer, in a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(folder)
    ModelSpec("pkg://staff/assets/tiny/target").tokenizer().save_pretrained(folder)
    return folder
