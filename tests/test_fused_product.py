"""addmm has the bits of product, scaling and sum, where `LoadedLowRank` uses it."""

from __future__ import annotations

import pytest
import torch

from loratool.updates.low_rank import LARGEST_FUSED_RANK, LEAST_FUSED_SIDE, LoadedLowRank

RANKS = [2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 100, 128, 192, 255, LARGEST_FUSED_RANK]
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
]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("rank", RANKS)
def test_the_fused_product_has_the_bits_of_its_three_steps(rank: int, scaling: float, one_thread: None) -> None:
    generator = torch.Generator().manual_seed(rank)
    for rows, columns in SHAPES:
        a = torch.randn(rank, columns, generator=generator)
        b = torch.randn(rows, rank, generator=generator)
        weight = torch.randn(rows, columns, generator=generator) * 3
        expected = weight + (b @ a) * scaling
        block = weight.clone()
        LoadedLowRank(a, b, scaling, transposed=False).apply(block, range(rows), torch.empty_like(block))
        assert torch.equal(block.view(torch.int32), expected.view(torch.int32)), (rows, columns)
