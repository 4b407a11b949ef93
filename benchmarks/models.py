"""The models and adapters that are measured, built once under `.data/` (not in version control)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parent / ".data"
EXAMPLES = Path(__file__).parent.parent / "examples"
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32_000
LAYERS = 22
"""The 1.1 B-parameter shape of TinyLlama."""

RANK, ALPHA = 16, 32
TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}


def llama(layers: int = LAYERS) -> Path:
    """A random bf16 Llama of the 1.1 B shape with so many layers, in shards of 500 MB."""
    folder = DATA / f"llama-{layers}"
    if not (folder / "model.safetensors.index.json").exists():
        _in_its_own_process("_build_llama", str(folder), layers)
    return folder


def lora(targets: str, layers: int = LAYERS) -> Path:
    """A random fp32 LoRA for it, r=16, alpha=32, in PEFT's layout."""
    folder = DATA / f"lora-{targets}-{layers}"
    if not (folder / "adapter_config.json").exists():
        _in_its_own_process("_build_lora", str(folder), TARGETS[targets], layers)
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: where LORATOOL_SMOLLM2 says, else fetched."""
    named = os.environ.get("LORATOOL_SMOLLM2")
    if named:
        return Path(named)
    subprocess.run([sys.executable, EXAMPLES / "get_smollm2.py", DATA / "smollm2"], check=True)
    return DATA / "smollm2"


def _in_its_own_process(function: str, *arguments: object) -> None:
    """A process counts the memory of the one that started it as its own peak, so those who measure stay small."""
    print(f"building {arguments[0]} ...", flush=True)
    code = f"import models; models.{function}(*{arguments!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    kv = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
        for name, rows in (("q_proj", HIDDEN), ("k_proj", kv), ("v_proj", kv), ("o_proj", HIDDEN)):
            yield f"{prefix}self_attn.{name}.weight", (rows, HIDDEN)
        yield prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _build_llama(path: str, layers: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, int] = {}

    def flush() -> None:
        save_file(shards[-1], folder / f"part-{len(shards):05d}", {"format": "pt"})
        shards[-1] = {}
        shards.append({})

    for name, shape in _shapes(layers):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > 5e8:
            flush()
        shards[-1][name] = tensor if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
        places[name] = len(shards)
    flush()
    count = len(shards) - 1
    names = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    for number, name in names.items():
        (folder / f"part-{number:05d}").rename(folder / name)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    index = {"metadata": {}, "weight_map": {name: names[place] for name, place in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _build_lora(path: str, targets: list[str], layers: int) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in _shapes(layers):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets:
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.005
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
