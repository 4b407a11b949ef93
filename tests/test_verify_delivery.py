"""What a model that any tool merged carries of its adapters, as `loratool verify --delivery` measures it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import merge_by_peft
from tiny_models import load

import loratool
from loratool.cli import cli
from loratool.errors import CheckpointError, LoratoolError, NotFoundError, PlacementError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


@pytest.fixture
def base(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("llama", "bf16")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


def peft_merge(base: Path, adapter: Path, out: Path, weight: float | None = None) -> Path:
    merge_by_peft(load(base, "llama"), adapter, out, weight=weight)
    return out


def test_what_peft_merged_carries_the_whole_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = loratool.verify_delivery(peft_merge(base, adapter, tmp_path / "theirs"), adapter, base)
    (found,) = result.adapters
    assert found.share == pytest.approx(1, abs=0.01)
    assert result.delivery.share == pytest.approx(1, abs=0.01)
    assert result.delivery.measured == 1
    assert result.unchanged == ()


def test_at_half_the_weight_it_carries_half(base: Path, adapter: Path, tmp_path: Path) -> None:
    theirs = peft_merge(base, adapter, tmp_path / "theirs", 0.5)
    assert loratool.verify_delivery(theirs, adapter, base).adapters[0].share == pytest.approx(0.5, abs=0.01)
    assert loratool.verify_delivery(theirs, [(adapter, 0.5)], base).adapters[0].share == pytest.approx(1, abs=0.01)


def test_a_merge_that_reported_success_and_is_the_base_carries_nothing(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    theirs = shutil.copytree(base, tmp_path / "theirs")
    result = loratool.verify_delivery(theirs, adapter, base)
    assert (result.adapters[0].share, result.delivery.changed) == (0, 0)
    assert set(result.unchanged) == set(result.deliveries)
    words = ["verify", "--delivery", str(theirs), "--base", str(base), "--adapter", str(adapter)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert f"carries 0.00 of {adapter.name}" in done.output
    assert json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout) == result.to_json()


def test_modules_that_a_tool_left_out_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    theirs = peft_merge(base, adapter, tmp_path / "theirs")
    file = theirs / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.down_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name]
    save_file(tensors, file, {"format": "pt"})
    result = loratool.verify_delivery(theirs, adapter, base)
    assert result.unchanged == (name,)
    assert 0.5 < result.adapters[0].share < 1


def test_two_adapters_are_told_apart(base: Path, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapters = tiny_adapters.folder("llama"), tiny_adapters.folder("llama", seed=2)
    merged = loratool.merge([(adapters[0], 0.7), (adapters[1], -0.4)], base, out=tmp_path / "out").out
    result = loratool.verify_delivery(merged, list(adapters), base)
    assert [each.share for each in result.adapters] == pytest.approx([0.7, -0.4], abs=0.02)


@pytest.mark.parametrize("way", ["quantize", "base_as"])
def test_a_quantized_merge_is_measured_against_its_dense_base(
    base: Path, adapter: Path, tmp_path: Path, way: str
) -> None:
    merged = loratool.merge(adapter, base, out=tmp_path / "out", **{way: "nf4"}).out
    assert loratool.verify_delivery(merged, adapter, base).adapters[0].share == pytest.approx(1, abs=0.15)


def test_of_a_merge_by_loratool_the_manifest_tells_base_and_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = loratool.merge([(adapter, 0.5)], base, out=tmp_path / "out").out
    result = loratool.verify_delivery(merged)
    assert result.base == base
    assert [(each.weight, each.share) for each in result.adapters] == [(0.5, pytest.approx(1, abs=0.01))]


def test_what_cannot_be_measured_is_refused(
    base: Path, adapter: Path, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    theirs = peft_merge(base, adapter, tmp_path / "theirs")
    with pytest.raises(NotFoundError, match="--base BASE and --adapter ADAPTER"):
        loratool.verify_delivery(theirs)
    with pytest.raises(LoratoolError):
        loratool.verify_delivery(tiny_models.folder("mistral", "bf16"), adapter, base)
    tensors = load_file(theirs / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][1, 2] = float("nan")
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight' in .* holds NaN or infinity"):
        loratool.verify_delivery(theirs, adapter, base)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlacementError, match=r"has no 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        loratool.verify_delivery(theirs, adapter, base)
    assert CliRunner().invoke(cli, ["verify", str(theirs), "--base", str(base)]).exit_code == 2


def test_a_dora_is_measured_by_what_it_does_to_its_base(
    base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    dora = tiny_adapters.folder("llama", use_dora=True)
    theirs = peft_merge(base, dora, tmp_path / "theirs")
    assert loratool.verify_delivery(theirs, dora, base).adapters[0].share == pytest.approx(1, abs=0.02)
