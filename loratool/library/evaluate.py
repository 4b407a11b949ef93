"""`loratool.eval`: loss and perplexity of a model on a user's own text, alone and with an adapter beside it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, LoratoolError, quoted
from loratool.library.merge import hold
from loratool.library.progress import Progress, Silent
from loratool.library.resolve import (
    ResolvedAdapter,
    ResolvedBase,
    open_registry,
    resolve_adapter,
    resolve_base,
    user_path,
)
from loratool.merging.arithmetic import choose_device
from loratool.train.data import Data, TokenizedSample, read_data, tokenize_data
from loratool.train.loss import Score, score
from loratool.train.model import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    put_beside,
    quiet_libraries,
)
from registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEFAULT_MAX_LENGTH: Final = 2048
"""Tokens; the memory for the logits grows with it."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """How well a model, or a model with an adapter beside it, foretells samples.

    Attributes:
        model: its name.
        adapter: the adapter's reference, or None.
        data: the file of samples.
        samples: how many there are; windows of a text file.
        score: of the model, with the adapter where one is given.
        without_adapter: of the model alone, where an adapter is given.
        max_length: the most tokens of a sample.
        device: where it was computed.
    """

    model: str
    adapter: str | None
    data: Path
    samples: int
    score: Score
    without_adapter: Score | None
    max_length: int
    device: str
    notes: tuple[str, ...]

    @property
    def gap(self) -> float | None:
        """What the adapter adds to the loss, in nats; below zero where it helps. None without an adapter."""
        return None if self.without_adapter is None else self.score.loss - self.without_adapter.loss

    def to_json(self) -> dict[str, Any]:
        """The result in the words of ``--json``."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "data": str(self.data),
            "samples": self.samples,
            "tokens": self.score.tokens,
            **_figures(self.score),
            "without_adapter": None if self.without_adapter is None else _figures(self.without_adapter),
            "gap": self.gap,
            "max_length": self.max_length,
            "device": self.device,
            "notes": list(self.notes),
        }


def evaluate(model: str | os.PathLike[str], data: str | os.PathLike[str], *,
             adapter: str | os.PathLike[str] | None = None, max_length: int | None = None, batch_size: int = 4,
             plain: bool = False, device: str = "auto", alpha: float | None = None, registry: str | None = None,
             progress: Progress | None = None) -> EvalResult:  # fmt: skip
    """Measure the loss and the perplexity of a model on a file of samples; `loratool.eval`.

    Args:
        model: a catalogued name, a folder, or a Hub id; dense, or NF4 as bitsandbytes stores it.
        data: a JSONL file of ``text``, ``prompt`` and ``completion``, or ``messages``, or a ``.txt`` file, which is cut
            into windows; see `loratool.train.data` for what counts.
        adapter: a catalogued name or a path. The model is then measured alone and with the adapter beside it.
        max_length: the most tokens of a sample, and the length of a window; by default the model's context, but 2,048 at
            most.
        batch_size: how many samples are computed at once.
        plain: read ``prompt`` and ``completion`` as they are, without the model's chat template.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        alpha: for a bare adapter file that does not say its own.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: told how many samples are done.

    Raises:
        LoratoolError, registry.RegistryError: says what is wrong, and in which line of the data.
    """
    watcher = progress or Silent()
    if batch_size < 1:
        raise LoratoolError(f"a batch of {batch_size} samples is none; give a --batch-size of at least 1")
    with open_registry(registry, read_only=True) as catalogue:
        base = resolve_base(model, catalogue)
        found = None if adapter is None else resolve_adapter(adapter, catalogue, alpha)
        notes = () if found is None else (*found.adapter.notes, *_right_base(found, base, catalogue))
    if not base.path.is_dir():
        raise CheckpointError(f"{quoted(base.path)} is a single file; give the model's folder, with its tokenizer")
    content = read_data(user_path(data))
    with hold(base.path, exclusive=False), quiet_libraries():
        Checkpoint.open(base.path)  # raises for what is damaged, incomplete or a pickle
        place = choose_device(device)
        config = load_config(base.path)
        length = _max_length(max_length, config)
        samples = _tokenized(content, base.path, config, length, plain=plain)
        watcher.begin("loading the model", len(samples))
        loaded = load_model(base.path, config, place)
        watcher.begin(f"scoring {base.name}", len(samples))
        alone = score(loaded, samples, batch_size=batch_size, device=place, progress=watcher.advance)
        beside = None
        if found is not None:
            watcher.begin("scoring with the adapter", len(samples))
            wrapped = put_beside(loaded, found.adapter, place)
            beside = score(wrapped, samples, batch_size=batch_size, device=place, progress=watcher.advance)
    return EvalResult(
        model=base.name,
        adapter=None if found is None else found.reference,
        data=content.file,
        samples=len(samples),
        score=beside or alone,
        without_adapter=None if beside is None else alone,
        max_length=length,
        device=place,
        notes=notes,
    )


def _figures(score: Score) -> dict[str, float | None]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "tokens_per_second": round(score.tokens_per_second, 1),
    }


def _right_base(found: ResolvedAdapter, base: ResolvedBase, catalogue: Registry) -> list[str]:
    """A note if the catalogue knows that the adapter belongs to another model. Nothing is written, so it is no error."""
    wanted, actual = found.base_fingerprint, base.record.fingerprint if base.record else None
    if wanted is None or actual is None or catalogue.bases.same_family(wanted, actual):
        return []
    return [
        f"{quoted(found.adapter.name)} belongs to another base ({wanted[:12]}…) than {quoted(base.name)} ({actual[:12]}…)"
    ]


def _max_length(asked: int | None, config: PreTrainedConfig) -> int:
    context = context_length(config)
    if asked is None:
        return min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if asked < 2:
        raise LoratoolError(f"{asked} tokens leave nothing to foretell; give a --max-length of at least 2")
    if context is not None and asked > context:
        raise LoratoolError(
            f"the model reads {context:,} tokens at most; give a --max-length up to that, not {asked:,}"
        )
    return asked


def _tokenized(data: Data, folder: Path, config: PreTrainedConfig, max_length: int, *,
               plain: bool) -> list[TokenizedSample]:  # fmt: skip
    """The samples as tokens that the model knows."""
    samples = tokenize_data(data, load_tokenizer(folder), max_length, plain=plain)
    vocabulary = config.get_text_config().vocab_size
    largest = max(max(sample.input_ids) for sample in samples)
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {quoted(folder)} gives token {largest:,}, and the model knows {vocabulary:,} only; give it "
            "the tokenizer that it was trained with"
        )
    return samples
