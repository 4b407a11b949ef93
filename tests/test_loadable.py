"""Configurations that other programs wrote: read as PEFT loads them, and written so that PEFT does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
from tiny_adapters import copy_with, save_peft_adalora
from tiny_models import load

import loratool
from loratool.errors import AdapterError
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

CONFIG = "adapter_config.json"


def held_by_peft(folder: Path, base: Path) -> dict[str, tuple[int, float]]:
    """The rank and the scaling of each module as PEFT loads an adapter."""
    model = peft.PeftModel.from_pretrained(load(base, "llama"), folder).base_model.model
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", ())
    }


def held_by_loratool(folder: Path) -> dict[str, tuple[int, float]]:
    return {module: (update.rank, update.scaling) for module, update in read_adapter(folder).ranked.items()}


NULLS = {
    f"{field.name}: null": {field.name: None}
    for field in dataclasses.fields(peft.LoraConfig)
    if field.name not in ("r", "lora_alpha", "target_modules")
}
ODD: dict[str, dict[str, Any]] = NULLS | {
    "r: 4.0": {"r": 4.0},
    "lora_alpha: 8.0": {"lora_alpha": 8.0},
    "ranks that are whole": {"rank_pattern": {"q_proj": 4.0}},
    "alphas that are whole": {"alpha_pattern": {"q_proj": 2.0}},
    "layers that are whole": {"layers_to_transform": [0.0, 1.0, 2.0]},
    "an empty bias": {"bias": ""},
    "patterns that are lists": {"rank_pattern": [], "alpha_pattern": []},
    "an empty initialisation": {"init_lora_weights": ""},
    "everything null": {
        "bias": None, "peft_type": None, "rank_pattern": None, "alpha_pattern": None, "lora_dropout": None, "task_type": None,
        "use_rslora": None, "fan_in_fan_out": None, "init_lora_weights": None, "modules_to_save": None, "inference_mode": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_it_is_read_as_peft_loads_it_and_written_so_that_peft_does(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base, plain = tiny_models.folder("llama", "fp32"), tiny_adapters.folder("llama")
    odd = copy_with(plain, tmp_path / "odd", **ODD[case])
    ours = held_by_loratool(odd)
    try:
        theirs = held_by_peft(odd, base)
    except (TypeError, AttributeError, KeyError, NotImplementedError, ValueError):
        theirs = ours  # PEFT cannot load it as it is
    assert ours == theirs
    assert held_by_peft(loratool.export(odd, tmp_path / "exported"), base) == ours
    loratool.add(odd, name="odd")
    assert held_by_loratool(loratool.export("odd", tmp_path / "again")) == ours


def test_targets_that_are_null_are_those_that_have_tensors(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    """PEFT would take its own for a Llama, q_proj and v_proj, and leave the rest out without a word."""
    odd = copy_with(tiny_adapters.folder("llama"), tmp_path / "odd", target_modules=None)
    ours = held_by_loratool(odd)
    assert ours == held_by_loratool(tiny_adapters.folder("llama"))
    assert held_by_peft(loratool.export(odd, tmp_path / "exported"), tiny_models.folder("llama", "fp32")) == ours


def test_what_peft_writes_itself_stays_what_it_is(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    plain = tiny_adapters.folder("llama", rank_pattern={"q_proj": 2}, use_rslora=True)
    loratool.export(plain, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / CONFIG).read_text()) == json.loads((plain / CONFIG).read_text())


def test_a_byte_order_mark_says_nothing(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "adapter")
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert held_by_loratool(folder) == held_by_loratool(tiny_adapters.folder("llama"))


def test_so_is_an_adaloras(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    plain = save_peft_adalora(load(base, "llama"), tmp_path / "plain")
    init_r = json.loads((plain / CONFIG).read_text())["init_r"]
    odd = copy_with(plain, tmp_path / "odd", init_r=float(init_r), bias=None, lora_dropout=None, alpha_pattern=None)
    assert read_adapter(odd).scaling == read_adapter(plain).scaling
    peft.PeftModel.from_pretrained(load(base, "llama"), loratool.export(odd, tmp_path / "exported"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "r: 4.5": ({"r": 4.5}, "'r' .* is '4.5' and must be a whole number"),
    "r as text": ({"r": "4"}, "'r' .* is the text '4' and must be a whole number"),
    "r: true": ({"r": True}, "'r' .* must be a whole number"),
    "alpha as text": ({"lora_alpha": "8"}, "'lora_alpha' .* is the text '8' and must be a number"),
    "a rank as text": ({"rank_pattern": {"q_proj": "4"}}, "'q_proj' .* is the text '4'"),
    "a rank that is no whole number": ({"rank_pattern": {"q_proj": 3.5}}, "'q_proj' .* whole number"),
    "an alpha that is null": ({"alpha_pattern": {"q_proj": None}}, "'q_proj'|lora_alpha"),
    "bias: None": ({"bias": "None"}, "'bias' .* is 'None' and must be none, all or lora_only"),
    "layers as text": ({"layers_to_transform": ["0"]}, "layers_to_transform"),
} | {
    f"{key} as text {text!r}": ({key: text}, f"'{key}' .* is the text '{text}'.* without quotes")
    for key in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias", "use_qalora")
    for text in ("true", "False")
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_would_take_for_something_else_is_refused_in_a_sentence(
    case: str, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message) as raised:
        read_adapter(copy_with(tiny_adapters.folder("llama"), tmp_path / "odd", **changes))
    assert CONFIG in str(raised.value)
