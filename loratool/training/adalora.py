"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ``h = W x + alpha / r * P (Lambda * (Q x))``, ranks allocated by importance.

P, Lambda and Q (equation 3) are B (out_features, r), E (r, 1) and A (r, in_features) in the files. Constants are those of the
authors' code and of PEFT, which differ from the paper in two formulas: the regularization (equation 4) is a mean of norms
instead of a sum of their squares, and the budget falls from t_i on instead of from ``t_i + t_f``.

Factors begin as LoRA's do, with Q random, P zero and Lambda one, and use LoRA's learning rates. In the paper, Lambda begins
with zero, and P and Q are random.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loratool.errors import LoratoolError
from loratool.formats.adalora import IMPORTANCE, PEFT_TYPE, pattern_key
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.training.budget import BudgetSchedule, budget_schedule, most_important
from loratool.training.layers import AdaptedLinear, fill_randomly, new_factor
from loratool.training.lora import TASK, LowRankAdaptation
from loratool.training.options import AdaLoRA
from loratool.training.targets import Targets, is_conv1d
from loratool.updates import LoadedUpdate
from loratool.updates.low_rank import LoadedLowRank
from loratool.updates.singular import RANK_EPSILON, LoadedSingularValue


class AdaLoRALinear(AdaptedLinear):
    """A linear layer with A (r, in_features), E (r, 1) and B (out_features, r)."""

    letters = ("A", "E", "B")

    def __init__(self, base: nn.Module, options: AdaLoRA) -> None:
        super().__init__(base, options.dropout)
        device, rank = self.weight.device, options.init_r
        self.lora_A = new_factor((rank, self.in_features), device)
        self.lora_E = new_factor((rank, 1), device)
        self.lora_B = new_factor((self.out_features, rank), device)
        self.alpha = options.lora_alpha
        self.scaling = self.alpha / (rank + RANK_EPSILON)

    def leading_product(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A * self.lora_E, self.lora_B, self.scaling

    @torch.no_grad()
    def loaded_update(self) -> LoadedUpdate:
        a, b, scaling = self.leading_product()
        divisor = torch.full((1,), float(len(a)), device=a.device) + RANK_EPSILON
        return LoadedSingularValue(LoadedLowRank(a, b.clone(), scaling, is_conv1d(self.base)), self.alpha, divisor)


class AdaLoRAAdaptation(LowRankAdaptation[AdaLoRALinear, AdaLoRA]):
    """An AdaLoRA in a model.

    Attributes:
        schedule: how the budget falls.
        kept: for each module, (r,) bool, the components that the last allocation kept.
        sensitivity, uncertainty: the moving averages of equations 9 and 10, by the factor's name in `parameters`.
    """

    method = "adalora"

    def __init__(self, model: nn.Module, targets: Targets, options: AdaLoRA, schedule: BudgetSchedule) -> None:
        super().__init__(model, targets, options, lambda base: AdaLoRALinear(base, options))
        self.schedule = schedule
        self.kept = {name: torch.ones(options.init_r, dtype=torch.bool) for name in self.layers}
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def penalty(self) -> Tensor | None:
        """Return ``gamma`` times the mean over all P and Q of ``|| P^T P - I ||_F`` and ``|| Q Q^T - I ||_F`` (equation 4)."""
        if self.options.orthogonality == 0:
            return None
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for layer in self.layers.values():
            for rows in (layer.lora_A, layer.lora_B.T):
                alike[rows.shape].append(rows)
        norms = []
        for group in alike.values():
            rows = torch.stack(group)
            apart = rows @ rows.mT - torch.eye(rows.shape[1], device=rows.device)
            norms.append(torch.linalg.matrix_norm(apart))
        return self.options.orthogonality * torch.cat(norms).mean()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Update the averages by the sensitivity ``I = | w * dL/dw |`` (equation 8)."""
        if step >= self.schedule.last_allocation:
            return
        beta1, beta2 = self.options.beta1, self.options.beta2
        for name, factor in self.parameters().items():
            if factor.grad is None:
                continue
            now = (factor * factor.grad).abs_()
            if name not in self.sensitivity:
                self.sensitivity[name], self.uncertainty[name] = torch.zeros_like(now), torch.zeros_like(now)
            average = self.sensitivity[name].mul_(beta1).add_(now, alpha=1 - beta1)
            self.uncertainty[name].mul_(beta2).add_(now.sub_(average).abs_(), alpha=1 - beta2)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep the most important components, as many as the budget allows; set the others in Lambda to zero (equation 6)."""
        if self.schedule.allocates(step):
            self.kept = most_important(self.importance(), self.schedule.budget(step))
        elif step <= self.schedule.last_allocation:
            return
        for name, layer in self.layers.items():
            layer.lora_E.mul_(self.kept[name][:, None].to(layer.lora_E.device))

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """Return the importance of each module's components, (r,) fp32 on the CPU.

        It is ``s(Lambda) + mean s(P) + mean s(Q)`` (equation 7) with ``s = sensitivity * uncertainty`` (equation 11).
        """

        def score(name: str, factor: Tensor) -> Tensor:
            if name not in self.sensitivity:
                return torch.zeros_like(factor)
            return self.sensitivity[name] * self.uncertainty[name]

        found = {}
        for module, layer in self.layers.items():
            of = {letter: score(f"{module}.{letter}", factor) for letter, factor in layer.factors()}
            found[module] = (of["E"].squeeze(1) + (of["A"].mean(1) + of["B"].mean(0))).cpu()
        return found

    def buffers(self) -> dict[str, Tensor]:
        averages = {f"{name}.sensitivity": value for name, value in self.sensitivity.items()}
        averages |= {f"{name}.uncertainty": value for name, value in self.uncertainty.items()}
        return averages | {f"{name}.kept": mask for name, mask in self.kept.items()}

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        factors = self.parameters()
        kept = {name: buffers.get(f"{name}.kept") for name in self.layers}
        averaged = [name for name in factors if f"{name}.sensitivity" in buffers]
        expected = len(kept) + 2 * len(averaged)
        if len(buffers) != expected or any(mask is None for mask in kept.values()):
            raise LoratoolError("the checkpoint holds the state of a different adapter than this AdaLoRA")
        self.kept = {name: mask.cpu().bool() for name, mask in kept.items() if mask is not None}
        for average, what in ((self.sensitivity, "sensitivity"), (self.uncertainty, "uncertainty")):
            average.clear()
            for name in averaged:
                average[name] = buffers[f"{name}.{what}"].to(factors[name].device, copy=True)

    def figures(self) -> dict[str, Any]:
        ranks = {name: int(mask.sum()) for name, mask in self.kept.items()}
        return {"budget": sum(ranks.values()), "ranks": ranks}

    def config(self) -> dict[str, Any]:
        schedule, options = self.schedule, self.options
        present = self._present()
        return {
            "peft_type": PEFT_TYPE,
            "task_type": TASK,
            "init_r": options.init_r,
            "target_r": options.rank,
            "lora_alpha": options.lora_alpha,
            "lora_dropout": options.dropout,
            "tinit": schedule.initial_steps,
            "tfinal": schedule.final_steps,
            "deltaT": schedule.allocation_steps,
            "total_step": schedule.total_steps,
            "beta1": options.beta1,
            "beta2": options.beta2,
            "orth_reg_weight": options.orthogonality,
            "rank_pattern": {pattern_key(name): mask.tolist() for name, mask in present.items() if not mask.all()}
            or None,
            "target_modules": list(self.targets.names),
            "fan_in_fan_out": self.targets.fan_in_fan_out,
            "bias": "none",
            "inference_mode": True,
        }

    def facts(self) -> dict[str, Any]:
        """Return the importance of each component in the file, by which `loratool.ranks.prune` chooses."""
        if not self.sensitivity:
            return {}
        present = self._present()
        return {IMPORTANCE: {name: scores[present[name]].tolist() for name, scores in self.importance().items()}}

    def adapter(self, draft: Draft, name: str, config: Mapping[str, Any] | None = None,
                facts: Mapping[str, Any] | None = None) -> Adapter:  # fmt: skip
        for module, mask in self._present().items():
            layer = self.layers[module]
            places = mask.nonzero().squeeze(1).to(layer.lora_E.device)
            a, e, b = layer.lora_A[places], layer.lora_E[places], layer.lora_B[:, places]
            draft.put_factors(module, {"A": a, "E": e, "B": b})
        return draft.adapter(name, self.config() | dict(config or {}), self.facts() | dict(facts or {}))

    def _present(self) -> dict[str, Tensor]:
        """Return the mask of components in the file: those kept, and those that a step between allocations made nonzero."""
        return {
            name: self.kept[name] | (layer.lora_E.detach().cpu().squeeze(1) != 0) for name, layer in self.layers.items()
        }


def attach_adalora(
    model: nn.Module, targets: Targets, options: AdaLoRA, seed: int, total_steps: int
) -> AdaLoRAAdaptation:
    """Wrap the targets in AdaLoRA layers.

    Raises:
        LoratoolError: the schedule does not fit into `total_steps`.
    """
    schedule = budget_schedule(options, len(targets.modules), total_steps)
    adaptation = AdaLoRAAdaptation(model, targets, options, schedule)
    for name, layer in adaptation.layers.items():
        fill_randomly(layer.lora_A, f"{name}.A", seed, uniform=1 / math.sqrt(layer.in_features))
        nn.init.ones_(layer.lora_E)
    return adaptation
