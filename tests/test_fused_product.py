"""One addmm stands for product, scaling and sum only where it has their bits, which depends on the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loratool.updates.low_rank import LEAST_FUSED_SIDE, LoadedLowRank, fused_has_the_bits

RANKS = [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 100, 128, 192, 193, 255, 256, 257, 400, 600]
SHAPES = [
    (512, 2048),
    (64, 14336),
    (576, 576),
    (192, 576),
    (65, 130),
    (100, 77),
    (33, 50),
    (LEAST_FUSED_SIDE, LEAST_FUSED_SIDE),
    (17, 19),
    (24, 1000),
    (1000, 24),
    (3, 1000),
    (1, 1),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    fused_has_the_bits.cache_clear()
    yield
    fused_has_the_bits.cache_clear()
    torch.set_num_threads(before)


def numbers(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and W."""
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return a, b, torch.randn(rows, columns, generator=generator) * 3


@pytest.mark.parametrize("rank", RANKS)
def test_an_update_has_the_bits_of_its_three_steps(rank: int) -> None:
    for rows, columns in SHAPES:
        a, b, weight = numbers(rows, columns, rank)
        for scaling in (1.0, 2.0, 8.0):
            block = weight.clone()
            LoadedLowRank(a, b, scaling, transposed=False).apply(block, range(rows), torch.empty_like(block))
            expected = weight + (b @ a) * scaling
            assert torch.equal(block.view(torch.int32), expected.view(torch.int32)), (rows, columns, scaling)


@pytest.mark.parametrize("pass_length", [1, 2, 15])
def test_a_blas_that_adds_to_w_before_its_sums_are_finished_is_found_out(
    pass_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = []

    def in_passes(block: torch.Tensor, b: torch.Tensor, a: torch.Tensor, *, alpha: float) -> torch.Tensor:
        fused.append(block.shape)
        for start in range(0, len(a), pass_length):
            block += alpha * (b[:, start : start + pass_length] @ a[start : start + pass_length])
        return block

    monkeypatch.setattr(torch.Tensor, "addmm_", in_passes)
    for rows, columns in SHAPES:
        a, b, weight = numbers(rows, columns, 16)
        block = weight.clone()
        LoadedLowRank(a, b, 2.0, transposed=False).apply(block, range(rows), torch.empty_like(block))
        assert torch.equal(block, weight + (b @ a) * 2.0), (rows, columns)
    assert fused  # it was tried
