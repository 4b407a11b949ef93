"""The update of GraLoRA (Jung et al. 2025, arXiv:2505.20355): W in k x k blocks, each of which has a low-rank product of its own.

A (k, in_features / k, r) and B (k, r, out_features / k) hold the factors of k blocks each. Block (j, n), of the j-th outputs and
the n-th inputs, is of rank r / k: the j-th columns of A[n] and the n-th rows of B[j]. A hybrid adds a LoRA of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class GraLora(Additive):
    """With A and B, and in a hybrid general_A (h, in_features) and general_B (out_features, h)."""

    @property
    def rank(self) -> int:
        return self.tensors["A"].shape[2]

    @property
    def kind(self) -> str:
        return f"gralora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self.tensors["A"].shape, self.tensors["B"].shape
        return b[0] * b[2], a[0] * a[1]

    @property
    def factors(self) -> tuple[str, ...]:
        return () if "general_A" in self.tensors else ("A", "B")

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its factors."""
        general = (numbers["general_B"], numbers["general_A"]) if "general_A" in numbers else None
        return Granular(numbers["A"], numbers["B"], general)


@dataclass(frozen=True)
class Granular:
    """The blocks, and the product of the `general` factors, fp32. PEFT computes the whole matrix at once."""

    a: torch.Tensor
    b: torch.Tensor
    general: tuple[torch.Tensor, torch.Tensor] | None

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self._whole[outputs, inputs]

    @cached_property
    def _whole(self) -> torch.Tensor:
        import torch

        k, width, rank = self.a.shape
        few = rank // k
        # A[n] of the n-th inputs, between zeros for all others: (in_features, j, n, r / k).
        scattered = self.a.new_zeros(k, width, k, k, few)
        for n in range(k):
            scattered[n, :, :, n] = self.a[n].view(width, k, few)
        left = scattered.view(k * width, k, rank)
        whole: torch.Tensor = torch.einsum("ikr, kro -> iko", left, self.b).reshape(k * width, -1).T
        if self.general is not None:
            whole += self.general[0] @ self.general[1]
        return whole

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        import torch

        size = outputs.stop - outputs.start, inputs.stop - inputs.start
        found = torch.zeros(size, dtype=torch.float64, device=self.a.device)
        k, width, rank = self.a.shape
        few, height = rank // k, self.b.shape[2]
        for j in range(outputs.start // height, -(-outputs.stop // height)):
            rows = slice(max(outputs.start, j * height), min(outputs.stop, (j + 1) * height))
            for n in range(inputs.start // width, -(-inputs.stop // width)):
                columns = slice(max(inputs.start, n * width), min(inputs.stop, (n + 1) * width))
                above = self.b[j, n * few : (n + 1) * few, rows.start - j * height : rows.stop - j * height].T
                beside = self.a[n, columns.start - n * width : columns.stop - n * width, j * few : (j + 1) * few].T
                found[
                    rows.start - outputs.start : rows.stop - outputs.start,
                    columns.start - inputs.start : columns.stop - inputs.start,
                ] = fixed_product(above, beside)
        if self.general is not None:
            found += fixed_product(self.general[0][outputs], self.general[1][:, inputs])
        return found
