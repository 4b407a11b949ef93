"""Error-compensated rounding with known output directions: later rows compensate the errors of earlier ones.

A change ``delta = B A`` moves a layer's outputs only in the directions that the columns of B span, and errors in these
directions hurt most. Let U, (rows, r), be an orthonormal basis of B's columns. The rounding error e of one column, a number per
row, has the part ``U^T e`` in these directions.

Rows are rounded in groups. Let S be the rows before a group G, and F the rows of G and after it. The smallest change of F that
makes ``U^T e`` zero is ``-U_F (U_F^T U_F)^-1 U_S^T e_S``. Its part in G is added to the change of G, and so on for each group.
Every column is treated by itself. This needs no data, and memory for r numbers per column.

In stochastic rounding, the noise of a code grows with its change. Compensation is therefore cut at the wanted change, so that
codes move differently but not more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

GROUP: Final = 16
"""The fewest rows that are rounded at once, independently of one another. If r is larger, it is the minimum."""

MOST_GROUPS: Final = 16
"""The most groups of a matrix. Tall matrices have larger groups, because more groups cost time and gain little."""

DAMPING: Final = 0.01
"""Added to the diagonal of ``U_F^T U_F``, which begins as the identity. It limits what the last rows compensate."""

MOST_PASSED: Final = 1.0
"""The limit of a code's compensation, in multiples of its wanted change."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are rounded at once, the factors that spread errors over them, (rows, r), and the errors before them."""

    rows: range
    spread: Tensor
    off: Tensor


class OutputFeedback:
    """The errors of one parameter in the directions of its update, while its blocks of rows are rounded in order.

    `outputs`, (rows, r) fp32, span the columns of the change. Groups are at fixed rows, however these are cut into blocks, or
    begin anew with each block. The first row of `outputs` is the row `first` of the parameter.
    """

    def __init__(self, outputs: Tensor, first: int = 0) -> None:
        import torch

        self._first = first
        self._basis = torch.linalg.qr(outputs.double())[0].float()
        self.begin()

    def begin(self) -> None:
        """Forget all rows so far. The next ones are the first, and may have other columns."""
        self._ahead = self._basis.T @ self._basis
        self._off = self._basis.new_zeros(self._basis.shape[1], 1)  # one column for all, until there is an error
        self._group: _Group | None = None

    def groups(self, rows: range, columns: int, *, by_block: bool) -> Iterator[tuple[range, Tensor]]:
        """Yield these rows in groups that are rounded at once, each with its compensation, (rows, columns) fp32.

        The caller must `add` the errors of a group before it takes the next one. Blocks of rows come once each, in order. With
        `by_block`, a new group begins with each block.
        """
        for part, group in self._entered(self._own(rows), by_block=by_block):
            spread = group.spread[part.start - group.rows.start : part.stop - group.rows.start]
            yield range(part.start + self._first, part.stop + self._first), spread @ group.off.expand(-1, columns)

    def skip(self, rows: range) -> None:
        """Pass rows that neither receive nor cause compensation."""
        for _ in self._entered(self._own(rows), by_block=False):
            pass

    def leave(self, rows: range, error: Tensor) -> None:
        """Pass rows that were rounded without compensation, and add their errors."""
        self._pass(self._own(rows))
        self.add(rows, error)

    def add(self, rows: range, error: Tensor) -> None:
        """Add the errors of rows, (rows, columns) fp32."""
        own = self._own(rows)
        self._off = self._off + self._basis[own.start : own.stop].T @ error

    def _own(self, rows: range) -> range:
        """Return rows of the parameter as rows of the basis."""
        return range(rows.start - self._first, rows.stop - self._first)

    def _entered(self, rows: range, *, by_block: bool) -> Iterator[tuple[range, _Group]]:
        """Yield the part of these rows in each group, and the group."""
        cut = self._cut(rows, by_block=by_block)
        begun = iter(self._spreads([whole for _, whole in cut if whole.start >= rows.start]))
        for part, whole in cut:
            if whole.start == part.start:
                self._group = _Group(whole, next(begun), self._off)
            assert self._group is not None  # rows come in order
            yield part, self._group

    def _cut(self, rows: range, *, by_block: bool) -> list[tuple[range, range]]:
        """Return for each group the part of these rows in it, and all rows of the group."""
        height, rank = self._basis.shape
        step = max(GROUP, rank, height // MOST_GROUPS)
        first = rows.start if by_block else rows.start // step * step
        end = rows.stop if by_block else height
        wholes = (range(start, min(start + step, end)) for start in range(first, rows.stop, step))
        return [(range(max(whole.start, rows.start), min(whole.stop, rows.stop)), whole) for whole in wholes]

    def _spreads(self, groups: list[range]) -> list[Tensor]:
        """Return for each group the factors that spread errors over its rows: ``-U_G (U_F^T U_F)^-1``, fp32."""
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
