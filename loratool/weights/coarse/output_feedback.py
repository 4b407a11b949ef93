"""Rounding that knows where an update writes to: errors of earlier rows there are compensated by the rows after them.

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
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are rounded at once; how errors of columns are spread over them, (rows, r); and the errors before them."""

    rows: range
    spread: Tensor
    off: Tensor


class OutputFeedback:
    """What one parameter is off by in the directions of its update, while its blocks of rows are rounded in order.

    `outputs`, fp32, (rows, r): the columns of the change are combinations of these. Groups lie at the same rows however these
    are cut into blocks, or begin anew with each block.
    """

    def __init__(self, outputs: Tensor) -> None:
        import torch

        self._basis = torch.linalg.qr(outputs.double())[0].float()
        self.begin()

    def begin(self) -> None:
        """Forget the rows so far: the next ones are the first, of whatever columns."""
        self._ahead = self._basis.T @ self._basis
        self._off = self._basis.new_zeros(self._basis.shape[1], 1)  # of every column, until there is something
        self._group: _Group | None = None

    def groups(self, rows: range, columns: int, *, by_block: bool) -> Iterator[tuple[range, Tensor]]:
        """These rows in groups that are rounded at once, and what is to be passed on to each, fp32, (rows, columns).

        `add` must be given what a group is off by before the next one. Blocks of rows come once each, in order. With `by_block` a
        group begins with the block.
        """
        for part, group in self._entered(rows, by_block=by_block):
            spread = group.spread[part.start - group.rows.start : part.stop - group.rows.start]
            yield part, spread @ group.off.expand(-1, columns)

    def skip(self, rows: range) -> None:
        """Go past rows to which nothing is passed on, and from which nothing is."""
        for _ in self._entered(rows, by_block=False):
            pass

    def leave(self, rows: range, error: Tensor) -> None:
        """Take note of rows to which nothing was passed on, and of what they are off by."""
        self._pass(rows)
        self.add(rows, error)

    def add(self, rows: range, error: Tensor) -> None:
        """Take note of what rows are off by: fp32, (rows, columns)."""
        self._off = self._off + self._basis[rows.start : rows.stop].T @ error

    def _entered(self, rows: range, *, by_block: bool) -> Iterator[tuple[range, _Group]]:
        """Those of these rows that belong to a group, and the group; for each group that they are part of."""
        cut = self._cut(rows, by_block=by_block)
        begun = iter(self._spreads([whole for _, whole in cut if whole.start >= rows.start]))
        for part, whole in cut:
            if whole.start == part.start:
                self._group = _Group(whole, next(begun), self._off)
            assert self._group is not None  # rows come in order
            yield part, self._group

    def _cut(self, rows: range, *, by_block: bool) -> list[tuple[range, range]]:
        """These rows by groups: those of a group that are among them, and the whole group."""
        height, rank = self._basis.shape
        step = max(GROUP, rank, height // MOST_GROUPS)
        first = rows.start if by_block else rows.start // step * step
        end = rows.stop if by_block else height
        wholes = (range(start, min(start + step, end)) for start in range(first, rows.stop, step))
        return [(range(max(whole.start, rows.start), min(whole.stop, rows.stop)), whole) for whole in wholes]

    def _spreads(self, groups: list[range]) -> list[Tensor]:
        """For each group, what to add to its rows for what columns are off by: ``-U_G (U_F^T U_F)^-1``, fp32."""
        import torch

        if not groups:
            return []
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
        """Remove these rows from those ahead."""
        basis = self._basis[rows.start : rows.stop]
        self._ahead = self._ahead - basis.T @ basis
