"""Seeded models and adapters of every kind that a merge can meet: small, and alike on every machine with the same numpy.

A model has matrices of several blocks of rows, of ragged blocks of scales and of odd columns. Dense numbers come from numpy,
4-bit ones from bitsandbytes on one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HIDDEN, INTERMEDIATE, WIDE, LAYERS, VOCABULARY = 192, 520, 2600, 2, 24
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
          "mlp.down_proj")  # fmt: skip
WORDS = ["<unk>", "<s>", "</s>", "the", "a", "cat", "dog", "sat", "on", "mat", "what", "and", "of", "in", "it", "was", "is",
         "to"]  # fmt: skip

Tensors = dict[str, torch.Tensor]


def numbers(name: str, *shape: int, spread: float = 1.0) -> torch.Tensor:
    """Random numbers that the name and the shape decide."""
    seed = np.frombuffer(f"{name} {shape}".encode(), np.uint8).astype(np.uint64)
    generator = np.random.Generator(np.random.Philox(int(np.sum(seed * np.arange(1, len(seed) + 1, dtype=np.uint64)))))
    return torch.from_numpy(generator.standard_normal(shape, np.float32) * np.float32(spread))


def llama_shapes(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> dict[str, tuple[int, int]]:
    """The linear modules of a small Llama, (out_features, in_features)."""
    sides = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {
        f"model.layers.{layer}.{module}": sides.get(module.rpartition(".")[2], (hidden, hidden))
        for layer in range(LAYERS)
        for module in LINEAR
    }


def ragged_shapes() -> dict[str, tuple[int, int]]:
    """Linear modules of several blocks of rows, of columns that are no whole blocks of scales, and of odd ones."""
    return {
        "model.layers.0.mlp.up_proj": (WIDE, 1088),
        "model.layers.0.mlp.down_proj": (1030, 2601),
        "model.layers.0.self_attn.q_proj": (130, 77),
        "model.layers.0.self_attn.v_proj": (1, 64),
        "model.layers.1.self_attn.q_proj": (64, 128),
    }


def dense_tensors(shapes: Mapping[str, tuple[int, int]], dtype: str) -> Tensors:
    """The tensors of a dense Llama with these linear modules."""
    hidden = HIDDEN
    tensors = {f"{module}.weight": numbers(module, *shape, spread=0.02) for module, shape in shapes.items()}
    tensors["model.embed_tokens.weight"] = numbers("embed", VOCABULARY, hidden)
    tensors["lm_head.weight"] = numbers("head", VOCABULARY, hidden, spread=0.02)
    norms = [f"model.layers.{n}.{kind}_layernorm" for n in range(LAYERS) for kind in ("input", "post_attention")]
    for norm in [*norms, "model.norm"]:
        tensors[f"{norm}.weight"] = 1 + numbers(norm, hidden, spread=0.01)
    return {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}


def save_model(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A Llama's folder with a tokenizer of a few words, which transformers loads."""
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(facts | config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _tokenizer() -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(WORDS)}, "unk_token": "<unk>"},
    }


def dense(folder: Path, dtype: str, shapes: Mapping[str, tuple[int, int]] | None = None) -> Path:
    return save_model(folder, dense_tensors(shapes or llama_shapes(), dtype))


