"""The recipe of a training run: every choice that decides its result, made and checked before it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypedDict, cast

from loratool.errors import LoratoolError, quoted
from loratool.formats.module_targets import ALL_LINEAR
from loratool.training.options import METHODS, LoRA, Options

MethodOptions = Options


class Choices(TypedDict, total=False):
    """The options of a training run. Each has a default.

    method: ``lora``, ``dylora`` or ``adalora``. The options of each are those of `loratool.training.options`.
    targets: names of modules, a pattern, or ``all-linear``.
    quantize: ``nf4`` trains the adapter on the base quantized to NF4 (QLoRA).
    steps, epochs: the length of the run; give at most one of them.
    batch_size: samples, or packed rows, in a step, summed over all its passes and processes.
    accumulate: number of passes that a step is split into; more passes take less memory.
    lr: the peak learning rate; by default the method's own.
    schedule: the course of the learning rate after warmup: ``cosine``, ``linear`` or ``constant``.
    warmup: steps in which the learning rate rises.
    weight_decay: AdamW's weight decay.
    clip: the largest norm of the gradients; 0 turns clipping off.
    precision: ``fp32`` or ``bf16`` (autocast); by default bf16 on CUDA and fp32 on a CPU.
    gradient_checkpointing: keep few activations and compute the others again.
    seed: the seed of everything that is drawn.
    max_length: the most tokens in a sample or a packed row; by default the model's context.
    truncate: cut longer samples instead of refusing them.
    plain: use no chat template for prompts and completions.
    pack: put several samples into a row of `max_length` tokens.
    validation: number of samples to hold out; by default a tenth.
    eval_every: steps between evaluations of the held-out samples.
    keep: ``best`` keeps the parameters of the best evaluation, ``last`` the final ones.
    """

    method: str
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    initialisation: str
    least_rank: int
    scaling_law: str
    distribution: str
    geometric_p: float
    update: str
    initial_rank: int
    initial_steps: int
    final_steps: int
    allocation_steps: int
    orthogonality: float
    beta1: float
    beta2: float
    targets: str | Sequence[str]
    quantize: str
    steps: int
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    schedule: str
    warmup: int
    weight_decay: float
    clip: float
    precision: str
    gradient_checkpointing: bool
    seed: int
    max_length: int
    truncate: bool
    plain: bool
    pack: bool
    validation: int
    eval_every: int
    keep: str


FEW_SAMPLES: Final = 500
BATCH_OF_FEW: Final = 4
BATCH_OF_MANY: Final = 16
"""Default samples in a step: `BATCH_OF_FEW` with fewer than `FEW_SAMPLES` samples, `BATCH_OF_MANY` with more."""

LEAST_EPOCHS: Final = 3
LEAST_STEPS: Final = 50
"""By default a run takes `LEAST_EPOCHS` epochs, or more if those would be fewer than `LEAST_STEPS` steps."""

LEAST_FOR_VALIDATION: Final = 20
MOST_VALIDATION: Final = 64
"""By default a tenth of the samples is held out, `MOST_VALIDATION` at most; with fewer than `LEAST_FOR_VALIDATION`, none."""

EVALUATIONS: Final = 6
"""Default number of evaluations in a run."""

MOST_WARMUP: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every choice that decides the result of a run. Attributes that are not listed here are those of `Choices`.

    Attributes:
        base, base_fingerprint: the name and the fingerprint of the model.
        data, data_sha256: the name of the samples, and the sha256 of their tokens and labels.
        samples: number of samples, including those that are held out (`validation`).
        adapter: the method with its options.
    """

    base: str
    base_fingerprint: str
    data: str
    data_sha256: str
    samples: int
    adapter: MethodOptions
    targets: str | tuple[str, ...] = ALL_LINEAR
    quantize: str | None = None
    steps: int = LEAST_STEPS
    batch_size: int = 4
    accumulate: int = 1
    lr: float
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    seed: int = 0
    max_length: int = 2048
    truncate: bool = False
    plain: bool = False
    pack: bool = False
    validation: int = 0
    eval_every: int = 10
    keep: str = "last"

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as flat JSON, in this order: for the catalogue, the log, and the facts beside the adapter."""
        flat: dict[str, Any] = {}
        for each in fields(self):
            item = getattr(self, each.name)
            if each.name == "adapter":
                flat |= {"method": self.adapter.method, **asdict(self.adapter), "alpha": self.adapter.lora_alpha}
            else:
                flat[each.name] = list(item) if isinstance(item, tuple) else item
        return flat

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0.

        It rises linearly for `warmup` steps, then follows `schedule`; all but ``constant`` fall to nearly 0 at the last step.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.schedule:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return self.lr * (1 - done)
            case _:
                return self.lr


NAMES: Final = ("base", "data")
"""Entries of a recipe that are only names. What they name is identified by digests."""

FLAGS: Final[Mapping[str, str]] = {"base_fingerprint": "base", "data_sha256": "data", "samples": "data"}


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the options in which two recipes, as JSON, differ: names of `Choices`, or ``base`` and ``data``."""
    keys = [key for key in [*wanted, *(key for key in recorded if key not in wanted)] if key not in NAMES]
    return list(dict.fromkeys(FLAGS.get(key, key) for key in keys if recorded.get(key) != wanted.get(key)))


