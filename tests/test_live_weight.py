"""A weight in memory takes an update as a merge of files does, and gets every bit back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kinds import CASES, save_case
from tiny_models import TinyModels, as_torch, load, stored_tensors

import loratool
from loratool.formats.read import read_adapter
from loratool.merging.live_weight import LiveModel, LiveWeight
from loratool.merging.plan import WeightedAdapter, plan_targets
from loratool.updates import LoadedUpdate
from loratool.updates.dora import LoadedDora
from loratool.updates.low_rank import LoadedLowRank

ROWS, COLUMNS, RANK = 200, 24_000, 3
"""More than one block of rows."""

MODULES = ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc")
"""Layers of GPT-2, which stores the transpose."""


def loaded(kind: str, *, transposed: bool) -> LoadedUpdate:
    generator = torch.Generator().manual_seed(1)
    outputs, inputs = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    a, b = torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)
    product = LoadedLowRank(a, b * 0.05, 1.5, transposed)
    return (
        product if kind == "lora" else LoadedDora(product, 0.5 + torch.rand(outputs, generator=generator), transposed)
    )


def weight_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_has_the_bits_of_a_merge_of_files_and_is_restored(dtype: torch.dtype, kind: str, transposed: bool) -> None:
    weight, original = weight_of(dtype), weight_of(dtype)
    live = LiveWeight.updated(weight, loaded(kind, transposed=transposed), transposed=transposed)
    whole = original.float()
    scratch = torch.empty_like(whole)
    update = loaded(kind, transposed=transposed)
    if isinstance(update, LoadedDora) and transposed:
        update.measure(whole, range(ROWS), scratch)
    expected = original.float().clone()
    update.apply(expected, range(ROWS), scratch)
    assert torch.equal(weight, expected.to(dtype))
    assert not torch.equal(weight, original)
    live.restore()
    assert torch.equal(weight, original)


def test_a_weight_that_lies_transposed_in_memory_is_merged_and_restored() -> None:
    weight, plain = weight_of(torch.bfloat16).T.contiguous().T, weight_of(torch.bfloat16)
    assert not weight.is_contiguous()
    original = plain.clone()
    live = LiveWeight.updated(weight, loaded("lora", transposed=False))
    LiveWeight.updated(plain, loaded("lora", transposed=False))
    assert torch.equal(weight, plain)
    live.restore()
    assert torch.equal(weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_memory_is_planned_and_merged_as_its_files_are(
    dtype: torch.dtype, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("gpt2", {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype])
    stored = {name: as_torch(tensor) for name, tensor in stored_tensors(base).items()}
    weights = {module: stored[f"{module}.weight"].T for module in MODULES}
    adapters = []
    for name in ("lora", "dora", "ia3", "loha"):
        save_case(tmp_path / name, CASES[name], weights)
        adapters.append(WeightedAdapter(read_adapter(tmp_path / name)))
    model = load(base, "gpt2")
    live = LiveModel(model.state_dict(), model.config.to_dict())
    before = {name: tensor.clone() for name, tensor in live.parameters.items()}

    targets, _ = plan_targets(adapters, live, "0" * 64)
    merged = [live.merge(target) for target in targets]

    loratool.merge([str(each.adapter.file.parent) for each in adapters], into=str(base), out=tmp_path / "out")
    files = {name: as_torch(tensor) for name, tensor in stored_tensors(tmp_path / "out").items()}
    changed = {name for name, tensor in live.parameters.items() if not torch.equal(tensor, before[name])}
    assert changed == {target.name for target in targets} and len(changed) >= len(weights)
    for name in changed:
        assert torch.equal(live.parameters[name], files[name])
    for weight in reversed(merged):
        weight.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.parameters.items())
