"""Adapters that are not plain LoRA: of every type of PEFT, in GGUF, and files of other programs by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import peft
from safetensors.numpy import save_file
from tiny_adapters import save_peft_adapter
from tiny_models import load

if TYPE_CHECKING:
    from tiny_models import TinyModels

DATA = Path(__file__).parent / "data" / "adapters"
"""What other programs saved; see ``make.py`` there."""

Q = {"target_modules": ["q_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": PROMPT,
    "MULTITASK_PROMPT_TUNING": PROMPT | {"num_tasks": 2},
    "P_TUNING": PROMPT | {"encoder_hidden_size": 8},
    "PREFIX_TUNING": PROMPT,
    "CARTRIDGE": PROMPT,
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": Q | {"r": 0, "oft_block_size": 4},
    "BOFT": Q | {"boft_block_size": 4},
    "ADALORA": Q | {"total_step": 10, "init_r": 6},
    "C3A": Q | {"block_size": 16},
    "FOURIERFT": Q | {"n_frequency": 10},
    "WAVEFT": Q | {"n_frequency": 10},
    "POLY": Q | {"r": 2, "n_tasks": 2, "n_skills": 2, "n_splits": 1},
    "VBLORA": Q | {"r": 2, "num_vectors": 4, "vector_length": 16, "topk": 2},
    "ROAD": Q | {"group_size": 8},
    "UNILORA": Q | {"save_indices": True},
    "TINYLORA": Q | {"weight_tying": 1.0},
    "LOHA": Q | {"r": 3, "alpha": 5},
    "LOKR": Q | {"r": 2, "alpha": 5, "decompose_both": True},
    "LORA": Q | {"r": 3, "lora_alpha": 5},
}
"""What each type of PEFT asks for beside modules that it targets; and where it has a rank and an alpha, some of its own."""

NOT_MADE = {
    "ADAMSS": "wants scikit-learn",
    "XLORA": "wants adapters that lie on disk",
}

MADE = [each.value for each in peft.PeftType if each.value not in NOT_MADE]


class PeftTypes:
    """Folders of adapters of PEFT's types for the tiny Llama, each saved by PEFT once. Read them only."""

    def __init__(self, root: Path, models: TinyModels) -> None:
        self.root = root
        self.models = models

    def __call__(self, peft_type: str) -> Path:
        folder = self.root / peft_type
        if not folder.exists():
            config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)](**CONFIGS.get(peft_type, Q))
            save_peft_adapter(load(self.models.folder("llama", "fp32"), "llama"), config, folder)
        return folder


def named(names: Mapping[str, tuple[int, ...]], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of tensors of ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ones(shape, np.float32) for name, shape in names.items()}, path, metadata)
    return path


def gguf_adapter(path: Path, *, alpha: float | None = 8.0, general_type: str = "adapter") -> Path:
    """An adapter as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(general_type)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/ada/llama")
    writer.add_token_list([f"token-{number}".encode() for number in range(500)])
    generator = np.random.default_rng(0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", generator.normal(size=(4, 64)).astype(np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", generator.normal(size=(64, 4)).astype(np.float16))
    writer.add_tensor("token_embd.weight.lora_a", generator.normal(size=(500, 4)).astype(np.float32))
    writer.add_tensor("token_embd.weight.lora_b", generator.normal(size=(64, 4)).astype(np.float32))
    packed = gguf.quantize(generator.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight.lora_a", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight.lora_b", generator.normal(size=(32, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BY_NAME: dict[str, tuple[dict[str, tuple[int, ...]], tuple[Any, ...], tuple[str, ...]]] = {
    "torchtune": (
        {
            "layers.0.attn.q_proj.lora_a.weight": (2, 6),
            "layers.0.attn.q_proj.lora_b.weight": (4, 2),
            "layers.0.mlp.w1.lora_a.weight": (2, 6),
            "layers.0.mlp.w1.lora_b.weight": (4, 2),
        },
        ("torchtune", "lora", 2, None, None),
        ("q_proj", "w1"),
    ),
    "torchtune's DoRA": (
        {
            "layers.0.attn.output_proj.lora_a.weight": (2, 6),
            "layers.0.attn.output_proj.lora_b.weight": (4, 2),
            "layers.0.attn.output_proj.magnitude": (4,),
        },
        ("torchtune", "dora", 2, None, None),
        ("output_proj",),
    ),
    "XLabs": (
        {
            "double_blocks.0.processor.qkv_lora1.down.weight": (2, 6),
            "double_blocks.0.processor.qkv_lora1.up.weight": (4, 2),
            "double_blocks.0.processor.proj_lora2.down.weight": (2, 6),
            "double_blocks.0.processor.proj_lora2.up.weight": (4, 2),
            "single_blocks.1.processor.qkv_lora.down.weight": (2, 6),
            "single_blocks.1.processor.qkv_lora.up.weight": (4, 2),
        },
        ("xlabs", "lora", 2, None, None),
        ("proj2", "qkv", "qkv1"),
    ),
    "BFL's control LoRA": (
        {
            "img_in.lora_A.weight": (2, 6),
            "img_in.lora_B.weight": (4, 2),
            "img_in.lora_B.bias": (4,),
            "double_blocks.0.img_attn.norm.key_norm.scale": (8,),
            "double_blocks.0.img_attn.norm.query_norm.scale": (8,),
        },
        ("bfl-control", "lora", 2, None, None),
        ("img_in",),
    ),
    "old diffusers": (
        {
            "unet.mid_block.attn1.processor.to_q_lora.down.weight": (2, 6),
            "unet.mid_block.attn1.processor.to_q_lora.up.weight": (4, 2),
            "unet.mid_block.attn1.processor.to_out_lora.down.weight": (2, 6),
            "unet.mid_block.attn1.processor.to_out_lora.up.weight": (4, 2),
            "text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": (2, 6),
            "text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (4, 2),
        },
        ("diffusers-old", "lora", 2, None, None),
        ("q_proj", "to_out.0", "to_q"),
    ),
    "loralib": (
        {"layers.0.attn.lora_A": (2, 6), "layers.0.attn.lora_B": (4, 2)},
        ("loralib", "lora", 2, None, None),
        ("attn",),
    ),
    "a DoRA of diffusers": (
        {"transformer.blocks.0.attn1.to_q.lora_A.weight": (2, 6), "transformer.blocks.0.attn1.to_q.lora_B.weight": (4, 2),
         "transformer.blocks.0.attn1.to_q.lora_magnitude_vector": (4,)},
        ("diffusers", "dora", 2, None, None),
        ("to_q",),
    ),
    "ComfyUI's LoKr": (
        {"diffusion_model.blocks.0.attn.q.lokr_w1": (2, 2), "diffusion_model.blocks.0.attn.q.lokr_w2_a": (2, 3),
         "diffusion_model.blocks.0.attn.q.lokr_w2_b": (3, 2), "diffusion_model.blocks.0.attn.q.alpha": ()},
        ("comfyui", "lokr", 3, 1.0, None),
        ("q",),
    ),
}  # fmt: skip
"""Files by their tensors' names and shapes, as the sources of programs have them, and what each is."""
