"""The models of PEFT's own tests, rebuilt tiny and with random weights: containers of layers, and transformers' model types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


class ByParameter(nn.Module):
    """A linear layer that is no module of torch: its weight is a parameter, (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.ones(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Layers(nn.Module):
    """Named layers. A merge runs no forward pass."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


LAYERS: Final[Mapping[str, Callable[[], dict[str, nn.Module]]]] = {
    "MLP": lambda: {"lin0": nn.Linear(10, 20), "lin1": nn.Linear(20, 2)},
    "MLP2": lambda: {"lin0": nn.Linear(10, 32), "lin1": nn.Linear(32, 2)},
    "MLP_LayerNorm": lambda: {
        "layernorm0": nn.LayerNorm(10, 10),
        "lin0": nn.Linear(10, 20),
        "layernorm1": nn.LayerNorm(20, 20),
        "lin1": nn.Linear(20, 2),
    },
    "MlpUsingParameters": lambda: {"lin0": ByParameter(10, 20), "lin1": ByParameter(20, 2)},
    "EmbConv1D": lambda: {"emb": nn.Embedding(100, 5), "conv1d": Conv1D(1, 5), "lin0": nn.Linear(10, 2)},
    "Conv1d": lambda: {"conv1d": nn.Conv1d(1, 1, 2), "lin0": nn.Linear(9, 2)},
    "Conv1dBigger": lambda: {"conv1d": nn.Conv1d(64, 16, 2), "lin0": nn.Linear(144, 2)},
    "Conv1dGroups": lambda: {"conv1d": nn.Conv1d(8, 8, 3, groups=2), "lin0": nn.Linear(64, 2)},
    "Conv2d": lambda: {"conv2d": nn.Conv2d(5, 10, 3), "lin0": nn.Linear(10, 2)},
    "Conv2d2": lambda: {"lin0": nn.Linear(10, 40), "conv2d": nn.Conv2d(8, 32, 3), "lin1": nn.Linear(32, 2)},
    "Conv2d1x1": lambda: {"conv2d": nn.Conv2d(1, 10, 1), "lin0": nn.Linear(90, 2)},
    "Conv2dGroups": lambda: {
        "lin0": nn.Linear(90, 288),
        "conv2d": nn.Conv2d(16, 16, 3, groups=8),
        "lin1": nn.Linear(16, 2),
    },
    "Conv2dGroups2": lambda: {"conv2d": nn.Conv2d(16, 32, 3, padding=1, groups=2), "lin0": nn.Linear(128, 2)},
    "Conv3d": lambda: {"conv3d": nn.Conv3d(5, 10, 3), "lin0": nn.Linear(10, 2)},
    "MHA": lambda: {"mha": nn.MultiheadAttention(10, 2), "lin0": nn.Linear(10, 2)},
    "Variants": lambda: {
        "embedding": nn.Embedding(100, 16),
        "conv1d": nn.Conv1d(16, 32, 3, padding=1),
        "conv2d": nn.Conv2d(1, 16, 3, padding=1),
        "linear1": nn.Linear(192, 64),
        "linear2": nn.Linear(64, 10),
    },
}

TEXT: Final[Mapping[str, Any]] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ENCODER: Final[Mapping[str, Any]] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GPT: Final[Mapping[str, Any]] = {
    "vocab_size": 101,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: Final[Mapping[str, Any]] = {"num_local_experts": 4, "num_experts_per_tok": 2}

TYPES: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "opt": ("OPTForCausalLM", "opt", {
        "vocab_size": 101, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    }),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT),
    "gptj": ("GPTJForCausalLM", "gptj", {**GPT, "rotary_dim": 4, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", "llama", {**TEXT, "tie_word_embeddings": False}),
    "mistral": ("MistralForCausalLM", "mistral", {**TEXT, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {**TEXT, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3ForCausalLM", "gemma3_text", {**TEXT, "tie_word_embeddings": True}),
    "llama4_text": ("Llama4ForCausalLM", "llama4_text", {
        **TEXT, **EXPERTS, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "moe_layers": [0, 1],
    }),
    "gpt_oss": ("GptOssForCausalLM", "gpt_oss", {
        **TEXT, **EXPERTS, "layer_types": ["full_attention", "sliding_attention"],
    }),
    "t5": ("T5ForConditionalGeneration", "t5", {
        "vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    }),
    "bart": ("BartForConditionalGeneration", "bart", {
        "vocab_size": 101, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    }),
    "bert": ("BertModel", "bert", ENCODER),
    "roberta": ("RobertaModel", "roberta", ENCODER),
    "deberta": ("DebertaModel", "deberta", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1,
    }),
    "deberta-v2": ("DebertaV2Model", "deberta-v2", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16,
    }),
    "bert classifier": ("BertForSequenceClassification", "bert", ENCODER),
    "roberta classifier": ("RobertaForSequenceClassification", "roberta", ENCODER),
    "llama classifier": ("LlamaForSequenceClassification", "llama", TEXT),
    "resnet": ("ResNetForImageClassification", "resnet", {
        "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic",
    }),
}  # fmt: skip
"""A name, with transformers' class, its model type, and the sizes of a tiny one."""

TASKS: Final[Mapping[str, str]] = {
    "LMHeadModel": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}
"""PEFT's task types, by the end of a class's name."""


def build(name: str) -> nn.Module:
    """Return a model of that name, fp32, with the same random weights each time."""
    torch.manual_seed(0)
    if name in LAYERS:
        return Layers(**LAYERS[name]()).eval()
    class_name, model_type, sizes = TYPES[name]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    return getattr(transformers, class_name)(config).eval()


def task_type(name: str) -> str | None:
    """Return the task type that PEFT's tests give this model."""
    if name in LAYERS:
        return None
    found = (task for end, task in TASKS.items() if TYPES[name][0].endswith(end))
    return next(found, "FEATURE_EXTRACTION")
