"""Merges on a CUDA device: what they compute, that a CPU takes them out again, and how much memory they take there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import ADAPTER_PREFIX, save_plain_adapter
from tiny_models import as_stored, as_torch, assert_same_tensors, digest, save_plain_model, stored_tensors

import loratool
from loratool.checkpoint.blocks import row_blocks
from loratool.merging.arithmetic import CUDA_BLOCK_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPES = {
    "model.layers.0.self_attn.q_proj": (1024, 1024),
    "model.layers.0.self_attn.k_proj": (77, 1024),
    "model.layers.0.mlp.up_proj": (4131, 1024),
    "model.layers.0.mlp.down_proj": (1024, 12_001),
}
"""The last has more than one block on CUDA too, and no row of it begins at a round address."""

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
ALPHAS = pytest.mark.parametrize("alpha", [16, 19])


def model_and_adapter(
    folder: Path, dtype: torch.dtype, alpha: float, shapes: dict[str, tuple[int, int]] = SHAPES
) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"{module}.weight": (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for module, shape in shapes.items()
    }
    base = save_plain_model(folder / "base", weights | {"model.norm.weight": torch.ones(1024, dtype=dtype)})
    return base, save_plain_adapter(folder / "adapter", shapes, r=16, lora_alpha=alpha)


@DTYPES
@ALPHAS
def test_a_merge_on_cuda_is_one_addmm_in_fp32_rounded_once(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    base, adapter = model_and_adapter(tmp_path, dtype, alpha)
    loratool.merge([adapter], into=base, out=tmp_path / "out", device="cuda")
    expected = stored_tensors(base)
    factors = load_file(adapter / "adapter_model.safetensors", device="cuda")
    for module, (rows, columns) in SHAPES.items():
        a, b = (factors[f"{ADAPTER_PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
        weight = as_torch(expected[f"{module}.weight"]).cuda().float()
        blocks = row_blocks(rows, columns * 4, CUDA_BLOCK_BYTES)
        merged = [torch.addmm(weight[r.start : r.stop], b[r.start : r.stop], a, alpha=alpha / 16) for r in blocks]
        expected[f"{module}.weight"] = as_stored(torch.cat(merged).to(dtype).cpu())
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "loratool.json").read_text())["options"]["device"] == "cuda"


@DTYPES
@ALPHAS
def test_cuda_and_cpu_are_one_rounding_apart_at_most(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    base, adapter = model_and_adapter(tmp_path, dtype, alpha)
    outputs = {}
    for device in ("cpu", "cuda"):
        loratool.merge([adapter], into=base, out=tmp_path / device, device=device)
        outputs[device] = stored_tensors(tmp_path / device)
    for name, on_cpu in outputs["cpu"].items():
        cpu, cuda = as_torch(on_cpu), as_torch(outputs["cuda"][name])
        unit = torch.finfo(dtype).eps
        # The two fp32 sums are a few units of fp32 apart at the scale of what is added, then each is rounded once.
        most = cpu.double().abs() * unit + 16 * torch.finfo(torch.float32).eps
        assert ((cpu.double() - cuda.double()).abs() <= most).all(), name
        if dtype != torch.float32:
            assert (cpu != cuda).double().mean() < 0.001, name


@pytest.mark.parametrize(("merging", "unmerging"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_undo_written_on_one_device_restores_on_the_other(
    dtype: torch.dtype, merging: str, unmerging: str, tmp_path: Path
) -> None:
    base, adapter = model_and_adapter(tmp_path, dtype, 19)
    before = digest(base)
    loratool.merge([adapter], into=base, out=tmp_path / "out", device=merging, undo=True)
    base.rename(tmp_path / "away")
    result = loratool.unmerge(tmp_path / "out", out=tmp_path / "back", device=unmerging)
    assert result.method == "undo"
    assert digest(tmp_path / "back") == before


def test_a_merge_in_place_on_cuda_comes_out_in_place_on_a_cpu(tmp_path: Path) -> None:
    base, adapter = model_and_adapter(tmp_path, torch.bfloat16, 19)
    before = digest(base)
    loratool.merge([adapter], into=base, in_place=True, device="cuda")
    assert digest(base) != before
    loratool.unmerge(base, in_place=True, device="cpu")
    assert digest(base) == before


@pytest.mark.parametrize(("merging", "unmerging"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_adalora_merged_on_one_device_comes_out_on_the_other_and_both_are_near(
    merging: str, unmerging: str, tmp_path: Path
) -> None:
    base, lora = model_and_adapter(tmp_path, torch.float32, 19)
    factors = {name.removesuffix(".weight"): t for name, t in load_file(lora / "adapter_model.safetensors").items()}
    values = {name.replace("lora_A", "lora_E"): torch.rand(16, 1) for name in factors if "lora_A" in name}
    save_file(factors | values, tmp_path / "adalora.safetensors")
    before = digest(base)
    for device in ("cpu", "cuda"):
        loratool.merge(
            [tmp_path / "adalora.safetensors"], into=base, out=tmp_path / device, alpha=19, device=device, undo=True
        )
    on_cpu, on_cuda = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_cuda[name], tensor, rtol=0, atol=2e-6)
    base.rename(tmp_path / "away")
    loratool.unmerge(tmp_path / merging, out=tmp_path / "back", device=unmerging)
    assert digest(tmp_path / "back") == before


def test_a_merge_on_cuda_verifies(tmp_path: Path) -> None:
    base, adapter = model_and_adapter(tmp_path, torch.bfloat16, 19)
    loratool.merge([adapter], into=base, out=tmp_path / "out", device="cuda")
    assert loratool.verify(tmp_path / "out").replayed == "base"


def test_device_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (12, 48):
        shapes = {f"model.layers.{layer}.mlp.up_proj": (4096, 1024) for layer in range(layers)}
        base, adapter = model_and_adapter(tmp_path / str(layers), torch.bfloat16, 16, shapes)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loratool.merge([adapter], into=base, out=tmp_path / str(layers) / "out", device="cuda")
        peaks.append(torch.cuda.max_memory_allocated())
    block = 4096 * 1024 * 4
    assert 0 < peaks[1] < peaks[0] + block
