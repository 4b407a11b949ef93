"""Kinds whose change depends on W, as PEFT saves them: merged to PEFT's bytes, taken out bit for bit, refused when broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_other_kinds import WEIGHTS, Change, first, saying, with_last_cut, with_nan
from tiny_adapters import merge_by_peft, save_peft_adapter
from tiny_models import DTYPES, TinyModels, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import LoratoolError
from loratool.formats.identify import identify
from loratool.formats.read import read_adapter
from loratool.formats.write import write_peft


@dataclass(frozen=True)
class Saved:
    """A configuration, the model it is trained on, and the tensors whose numbers lie around 1, as trained ones do.

    PEFT rounds the change of half types more than once if not `once`.
    """

    config: peft.PeftConfig
    model: str = "llama"
    around_1: tuple[str, ...] = ()
    once: bool = True


LLAMA = ["q_proj", "v_proj", "down_proj"]
IA3 = ("ia3_l",)
CONFIGS: dict[str, Saved] = {
    "ia3": Saved(peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]), around_1=IA3),
    "ia3-biases": Saved(
        peft.IA3Config(target_modules=["q_proj", "k_proj", "o_proj", "up_proj"], feedforward_modules=["up_proj"]),
        "qwen2", IA3,
    ),
    "ia3-conv1d": Saved(
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        "gpt2", IA3,
    ),
}  # fmt: skip


class Adapters:
    """Adapters of these configurations, as PEFT saves them, made when first asked for."""

    def __init__(self, root: Path, models: TinyModels) -> None:
        self._root, self._models = root, models

    def folder(self, name: str) -> Path:
        folder, saved = self._root / name, CONFIGS[name]
        if not folder.exists():
            model = load(self._models.folder(saved.model, "fp32"), saved.model)
            save_peft_adapter(model, saved.config, folder, seed=5)
            tensors = load_file(folder / WEIGHTS)
            moved = {
                key: each + 1 if any(part in key for part in saved.around_1) else each for key, each in tensors.items()
            }
            save_file(moved, folder / WEIGHTS, {"format": "pt"})
        return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("relative"), tiny_models)


def merged_by_peft(name: str, base: Path, adapter: Path, out: Path) -> Mapping[str, Any]:
    """The stored tensors of PEFT's merge: of its merge over the base in fp32, rounded once, where it rounds more often."""
    model, saved = CONFIGS[name].model, CONFIGS[name]
    if saved.once:
        return merge_by_peft(load(base, model), adapter, out)
    exact = merge_by_peft(load(base, model).float(), adapter, out)
    dtypes = {key: as_torch(each).dtype for key, each in stored_tensors(base).items()}
    rounded = {key: as_torch(each).to(dtypes[key]) for key, each in exact.items()}
    save_file(rounded, out / "rounded.safetensors")
    return stored_tensors(out / "rounded.safetensors")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_has_pefts_bytes_and_is_taken_out_bit_for_bit(
    name: str, dtype: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder(CONFIGS[name].model, dtype), adapters.folder(name)
    result = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True)
    before, after = stored_tensors(base), stored_tensors(result.out)
    assert_same_tensors(after, before | merged_by_peft(name, base, adapter, tmp_path / "peft"))
    weights = {each for each in read_adapter(adapter).changes if each.endswith(".weight")}
    assert sum(after[each].data != before[each].data for each in before) >= len(weights)
    loratool.verify(result.out)
    assert_same_tensors(stored_tensors(loratool.unmerge(result.out, out=tmp_path / "back").out), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_undo_is_a_fraction_of_the_touched_bytes(
    name: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder(CONFIGS[name].model, "bf16")
    merged = loratool.merge(adapters.folder(name), base, out=tmp_path / "merged", undo=True)
    assert merged.undo_file is not None
    assert merged.undo_file.stat().st_size < 0.5 * merged.plan.touched_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_loads_in_peft_with_the_same_numbers(
    name: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    write_peft(read_adapter(adapters.folder(name)), written, keep_metadata=False)
    ours, theirs = load_file(written / WEIGHTS), load_file(adapters.folder(name) / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert identify(adapters.folder(name)).kind == name.partition("-")[0]


def test_a_module_without_a_bias_lacks_nothing(adapters: Adapters, tiny_models: TinyModels, tmp_path: Path) -> None:
    changes = read_adapter(adapters.folder("ia3-biases")).changes
    plan = loratool.merge(adapters.folder("ia3-biases"), tiny_models.folder("qwen2"), out=tmp_path / "out").plan
    changed = {target.name for target in plan.targets}
    assert {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias"} <= changed
    assert "model.layers.0.self_attn.o_proj.bias" in set(changes) - changed


def with_vector(part: str) -> Change:
    """The tensor has lost its axis of length 1."""

    def flat(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = first(tensors, part)
        tensors[name] = tensors[name].flatten().contiguous()

    return flat


BROKEN: dict[str, tuple[str, Change, str]] = {
    "ia3: another length": ("ia3", with_last_cut("down_proj.ia3_l"), r"fits a matrix of shape \[any, \d+\]"),
    "ia3: a vector": ("ia3", with_vector("ia3_l"), "neither a row nor a column"),
    "ia3: NaN": ("ia3", with_nan("ia3_l"), "NaN"),
    "ia3: other feed-forward modules": ("ia3", saying(feedforward_modules=[]), "says that it is none of them"),
    "ia3: not a target": ("ia3", saying(target_modules=["q_proj"]), "does not target"),
    "ia3: nothing": ("ia3", lambda tensors, config: tensors.clear(), "holds no IA3 tensors"),
}


def broken(adapters: Adapters, name: str, change: Change, out: Path) -> Path:
    folder = shutil.copytree(adapters.folder(name), out)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_refused_with_a_sentence_and_nothing_is_written(
    what: str, adapters: Adapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    name, change, message = BROKEN[what]
    folder = broken(adapters, name, change, tmp_path / "broken")
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(folder, tiny_models.folder(CONFIGS[name].model, "fp32"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
