"""Rounding that knows where an update writes to: what earlier rows are off by there is made good by the rows after them.

A change ``delta = B A`` moves the outputs of a layer in the few directions that the columns of B span, and what is off in
these hurts most: it tells a model something about its own fine-tune. The rounding of one column has an error e, one number
for each row, and ``U^T e`` of it lies there, U (rows, r) an orthonormal basis of B's columns. With rows in groups, S those
before a group G and F all from it on, the least change of F that makes ``U^T e`` zero is ``-U_F (U_F^T U_F)^-1 U_S^T e_S``. Its
part in G is added to what G is to change by, and so on down the rows, each column by itself. It needs no data, and of
memory r numbers for each column.

A code that is moved by chance makes noise in proportion to what it is to change by. So what is passed on is cut at the change
that is wanted anyway, which makes no more moves, only other ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

Move = Callable[[slice, "Tensor"], "tuple[Tensor, Tensor]"]
"""Takes rows of a block and what is added to them, (rows, columns); gives the places of their codes then, and their numbers."""

GROUP: Final = 16
"""So many rows at least are rounded at once, without regard to one another; with a larger r as many as that."""

DAMPING: Final = 0.01
"""Of ``U_F^T U_F``, which has ones in its diagonal at first: the last rows are not made to pay for all before them."""


class OutputFeedback:
    """What one matrix is off by in the directions of its update, while its blocks of rows are rounded in order.

    `outputs`, fp32, (rows, r): the columns of the change are combinations of these.
    """

    def __init__(self, outputs: Tensor) -> None:
        import torch

        basis, _ = torch.linalg.qr(outputs.double())
        self._basis = basis.float()
        self._ahead = basis.T @ basis
        self._off = self._basis.new_zeros(self._basis.shape[1], 1)  # of every column, until there is something

    def carry(self, rows: range, old: Tensor, change: Tensor, wanted: Tensor, move: Move) -> Tensor:
        """Where the codes of the `rows` go, int32, (rows, columns); blocks come once each, here or to `leave`, in order.

        `old` are the numbers from before and `change` what is added to them; `wanted` is the same, as the codes that take part
        carry it; all fp32, (rows, columns).
        """
        import torch

        rank = self._basis.shape[1]
        moved = torch.empty(old.shape, dtype=torch.int32, device=old.device)
        damping = DAMPING * torch.eye(rank, dtype=torch.float64, device=old.device)
        step = max(GROUP, rank)
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            basis = self._basis[rows.start + part.start : rows.start + part.stop]
            spread = torch.linalg.inv(self._ahead + damping).float()
            most = wanted[part].abs()
            passed = ((basis @ spread).neg_() @ self._off).maximum(-most).minimum(most)
            moved[part], reached = move(part, passed.add_(wanted[part]))
            self._add(basis, reached.sub_(old[part]).sub_(change[part]))
        return moved

    def leave(self, rows: range, error: Tensor) -> None:
        """Take note of what `rows` are off by that were rounded without regard to others: fp32, (rows, columns)."""
        self._add(self._basis[rows.start : rows.stop], error)

    def _add(self, basis: Tensor, error: Tensor) -> None:
        self._off = self._off + basis.T @ error
        self._ahead -= basis.double().T @ basis.double()
