"""Tiny random models as `save_pretrained` writes them, and safetensors folders written or read by hand.

`TinyModels` builds a model of a named architecture once a session. `stored_tensors` reads a folder without
torch or the safetensors library, so that a test compares the bytes on disk and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

Layout = Literal["single", "sharded"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SHARD_SIZE = 40_000
"""Bytes; a few tensors of a tiny model fill a shard."""

VOCABULARY = 131


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build one tiny model, and which of its modules a usual LoRA targets."""

    config: Callable[[], transformers.PreTrainedConfig]
    model: type[transformers.PreTrainedModel]
    auto: Any
    target_modules: tuple[str, ...]
    prefix_dropped: str = ""
    """Prefix that this checkpoint's names lack although the model with its head has it."""
    masks_stored: bool = False
    """Whether the checkpoint holds the attention masks that old GPT-2 files carry and no model loads."""


def _llama(**changes: Any) -> transformers.PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**(sizes | changes))


def _mistral() -> transformers.PreTrainedConfig:
    return transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        max_position_embeddings=64,
        sliding_window=32,
    )


def _qwen2() -> transformers.PreTrainedConfig:
    return transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=56,
        intermediate_size=152,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


def _gemma() -> transformers.PreTrainedConfig:
    return transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


def _gpt2(**changes: Any) -> transformers.PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2Config(**(sizes | changes))


def _opt() -> transformers.PreTrainedConfig:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
        do_layer_norm_before=True,
    )


def _gpt_neox(**changes: Any) -> transformers.PreTrainedConfig:
    return transformers.GPTNeoXConfig(
        **changes,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=140,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )


def _bert() -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=132,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )


def _llama_odd() -> transformers.PreTrainedConfig:
    return _llama(
        hidden_size=135,
        intermediate_size=391,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        vocab_size=129,
    )


def _llama_many_blocks() -> transformers.PreTrainedConfig:
    return _llama(
        hidden_size=1100,
        intermediate_size=3000,
        num_attention_heads=11,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )


def _gpt2_many_blocks() -> transformers.PreTrainedConfig:
    return _gpt2(n_embd=1100, n_inner=3001, n_layer=1, n_head=11)


_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
_BERT_TARGETS = ("query", "key", "value", "dense")
_CAUSAL = transformers.AutoModelForCausalLM

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, transformers.LlamaForCausalLM, _CAUSAL, _LLAMA_TARGETS),
    "mistral": Architecture(_mistral, transformers.MistralForCausalLM, _CAUSAL, _LLAMA_TARGETS),
    "qwen2": Architecture(_qwen2, transformers.Qwen2ForCausalLM, _CAUSAL, _LLAMA_TARGETS),
    "gemma": Architecture(_gemma, transformers.GemmaForCausalLM, _CAUSAL, _LLAMA_TARGETS),
    "gpt2": Architecture(_gpt2, transformers.GPT2LMHeadModel, _CAUSAL, _GPT2_TARGETS),
    "gpt2-without-prefix": Architecture(
        _gpt2,
        transformers.GPT2LMHeadModel,
        _CAUSAL,
        _GPT2_TARGETS,
        prefix_dropped="transformer.",
        masks_stored=True,
    ),
    "gpt2-untied": Architecture(
        lambda: _gpt2(tie_word_embeddings=False),
        transformers.GPT2LMHeadModel,
        _CAUSAL,
        (*_GPT2_TARGETS, "lm_head"),
    ),
    "opt": Architecture(
        _opt, transformers.OPTForCausalLM, _CAUSAL, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    ),
    "gpt_neox": Architecture(
        _gpt_neox,
        transformers.GPTNeoXForCausalLM,
        _CAUSAL,
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bert": Architecture(
        _bert,
        transformers.BertForSequenceClassification,
        transformers.AutoModelForSequenceClassification,
        _BERT_TARGETS,
    ),
    "bert-headless": Architecture(_bert, transformers.BertModel, transformers.AutoModel, _BERT_TARGETS),
    "llama-tied": Architecture(
        lambda: _llama(tie_word_embeddings=True), transformers.LlamaForCausalLM, _CAUSAL, _LLAMA_TARGETS
    ),
    "gpt_neox-tied": Architecture(
        lambda: _gpt_neox(tie_word_embeddings=True),
        transformers.GPTNeoXForCausalLM,
        _CAUSAL,
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "llama-odd": Architecture(_llama_odd, transformers.LlamaForCausalLM, _CAUSAL, _LLAMA_TARGETS),
    "llama-many-blocks": Architecture(_llama_many_blocks, transformers.LlamaForCausalLM, _CAUSAL, _LLAMA_TARGETS),
    "gpt2-many-blocks": Architecture(_gpt2_many_blocks, transformers.GPT2LMHeadModel, _CAUSAL, _GPT2_TARGETS),
}


