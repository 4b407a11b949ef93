"""Error-compensated rounding with known inputs: the error of each column is compensated by the columns after it.

Let X, (tokens, columns), be inputs of the layer. An error E of its rows costs ``||X E^T||^2``, the error of its outputs, plus
``damping ||E||^2`` for other inputs. Once the columns S are rounded, the best errors of the remaining columns F are
``-H_FF^-1 H_FS e_S`` with ``H = X^T X + damping I``. That is GPTQ (Frantar et al. 2022, arXiv:2210.17323).

No (columns, columns) matrix is needed, because ``H_FF^-1 X_F^T = X_F^T (damping I + X_F X_F^T)^-1``. The errors of the next
columns G, a part of F, are ``-P_G^T y``. Here ``y = X_S e_S`` is the output error of a row so far, and
``P_G = (damping I + X_F X_F^T)^-1 X_G``.

Columns are rounded in descending order of the size of their inputs (GPTQ's act-order). One or two columns with massive
activations (Sun et al. 2024, arXiv:2402.17762) often hold half of all energy, and their errors do nearly all the harm. Rounded
first, they are compensated by all others.

GPTQ rounds to nearest, so compensation cannot make an error larger than half a step. In stochastic rounding, the odds that a
code moves grow with its change, so compensation adds noise of its own. It may therefore be cut at `most` times the wanted
change, which gives different moves but not more of them. If changes are not small, it is better not to cut. This is not known
in advance, so each of `TRIALS` is computed and the one with the least error is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

Move = Callable[[slice, "Tensor"], "tuple[Tensor, Tensor]"]
"""Takes columns and their change, (rows, columns); returns the places of their rounded codes, and their numbers."""

ALONE: Final = 16
"""Number of columns, those with the largest inputs, that are rounded one by one."""

GROUP: Final = 16
"""Number of the other columns that are rounded at once, independently of one another."""

TOGETHER: Final = 32
"""Number of parts whose coefficients are computed at once."""

COMPARED_DAMPING: Final = 0.3
"""The damping under which trials are compared."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to compensate errors.

    Attributes:
        damping: the cost of an error with other inputs, relative to the mean over the known inputs.
        most: the limit of compensation, in multiples of the wanted change.
        short: whether codes with short steps carry the change for the others (`loratool.weights.coarse.short_steps`).
    """

    damping: float
    most: float
    short: bool


TRIALS: Final = (Trial(1.0, 1.0, short=True), Trial(3.0, math.inf, short=False))
"""The first trial changes no more codes than rounding without compensation. The second has less error if changes are large."""


class Feedback:
    """The cost of a matrix's errors and their compensation, from its `inputs`, (tokens, columns) fp32.

    Attributes:
        order: (columns,) int64, the columns in the order of rounding, those with the largest inputs first.
    """

    def __init__(self, inputs: Tensor) -> None:
        import torch

        # Scale so that squares of the inputs do not overflow fp32. A power of two rounds nothing.
        inputs = torch.ldexp(inputs, -torch.frexp(inputs.abs().amax()).exponent)
        energy = inputs.square().sum(0)
        self.order = torch.argsort(energy, descending=True, stable=True)
        inputs = inputs[:, self.order] / energy.mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        if len(inputs) > inputs.shape[1]:
            inputs = torch.linalg.qr(inputs.double(), mode="r").R.float()  # fewer rows with the same X^T X
        self._groups = groups(inputs.shape[1])
        self._inputs = inputs.T.contiguous()
        self._passed = {
            damping: coefficients(self._inputs, damping, self._groups)
            for damping in {trial.damping for trial in TRIALS}
        }

    def best(self, old: Tensor, change: Tensor, short: Tensor, move: Move) -> tuple[Tensor, bool]:
        """Round with each trial and return the codes of the one with the least error.

        All tensors are (rows, columns), with columns in `order`.

        Args:
            old: the numbers before.
            change: the wanted change.
            short: the wanted change as the codes with short steps carry it.

        Returns:
            The places of the codes, int32, and whether the short steps carry the change.
        """
        import torch

        found: list[tuple[float, Tensor, bool]] = []
        for trial in TRIALS:
            wanted = short if trial.short else change
            moved = torch.empty(old.shape, dtype=torch.int32, device=old.device)
            off, unseen = old.new_zeros(len(old), self._inputs.shape[1]), old.new_zeros((), dtype=torch.float64)
            for part in self._groups:
                passed = self._passed_on(off, part, trial, wanted[:, part])
                moved[:, part], reached = move(part, wanted[:, part] + passed)
                error = reached - old[:, part] - change[:, part]
                off.addmm_(error, self._inputs[part])
                unseen += error.square().sum(dtype=torch.float64)
            cost = off.square().sum(dtype=torch.float64) + COMPARED_DAMPING * unseen
            found.append((float(cost), moved, trial.short))
        _, moved, is_short = min(found, key=lambda each: each[0])
        return moved, is_short

    def _passed_on(self, off: Tensor, part: slice, trial: Trial, wanted: Tensor) -> Tensor:
        """Return the compensation of the columns of `part` for the output error `off` so far, cut relative to `wanted`."""
        passed = (off @ self._passed[trial.damping][part].T).neg_()
        if math.isfinite(trial.most):
            most = wanted.abs() * trial.most
            passed = passed.maximum(-most).minimum(most)
        return passed


def groups(columns: int) -> list[slice]:
    """Return the groups of columns that are rounded at once."""
    starts = [*range(min(ALONE, columns)), *range(ALONE, columns, GROUP), columns]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def coefficients(inputs: Tensor, damping: float, parts: Sequence[slice]) -> Tensor:
    """Return P of all columns, (columns, tokens) fp32, from `inputs`, (columns, tokens).

    It is computed for blocks B of parts, from the last block to the first. Let M be the inverse for the columns after B, U the
    upper triangular factor of ``U U^T = I + B M B^T``, and ``V = U^-1 B M``. Then P of a part G of B is ``U_GG^-T V_G``, and
    the inverse for B and the columns after it is ``M - V^T V``.
    """
    import torch

    passed = torch.empty_like(inputs)
    inverse = torch.eye(inputs.shape[1], dtype=torch.float64, device=inputs.device) / damping
    for start in reversed(range(0, len(parts), TOGETHER)):
        few = parts[start : start + TOGETHER]
        first = few[0].start
        columns = inputs[first : few[-1].stop].double()
        solved = columns @ inverse
        factor = solved @ columns.T
        factor.diagonal().add_(1)
        factor = torch.linalg.cholesky(factor.flip(0, 1)).flip(0, 1)
        solved = torch.linalg.solve_triangular(factor, solved, upper=True)
        inverse -= solved.T @ solved
        for part in few:
            here = slice(part.start - first, part.stop - first)
            passed[part] = torch.linalg.solve_triangular(factor[here, here].T, solved[here], upper=False)
    return passed