def checked(choices: Mapping[str, Any]) -> Choices:
    """Check each choice by itself and return all of them, with `method` filled in.

    Raises:
        LoratoolError: a choice is invalid or unknown; the message names it as on the command line.
    """
    given = dict(choices)
    for key, value in given.items():
        if key not in Choices.__annotations__:
            raise LoratoolError(f"training has no option {quoted(key)}; see 'loratool train --help'")
        holds, words = _RULES.get(key, (None, ""))
        if holds is not None and not holds(value):
            raise LoratoolError(f"{flag(key)} is {quoted(value, 40)} and must be {words}")
    if "steps" in given and "epochs" in given:
        raise LoratoolError("--steps and --epochs both set the length of the run; give one of them")
    given.setdefault("method", LoRA.method)
    method_options(cast("Choices", given))
    return cast("Choices", given)


def method_options(choices: Choices) -> MethodOptions:
    """Return the options of the chosen method.

    Raises:
        LoratoolError: a value is invalid, or belongs to a different method.
    """
    method = choices["method"]
    own = {each.name for each in fields(METHODS[method])}
    for owner, options in METHODS.items():
        foreign = next((each.name for each in fields(options) if each.name in choices and each.name not in own), None)
        if foreign is not None:
            raise LoratoolError(f"{flag(foreign)} is for --method {owner}, but this is {method}; leave it out")
    values: dict[str, Any] = {key: value for key, value in choices.items() if key in own}
    return METHODS[method](**values)


def flag(name: str) -> str:
    """Return an option as the command line spells it, such as ``--batch-size``."""
    return "--" + name.replace("_", "-")


def default_validation(samples: int) -> int:
    """Return the default number of samples to hold out."""
    return 0 if samples < LEAST_FOR_VALIDATION else min(samples // 10, MOST_VALIDATION)


_Rule = tuple[Callable[[Any], bool], str]


def _whole(least: int, most: int | None = None) -> _Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and least <= value and (most is None or value <= most)

    return holds, f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most:,}"


def _number(holds: Callable[[float], bool], words: str) -> _Rule:
    return lambda value: isinstance(value, int | float) and math.isfinite(value) and holds(value), words


def _one_of(*words: str) -> _Rule:
    return lambda value: value in words, " or ".join(words)


_RULES: Final[Mapping[str, _Rule]] = {
    "method": _one_of(*METHODS),
    "rank": _whole(1, 1 << 16),
    "initial_rank": _whole(1, 1 << 16),
    "targets": (bool, "names of modules separated by commas, a pattern, or all-linear"),
    "quantize": _one_of("nf4"),
    "steps": _whole(1, 10**9),
    "epochs": _whole(1, 10**6),
    "batch_size": _whole(1, 10**6),
    "accumulate": _whole(1, 10**6),
    "lr": _number(lambda value: 0 < value <= 1000, "above 0, and 1000 at most"),
    "schedule": _one_of("cosine", "linear", "constant"),
    "warmup": _whole(0),
    "weight_decay": _number(lambda value: value >= 0, "0 or more"),
    "clip": _number(lambda value: value >= 0, "0 or more"),
    "precision": _one_of("fp32", "bf16"),
    "seed": _whole(0, 2**63 - 1),
    "max_length": _whole(2),
    "validation": _whole(0),
    "eval_every": _whole(1),
    "keep": _one_of("best", "last"),
}
