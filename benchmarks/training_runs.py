"""Runs of loratool's training loop within one process, on one model that is loaded once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from models import EXAMPLES, smollm2

from loratool.running.data import TokenizedSample, read_data, tokenize_data
from loratool.running.model import load_config, load_model, load_tokenizer, quiet_libraries
from loratool.training.batches import split_validation
from loratool.training.checkpoints import TrainingState
from loratool.training.loop import StepReport, Training
from loratool.training.methods import attach
from loratool.training.optimizer import make_optimizer
from loratool.training.options import Options
from loratool.training.processes import Processes
from loratool.training.recipe import Recipe

BATCH = 4
WARMUP = 4
HELD_OUT = 16
SEED = 1
KEPT = os.environ.get("KEPT_RUNS")
"""A folder where finished runs are kept, so that a script that was cut off goes on."""


@dataclass(frozen=True, slots=True)
class Run:
    """Losses of the held out samples before and after, at each rank that it can act at; what it took; what it logged."""

    before: float
    by_rank: dict[int, float]
    seconds: float
    tokens: int
    figures: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        """After, at its full rank."""
        return self.by_rank[max(self.by_rank)]

    def gap(self, rank: int | None = None) -> float:
        """What it takes off the loss, at a rank or at its full one."""
        return self.before - self.by_rank[max(self.by_rank) if rank is None else rank]


def run(style: str, options: Options, *, steps: int, lr: float, seed: int = SEED) -> Run:
    """Train on a style, from the same base, and score what is held out.

    The seed decides the factors to begin with, which samples are held out, and the order of the others.
    """
    key = f"{style}-{steps}-{lr}-{seed}-{options}".replace(" ", "").replace("/", "")
    kept = Path(KEPT, f"{key}.json") if KEPT else None
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text())
        return Run(**found | {"by_rank": {int(rank): loss for rank, loss in found["by_rank"].items()}})
    result = _train(style, options, steps, lr, seed)
    losses = {rank: round(loss, 4) for rank, loss in result.by_rank.items()}
    print(
        f"{style} {options.method} r={options.rank} lr={lr:g} seed={seed}: {losses} in {result.seconds:.0f} s",
        flush=True,
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(result)))
    return result


def _train(style: str, options: Options, steps: int, lr: float, seed: int) -> Run:
    model, _ = _loaded()
    train, held_out = samples(style, seed)
    recipe = Recipe(
        base="smollm2", base_fingerprint="", data=style, data_sha256="", samples=len(train), adapter=options,
        steps=steps, batch_size=BATCH, lr=lr, warmup=WARMUP, seed=seed, plain=True,
    )  # fmt: skip
    adaptation = attach(model, options, seed=seed, total_steps=steps)
    optimizer = make_optimizer(adaptation.parameters(), recipe, paged=False)
    training = Training(recipe, model, adaptation, optimizer, Processes("cpu"), train, [])
    before = training.score_at(adaptation.ranks[-1], held_out)
    log = _Log()
    training.run(log)
    by_rank = {rank: training.score_at(rank, held_out) for rank in adaptation.ranks}
    adaptation.detach()
    return Run(before, by_rank, training.seconds, training.tokens, log.figures)


class _Log:
    """Takes note of what the method says of each step."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []

    def stepped(self, report: StepReport) -> None:
        self.figures.append({"loss": report.loss} | report.figures)

    def evaluated(self, step: int, loss: float) -> None:
        pass

    def wants_state(self, step: int) -> bool:
        return False

    def keep(self, state: TrainingState) -> None:
        pass

    def wants_to_stop(self) -> bool:
        return False


@cache
def samples(style: str, seed: int = SEED) -> tuple[Sequence[TokenizedSample], Sequence[TokenizedSample]]:
    """Those to train on, and those held out, of a style of the examples: ``pirate``, or ``legal``."""
    tokenized = tokenize_data(read_data(EXAMPLES / f"{style}.jsonl"), _loaded()[1], 256, plain=True)
    return split_validation(tokenized, HELD_OUT, seed)


@cache
def _loaded() -> tuple[Any, Any]:
    folder = smollm2()
    with quiet_libraries():
        return load_model(folder, load_config(folder), "cpu"), load_tokenizer(folder)
