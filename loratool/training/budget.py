"""AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512): how many components all modules may have, and which.

The schedule is that of the authors' code and of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.errors import LoratoolError
from loratool.training.options import AdaLoRA

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """The budget of each step, counted from 0: `initial` to t_i, then falling as a cube, `final` for the last t_f steps.

    Attributes:
        initial, final: components of all modules together, at the beginning and at the end.
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
        """The step that cuts to the final budget; from then on the components stay the same."""
        return self.total_steps - self.final_steps

    def budget(self, step: int) -> int:
        """``b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_f - t_i))^3`` between t_i and ``T - t_f`` (equation 12)."""
        if step <= self.initial_steps:
            return self.initial
        if step >= self.last_allocation:
            return self.final
        left = 1 - (step - self.initial_steps) / (self.last_allocation - self.initial_steps)
        return int((self.initial - self.final) * left**3 + self.final)

    def allocates(self, step: int) -> bool:
        """Whether components are chosen anew after `step`."""
        falling = self.initial_steps < step < self.last_allocation and step % self.allocation_steps == 0
        return falling or step == self.last_allocation


def budget_schedule(options: AdaLoRA, modules: int, total_steps: int) -> BudgetSchedule:
    """The schedule of an AdaLoRA on so many modules, with the default steps where none are chosen.

    Raises:
        LoratoolError: the first and the last steps leave none between them.
    """
    first = total_steps // 10 if options.initial_steps is None else options.initial_steps
    last = max(1, total_steps * 3 // 10) if options.final_steps is None else options.final_steps
    if first + last >= total_steps:
        raise LoratoolError(
            f"AdaLoRA's {first} initial and {last} final steps leave none of {total_steps} steps to share out ranks in; "
            "train for more steps, or give fewer of them"
        )
    between = max(1, total_steps // 100) if options.allocation_steps is None else options.allocation_steps
    return BudgetSchedule(options.init_r * modules, options.rank * modules, first, last, between, total_steps)


def most_important(importance: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Which components of each module, (r,) bool, are among the `budget` most important of all; of equals the first."""
    import torch

    scores = torch.cat(list(importance.values()))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[torch.sort(scores, descending=True, stable=True).indices[:budget]] = True
    return dict(zip(importance, torch.split(chosen, [len(score) for score in importance.values()]), strict=True))
