"""What a user chooses of each method, checked when it is made. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from loratool.errors import LoratoolError, quoted
from loratool.formats.dylora import LAWS, ScalingLaw, alpha_at

Initialisation = Literal["kaiming", "gaussian"]
INITIALISATIONS: Final[tuple[Initialisation, ...]] = ("kaiming", "gaussian")
Distribution = Literal["uniform", "geometric"]
DISTRIBUTIONS: Final[tuple[Distribution, ...]] = ("uniform", "geometric")
Update = Literal["leading", "frozen"]
UPDATES: Final[tuple[Update, ...]] = ("leading", "frozen")

DEFAULT_LR: Final = 1e-3
"""The learning rate of every method where none is chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): ``W x + scaling * B (A x)``.

    Attributes:
        rank: components of each module.
        alpha: what the scaling is made of; None for twice the rank.
        dropout: the probability with which an input of A is set to zero, 0 or more and below 1.
        rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732), not ``alpha / rank``.
        initialisation: how A begins, B being zero: ``kaiming``, uniform within ``1 / sqrt(in_features)`` as the authors'
            code and PEFT have it; or ``gaussian``, normal with the standard deviation ``1 / rank`` as PEFT has it.

    Raises:
        LoratoolError: a value is impossible.
    """

    method: ClassVar[str] = "lora"
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
        """What multiplies ``B A``."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class DyLoRA:
    """DyLoRA (Valipour et al. 2022, arXiv:2210.07558): a LoRA whose leading b components are one at every rank b.

    Attributes:
        rank: the largest rank, the paper's r_max.
        least_rank: the smallest, r_min.
        alpha: what the scaling is made of; None for twice the rank.
        dropout: as LoRA's.
        rslora: scale rank b by ``alpha / sqrt(b)``.
        scaling_law: how else rank b is scaled: ``paper``, ``alpha / b`` (equation 7), or ``kohya``,
            ``alpha / rank * sqrt(rank / b)``.
        initialisation: as LoRA's.
        distribution: how b is drawn each step: ``uniform`` or ``geometric`` over least_rank..rank.
        geometric_p: of a geometric distribution, with which b has the weight ``(1 - p) ** (b - least_rank)``.
        update: which components a step changes: all ``leading`` b, or only the b-th, the others being ``frozen``
            (algorithm 1 with and without its line for the frozen variant).

    Raises:
        LoratoolError: a value is impossible.
    """

    method: ClassVar[str] = "dylora"
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
            raise LoratoolError(f"the least rank is {self.least_rank} and must be among 1 to {self.rank}, the rank")
        if not 0 < self.geometric_p < 1:
            raise LoratoolError(f"the geometric distribution's p is {self.geometric_p} and must be between 0 and 1")

    @property
    def lora_alpha(self) -> float:
        """Alpha itself."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def scaling_at(self, rank: int) -> float:
        """What multiplies the product of the first `rank` components."""
        alpha = alpha_at(self.lora_alpha, rank, self.rank, self.scaling_law, use_rslora=self.rslora)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoRA:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ``W x + scaling * P (Lambda * (Q x))``, ranks shared out by importance.

    Q begins with random numbers, P with zero and Lambda with one, so it learns as LoRA does, at LoRA's rates.

    Attributes:
        rank: the average rank that training ends with: the budget is this times the number of modules.
        initial_rank: the rank that each module begins with; None for a quarter more (the paper: half as much again).
        alpha: what the scaling, ``alpha / (initial_rank + 1e-5)``, is made of; None for twice the initial rank.
        dropout: as LoRA's.
        initial_steps: steps before the budget begins to fall, t_i; None for a tenth of all steps.
        final_steps: steps at the end whose ranks stay as they are, t_f; None for three tenths of all.
        allocation_steps: steps from one sharing out to the next, Delta T; None for a hundredth of all.
        beta1, beta2: of the moving averages of sensitivity and of its uncertainty (equations 9 and 10).
        orthogonality: the weight gamma of the regularization that keeps P and Q orthogonal (equation 4).

    Raises:
        LoratoolError: a value is impossible.
    """

    method: ClassVar[str] = "adalora"
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
        """The rank that each module begins with."""
        return math.ceil(1.25 * self.rank) if self.initial_rank is None else self.initial_rank

    @property
    def lora_alpha(self) -> float:
        """Alpha itself."""
        return 2.0 * self.init_r if self.alpha is None else self.alpha


Options = LoRA | DyLoRA | AdaLoRA
METHODS: Final[dict[str, type[LoRA] | type[DyLoRA] | type[AdaLoRA]]] = {
    options.method: options for options in (LoRA, DyLoRA, AdaLoRA)
}
"""The options of each method, by the name that the command line has for it."""


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
