"""What is not supported is refused by name before anything is written, and never merged wrongly."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, merge_by_peft, save_peft_adapter
from tiny_models import ARCHITECTURES, assert_same_tensors, digest, load, save_plain_model, stored_tensors

import loratool
from loratool.errors import LoratoolError
from loratool.formats.kinds import OF_PEFT

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


def expect_refusal(adapter: Path, base: Path, folder: Path, named: str, *, beside: Path | None = None) -> None:
    """The merge must fail and say what it met, into a new folder and in place, and leave no trace."""
    folder.mkdir()
    copy = shutil.copytree(base, folder / "copy")
    before = digest(base)
    adapters = [adapter] if beside is None else [beside, adapter]
    for options in ({"into": base, "out": folder / "out"}, {"into": copy, "in_place": True}):
        with pytest.raises(LoratoolError) as raised:
            loratool.merge(adapters, **options)
        assert re.search(named, str(raised.value), re.IGNORECASE), f"{raised.value} does not name {named}"
        assert digest(base) == before
        assert digest(copy) == before
        assert sorted(path.name for path in folder.iterdir()) == ["copy"]


LORA_FEATURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "modules_to_save of a tied embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}, "embed_tokens.*ties"),
    "lora_bias without biases": ("llama", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, "lora_bias"),
    "layer_replication": (
        "llama",
        {"layer_replication": [[0, 2], [1, 2]]},
        r"layer_replication \(.*0, 2.*1, 2.*\): .*passthrough merge",
    ),
    "aLoRA": ("llama", {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, "alora"),
    "KaSA": ("llama", {"kasa_config": peft.tuners.lora.KasaConfig()}, "kasa"),
}


@pytest.mark.parametrize("feature", LORA_FEATURES)
def test_a_lora_feature_of_peft_is_refused_by_name(feature: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    architecture, options, named = LORA_FEATURES[feature]
    base = tiny_models.folder(architecture, "bf16")
    targets = list(ARCHITECTURES[architecture].target_modules)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": targets} | options))
    adapter = save_peft_adapter(load(base, architecture), config, tmp_path / "adapter")
    expect_refusal(adapter, base, tmp_path / "work", named)


HAND_WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA without its magnitudes": ({"use_dora": True}, "dora"),
    "QALoRA": ({"use_qalora": True, "qalora_group_size": 16}, "qalora"),
    "modules_to_save without tensors": ({"modules_to_save": ["classifier"]}, "modules_to_save"),
    "trainable tokens by module": (
        {"trainable_token_indices": {"embed_tokens": [1]}},
        "trainable_token_indices",
    ),
    "target_parameters": ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    "lora_bias without tensors": ({"lora_bias": True}, "lora_bias"),
    "biases of no known sort": ({"bias": "some"}, "bias.*must be none, all or lora_only"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow"),
    "BD-LoRA without blocks": ({"use_bdlora": {"nblocks": 2}}, "target_modules_bd_a"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "kasa"),
    "Megatron": ({"megatron_config": {"hidden_size": 64}}, "megatron"),
} | {
    f"initialised by {init}": ({"init_lora_weights": init}, init.partition("_niter")[0].replace("_", ".?"))
    for init in (
        "pissa",
        "pissa_niter_16",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "an_init_of_tomorrow",
    )
}


@pytest.mark.parametrize("feature", HAND_WRITTEN)
def test_a_config_that_asks_for_more_than_plain_lora_is_refused_by_name(
    feature: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    entries, named = HAND_WRITTEN[feature]
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / "adapter", **entries)
    expect_refusal(adapter, tiny_models.folder("llama"), tmp_path / "work", named)


def test_multi_head_attention_is_refused_as_what_it_is(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"mha": torch.nn.MultiheadAttention(16, 2), "out": torch.nn.Linear(16, 16)})
    adapter = save_peft_adapter(model, peft.LoraConfig(r=4, target_modules=["mha"]), tmp_path / "adapter")
    base = save_plain_model(tmp_path / "base", dict(model.state_dict()))
    expect_refusal(adapter, base, tmp_path / "work", r"'mha', an nn\.MultiheadAttention.*twice")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=init)
    adapter = save_peft_adapter(load(base, "llama"), config, tmp_path / "adapter")
    expect_refusal(adapter, base, tmp_path / "work", init.partition("_")[0])


OTHER_TYPES: dict[str, Callable[[], peft.PeftConfig]] = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("kind", [each for each in OTHER_TYPES if OF_PEFT[each].why_not])
def test_another_peft_type_is_refused_by_name(kind: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    adapter = save_peft_adapter(load(base, "llama"), OTHER_TYPES[kind](), tmp_path / "adapter")
    expect_refusal(adapter, base, tmp_path / "work", kind)


@pytest.mark.parametrize(
    "kind",
    [*sorted({kind.value for kind in peft.PeftType} - {"LORA"} - set(OTHER_TYPES)), "A_TYPE_OF_TOMORROW"],
)
def test_a_type_that_only_its_config_tells_from_lora_is_refused_by_name(
    kind: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / "adapter", peft_type=kind)
    expect_refusal(adapter, tiny_models.folder("llama"), tmp_path / "work", kind)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("base_model.model.model.embed_tokens.weight", "embed_tokens"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "lora_magnitude_vector"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_B.bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "q_proj"),
        ("base_model.model.model.layers.0.mlp.gate_proj.lora_E", "lora_E"),
        ("a_tensor_of_another_kind", "a_tensor_of_another_kind"),
    ],
)
def test_a_tensor_that_plain_lora_does_not_have_is_refused_by_name_whatever_the_config_says(
    key: str, named: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {key: torch.ones(64)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    expect_refusal(adapter, tiny_models.folder("llama"), tmp_path / "work", named)


def test_resized_embeddings_beside_the_factors_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    model = load(base, "llama")
    model.resize_token_embeddings(140)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    adapter = save_peft_adapter(model, config, tmp_path / "adapter", save_embedding_layers=True)
    expect_refusal(adapter, base, tmp_path / "work", "embed_tokens|lm_head")


def head_adapter_with_its_base_weight(base: Path, folder: Path) -> Path:
    """What PEFT saves by itself when `lm_head` is a target: the factors and a copy of the base's weight."""
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    adapter = save_peft_adapter(load(base, "llama"), config, folder)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    return adapter


