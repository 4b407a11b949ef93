"""Rounding that knows where an update writes to: what earlier rows are off by there is made good by the rows after them.

A change ``delta = B A`` moves the outputs of a layer in the few directions that the columns of B span, and what is off in
these hurts most: it tells a model something about its own fine-tune. The rounding of one column has an error e, one number
for each row, and ``U^T e`` of it lies there, U (rows, r) an orthonormal basis of B's columns. With rows in groups, S those
before a group G and F all from it on, the least change of F that makes ``U^T e`` zero is ``-U_F (U_F^T U_F)^-1 U_S^T e_S``. Its
part in G is added to what G is to change by, and so on down the groups, each column by itself. It needs no data, and of
memory r numbers for each column.

A code that is moved by chance makes noise in proportion to what it is to change by. So what is passed on is cut at the change
that is wanted anyway, which makes no more moves, only other ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

GROUP: Final = 16
"""So many rows at least are rounded at once, without regard to one another; with a larger r as many as that."""

MOST_GROUPS: Final = 16
"""The groups of a tall matrix are larger, so that there are no more: each costs some calls, and little is gained by it."""

DAMPING: Final = 0.01
"""Of ``U_F^T U_F``, which has ones in its diagonal at first: the last rows are not made to pay for all before them."""

MOST_PASSED: Final = 1.0
"""What is passed on to a code is cut at so many times what it is to change by anyway."""


class OutputFeedback:
    """What one matrix is off by in the directions of its update, while its blocks of rows are rounded in order.

    `outputs`, fp32, (rows, r): the columns of the change are combinations of these.
    """

    def __init__(self, outputs: Tensor) -> None:
        import torch

        self._basis = torch.linalg.qr(outputs.double())[0].float()
        self._ahead = self._basis.T @ self._basis
        self._off = self._basis.new_zeros(self._basis.shape[1], 1)  # of every column, until there is something

    def groups(self, rows: range, columns: int) -> Iterator[tuple[range, Tensor]]:
        """These rows in groups that are rounded at once, and what is to be passed on to each, fp32, (rows, columns).

        What a group is off by is to be told to `add` before the next one. Blocks of rows come once each, in order.
        """
        groups = self._groups(rows)
        for group, spread in zip(groups, self._spreads(groups), strict=True):
            yield group, spread @ self._off.expand(-1, columns)

    def leave(self, rows: range, error: Tensor) -> None:
        """Take note of rows to which nothing was passed on, and what they are off by."""
        self._pass(rows)
        self.add(rows, error)

    def add(self, rows: range, error: Tensor) -> None:
        """Take note of what rows are off by: fp32, (rows, columns)."""
        self._off = self._off + self._basis[rows.start : rows.stop].T @ error

    def _groups(self, rows: range) -> list[range]:
        """These rows in groups that are rounded at once."""
        height, rank = self._basis.shape
        step = max(GROUP, rank, height // MOST_GROUPS)
        return [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]

    def _spreads(self, groups: list[range]) -> list[Tensor]:
        """Of each group, what is to be added to its rows for what columns are off by: ``-U_G (U_F^T U_F)^-1``, fp32."""
        import torch

        ahead = []
        for group in groups:
            ahead.append(self._ahead)
            self._pass(group)
        damping = DAMPING * torch.eye(self._basis.shape[1], device=self._basis.device)
        inverses = torch.linalg.inv(torch.stack(ahead) + damping).neg_()
        return [
            self._basis[group.start : group.stop] @ inverse for group, inverse in zip(groups, inverses, strict=True)
        ]

    def _pass(self, rows: range) -> None:
        """These rows are not among those ahead any more."""
        basis = self._basis[rows.start : rows.stop]
        self._ahead = self._ahead - basis.T @ basis
