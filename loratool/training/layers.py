"""A linear layer with low-rank factors beside its frozen weight: what the layers of all methods have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loratool.training.merged_weight import MergedWeight
from loratool.training.targets import is_conv1d
from loratool.updates import LoadedUpdate
from loratool.updates.low_rank import LoadedLowRank


class AdaptedLinear(nn.Module):
    """``y = base(x) + scaling * B (A x)`` around an nn.Linear, a Conv1D or a Linear4bit.

    A method says by `leading_product` what A, B and the scaling are at the moment.

    Attributes:
        base: the layer itself, which computes its part as it always does.
        in_features, out_features: of the base.
        dropout: the probability with which an input of A is zero in training.
    """

    letters: ClassVar[tuple[str, ...]] = ("A", "B")
    base: nn.Module

    def __init__(self, base: nn.Module, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = _features(base)
        self.dropout = dropout
        self._merged_weight: MergedWeight | None = None
        self.train(base.training)

    def leading_product(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in_features), B (out_features, r) and the scaling."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update."""
        return self._merged_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """Of x (..., in_features), y (..., out_features), computed in the type of what the base gives."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        a, b, scaling = self.leading_product()
        x = x.to(y.dtype)
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        hidden = functional.linear(x, a.to(y.dtype))
        # One product that begins from y: nothing of y's size is made but the result.
        return torch.addmm(
            y.reshape(-1, self.out_features), hidden.reshape(-1, len(a)), b.to(y.dtype).T, alpha=scaling
        ).view(y.shape)

    def merge(self) -> None:
        """Add the update to the base's weight, as it is now, rounded once; the base's part is all from then on."""
        if self._merged_weight is None:
            self._merged_weight = MergedWeight(self.weight, self.loaded_update())

    def unmerge(self) -> None:
        """Give the base's weight the bits that it had."""
        if self._merged_weight is not None:
            self._merged_weight.restore()
            self._merged_weight = None

    @torch.no_grad()
    def loaded_update(self) -> LoadedUpdate:
        """A copy of the update as it is now."""
        a, b, scaling = self.leading_product()
        return LoadedLowRank(a.clone(), b.clone(), scaling, is_conv1d(self.base))

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The factors by their letters, in the order of `letters`."""
        for letter in self.letters:
            yield letter, getattr(self, f"lora_{letter}")

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models look at."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def extra_repr(self) -> str:
        return ", ".join(f"{letter}={tuple(factor.shape)}" for letter, factor in self.factors())


def new_factor(shape: tuple[int, int], device: torch.device) -> nn.Parameter:
    """A factor of zeros, fp32."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))


def fill_randomly(factor: nn.Parameter, name: str, seed: int, *, uniform: float | None = None,
                  normal: float | None = None) -> None:  # fmt: skip
    """Fill a factor with random numbers: `uniform` within plus and minus that, or `normal` with that standard deviation.

    They depend on the seed and the factor's name alone, not on the device nor on what else is filled.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    numbers = torch.empty(factor.shape)
    if uniform is not None:
        numbers.uniform_(-uniform, uniform, generator=generator)
    elif normal is not None:
        numbers.normal_(0, normal, generator=generator)
    with torch.no_grad():
        factor.copy_(numbers)


def _features(base: nn.Module) -> tuple[int, int]:
    """in_features and out_features; a Conv1D stores its weight as (in_features, out_features)."""
    if is_conv1d(base):
        rows, columns = base.get_parameter("weight").shape
        return rows, columns
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features
