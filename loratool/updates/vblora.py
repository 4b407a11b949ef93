"""The update of VB-LoRA (Li et al. 2024, arXiv:2405.15179, section 3): a LoRA whose factors are cut from a shared vector bank.

A and B consist of vectors of b numbers. Each of them is the mean of the k vectors of the bank (N, b) with the largest logits,
weighted by the softmax of these logits. A file holds all logits, or the indices and weights of the largest alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Final

from loratool.errors import AdapterError, quoted
from loratool.updates.additive import Additive, Delta
from loratool.updates.fixed_functions import fixed_exp
from loratool.updates.low_rank import read_factor, read_tensor
from loratool.updates.product import Product

if TYPE_CHECKING:
    import torch

BANK: Final = "bank"
INDICES: Final = "indices"


@dataclass(frozen=True, slots=True, kw_only=True)
class VbLora(Additive):
    """With logits A (r, in_features / b, N) and B (out_features / b, r, N), or indices and weights; `topk` is k."""

    topk: int

    @property
    def _first(self) -> tuple[tuple[int, ...], ...]:
        first = "logits" if "logits_A" in self.tensors else INDICES
        return tuple(self.tensors[f"{first}_{letter}"].shape for letter in "AB")

    @property
    def rank(self) -> int:
        return self._first[0][0]

    @property
    def kind(self) -> str:
        return f"vblora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self._first
        length = self.tensors[BANK].shape[1]
        return b[0] * length, a[1] * length

    @property
    def factors(self) -> tuple[str, ...]:
        return (BANK,)

    def read(self, letter: str) -> torch.Tensor:
        """Read a tensor as fp32, or indices as whole numbers.

        Raises:
            AdapterError: a number is NaN or infinite, an index lies outside the bank, or weights are not those of a softmax.
        """
        info = self.tensors[letter]
        if not letter.startswith(INDICES):
            numbers = read_factor(info)
            if letter.startswith("weights") and bool(((numbers < 0) | (numbers.sum(-1, keepdim=True) >= 1)).any()):
                raise AdapterError(
                    f"{quoted(info.name)} in {quoted(info.file)} holds numbers that are no shares of 1; save it again"
                )
            return numbers
        indices = read_tensor(info).long()
        if bool(((indices < 0) | (indices >= self.tensors[BANK].shape[0])).any()):
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(info.file)} names vectors outside a bank of {self.tensors[BANK].shape[0]}; "
                "save it again"
            )
        return indices

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from the bank and what chooses from it."""

        def factors(fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
            mean = self._fixed_mean if fixed else self._mean
            a, b = (mean(numbers, letter) for letter in "AB")
            return b.transpose(1, 2).reshape(-1, self.rank), a.reshape(self.rank, -1)

        return Product(factors)

    def _mean(self, numbers: Mapping[str, torch.Tensor], letter: str) -> torch.Tensor:
        """Return the weighted means of vectors, (..., b), in PEFT's order."""
        import torch

        logits, indices = numbers.get(f"logits_{letter}"), numbers.get(f"{INDICES}_{letter}")
        if logits is None:
            weights = numbers[f"weights_{letter}"]
            logits = torch.log(torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1))
        largest = logits.topk(self.topk, dim=-1)
        chosen = largest.indices if indices is None else indices.gather(-1, largest.indices)
        mean: torch.Tensor = (torch.softmax(largest.values, -1).unsqueeze(-1) * numbers[BANK][chosen]).sum(-2)
        return mean

    def _fixed_mean(self, numbers: Mapping[str, torch.Tensor], letter: str) -> torch.Tensor:
        """Return them with the same bits on every machine. Of equal logits, the first ones are the largest."""
        logits, indices = numbers.get(f"logits_{letter}"), numbers.get(f"{INDICES}_{letter}")
        if indices is None:
            assert logits is not None
            order = logits.double().sort(dim=-1, descending=True, stable=True)
            largest, indices = order.values[..., : self.topk], order.indices[..., : self.topk]
            shares = list(fixed_exp(largest - largest[..., :1]).unbind(-1))
        else:
            shares = list(numbers[f"weights_{letter}"].double().unbind(-1))
            shares.append(1 - reduce(add, shares))
        bank = numbers[BANK].double()
        parts = (share[..., None] * bank[each] for share, each in zip(shares, indices.unbind(-1), strict=True))
        return (reduce(add, parts) / reduce(add, shares)[..., None]).float()
