"""A linear layer with low-rank factors beside its frozen weight: the base class of the layers of all methods."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loratool.merging.live_weight import LiveWeight
from loratool.training.targets import is_conv1d
from loratool.updates import LoadedUpdate
from loratool.updates.low_rank import LoadedLowRank


class AdaptedLinear(nn.Module):
    """``y = base(x) + scaling * B (A x)`` around an nn.Linear, a Conv1D or a Linear4bit.

    A method defines the current A, B and scaling by `leading_product`.

    Attributes:
        base: the wrapped layer.
        in_features, out_features: the sizes of the base.
        dropout: the probability with which an input of A is set to zero in training.
    """

    letters: ClassVar[tuple[str, ...]] = ("A", "B")
    base: nn.Module

    def __init__(self, base: nn.Module, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = _features(base)
        self.dropout = dropout
        self._live_weight: LiveWeight | None = None
        self.train(base.training)

    def leading_product(self) -> tuple[Tensor, Tensor, float]:
        """Return A (r, in_features), B (out_features, r) and the scaling that act now."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the base's weight contains the update."""
        return self._live_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out_features) of x (..., in_features), in the dtype of the base's output."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        a, b, scaling = self.leading_product()
        x = x.to(y.dtype)
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        hidden = functional.linear(x, a.to(y.dtype))
        # addmm adds to y directly, so the result is the only other tensor of y's size.
        return torch.addmm(
            y.reshape(-1, self.out_features), hidden.reshape(-1, len(a)), b.to(y.dtype).T, alpha=scaling
        ).view(y.shape)

    def merge(self) -> None:
        """Add the current update to the base's weight, rounded once. From then on only the base computes."""
        if self._live_weight is None:
            self._live_weight = LiveWeight.updated(self.weight, self.loaded_update(), transposed=is_conv1d(self.base))

    def unmerge(self) -> None:
        """Restore the base's weight bit for bit."""
        if self._live_weight is not None:
            self._live_weight.restore()
            self._live_weight = None

    @torch.no_grad()
    def loaded_update(self) -> LoadedUpdate:
        """Return a copy of the current update."""
        a, b, scaling = self.leading_product()
        return LoadedLowRank(a.clone(), b.clone(), scaling, is_conv1d(self.base))

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the factors with their letters, in the order of `letters`."""
        for letter in self.letters:
            yield letter, getattr(self, f"lora_{letter}")

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models read directly."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def extra_repr(self) -> str:
        return ", ".join(f"{letter}={tuple(factor.shape)}" for letter, factor in self.factors())


def new_factor(shape: tuple[int, int], device: torch.device) -> nn.Parameter:
    """Return a factor of zeros, fp32."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))


def fill_randomly(factor: nn.Parameter, name: str, seed: int, *, uniform: float | None = None,
                  normal: float | None = None) -> None:  # fmt: skip
    """Fill a factor with random numbers: uniform between ``-uniform`` and ``uniform``, or normal with deviation `normal`.

    The numbers depend only on the seed and the factor's name, not on the device or on other factors.
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
    """Return in_features and out_features. A Conv1D stores its weight as (in_features, out_features)."""
    if is_conv1d(base):
        rows, columns = base.get_parameter("weight").shape
        return rows, columns
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features
