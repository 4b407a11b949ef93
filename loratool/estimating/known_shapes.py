"""Configurations of models that papers describe, with the keys of transformers' ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final


def _llama(hidden: int, layers: int, heads: int, intermediate: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    } | more


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50_257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


_LLAMA3: Final = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}

KNOWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # Brown et al. 2020, arXiv:2005.14165, table 2.1. Modules are OPT's, with separate projections, because the LoRA
    # paper adapts W_q and W_v separately.
    "gpt3-175b": {
        "model_type": "opt",
        "vocab_size": 50_257,
        "hidden_size": 12_288,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "ffn_dim": 49_152,
        "max_position_embeddings": 2048,
        "activation_function": "gelu",
        "dropout": 0.1,
    },
    # Touvron et al. 2023, arXiv:2302.13971, table 2.
    "llama-7b": _llama(4096, 32, 32, 11_008),
    "llama-13b": _llama(5120, 40, 40, 13_824),
    "llama-33b": _llama(6656, 60, 52, 17_920),
    "llama-65b": _llama(8192, 80, 64, 22_016),
    # Grattafiori et al. 2024, arXiv:2407.21783, table 3.
    "llama3-8b": _llama(4096, 32, 32, 14_336, **_LLAMA3),
    "llama3-70b": _llama(8192, 80, 64, 28_672, **_LLAMA3),
    "llama3-405b": _llama(16_384, 126, 128, 53_248, **_LLAMA3),
    # Jiang et al. 2023, arXiv:2310.06825, table 1.
    "mistral-7b": _llama(4096, 32, 32, 14_336, num_key_value_heads=8, max_position_embeddings=32_768)
    | {"model_type": "mistral"},
}
"""Configurations by the names that ``loratool estimate`` accepts."""
