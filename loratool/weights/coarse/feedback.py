"""Rounding that knows what a matrix multiplies: the error of each column is compensated by the columns after it.

With X, (tokens, columns), inputs of the layer, an error E of its rows costs ``||X E^T||^2``, what its outputs are off by, and
``damping ||E||^2`` for inputs that were not seen. Once some columns S are rounded, the others, F, do best to be off by
``-H_FF^-1 H_FS e_S`` with ``H = X^T X + damping I``; that is GPTQ (Frantar et al. 2022, arXiv:2210.17323). Since
``H_FF^-1 X_F^T = X_F^T (damping I + X_F X_F^T)^-1``, no matrix of (columns, columns) is made: of the next columns G, some of F,
it is ``-P_G^T y``, where ``y = X_S e_S`` is what a row's outputs are off by so far, and ``P_G = (damping I + X_F X_F^T)^-1 X_G``.

Columns are rounded in the order of their inputs' size, largest first (GPTQ's act-order). Half of all energy is often that of one
or two columns, those of massive activations (Sun et al. 2024, arXiv:2402.17762), and their errors are nearly all that a model
notices. Rounded first, they are made good by all others.

GPTQ rounds to nearest, where an error is half a step at most whatever is passed on. Rounding by chance, a code moves with
odds in proportion to what it is to change by: passing on makes noise itself. So what is passed on may be cut at `most` times
the change that is wanted anyway, which makes no more moves, only other ones. Where the changes are not small it is better
not to cut. Nobody knows before, so each of `TRIALS` is rounded, and the one with the least error is taken.
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
"""Takes columns and what is added to them, (rows, columns); gives the places of their codes then, and their numbers."""

ALONE: Final = 16
"""So many columns, those with the largest inputs, are rounded one by one."""

GROUP: Final = 16
"""Of the others so many are rounded at once, without regard to one another."""

TOGETHER: Final = 32
"""Parts whose coefficients are made at once."""

COMPARED_DAMPING: Final = 0.3
"""What trials are compared under; inputs that were not seen may come as well."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way of passing errors on.

    Attributes:
        damping: what an error costs with inputs that were not seen, beside the mean of those that were.
        most: at how many times the wanted change what is passed on is cut.
        short: whether codes with short steps carry the change for the others (`loratool.weights.coarse.short_steps`).
    """

    damping: float
    most: float
    short: bool


TRIALS: Final = (Trial(1.0, 1.0, short=True), Trial(3.0, math.inf, short=False))
"""The first moves no more codes than are moved anyway; where changes are large, the second has less error."""


class Feedback:
    """What errors of a matrix cost, and how they are passed on: from `inputs`, (tokens, columns), fp32.

    `order`, int64, (columns,): the columns as they are rounded, those with the largest inputs first.
    """

    def __init__(self, inputs: Tensor) -> None:
        import torch

        # Squares of the largest inputs are to be fp32 numbers, and a power of two rounds nothing.
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
        """Where the codes go, int32, under the trial with the least error, and whether the short steps carry the change.

        `old` are the numbers from before, `change` what is added to them, `short` the same as the codes with short steps
        carry it; all (rows, columns), their columns in `order`, as those of what it gives are.
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
        """What the columns of `part` are to change by, beside the `wanted` change, for what outputs are `off` by so far."""
        passed = (off @ self._passed[trial.damping][part].T).neg_()
        if math.isfinite(trial.most):
            most = wanted.abs() * trial.most
            passed = passed.maximum(-most).minimum(most)
        return passed


def groups(columns: int) -> list[slice]:
    """The columns that are rounded at once."""
    starts = [*range(min(ALONE, columns)), *range(ALONE, columns, GROUP), columns]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def coefficients(inputs: Tensor, damping: float, parts: Sequence[slice]) -> Tensor:
    """P of all columns, fp32, (columns, tokens), from `inputs`, (columns, tokens).

    It is made for many parts at once, from the last ones to the first. With M the inverse for the columns after B, all that
    is asked of B is in the factor U, upper triangular, of ``U U^T = I + B M B^T``: with ``V = U^-1 B M``, P of a part G of B
    is ``U_GG^-T V_G``, and the inverse for B and all after it is ``M - V^T V``.
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
