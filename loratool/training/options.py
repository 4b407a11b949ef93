"""The options of each method, which check themselves when they are made. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Final, Literal

from loratool.errors import LoratoolError, quoted
from loratool.formats.scaling_law import LAWS, ScalingLaw, alpha_at

Initialisation = Literal["kaiming", "gaussian"]
INITIALISATIONS: Final[tuple[Initialisation, ...]] = ("kaiming", "gaussian")
Distribution = Literal["uniform", "geometric"]
DISTRIBUTIONS: Final[tuple[Distribution, ...]] = ("uniform", "geometric")
Update = Literal["leading", "frozen"]
UPDATES: Final[tuple[Update, ...]] = ("leading", "frozen")

DEFAULT_LR: Final = 1e-3
"""The default learning rate of every method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): ``W x + scaling * B (A x)``.

    Attributes:
        rank: number of components in each module.
        alpha: numerator of the scaling; None for twice the rank.
        dropout: the probability with which an input of A is set to zero, 0 or more and below 1.
        rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732) instead of ``alpha / rank``.
        initialisation: the initial numbers of A (B is zero). ``kaiming`` is uniform between ``-1 / sqrt(in_features)`` and
            ``1 / sqrt(in_features)``, as in the authors' code and PEFT. ``gaussian`` is normal with standard deviation
            ``1 / rank``, as in PEFT.

    Raises:
        LoratoolError: a value is invalid.
    """

    method: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    rank_is: ClassVar[str] = ""
    averages: ClassVar[int] = 0
    only_last: ClassVar[str | None] = None
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    initialisation: Initialisation = "kaiming"

    def __post_init__(self) -> None:
        _check_common(self.rank, self.alpha, self.dropout)
        _check_choice("initialisation", self.initialisation, INITIALISATIONS)

    @property
    def lora_alpha(self) -> float:
        """Alpha itself."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """The factor of ``B A``."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @staticmethod
    def factor_shapes(rank: int, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        """Return the shape of each factor on a module, by its letter."""
        return {"A": (rank, inputs), "B": (outputs, rank)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DyLoRA:
    """DyLoRA (Valipour et al. 2022, arXiv:2210.07558): a LoRA whose first b components are a LoRA of rank b, for every b.

    Attributes:
        rank: the largest rank, the paper's r_max.
        least_rank: the smallest rank, the paper's r_min.
        alpha: numerator of the scaling; None for twice the rank.
        dropout: the same as LoRA's.
        rslora: scale rank b by ``alpha / sqrt(b)``.
        scaling_law: the scaling of rank b without `rslora`: ``paper`` is ``alpha / b`` (equation 7); ``kohya`` is
            ``alpha / rank * sqrt(rank / b)``.
        initialisation: the same as LoRA's.
        distribution: how each step draws b from least_rank..rank: ``uniform`` or ``geometric``.
        geometric_p: the p of a geometric distribution, in which b has the weight ``(1 - p) ** (b - least_rank)``.
        update: the components that a step changes: all b ``leading`` ones, or only the b-th while the others are ``frozen``
            (the two variants of algorithm 1).

    Raises:
        LoratoolError: a value is invalid.
    """

    method: ClassVar[str] = "dylora"
    title: ClassVar[str] = "DyLoRA"
    rank_is: ClassVar[str] = "largest"
    averages: ClassVar[int] = 0
    only_last: ClassVar[str | None] = None
    rank: int = 8
    least_rank: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    scaling_law: ScalingLaw = "paper"
    initialisation: Initialisation = "kaiming"
    distribution: Distribution = "uniform"
    geometric_p: float = 0.15
    update: Update = "leading"

    def __post_init__(self) -> None:
        _check_common(self.rank, self.alpha, self.dropout)
        _check_choice("initialisation", self.initialisation, INITIALISATIONS)
        _check_choice("distribution", self.distribution, DISTRIBUTIONS)
        _check_choice("update", self.update, UPDATES)
        _check_choice("scaling law", self.scaling_law, LAWS)
        if not 1 <= self.least_rank <= self.rank:
            raise LoratoolError(f"the least rank is {self.least_rank} and must be from 1 to {self.rank}, the rank")
        if not 0 < self.geometric_p < 1:
            raise LoratoolError(f"the geometric distribution's p is {self.geometric_p} and must be between 0 and 1")

    @property
    def lora_alpha(self) -> float:
        """Alpha itself."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def scaling_at(self, rank: int) -> float:
        """Return the factor of the product of the first `rank` components."""
        alpha = alpha_at(self.lora_alpha, rank, self.rank, self.scaling_law, use_rslora=self.rslora)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @staticmethod
    def factor_shapes(rank: int, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        """Return the shape of each factor on a module, by its letter."""
        return {"A": (rank, inputs), "B": (outputs, rank)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoRA:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ``W x + scaling * P (Lambda * (Q x))``, ranks allocated by importance.

    Q begins with random numbers, P with zero and Lambda with one, so LoRA's learning rates suit it.

    Attributes:
        rank: the average rank at the end of training. The final budget is this times the number of modules.
        initial_rank: the rank of each module at the beginning; None for 1.25 times `rank` (the paper: 1.5 times).
        alpha: numerator of the scaling ``alpha / (initial_rank + 1e-5)``; None for twice the initial rank.
        dropout: the same as LoRA's.
        initial_steps: steps before the budget begins to fall, t_i; None for a tenth of all steps.
        final_steps: steps at the end in which ranks stay the same, t_f; None for three tenths of all steps.
        allocation_steps: steps from one allocation to the next, Delta T; None for a hundredth of all steps.
        beta1, beta2: decay rates of the moving averages of sensitivity and its uncertainty (equations 9 and 10).
        orthogonality: the weight gamma of the regularization that keeps P and Q orthogonal (equation 4).

    Raises:
        LoratoolError: a value is invalid.
    """

    method: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    rank_is: ClassVar[str] = "average"
    averages: ClassVar[int] = 2
    only_last: ClassVar[str | None] = "an AdaLoRA comes down to its budget near the end only"
    rank: int = 8
    initial_rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    initial_steps: int | None = None
    final_steps: int | None = None
    allocation_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        _check_common(self.rank, self.alpha, self.dropout)
        if self.init_r < self.rank:
            raise LoratoolError(
                f"the initial rank is {self.init_r} and must be at least {self.rank}, the average that AdaLoRA ends with"
            )
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < value < 1:
                raise LoratoolError(f"{name} is {value} and must be between 0 and 1")
        if not 0 <= self.orthogonality < math.inf:
            raise LoratoolError(f"the weight of orthogonality is {self.orthogonality} and must be 0 or more")
        least = (("initial", self.initial_steps, 0), ("final", self.final_steps, 1),
                 ("allocation", self.allocation_steps, 1))  # fmt: skip
        for name, steps, fewest in least:
            if steps is not None and steps < fewest:
                raise LoratoolError(f"the number of {name} steps is {steps} and must be at least {fewest}")

    @property
    def init_r(self) -> int:
        """The rank of each module at the beginning."""
        return math.ceil(1.25 * self.rank) if self.initial_rank is None else self.initial_rank

    @property
    def lora_alpha(self) -> float:
        """Alpha itself."""
        return 2.0 * self.init_r if self.alpha is None else self.alpha

    @staticmethod
    def factor_shapes(rank: int, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        """Return the shape of each factor on a module, by its letter."""
        return {"A": (rank, inputs), "B": (outputs, rank), "E": (rank, 1)}


LowRankOptions = LoRA | DyLoRA
Options = LoRA | DyLoRA | AdaLoRA
METHODS: Final[dict[str, type[LoRA] | type[DyLoRA] | type[AdaLoRA]]] = {
    options.method: options for options in (LoRA, DyLoRA, AdaLoRA)
}
"""The options of each method, by its name on the command line.

Each class also has facts about its method: `title` is its name in messages, `rank_is` says which of its ranks `rank` is,
`averages` is the number of moving averages that training keeps of each parameter, and `only_last` is the reason why only the
last state can be kept, if there is one.
"""

RANKS: Final = ", ".join(f"{options.title}'s {options.rank_is}" for options in METHODS.values() if options.rank_is)
"""Which rank `rank` is, for the methods that have several, as text."""


def method_with(option: str) -> type[LoRA] | type[DyLoRA] | type[AdaLoRA]:
    """Return the first method that has an option."""
    return next(options for options in METHODS.values() if option in {each.name for each in fields(options)})


def _check_common(rank: int, alpha: float | None, dropout: float) -> None:
    if rank < 1:
        raise LoratoolError(f"the rank is {rank} and must be at least 1")
    if alpha is not None and not 0 < alpha < math.inf:
        raise LoratoolError(f"alpha is {alpha} and must be a number above 0")
    if not 0 <= dropout < 1:
        raise LoratoolError(f"the dropout is {dropout} and must be 0 or more and below 1")


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LoratoolError(f"the {what} is {quoted(value, 40)} and must be {' or '.join(choices)}")
