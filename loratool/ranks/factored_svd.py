"""The singular value decomposition of a product of thin factors, through QR, without ever forming the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def factored_svd(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (out, k), s (k,) and V (k, in) with ``B A = U diag(s) V``, for B (out, r) and A (r, in).

    The columns of U and the rows of V are orthonormal. The singular values s are not negative, largest first.
    ``k = min(out, in, r)``. With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, only the core ``R_B R_A^T`` of at most (r, r) is
    decomposed (Golub and Van Loan, Matrix Computations, 5.2 and 8.6). The leading components are the best approximation
    of each rank in the Frobenius norm (Eckart and Young 1936). All results are fp64, on the factors' device.
    """
    import torch

    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, s, v @ right.T


def balanced(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (k, in) and B (out, k), fp32, with ``B A = U diag(s) V``. Each takes the square roots of s."""
    root = s.sqrt()
    return (root[:, None] * v).float(), (u * root).float()
