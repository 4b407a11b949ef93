"""A weight multiplies an adapter as PEFT's `scale_layer` does, bit for bit; a kind that it does not scale has no other than 1."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
from tiny_adapters import save_peft_adapter
from tiny_models import StoredTensor, as_stored, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import LoratoolError
from loratool.formats.kinds import COMPUTED

if TYPE_CHECKING:
    from tiny_models import TinyModels

TARGETS = ["q_proj", "v_proj"]
BLOCKS = peft.tuners.lora.BdLoraConfig(nblocks=2, target_modules_bd_b=["_proj"])
SCALED: Mapping[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_rslora=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_dora=True),
    "bdlora": peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_bdlora=BLOCKS),
    "embedding": peft.LoraConfig(r=4, lora_alpha=7, target_modules=["embed_tokens"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS),
}


def scaled_by_peft(model: Any, adapter: Path, weight: float) -> dict[str, StoredTensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.Embedding):  # PEFT 0.21's scale_layer passes over them
                module.set_scale("default", weight)
            elif hasattr(module, "scale_layer"):
                module.scale_layer(weight)
        return {name: as_stored(tensor) for name, tensor in wrapped.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("weight", [0.5, -1.3])
@pytest.mark.parametrize("kind", SCALED)
def test_a_weight_multiplies_what_scale_layer_does(
    kind: str, weight: float, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    adapter = save_peft_adapter(load(base, "llama"), SCALED[kind], tmp_path / "adapter", save_embedding_layers=False)
    loratool.merge([(adapter, weight)], base, out=tmp_path / "out")
    before = stored_tensors(base)
    theirs = scaled_by_peft(load(base, "llama"), adapter, weight)
    assert_same_tensors(stored_tensors(tmp_path / "out"), before | theirs)
    assert any(theirs[name].data != before[name].data for name in before)


UNSCALED: Mapping[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "hra": peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", sorted(UNSCALED.keys() & COMPUTED))
def test_a_kind_that_scale_layer_leaves_alone_needs_a_weight_of_1(
    kind: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    adapter = save_peft_adapter(load(base, "llama"), UNSCALED[kind], tmp_path / "adapter")
    with pytest.raises(LoratoolError, match=rf"'adapter'.* by {kind}.*needs a weight of 1"):
        loratool.merge([(adapter, 0.5)], base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
