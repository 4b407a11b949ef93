"""The product of two factors that a kind computes from its tensors: D = left right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.updates.low_rank import fixed_product

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Product:
    """``left right``, fp32: left (out_features, r), right (r, in_features).

    `factors` computes them: in PEFT's order for ``fixed=False``, and with the same bits on every machine for ``fixed=True``.
    """

    factors: Callable[[bool], tuple[torch.Tensor, torch.Tensor]]

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        left, right = self._summed
        return left[outputs] @ right[:, inputs]

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        left, right = self._fixed
        return fixed_product(left[outputs], right[:, inputs])

    @cached_property
    def _summed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factors(False)

    @cached_property
    def _fixed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factors(True)
