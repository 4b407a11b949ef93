"""Rounding that knows what a matrix multiplies: the error of each column is made good by the columns after it.

With X, (tokens, columns), inputs of the layer, an error E of its rows costs ``||X E^T||^2 = sum of e H e^T``, H = X^T X. Once
some columns are rounded, the others do best to be off by ``-H_FF^-1 H_FS e_S`` (S those before, F the others); that is GPTQ
(Frantar et al. 2022, arXiv:2210.17323). With ``H = R R^T``, R upper triangular, it needs no inverse for each column: of the
next columns G it is ``-e_S R_SG R_GG^-1``, by rows.

Columns are rounded in the order of H's diagonal, largest first (GPTQ's act-order). Half of its sum is often that of one or two
columns, those of massive activations (Sun et al. 2024, arXiv:2402.17762), and their errors are nearly all that a model notices.
Rounded first, they are made good by all others.

GPTQ rounds to nearest, where an error is half a step at most whatever is passed on. Rounding by chance, a code moves with
odds in proportion to what it is to change by: passing on makes noise itself. So what is passed on may be cut at `most` times
the change that is wanted anyway, which makes no more moves, only other ones. Where the changes are not small it is better
not to cut. Nobody knows before, so each of `TRIALS` is rounded, and the one with the least error under H is taken.
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

COMPARED_DAMPING: Final = 0.3
"""Of the H that errors are compared under; inputs that were not seen may come as well."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way of passing errors on.

    Attributes:
        damping: what is added to H, in units of its mean diagonal, for inputs that were not seen.
        most: at how many times the wanted change what is passed on is cut.
        short: whether codes with short steps carry the change for the others (`loratool.weights.short_steps`).
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
        hessian = inputs.T @ inputs
        hessian /= hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[self.order][:, self.order]
        self._groups = groups(len(hessian))
        self._passed = {
            damping: coefficients(hessian, damping, self._groups) for damping in {trial.damping for trial in TRIALS}
        }
        hessian.diagonal().add_(COMPARED_DAMPING)
        self._hessian = hessian

    def best(self, old: Tensor, change: Tensor, short: Tensor, move: Move) -> tuple[Tensor, bool]:
        """Where the codes go, int32, under the trial with the least error, and whether the short steps carry the change.

        `old` are the numbers from before, `change` what is added to them, `short` the same as the codes with short steps
        carry it; all (rows, columns), their columns in `order`, as those of what it gives are.
        """
        import torch

        found: list[tuple[float, Tensor, bool]] = []
        for trial in TRIALS:
            wanted = short if trial.short else change
            errors, moved = torch.zeros_like(old), torch.empty(old.shape, dtype=torch.int32, device=old.device)
            for part in self._groups:
                passed = self._passed_on(errors, part, trial, wanted[:, part])
                moved[:, part], reached = move(part, wanted[:, part] + passed)
                errors[:, part] = reached - old[:, part] - change[:, part]
            found.append((self._cost(errors), moved, trial.short))
        _, moved, is_short = min(found, key=lambda each: each[0])
        return moved, is_short

    def _passed_on(self, errors: Tensor, part: slice, trial: Trial, wanted: Tensor) -> Tensor:
        """What the columns of `part` are to change by, beside the `wanted` change, for the errors before them."""
        passed = (errors[:, : part.start] @ self._passed[trial.damping][: part.start, part]).neg_()
        if math.isfinite(trial.most):
            most = wanted.abs() * trial.most
            passed = passed.maximum(-most).minimum(most)
        return passed

    def _cost(self, errors: Tensor) -> float:
        """What errors, (rows, columns), do to the outputs of the layer."""
        import torch

        return float(((errors @ self._hessian) * errors).sum(1).sum(dtype=torch.float64))


def groups(columns: int) -> list[slice]:
    """The columns that are rounded at once."""
    starts = [*range(min(ALONE, columns)), *range(ALONE, columns, GROUP), columns]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def coefficients(hessian: Tensor, damping: float, parts: Sequence[slice]) -> Tensor:
    """What of each column's error the columns after it take on, fp32, (columns, columns), zero up to each one's own part."""
    import torch

    damped = hessian.double()
    damped.diagonal().add_(damping)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    passed = torch.zeros_like(hessian)
    for part in parts[1:]:
        solved = torch.linalg.solve_triangular(upper[part, part], upper[: part.start, part], upper=True, left=False)
        passed[: part.start, part] = solved.float()
    return passed
