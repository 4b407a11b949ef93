"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): each step draws a rank b and trains the first b components of a LoRA.

``h = W x + alpha / b * B[:, :b] A[:b] x`` (equations 5 to 7).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from loratool.errors import LoratoolError
from loratool.formats.adapter import Adapter
from loratool.formats.kinds import NESTED_LORA
from loratool.training.lora import LoRALinear, LowRankAdaptation, peft_lora_config
from loratool.training.options import DyLoRA
from loratool.training.targets import Targets


class DyLoRALinear(LoRALinear):
    """A LoRA layer that acts through its first `active` components.

    With `frozen`, only the last of them is trained. The others are constants in the forward pass, so only the optimizer's
    momentum changes them.
    """

    def __init__(self, base: nn.Module, options: DyLoRA) -> None:
        super().__init__(base, options.rank, options.scaling_at(options.rank), options.dropout)
        self.active = options.rank
        self.frozen = options.update == "frozen"

    def leading_product(self) -> tuple[Tensor, Tensor, float]:
        b = self.active
        rows, columns = self.lora_A[:b], self.lora_B[:, :b]
        if self.frozen and torch.is_grad_enabled() and b > 1:
            rows = torch.cat([rows[:-1].detach(), rows[-1:]])
            columns = torch.cat([columns[:, :-1].detach(), columns[:, -1:]], dim=1)
        return rows, columns, self.scaling


class DyLoRAAdaptation(LowRankAdaptation[DyLoRALinear, DyLoRA]):
    """A DyLoRA in a model."""

    method = "dylora"

    def __init__(self, model: nn.Module, targets: Targets, options: DyLoRA, seed: int) -> None:
        super().__init__(model, targets, options, lambda base: DyLoRALinear(base, options))
        self.seed = seed
        for name, layer in self.layers.items():
            layer.fill(name, options.initialisation, seed)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(range(self.options.least_rank, self.options.rank + 1))

    def act_at(self, rank: int) -> None:
        if rank not in self.ranks:
            raise LoratoolError(
                f"the DyLoRA acts at the ranks {self.ranks[0]} to {self.ranks[-1]}, and {rank} is not one of them"
            )
        for layer in self.layers.values():
            layer.active, layer.scaling = rank, self.options.scaling_at(rank)

    def begin_step(self, step: int) -> None:
        self.act_at(drawn_rank(self.options, self.seed, step))

    def figures(self) -> dict[str, Any]:
        return {"rank": next(iter(self.layers.values())).active}

    def config(self) -> dict[str, Any]:
        return peft_lora_config(self.options, self.targets)

    def facts(self) -> dict[str, Any]:
        return {"kind": NESTED_LORA, "scaling": self.options.scaling_law}

    def adapter(self, *arguments: Any, **keywords: Any) -> Adapter:
        return replace(super().adapter(*arguments, **keywords), kind=NESTED_LORA)


def attach_dylora(model: nn.Module, targets: Targets, options: DyLoRA, seed: int) -> DyLoRAAdaptation:
    """Wrap the targets in DyLoRA layers."""
    return DyLoRAAdaptation(model, targets, options, seed)


def drawn_rank(options: DyLoRA, seed: int, step: int) -> int:
    """Return the rank of a step: ``b ~ p_B`` of algorithm 1. It depends only on the options, the seed and the step."""
    digest = hashlib.blake2b(f"rank {seed} {step}".encode(), digest_size=8).digest()
    shares = list(accumulate(_weights(options)))
    place = int.from_bytes(digest) / 2**64 * shares[-1]
    return options.least_rank + sum(share <= place for share in shares[:-1])


def _weights(options: DyLoRA) -> Sequence[float]:
    ranks = range(options.rank - options.least_rank + 1)
    return [1.0 if options.distribution == "uniform" else (1 - options.geometric_p) ** rank for rank in ranks]