def four_bit(folder: Path, kind: str, dtype: str, shapes: Mapping[str, tuple[int, int]] | None = None, *,
             blocksize: int = 64, nested: bool = True) -> Path:  # fmt: skip
    """A Llama whose linear modules are in 4 bits, with a block of zeros here and there, as bitsandbytes stores them."""
    import bitsandbytes.functional as bnb

    shapes = shapes or llama_shapes()
    tensors = dense_tensors(shapes, dtype)
    for module in shapes:
        weight = tensors.pop(f"{module}.weight")
        weight.view(-1)[: 3 * blocksize // 2] = 0
        weight.view(-1)[-blocksize // 3 :] *= 20
        codes, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
        parts = {f"{module}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors |= {f"{module}.weight": codes} | parts
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "float32",
    }
    return save_model(folder, tensors, quantization_config=quantization)


def gpt2(folder: Path, dtype: str) -> Path:
    """A GPT-2, whose Conv1D modules are stored as (in_features, out_features)."""
    side, tensors = 128, {}
    for layer in range(2):
        for module, shape in gpt2_shapes(side, layer).items():
            tensors[f"{module}.weight"] = numbers(module, *shape[::-1], spread=0.02)
            tensors[f"{module}.bias"] = numbers(f"{module}.bias", shape[0], spread=0.02)
        for norm in ("ln_1", "ln_2"):
            tensors[f"transformer.h.{layer}.{norm}.weight"] = torch.ones(side)
            tensors[f"transformer.h.{layer}.{norm}.bias"] = torch.zeros(side)
    for name, shape in (("wte", (VOCABULARY, side)), ("wpe", (64, side)), ("ln_f", (side,))):
        tensors[f"transformer.{name}.weight"] = numbers(name, *shape)
    tensors["transformer.ln_f.bias"] = torch.zeros(side)
    folder.mkdir(parents=True)
    save_file(
        {n: t.to(DTYPES[dtype]).contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    facts = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": side, "n_layer": 2, "n_head": 4}
    (folder / "config.json").write_text(
        json.dumps(facts | {"vocab_size": VOCABULARY, "n_positions": 64}, indent=2) + "\n"
    )
    return folder


def gpt2_shapes(side: int = 128, layer: int | None = None) -> dict[str, tuple[int, int]]:
    sides = {"attn.c_attn": (3 * side, side), "attn.c_proj": (side, side), "mlp.c_fc": (4 * side, side),
             "mlp.c_proj": (side, 4 * side)}  # fmt: skip
    layers = range(2) if layer is None else [layer]
    return {f"transformer.h.{n}.{module}": shape for n in layers for module, shape in sides.items()}


# Adapters


def _factors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: str, strength: float) -> dict[str, Tensors]:
    return {
        module: {
            "A": numbers(f"{seed} A {module}", rank, shape[1], spread=0.05),
            "B": numbers(f"{seed} B {module}", shape[0], rank, spread=0.02 * strength),
        }
        for module, shape in shapes.items()
    }


def _config(shapes: Mapping[str, tuple[int, int]], rank: int, **config: Any) -> dict[str, Any]:
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"} | config


def _save_folder(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))
    return folder


def lora(folder: Path, shapes: Mapping[str, tuple[int, int]], *, rank: int = 4, seed: str = "lora", strength: float = 1.0,
         heads: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:  # fmt: skip
    """A LoRA as PEFT saves it; `heads` are the tensors of its ``modules_to_save``, by module."""
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor
        for module, factors in _factors(shapes, rank, seed, strength).items()
        for letter, factor in factors.items()
    }
    tensors |= {f"base_model.model.{module}.weight": tensor for module, tensor in (heads or {}).items()}
    saved = {"modules_to_save": [module.rpartition(".")[2] for module in heads]} if heads else {}
    return _save_folder(folder, tensors, _config(shapes, rank, **saved, **config))


def adalora(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """An AdaLoRA as PEFT saves it, one component of its first module pruned away."""
    tensors: Tensors = {}
    pruned = next(iter(shapes))
    for module, factors in _factors(shapes, 4, "adalora", 1.0).items():
        kept = 3 if module == pruned else 4
        tensors |= {
            f"base_model.model.{module}.lora_A": factors["A"][:kept],
            f"base_model.model.{module}.lora_B": factors["B"][:, :kept],
            f"base_model.model.{module}.lora_E": 1 + numbers(f"E {module}", kept, 1, spread=0.3),
        }
    config = _config(shapes, 4, peft_type="ADALORA", init_r=4, target_r=4, lora_alpha=7, total_step=1)
    config["rank_pattern"] = {f"{pruned}.lora_E": [True, False, True, True]}
    return _save_folder(folder, tensors, config)


def dylora(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """A DyLoRA as a PEFT folder whose facts say what it is."""
    lora(folder, shapes, rank=8, seed="dylora")
    (folder / "loratool.json").write_text(json.dumps({"kind": "dylora"}))
    return folder


def kohya(file: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """A LoRA in kohya's layout."""
    tensors: Tensors = {}
    for module, factors in _factors(shapes, 4, "kohya", 1.0).items():
        flat = "lora_te_" + module.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": factors["A"], f"{flat}.lora_up.weight": factors["B"]}
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def text(file: Path) -> Path:
    lines = ["the cat sat on the mat", "what was it", "a dog and a cat sat in the mat of the dog", "it is to sat"]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


Build = Callable[[Path], Path]

MODELS: Mapping[str, Build] = {
    "bf16": lambda to: dense(to, "bf16"),
    "fp16": lambda to: dense(to, "fp16"),
    "fp32": lambda to: dense(to, "fp32"),
    "bf16-ragged": lambda to: dense(to, "bf16", ragged_shapes()),
    "nf4": lambda to: four_bit(to, "nf4", "bf16"),
    "nf4-plain": lambda to: four_bit(to, "nf4", "fp16", blocksize=128, nested=False),
    "nf4-ragged": lambda to: four_bit(to, "nf4", "bf16", ragged_shapes()),
    "fp4": lambda to: four_bit(to, "fp4", "bf16"),
    "fp4-plain": lambda to: four_bit(to, "fp4", "fp32", nested=False),
    "fp4-ragged": lambda to: four_bit(to, "fp4", "bf16", ragged_shapes()),
    "gpt2": lambda to: gpt2(to, "bf16"),
}

HEAD = {"lm_head": numbers("new head", VOCABULARY, HIDDEN, spread=0.02)}
REPLACED = HEAD | {"model.layers.1.self_attn.v_proj": numbers("new v_proj", HIDDEN, HIDDEN, spread=0.02)}
ATTENTION = {module: shape for module, shape in llama_shapes().items() if module.endswith(("q_proj", "v_proj"))}
QUERIES = {module: shape for module, shape in llama_shapes().items() if module.endswith("q_proj")}

ADAPTERS: Mapping[str, Build] = {
    "lora": lambda to: lora(to, llama_shapes()),
    "rslora": lambda to: lora(to, ATTENTION, rank=8, seed="rslora", use_rslora=True, lora_alpha=3),
    "strong": lambda to: lora(to, llama_shapes(), seed="strong", strength=12),
    "ragged": lambda to: lora(to, ragged_shapes(), seed="ragged"),
    "gpt2": lambda to: lora(to, gpt2_shapes(), seed="gpt2", fan_in_fan_out=True),
    "head": lambda to: lora(to, QUERIES, seed="head", heads=HEAD),
    "replaced": lambda to: lora(to, QUERIES, seed="head", heads=REPLACED),
    "adalora": lambda to: adalora(to, ATTENTION),
    "dylora": lambda to: dylora(to, ATTENTION),
    "kohya": lambda to: kohya(to / "kohya.safetensors", ATTENTION),
}
