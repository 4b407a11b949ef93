"""The update of Uni-LoRA (Li et al. 2025, arXiv:2506.00799): a LoRA whose factors are numbers of one shared vector.

``A = theta[indices_A] * scales_A`` and ``B = theta[indices_B] * scales_B``, with fixed random indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.errors import AdapterError, quoted
from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import read_factor, read_tensor
from loratool.updates.product import Product

if TYPE_CHECKING:
    import torch

THETA: Final = "theta"
INDICES: Final = "indices"


@dataclass(frozen=True, slots=True)
class UniLora(Additive):
    """With theta (d,), indices and scales A (r, in_features), and B (out_features, r)."""

    @property
    def rank(self) -> int:
        return self.tensors["indices_A"].shape[0]

    @property
    def kind(self) -> str:
        return f"unilora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["indices_B"].shape[0], self.tensors["indices_A"].shape[1]

    @property
    def factors(self) -> tuple[str, ...]:
        return THETA, "scales_A", "scales_B"

    def read(self, letter: str) -> torch.Tensor:
        """Read a tensor as fp32, or indices as whole numbers.

        Raises:
            AdapterError: a number is NaN or infinite, or an index lies outside theta.
        """
        info = self.tensors[letter]
        if not letter.startswith(INDICES):
            return read_factor(info)
        indices, length = read_tensor(info).long(), self.tensors[THETA].shape[0]
        if bool(((indices < 0) | (indices >= length)).any()):
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(info.file)} names numbers outside a vector of {length}; save it again"
            )
        return indices

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its tensors."""

        def factors(fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = (numbers[THETA][numbers[f"{INDICES}_{letter}"]] * numbers[f"scales_{letter}"] for letter in "AB")
            return b, a

        return Product(factors)