def test_a_heads_own_weight_beside_its_factors_is_merged_as_peft_does(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    adapter = head_adapter_with_its_base_weight(base, tmp_path / "adapter")
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    theirs = merge_by_peft(load(base, "llama"), adapter, tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)


def test_another_weight_of_the_head_beside_its_factors_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    """PEFT would replace the base's head by it."""
    base = tiny_models.folder("llama", "bf16")
    adapter = head_adapter_with_its_base_weight(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    expect_refusal(adapter, base, tmp_path / "work", r"lm_head\.base_layer")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*layers\.1\..*"},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ],
    ids=["target_modules", "regex", "exclude_modules", "layers_to_transform"],
)
def test_factors_for_a_module_that_the_config_leaves_out_are_refused(
    options: dict[str, Any], tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    """PEFT drops such tensors in silence; every tensor lands, or nothing is written."""
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / "adapter", **options)
    expect_refusal(adapter, tiny_models.folder("llama"), tmp_path / "work", "target_modules|exclude_modules|layers_")


def test_one_adapter_that_is_refused_stops_the_merge_of_all(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    good = tiny_adapters.folder("llama")
    bad = copy_with(good, tmp_path / "bad", use_dora=True)
    expect_refusal(bad, tiny_models.folder("llama"), tmp_path / "work", "dora", beside=good)


def test_a_single_file_is_refused_like_its_directory(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    source = tiny_adapters.folder("llama")
    config = json.loads((source / "adapter_config.json").read_text()) | {"use_dora": True}
    file = tmp_path / "dora.safetensors"
    save_file(load_file(source / "adapter_model.safetensors"), file, {"adapter_config": json.dumps(config)})
    expect_refusal(file, tiny_models.folder("llama"), tmp_path / "work", "dora")
