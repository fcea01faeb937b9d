"""Tiny language models of many families, from configs with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2}
SMALL: dict[str, Any] = {
    k: BASE[k] for k in ("hidden_size", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GQA, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**GQA, "head_dim": 8, "sliding_window": 8}),
    "phi3": ("Phi3Config", GQA),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "neox": ("GPTNeoXConfig", {**BASE, "intermediate_size": 48}),
    "opt": ("OPTConfig", {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {**SMALL, "n_layer": 3, "n_head": 4}),
    "falcon-alibi": ("FalconConfig", {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True}),
    "falcon": ("FalconConfig", {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False}),
    "mamba": ("MambaConfig", {**SMALL, "num_hidden_layers": 3, "state_size": 8}),
    "mixtral": ("MixtralConfig", {**GQA, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**GQA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def build(family: str = "llama", **overrides: Any) -> Any:
    """A random model in eval mode."""
    name, kwargs = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**kwargs, **overrides})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A random model's directory."""
    build(family, **overrides).to(dtype).save_pretrained(path)
    return path


def ids(windows: int = 6, length: int = 24, vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (windows, length), generator=torch.Generator().manual_seed(1))
