"""BD-LoRA is merged to PEFT's bytes where PEFT rounds once, and to its sum in fp32, rounded once, where it rounds twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
from peft.tuners.lora import BdLoraConfig
from tiny_adapters import copy_with, merge_by_peft, save_peft_adapter
from tiny_models import DTYPES, as_stored, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import LoratoolError

if TYPE_CHECKING:
    from tiny_models import TinyModels

BLOCKS: Mapping[str, BdLoraConfig] = {
    "both sides": BdLoraConfig(nblocks=2, target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_", "v_proj"]),
    "some modules": BdLoraConfig(nblocks=4, target_modules_bd_b=["q_proj"], match_strict=False),
    "one block": BdLoraConfig(nblocks=1, target_modules_bd_a=["_proj"]),
}


def saved(models: TinyModels, folder: Path, blocks: BdLoraConfig, **lora: Any) -> Path:
    targets = ["q_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": targets, "use_bdlora": blocks} | lora))
    return save_peft_adapter(load(models.folder("llama", "fp32"), "llama"), config, folder)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_merge_is_pefts_and_is_taken_out_bit_for_bit(
    blocks: str, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    adapter = saved(tiny_models, tmp_path / "adapter", BLOCKS[blocks], use_rslora=blocks == "both sides")
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True).out
    exact = merge_by_peft(load(base, "llama").float(), adapter, tmp_path / "peft")
    rounded = {name: as_stored(as_torch(tensor).to(DTYPES[dtype])) for name, tensor in exact.items()}
    before = stored_tensors(base)
    assert_same_tensors(stored_tensors(merged), before | rounded)
    loratool.verify(merged)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), before)


def inside(**changes: Any) -> dict[str, Any]:
    plain = {"nblocks": 2, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj", "v_proj"]}
    return {"use_bdlora": {**plain, "match_strict": True, **changes}}


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "no object": ({"use_bdlora": True}, "'use_bdlora'.*must be an object"),
    "no blocks": (inside(nblocks=0), "'nblocks'.*at least 1"),
    "other blocks": (inside(nblocks=3), "3 blocks"),
    "no names": (inside(target_modules_bd_a=7), "target_modules_bd_a.*list of names"),
    "neither": (inside(target_modules_bd_a=None), "o_proj.*neither"),
    "both": (inside(target_modules_bd_a=["_proj"]), "both"),
    "the other factor": (
        inside(target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["o_proj"]),
        "do not make rank 4|no part of|shape",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_contradict_the_tensors_are_refused(case: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    adapter = copy_with(saved(tiny_models, tmp_path / "good", BLOCKS["both sides"]), tmp_path / "adapter", **changes)
    assert json.loads((adapter / "adapter_config.json").read_text())["use_bdlora"] is not None
    with pytest.raises(LoratoolError, match=message) as raised:
        loratool.merge(adapter, tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
