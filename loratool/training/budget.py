"""AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512): how many components all modules may have, and which ones.

The schedule equals that of the authors' code and of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loratool.errors import LoratoolError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """The budget of each step, counted from 0: `initial` up to t_i, then a cubic fall, then `final` for the last t_f steps.

    Attributes:
        initial, final: number of components in all modules together, at the beginning and at the end.
        initial_steps, final_steps, allocation_steps, total_steps: the paper's t_i, t_f, Delta T and T.
    """

    initial: int
    final: int
    initial_steps: int
    final_steps: int
    allocation_steps: int
    total_steps: int

    @property
    def last_allocation(self) -> int:
        """The step that cuts to the final budget. After it, the components stay the same."""
        return self.total_steps - self.final_steps

    def budget(self, step: int) -> int:
        """Return the budget after `step` (equation 12).

        Between t_i and ``T - t_f``, it is ``b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_f - t_i))^3``.
        """
        if step <= self.initial_steps:
            return self.initial
        if step >= self.last_allocation:
            return self.final
        left = 1 - (step - self.initial_steps) / (self.last_allocation - self.initial_steps)
        return int((self.initial - self.final) * left**3 + self.final)

    def allocates(self, step: int) -> bool:
        """Return whether components are chosen again after `step`."""
        falling = self.initial_steps < step < self.last_allocation and step % self.allocation_steps == 0
        return falling or step == self.last_allocation


class Budgeted(Protocol):
    """The options that a schedule depends on."""

    @property
    def title(self) -> str:
        """The method's name in messages."""

    @property
    def rank(self) -> int:
        """The average rank at the end."""

    @property
    def init_r(self) -> int:
        """The rank of each module at the beginning."""

    @property
    def initial_steps(self) -> int | None:
        """Number of steps before the budget begins to fall."""

    @property
    def final_steps(self) -> int | None:
        """Number of steps at the end in which ranks stay the same."""

    @property
    def allocation_steps(self) -> int | None:
        """Number of steps from one allocation to the next."""


def budget_schedule(options: Budgeted, modules: int, total_steps: int) -> BudgetSchedule:
    """Return the schedule of an AdaLoRA on `modules` modules, with default numbers of steps where the options name none.

    Raises:
        LoratoolError: no steps are left between the initial and the final ones.
    """
    first = total_steps // 10 if options.initial_steps is None else options.initial_steps
    last = max(1, total_steps * 3 // 10) if options.final_steps is None else options.final_steps
    if first + last >= total_steps:
        raise LoratoolError(
            f"{options.title}'s {first} initial and {last} final steps leave none of {total_steps} steps to allocate ranks in; "
            "train for more steps, or give fewer initial or final ones"
        )
    between = max(1, total_steps // 100) if options.allocation_steps is None else options.allocation_steps
    return BudgetSchedule(options.init_r * modules, options.rank * modules, first, last, between, total_steps)


def most_important(importance: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Return for each module, (r,) bool, which components are among the `budget` most important ones of all modules.

    Of equally important components, the first ones are chosen.
    """
    import torch

    scores = torch.cat(list(importance.values()))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[torch.sort(scores, descending=True, stable=True).indices[:budget]] = True
    return dict(zip(importance, torch.split(chosen, [len(score) for score in importance.values()]), strict=True))
