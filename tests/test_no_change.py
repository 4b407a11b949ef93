"""Adapters and merges that change nothing: said by add and show, refused by merge, and counted by the bytes that changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import save_peft_adalora
from tiny_models import digest, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import NoChangeError
from loratool.formats.no_change import why_no_change
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "adapter")


def edit(folder: Path, change: Change, **config: Any) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    facts = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(facts))
    return folder


def times(factor: float, *, only: str = "") -> Change:
    """Multiply every B, or those of the modules whose names hold `only`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".lora_B." in name and only in name:
                tensors[name] = tensors[name] * factor

    return change


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    pass


@pytest.fixture
def untrained(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """What PEFT saves before the first step."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(load(tiny_models.folder("llama", "bf16"), "llama"), config).save_pretrained(
        tmp_path / "untrained"
    )
    return tmp_path / "untrained"


@pytest.fixture
def alpha_zero(adapter: Path) -> Path:
    return edit(adapter, nothing, lora_alpha=0, alpha_pattern={})


@pytest.fixture(params=["untrained", "alpha_zero"])
def idle(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield request.getfixturevalue(request.param)


def test_an_adapter_that_changes_nothing_is_said_to_by_add_and_show(idle: Path) -> None:
    added = loratool.add(idle, name="idle")
    assert any("'" + idle.name + "' changes nothing" in note for note in added.notes)
    for named in ("idle", idle):
        assert loratool.show(named).changes_nothing
    shown = CliRunner().invoke(cli, ["show", "idle"])
    assert "changes nothing" in shown.output
    assert json.loads(CliRunner().invoke(cli, ["show", "idle", "--json"]).output)["changes_nothing"]


def test_an_adapter_that_changes_something_is_not(adapter: Path) -> None:
    assert not any("changes nothing" in note for note in loratool.add(adapter, name="pirate").notes)
    assert loratool.show("pirate").changes_nothing is None


@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"in_place": True}, {"quantize": "nf4"}])
def test_a_merge_of_it_is_refused(idle: Path, base: Path, options: dict[str, Any]) -> None:
    before = digest(base.parent)
    with pytest.raises(NoChangeError, match=r"changes nothing: .*--allow-no-op"):
        loratool.merge([idle], into=base, **options)
    assert digest(base.parent) == before


def test_a_merge_of_it_is_allowed_with_the_word(idle: Path, base: Path, tmp_path: Path) -> None:
    merged = loratool.merge([idle], into=base, out=tmp_path / "out", allow_no_op=True)
    assert any("changes nothing" in note for note in merged.notes)
    assert (merged.changed_tensors, len(merged.unchanged)) == (0, len(merged.plan.targets))
    assert stored_tensors(merged.out) == stored_tensors(base)


def test_a_weight_of_zero_is_no_change(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NoChangeError, match="its weight is 0"):
        loratool.merge([(adapter, 0.0)], into=base)
    done = CliRunner().invoke(
        cli, ["merge", f"{adapter}=0", "--into", str(base), "--out", str(tmp_path / "o"), "--allow-no-op"]
    )
    assert done.exit_code == 0 and "0 tensors, 0 B of" in done.output


def test_one_of_two_adapters_that_changes_nothing_is_named(base: Path, adapter: Path, untrained: Path) -> None:
    with pytest.raises(NoChangeError, match="'untrained' changes nothing"):
        loratool.merge([adapter, untrained], into=base)


def test_an_adalora_without_singular_values_changes_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = save_peft_adalora(load(tiny_models.folder("llama", "fp32"), "llama"), tmp_path / "ada")
    assert why_no_change(read_adapter(folder)) is None

    def no_values(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_E" in name:
                tensors[name] = torch.zeros_like(tensors[name])

    assert why_no_change(read_adapter(edit(folder, no_values)))


def test_a_dylora_changes_nothing_at_a_rank_whose_components_are_zero(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def no_leading(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".lora_B." in name:
                tensors[name][:, :2] = -0.0

    edit(adapter, no_leading)
    (adapter / "loratool.json").write_text(json.dumps({"schema": 1, "kind": "dylora"}))
    with pytest.raises(NoChangeError):
        loratool.merge([f"{adapter}@rank=2"], into=base)
    assert loratool.merge([f"{adapter}@rank=3"], into=base, out=tmp_path / "out").changed_tensors


@pytest.mark.parametrize("options", [{}, {"undo": True}, {"in_place": True}, {"quantize": "nf4"}, {"base_as": "nf4"}])
def test_an_update_that_is_lost_by_rounding_is_refused_and_leaves_nothing(
    base: Path, adapter: Path, options: dict[str, Any]
) -> None:
    edit(adapter, times(1e-9))
    before = digest(base.parent)
    with pytest.raises(NoChangeError, match=r"smaller than the last digit of every bf16 number.*--allow-no-op"):
        loratool.merge([adapter], into=base, **options)
    assert digest(base.parent) == before
    assert sorted(path.name for path in base.parent.iterdir()) == ["adapter", "base"]


def test_of_a_finer_base_the_same_update_changes_something(
    tiny_models: TinyModels, adapter: Path, tmp_path: Path
) -> None:
    edit(adapter, times(1e-6))
    merged = loratool.merge([adapter], into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
    assert merged.changed_tensors == len(merged.plan.targets)


def test_an_update_lost_by_rounding_of_an_image_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An image holds zeros, to which a number is added that is as small as may be: here the products are below all of fp32."""
    image = loratool.quantize(base, out=tmp_path / "image").out
    edit(adapter, lambda tensors: tensors.update({name: tensor * 1e-25 for name, tensor in tensors.items()}))
    with pytest.raises(NoChangeError):
        loratool.merge([adapter], into=image, dequantize=True)
    merged = loratool.merge([adapter], into=image, dequantize=True, out=tmp_path / "out", allow_no_op=True)
    assert merged.changed_tensors == 0


def test_tensors_are_counted_by_the_bytes_that_changed(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit(adapter, times(0, only="layers.1.self_attn.q_proj"))
    edit(adapter, times(1e-9, only="layers.0.mlp.up_proj"))
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["merge", str(adapter), "--into", str(base), "--out", str(out)])
    assert done.exit_code == 0, done.output
    was, now = stored_tensors(base), stored_tensors(out)
    kept = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    changed = [name for name in was if was[name] != now[name]]
    assert json.loads((out / "loratool.json").read_text())["unchanged"] == kept
    assert f"{len(changed)} tensors" in done.output
    assert f"2 of {len(changed) + 2} tensors kept the base's bytes" in done.output
    found = json.loads(
        CliRunner().invoke(cli, ["merge", str(adapter), "--into", str(base), "--out", f"{out}-2", "--json"]).stdout
    )
    assert (found["changed_tensors"], found["unchanged"]) == (len(changed), kept)
    assert loratool.verify(out).replayed == "base"
    for options in ({"quantize": "nf4"}, {"in_place": True}):
        merged = loratool.merge([adapter], into=base, out=None if "in_place" in options else tmp_path / "x", **options)
        assert list(merged.unchanged) == kept
