"""The training loop: steps over batches, evaluations, and states to resume from.

Every random choice depends only on the recipe's seed and the number of the epoch or step. A run that is resumed from a
state therefore gives the same result as one that never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

import torch

from loratool.errors import LoratoolError
from loratool.running.data import TokenizedSample
from loratool.running.loss import NotFiniteError, score, summed_loss
from loratool.training.batches import Row, collate, plan_epoch
from loratool.training.checkpoints import TrainingState
from loratool.training.memory import peak_memory
from loratool.training.methods import Adaptation
from loratool.training.optimizer import load_moments, moments
from loratool.training.processes import Processes
from loratool.training.recipe import Recipe

EVALUATION_BATCH: Final = 8
MOST_RANKS: Final = 16
SAMPLES_BY_RANK: Final = 64
"""Training samples on which a DyLoRA is scored at each rank if no samples are held out."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """The figures of one step.

    Attributes:
        step: its number, from 1.
        loss: mean cross entropy in nats over the tokens that count, of all processes, before the step.
        gradient_norm: L2 norm of all gradients, before clipping.
        tokens: tokens that the model read, without padding.
        seconds: duration of the step.
        figures: the method's own figures.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the step as an entry of the log."""
        return {
            "step": self.step,
            "loss": self.loss,
            "lr": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "seconds": round(self.seconds, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
            **self.figures,
        }


class Observer(Protocol):
    """The receiver of a run's events, which may also stop the run."""

    def stepped(self, report: StepReport) -> None:
        """Receive the report of each step."""

    def evaluated(self, step: int, loss: float) -> None:
        """Receive the loss of the validation samples after `step` steps."""

    def wants_state(self, step: int) -> bool:
        """Return whether the state after `step` steps should be kept."""

    def keep(self, state: TrainingState) -> None:
        """Keep a state to resume from."""

    def wants_to_stop(self) -> bool:
        """Return whether the run should stop here. Every process calls this after each step."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run.

    Attributes:
        loss, loss_before: mean cross entropy in nats. With held-out samples, it is measured on those, with the adapter that
            is kept and with the model before training. Without, it is that of the last and the first step's own samples.
        is_held_out: whether samples were held out.
        loss_by_rank: the loss at each measured rank of a DyLoRA; empty for other methods.
        seconds: time spent in steps.
        tokens: tokens read in steps, without padding.
        peak_memory_bytes: the peak memory of this process.
    """

    loss: float
    loss_before: float
    is_held_out: bool
    loss_by_rank: dict[int, float]
    seconds: float
    tokens: int
    peak_memory_bytes: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, with a loss above 700 taken as 700 so that it stays finite."""
        return math.exp(min(self.loss, 700.0))

    @property
    def tokens_per_second(self) -> float:
        """Tokens that steps have read per second."""
        return round(self.tokens / self.seconds, 1) if self.seconds else 0.0

    def losses(self) -> dict[str, Any]:
        """Return the figures that equal runs share, as JSON."""
        by_rank = {str(rank): loss for rank, loss in self.loss_by_rank.items()}
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "loss_before": self.loss_before,
            "held_out": self.is_held_out,
            **({"loss_by_rank": by_rank} if by_rank else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """Return all figures, as JSON for the catalogue."""
        return self.losses() | {
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(slots=True)
class Training:
    """A model with its adapter, its samples for training and validation, and the progress of the run."""

    recipe: Recipe
    model: torch.nn.Module
    adaptation: Adaptation
    optimizer: torch.optim.Optimizer
    processes: Processes
    samples: Sequence[TokenizedSample]
    held_out: Sequence[TokenizedSample]
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    step_losses: tuple[float, float] = (0.0, 0.0)

    def run(self, observer: Observer) -> bool:
        """Train to the recipe's last step. Return False if the observer stopped the run before; its state is kept.

        Raises:
            NotFiniteError: a step's loss or gradient is not finite; the state before that step is kept.
            LoratoolError: the device has too little memory.
        """
        recipe = self.recipe
        if self.held_out and not self.losses:
            self.evaluate(observer)
        for rows in islice(batches(self.samples, recipe, skip=self.step), recipe.steps - self.step):
            try:
                report = self.make_step(rows)
            except NotFiniteError:
                observer.keep(self.state())
                raise
            except torch.OutOfMemoryError:
                raise LoratoolError(
                    f"{self.processes.device} has too little memory for a step of {len(rows)} samples; give more passes with "
                    "--accumulate, a smaller --batch-size or --max-length, or --gradient-checkpointing"
                ) from None
            observer.stepped(report)
            if self.held_out and (self.step % recipe.eval_every == 0 or self.step == recipe.steps):
                self.evaluate(observer)
            stopping = self._agreed(observer.wants_to_stop())
            if stopping or self.step == recipe.steps or observer.wants_state(self.step):
                observer.keep(self.state())
            if stopping:
                break
        return self.step == recipe.steps

    def make_step(self, rows: Sequence[Row]) -> StepReport:
        """Make one optimizer step on `rows`. The loss is the mean over all their tokens that count.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; no parameter was changed.
        """
        began, recipe, parameters = time.perf_counter(), self.recipe, self.adaptation.parameters()
        self.model.train()
        torch.manual_seed(step_seed(recipe.seed, self.step, self.processes.rank))
        self.adaptation.begin_step(self.step)
        scored = sum(row.scored_tokens for row in rows)
        loss = torch.zeros(1, device=self.processes.device)
        for part in self.processes.share(rows, recipe.accumulate):
            with self._autocast():
                part_loss = summed_loss(self.model, self._on_device(collate(part))) / scored
            part_loss.backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()
        gradients = [_gradient(parameter) for parameter in parameters.values()]
        self.processes.add_up([loss, *gradients])
        penalty = self.adaptation.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients]))
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            self.optimizer.zero_grad()
            raise _not_finite(self.step + 1, float(loss), float(norm))
        self.adaptation.after_backward(self.step)
        if recipe.clip and norm > recipe.clip:
            torch._foreach_mul_(gradients, recipe.clip / (norm + 1e-6))
        rate = recipe.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.adaptation.after_step(self.step)
        self.optimizer.zero_grad()
        return self._stepped(float(loss), rate, float(norm), rows, time.perf_counter() - began)

    def evaluate(self, observer: Observer) -> None:
        """Score the held-out samples at the full rank, and remember the parameters if they are the best so far."""
        try:
            loss = self.score_at(self.adaptation.ranks[-1], self.held_out)
        except NotFiniteError:
            if not self.step:
                raise  # the model itself has no finite loss
            raise NotFiniteError(
                f"after step {self.step} the loss on the held-out samples is not finite; start again with a smaller --lr and "
                "--force"
            ) from None
        if (
            self.recipe.keep == "best"
            and self.step
            and loss < min((at for step, at in self.losses if step), default=math.inf)
        ):
            self.best = {name: tensor.clone() for name, tensor in self._adapter().items()}
        self.losses.append((self.step, loss))
        observer.evaluated(self.step, loss)

    def score_at(self, rank: int, samples: Sequence[TokenizedSample],
                 progress: Callable[[int], None] = lambda count: None) -> float:  # fmt: skip
        """Return the loss of `samples`, mean cross entropy in nats, with the adapter acting at `rank`."""
        self.model.eval()
        self.adaptation.act_at(rank)
        with self._autocast():
            found = score(
                self.model, samples, batch_size=EVALUATION_BATCH, device=self.processes.device, progress=progress
            )
        return found.loss

    @property
    def scored_at_the_end(self) -> int:
        """Number of samples that `outcome` scores. An adapter with several ranks is scored on the same ones at each."""
        return len(self._ranks_measured) * len(self._samples_measured)

    @property
    def _ranks_measured(self) -> Sequence[int]:
        ranks = self.adaptation.ranks
        return thinned(ranks) if len(ranks) > 1 else ()

    @property
    def _samples_measured(self) -> Sequence[TokenizedSample]:
        return self.held_out or self.samples[:SAMPLES_BY_RANK]

    def outcome(self, progress: Callable[[int], None] = lambda count: None) -> Outcome:
        """Load the parameters to keep and return the result of the run. `progress` counts up to `scored_at_the_end`."""
        self._take_best()
        by_rank = {rank: self.score_at(rank, self._samples_measured, progress) for rank in self._ranks_measured}
        if self.held_out:
            after = [loss for step, loss in self.losses if step]
            before, loss = self.losses[0][1], min(after) if self.recipe.keep == "best" else after[-1]
        else:
            before, loss = self.step_losses
        return Outcome(
            loss, before, bool(self.held_out), by_rank, self.seconds, self.tokens, peak_memory(self.processes.device)
        )

    def _take_best(self) -> None:
        """Load the parameters with the lowest validation loss, if any were kept."""
        parameters = self.adaptation.parameters()
        buffers = {}
        for name, tensor in self.best.items():
            group, _, own = name.partition(" ")
            if group == "parameter":
                with torch.no_grad():
                    parameters[own].copy_(tensor)
            else:
                buffers[own] = tensor
        if self.best:
            self.adaptation.load_buffers(buffers)

    def state(self) -> TrainingState:
        """Return the current state of the run."""
        parameters = self.adaptation.parameters()
        facts = {name: getattr(self, name) for name in _FACTS}
        return TrainingState(
            self.step, parameters, moments(self.optimizer, parameters), self.adaptation.buffers(), self.best, facts
        )

    def load(self, state: TrainingState) -> None:
        """Restore a state."""
        parameters = self.adaptation.parameters()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.parameters[name])
        load_moments(self.optimizer, parameters, state.moments)
        device = self.processes.device
        self.adaptation.load_buffers({name: tensor.to(device) for name, tensor in state.buffers.items()})
        self.best = {name: tensor.to(device) for name, tensor in state.best.items()}
        self.step = state.step
        for name in _FACTS:
            setattr(self, name, state.facts[name])
        self.losses = [(step, loss) for step, loss in self.losses]  # JSON turned the tuples into lists

    def _adapter(self) -> dict[str, torch.Tensor]:
        parameters = {f"parameter {name}": each.detach() for name, each in self.adaptation.parameters().items()}
        return parameters | {f"buffer {name}": each for name, each in self.adaptation.buffers().items()}

    def _stepped(self, loss: float, rate: float, norm: float, rows: Sequence[Row], seconds: float) -> StepReport:
        tokens = sum(row.tokens for row in rows)
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.step_losses = (loss if self.step == 1 else self.step_losses[0], loss)
        memory = peak_memory(self.processes.device)
        return StepReport(self.step, loss, rate, norm, tokens, seconds, memory, dict(self.adaptation.figures()))

    def _agreed(self, stopping: bool) -> bool:
        flag = torch.tensor([float(stopping)], device=self.processes.device)
        self.processes.add_up([flag])
        return bool(flag)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.partition(":")[0], torch.bfloat16)

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.processes.device) for name, tensor in batch.items()}


_FACTS: Final = ("losses", "seconds", "tokens", "step_losses")


def thinned(ranks: Sequence[int]) -> Sequence[int]:
    """Return all ranks if there are at most `MOST_RANKS`, or else the powers of two among them and the last."""
    if len(ranks) <= MOST_RANKS:
        return ranks
    return [rank for rank in ranks if rank & (rank - 1) == 0 or rank == ranks[-1]]


def batches(samples: Sequence[TokenizedSample], recipe: Recipe, *, skip: int = 0) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of each step without end, after skipping the first `skip` steps."""
    row_length = recipe.max_length if recipe.pack else None
    epoch = 0
    while True:
        planned = plan_epoch(
            samples, batch_size=recipe.batch_size, row_length=row_length, seed=recipe.seed, epoch=epoch
        )
        yield from planned[skip:]
        skip = max(0, skip - len(planned))
        epoch += 1


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a different seed for each step and process; `rank` is the process's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()) >> 1


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _not_finite(step: int, loss: float, norm: float) -> NotFiniteError:
    what = f"the loss is {loss:g}" if not math.isfinite(loss) else f"the gradient's norm is {norm:g}"
    return NotFiniteError(
        f"{what} at step {step}, so the step was not made and the state before it is kept; start again with a smaller --lr and "
        "--force"
    )
