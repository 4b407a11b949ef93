"""What a merge refuses because the numbers would not be what the user means, and how it is called from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import TinyAdapters, save_plain_adapter
from tiny_models import TinyModels, save_plain_model

import loratool
from loratool.errors import LoratoolError


def model(folder: Path, dtype: torch.dtype, fill: float = 1.0) -> Path:
    return save_plain_model(folder, {"model.layers.0.q_proj.weight": torch.full((64, 32), fill, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_that_the_stored_type_cannot_hold_is_refused_and_nothing_is_written(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = model(tmp_path / "base", dtype, fill=1.0 if dtype == torch.float16 else 3.38e38)
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    weight = 1e8 if dtype == torch.float16 else 1e38
    with pytest.raises(LoratoolError, match=r"q_proj.*cannot hold"):
        loratool.merge([(adapter, weight)], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_largest_number_of_the_stored_type_is_not_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.float16, fill=65504.0)
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    out = loratool.merge([(adapter, 1e-9)], into=base, out=tmp_path / "out", allow_no_op=True).out
    merged = load_file(out / "model.safetensors")["model.layers.0.q_proj.weight"]
    assert (merged == 65504.0).all()


def test_a_base_that_holds_infinity_already_is_merged(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.bfloat16, fill=float("inf"))
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    out = loratool.merge([adapter], into=base, out=tmp_path / "out", allow_no_op=True).out
    assert load_file(out / "model.safetensors")["model.layers.0.q_proj.weight"].isinf().all()


def test_a_scaling_beyond_fp32_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.bfloat16)
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    with pytest.raises(LoratoolError, match="fp32 cannot represent"):
        loratool.merge([(adapter, 1e300)], into=base, out=tmp_path / "out")


def test_one_adapter_may_stand_alone(tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama")
    alone = loratool.merge(adapter, into=base, out=tmp_path / "a")
    listed = loratool.merge([str(adapter)], into=base, out=tmp_path / "b")
    assert alone.output_fingerprint == listed.output_fingerprint


@pytest.mark.parametrize("spec", [3, ("a", "0.5"), ("a", float("nan")), ("a", 1.0, 2.0), None])
def test_what_is_no_adapter_is_refused(spec: object, tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.bfloat16)
    with pytest.raises(LoratoolError):
        loratool.merge([spec], into=base, out=tmp_path / "out")  # type: ignore[list-item]


def test_a_dry_run_finds_nan_and_a_missing_device(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.bfloat16)
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    with pytest.raises(LoratoolError, match="device"):
        loratool.merge([adapter], into=base, dry_run=True, device="cuda:99")
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(LoratoolError, match="NaN"):
        loratool.merge([adapter], into=base, dry_run=True)


def test_other_weights_in_the_folder_are_copied_and_said(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.bfloat16)
    (base / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    result = loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert (result.out / "consolidated.safetensors").read_bytes() == (base / "consolidated.safetensors").read_bytes()
    assert any("consolidated.safetensors" in note for note in result.notes)


def test_a_merge_into_a_file_of_a_models_folder_goes_beside_that_folder(tmp_path: Path) -> None:
    base = model(tmp_path / "base", torch.bfloat16)
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (64, 32)})
    file = base / "model.safetensors"
    assert loratool.merge([adapter], into=file).out == tmp_path / "model-adapter"
    (base / "config.json").unlink()
    assert loratool.merge([adapter], into=file).out == base / "model-adapter"
