"""4-bit weights on a CUDA device: the bits of bitsandbytes' own kernel, and merges that either device takes out again."""

from __future__ import annotations

import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from four_bit_models import codes_apart
from test_nf4 import matrix, parts_of, quantized
from tiny_adapters import save_plain_adapter
from tiny_models import digest, save_plain_model, stored_tensors

import loratool
from loratool.weights.rounding import Rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPES = {"up_proj": (2048, 1024), "down_proj": (1024, 4096), "odd_proj": (130, 96)}
"""The rows of the last are no whole number of blocks."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {}
    for name, shape in SHAPES.items():
        parts = quantized(shape, "nf4", "bf16", nested=True, blocksize=64)
        tensors |= {key.replace("m.weight", f"{name}.weight"): value for key, value in parts.items()}
    return save_plain_model(tmp_path / "base", tensors)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_plain_adapter(tmp_path / "adapter", SHAPES, r=16, lora_alpha=0.5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_decoding_on_cuda_has_the_bits_of_bitsandbytes_kernel(tmp_path: Path, kind: str, dtype: str) -> None:
    tensors = quantized((256, 1024), kind, dtype, nested=True, blocksize=64)
    weight, rows = matrix(save_plain_model(tmp_path / "m", tensors)), range(256)
    found = torch.empty(weight.shape, device="cuda")
    weight.load("cuda").decode(rows, tuple(part.cuda() for part in parts_of(weight, rows)), found)
    on_device = {key: value.cuda() for key, value in tensors.items()}
    state = bnb.QuantState.from_dict(
        {key: value for key, value in on_device.items() if key != "m.weight"}, torch.device("cuda")
    )
    assert torch.equal(found, bnb.dequantize_4bit(on_device["m.weight"], state).float())


def test_chance_is_the_same_on_both_devices() -> None:
    for seed in (0, 1, 2**64 - 1):
        one, other = (Rounding(seed).words(range(64, 128), 10_001, torch.device(name)) for name in ("cpu", "cuda"))
        assert torch.equal(one, other.cpu())


def test_both_devices_move_nearly_all_codes_alike(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The products differ in their last bits, which decide where chance is within them of the odds."""
    outputs = []
    for device in ("cpu", "cuda"):
        result = loratool.merge([adapter], into=base, out=tmp_path / device, device=device)
        assert result.delivery is not None
        assert result.delivery.share > 0.9
        outputs.append(stored_tensors(tmp_path / device))
    for name in SHAPES:
        one, other = (tensors[f"{name}.weight"].data for tensors in outputs)
        assert codes_apart(one, other) < 1e-4


@pytest.mark.parametrize(("merging", "unmerging"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_an_undo_of_a_4_bit_merge_restores_on_the_other_device(
    base: Path, adapter: Path, merging: str, unmerging: str, tmp_path: Path
) -> None:
    before = digest(base)
    loratool.merge([adapter], into=base, out=tmp_path / "out", device=merging, undo=True)
    base.rename(tmp_path / "away")
    result = loratool.unmerge(tmp_path / "out", out=tmp_path / "back", device=unmerging)
    assert result.method == "undo"
    assert digest(tmp_path / "back") == before


def test_a_4_bit_merge_on_cuda_verifies_and_comes_out_in_place(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge([adapter], into=base, out=tmp_path / "out", device="cuda")
    assert loratool.verify(tmp_path / "out").replayed == "base"
    model = shutil.copytree(base, tmp_path / "model")
    before = digest(model)
    loratool.merge([adapter], into=model, in_place=True, device="cuda")
    assert digest(model) != before
    loratool.unmerge(model, in_place=True, device="cpu")
    assert digest(model) == before
