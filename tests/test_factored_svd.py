"""The SVD of a product of factors equals numpy's of the dense product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratool.ranks.factored_svd import factored_svd

SHAPES = [(64, 48, 8), (48, 64, 8), (33, 17, 1), (16, 40, 16), (6, 40, 12), (40, 6, 12), (5, 4, 9)]


def factors(out: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out * columns + rank)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize(("out", "columns", "rank"), SHAPES)
def test_singular_values_are_those_of_the_dense_product(out: int, columns: int, rank: int) -> None:
    b, a = factors(out, columns, rank)
    expected = np.linalg.svd(b.double().numpy() @ a.double().numpy(), compute_uv=False)[: min(out, columns, rank)]
    np.testing.assert_allclose(factored_svd(b, a)[1].numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("out", "columns", "rank"), SHAPES)
def test_it_multiplies_back_to_the_product_and_its_vectors_are_orthonormal(out: int, columns: int, rank: int) -> None:
    b, a = factors(out, columns, rank)
    u, s, v = factored_svd(b, a)
    kept = min(out, columns, rank)
    assert u.shape == (out, kept) and s.shape == (kept,) and v.shape == (kept, columns)
    assert u.dtype == s.dtype == v.dtype == torch.float64
    torch.testing.assert_close((u * s) @ v, b.double() @ a.double(), rtol=1e-12, atol=1e-12)
    identity = torch.eye(kept, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(v @ v.T, identity, rtol=0, atol=1e-12)


def test_a_zero_update_has_zero_singular_values() -> None:
    u, s, v = factored_svd(torch.zeros(7, 3), torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))
    assert s.tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(u).all() and torch.isfinite(v).all()
