"""LoRAs that were trained in another way merge as LoRAs, to the bytes of PEFT's merge over the base in fp32, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import copy_with, merge_by_peft, save_peft_adapter
from tiny_models import StoredTensor, as_stored, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import LoratoolError

if TYPE_CHECKING:
    from tiny_models import TinyModels

WAYS: dict[str, dict[str, Any]] = {
    "MiCA": {"init_lora_weights": "mica"},
    "VeLoRA": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
    "MonteCLoRA": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
}


def rounded_once(base: Path, adapter: Path) -> dict[str, StoredTensor]:
    """PEFT's merge over the base in fp32, rounded to the type that the base is stored in."""
    exact = merge_by_peft(load(base, "llama").float(), adapter, adapter.parent / "fp32")
    kept = stored_tensors(base)
    return {name: as_stored(as_torch(tensor).to(as_torch(kept[name]).dtype)) for name, tensor in exact.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("way", WAYS)
def test_what_served_training_alone_is_ignored_with_a_note(
    way: str, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], **WAYS[way])
    adapter = save_peft_adapter(load(base, "llama").float(), config, tmp_path / "adapter")
    extra = [
        name
        for name in load_file(adapter / "adapter_model.safetensors")
        if ".lora_A." not in name and ".lora_B." not in name
    ]
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out")
    assert_same_tensors(stored_tensors(tmp_path / "out"), rounded_once(base, adapter))
    said = [note for note in merged.notes if way in note]
    assert bool(said) == (way != "MiCA")
    assert all(f"{len(extra)} tensors" in note for note in said)


@pytest.mark.parametrize("way", ["VeLoRA", "MonteCLoRA"])
def test_an_adapter_made_from_one_is_a_lora_that_peft_loads(way: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **WAYS[way])
    adapter = save_peft_adapter(load(base, "llama"), config, tmp_path / "adapter")
    half = loratool.truncate(adapter, rank=2, out=tmp_path / "half")[0].out
    loratool.merge(half, into=base, out=tmp_path / "out")
    assert_same_tensors(stored_tensors(tmp_path / "out"), merge_by_peft(load(base, "llama"), half, tmp_path / "peft"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_one_that_changed_the_base_is_refused_until_peft_converted_it(
    init: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=init)
    model = peft.get_peft_model(load(base, "llama"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(LoratoolError, match=rf"'{init}'.*path_initial_model_for_weight_conversion=INITIAL"):
        loratool.merge(tmp_path / "raw", into=base, out=tmp_path / "out")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loratool.merge(tmp_path / "lora", into=base, out=tmp_path / "out")
    theirs = merge_by_peft(load(base, "llama"), tmp_path / "lora", tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)
    trained = model.merge_and_unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    ours = as_torch(stored_tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"])
    assert torch.allclose(ours, trained, atol=1e-5)


def test_a_setting_that_is_off_is_no_note(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    plain = save_peft_adapter(load(base, "llama"), config, tmp_path / "plain")
    adapter = copy_with(plain, tmp_path / "adapter", velora_config=None, monteclora_config=None)
    assert not any("trained by" in note for note in loratool.merge(adapter, into=base, out=tmp_path / "out").notes)