class TinyModels:
    """Tiny models under one folder, built when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, architecture: str, dtype: str = "bf16", layout: Layout = "single") -> Path:
        """Return the folder of the model, as `save_pretrained` wrote it, with tokenizer files beside it."""
        folder = self._root / f"{architecture}-{dtype}-{layout}"
        if not folder.exists():
            _save(ARCHITECTURES[architecture], DTYPES[dtype], layout, folder)
        return folder


def _save(architecture: Architecture, dtype: torch.dtype, layout: Layout, folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = architecture.model(architecture.config())
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.data.eq(1).all() else 0.0, 0.05)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE if layout == "sharded" else "5GB")
    if architecture.prefix_dropped:
        rewrite_tensors(folder, lambda name: name.removeprefix(architecture.prefix_dropped))
    if architecture.masks_stored and layout == "single":
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril().to(dtype) for layer in range(2)}
        rewrite_tensors(folder, extra=masks)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}\n')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}\n')


def load(folder: Path, architecture: str, *, auto: Any = None) -> transformers.PreTrainedModel:
    """Load a saved model in the type it is stored in."""
    loader = auto or ARCHITECTURES[architecture].auto
    return loader.from_pretrained(folder, dtype="auto", local_files_only=True)


def rewrite_tensors(
    folder: Path,
    rename: Callable[[str], str] = lambda name: name,
    extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Rewrite a model's safetensors files and index with other names; `extra` goes into each file."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors | dict(extra), path, metadata=metadata)
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        index = json.loads(index_path.read_text())
        index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_plain_model(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, model_type: str = "llama", **config: Any
) -> Path:
    """Write these tensors as a model: `model.safetensors` and a `config.json` that names the type."""
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | config, indent=2) + "\n")
    return folder


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it stands in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def stored_in_file(path: Path) -> dict[str, StoredTensor]:
    """Read one safetensors file: eight bytes of header length, a JSON header, the data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read every tensor of a model folder; a name in two shards is a failure."""
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in stored_in_file(path).items():
            assert name not in tensors, f"{name} is stored twice, the second time in {path.name}"
            tensors[name] = tensor
    return tensors


def as_torch(tensor: StoredTensor) -> torch.Tensor:
    """Return the stored tensor in its own type."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def as_stored(tensor: torch.Tensor) -> StoredTensor:
    """Return what a safetensors file holds for this tensor."""
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
    return StoredTensor(dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())


def assert_same_tensors(
    actual: Mapping[str, StoredTensor], expected: Mapping[str, StoredTensor], note: str = ""
) -> None:
    """Fail unless names, types, shapes and bytes are the same; say which differ and by how much."""
    assert sorted(actual) == sorted(expected), f"the tensor names differ {note}"
    wrong = []
    for name, want in expected.items():
        have = actual[name]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            wrong.append(f"{name}: {have.dtype} {have.shape}, expected {want.dtype} {want.shape}")
        elif have.data != want.data:
            ours, theirs = as_torch(have).float(), as_torch(want).float()
            differing = int((ours != theirs).sum())
            worst = float((ours - theirs).abs().max())
            wrong.append(f"{name} {want.dtype} {want.shape}: {differing} elements differ, by {worst:.3g} at most")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(expected)} tensors differ {note}", *wrong])


def digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
