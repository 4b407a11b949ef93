"""A weight in memory takes an update as a merge of files does, and gets every bit back."""

from __future__ import annotations

import pytest
import torch

from loratool.merging.live_weight import LiveWeight
from loratool.updates import LoadedUpdate
from loratool.updates.dora import LoadedDora
from loratool.updates.low_rank import LoadedLowRank

ROWS, COLUMNS, RANK = 200, 24_000, 3
"""More than one block of rows."""


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
    live = LiveWeight(weight, loaded(kind, transposed=transposed), transposed=transposed)
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
    live = LiveWeight(weight, loaded("lora", transposed=False))
    LiveWeight(plain, loaded("lora", transposed=False))
    assert torch.equal(weight, plain)
    live.restore()
    assert torch.equal(weight, original)
