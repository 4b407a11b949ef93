"""`loratool.eval`: loss and perplexity of a model on a user's own text, alone, with an adapter beside it, and by rank."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, LoratoolError, printable, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.formats.alpha import Alpha
from loratool.formats.kinds import kind_named
from loratool.formats.scaling_law import scaling_law
from loratool.library.places.holding import hold
from loratool.library.places.user_path import user_path
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.picture import drawn, refuse_picture
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import ResolvedAdapter, ResolvedBase, resolve_adapter, resolve_base
from loratool.library.resolving.resolve_data import resolve_data
from loratool.merging.arithmetic import choose_device
from loratool.ranks.truncate import Cut, truncate_by_svd, truncate_leading
from loratool.running.data import Data, TokenizedSample
from loratool.running.loss import Score, score
from loratool.running.model import (
    beside,
    load_config,
    load_model,
    quiet_libraries,
)
from loratool.running.model_tokens import checked_max_length, tokenized_for
from registry import Registry

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

MOST_TICKS: Final = 12


@dataclass(frozen=True, slots=True)
class RankScore:
    """The score of a model with an adapter beside it that is cut to `rank`."""

    rank: int
    score: Score


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Loss and perplexity of a model on samples, alone or with an adapter beside it.

    Attributes:
        model: name of the model.
        adapter: the adapter's reference, or None.
        data: the file of samples, or the id of a data set.
        samples: number of samples, or of windows of a text file.
        truncated: number of samples that were cut at `max_length`.
        score: score of the model, with the adapter if one is given.
        without_adapter: score of the model alone, if an adapter is given.
        ranks: scores with the adapter cut to each of the given ranks and, last, uncut; empty without `ranks`.
        max_length: largest number of tokens of a sample.
        device: device of the computation.
        plot: the picture of the loss by rank, if one was drawn.
    """

    model: str
    adapter: str | None
    data: Path
    samples: int
    truncated: int
    score: Score
    without_adapter: Score | None
    ranks: tuple[RankScore, ...]
    max_length: int
    device: str
    plot: Path | None
    notes: tuple[str, ...]

    @property
    def gap(self) -> float | None:
        """Difference that the adapter makes to the loss, in nats per token; negative if it helps. None without an adapter."""
        return None if self.without_adapter is None else self.score.loss - self.without_adapter.loss

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "data": str(self.data),
            "samples": self.samples,
            "truncated": self.truncated,
            "tokens": self.score.tokens,
            **_figures(self.score),
            "without_adapter": None if self.without_adapter is None else _figures(self.without_adapter),
            "gap": self.gap,
            "ranks": [{"rank": each.rank, **_figures(each.score)} for each in self.ranks],
            "max_length": self.max_length,
            "device": self.device,
            "plot": None if self.plot is None else str(self.plot),
            "notes": list(self.notes),
        }


def evaluate(model: str | os.PathLike[str], data: str | os.PathLike[str], *,
             adapter: str | os.PathLike[str] | None = None, ranks: Sequence[int] | None = None,
             plot: str | os.PathLike[str] | None = None, max_length: int | None = None, batch_size: int = 4,
             plain: bool = False, truncate: bool = False, force: bool = False, device: str = "auto", alpha: Alpha | None = None,
             registry: str | None = None, progress: Progress | None = None) -> EvalResult:  # fmt: skip
    """Measure the loss and the perplexity of a model on samples; `loratool.eval`.

    Args:
        model: a catalogued name, a folder, or a Hub id; dense, or NF4 as bitsandbytes stores it.
        data: samples of ``text``, ``prompt`` and ``completion``, or ``messages`` in a JSONL, JSON, CSV or Parquet file, or
            in a data set of the Hub (``owner/name:split``); or a ``.txt`` file, which is cut into windows.
            `loratool.running.data` says which tokens count towards the loss.
        adapter: a catalogued name, a path or a Hub id. The model is then measured alone and with the adapter beside it.
        ranks: also measure the adapter cut to each of these ranks; see `loratool.ranks.truncate`.
        plot: a ``.png``, ``.svg`` or ``.pdf`` file for a picture of the loss by rank.
        max_length: largest number of tokens of a sample, and the length of a window; by default the model's context, at
            most 2,048.
        batch_size: number of samples computed at once.
        plain: use ``prompt`` and ``completion`` as they are, without the model's chat template.
        truncate: cut samples of more than `max_length` tokens at the end instead of refusing them.
        force: replace a picture that loratool drew.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        alpha: alpha of a bare adapter file that does not state it: a number, or ``rank`` for each module's rank.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of samples done.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong, and in which line of the data.
    """
    if batch_size < 1:
        raise LoratoolError(f"--batch-size is {batch_size} and must be at least 1")
    subject = _subject(model, adapter, alpha, registry)
    wanted = _checked_ranks(ranks, subject.adapter)
    picture = _checked_picture(plot, wanted, force=force)
    content = resolve_data(data)
    with hold(subject.folder, exclusive=False), quiet_libraries():
        scorer = _load(subject, content, max_length, batch_size, device, progress or Silent(),
                       plain=plain, truncate=truncate)  # fmt: skip
        scores = _score(scorer, subject, wanted)
    result = _result(subject, content, scorer, scores, picture)
    if picture is not None:
        _draw(result, picture, force=force)
    return result


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is measured: a model, and the adapter beside it if one is given."""

    base: ResolvedBase
    found: ResolvedAdapter | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.base.path

    @property
    def adapter(self) -> Adapter | None:
        return None if self.found is None else self.found.adapter


def _subject(model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, alpha: Alpha | None,
             registry: str | None) -> _Subject:  # fmt: skip
    """Resolve the model and the adapter.

    Raises:
        LoratoolError, registry.RegistryError: there is none of that name, or the model is not a folder.
    """
    with open_registry(registry, read_only=True) as catalogue:
        base = resolve_base(model, catalogue)
        found = None if adapter is None else resolve_adapter(adapter, catalogue, alpha)
        notes = () if found is None else (*found.adapter.notes, *_right_base(found, base, catalogue))
    if not base.path.is_dir():
        raise CheckpointError(f"{quoted(base.path)} is a single file; give the model's folder, with its tokenizer")
    return _Subject(base, found, notes)


@dataclass(frozen=True, slots=True)
class _Scorer:
    """Scorer of a loaded model, alone and with adapters beside it, on the same samples."""

    model: PreTrainedModel
    samples: Sequence[TokenizedSample]
    max_length: int
    batch_size: int
    device: str
    watcher: Progress

    def alone(self, label: str) -> Score:
        return self._score(self.model, label)

    def beside(self, adapter: Adapter, label: str) -> Score:
        with beside(self.model, adapter, self.device) as wrapped:
            return self._score(wrapped, label)

    def _score(self, model: Module, label: str) -> Score:
        self.watcher.begin(label, len(self.samples))
        return score(model, self.samples, batch_size=self.batch_size, device=self.device, progress=self.watcher.advance)


def _load(subject: _Subject, content: Data, max_length: int | None, batch_size: int, device: str, watcher: Progress, *,
          plain: bool, truncate: bool) -> _Scorer:  # fmt: skip
    """Read the samples as tokens of the model, and load the model.

    Raises:
        LoratoolError: the model cannot be loaded, or a sample cannot be used.
    """
    Checkpoint.open(subject.folder)  # raises if it is damaged, incomplete or a pickle
    place = choose_device(device)
    config = load_config(subject.folder)
    length = checked_max_length(max_length, config)
    samples = tokenized_for(content, subject.folder, config, length, plain=plain, truncate=truncate)
    watcher.begin("loading the model", len(samples))
    model = load_model(subject.folder, config, place)
    return _Scorer(model, samples, length, batch_size, place, watcher)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Scores of the model alone, with the adapter, and with the adapter cut to each rank."""

    alone: Score
    whole: Score | None
    by_rank: tuple[RankScore, ...]


def _score(scorer: _Scorer, subject: _Subject, ranks: Sequence[int]) -> _Scores:
    alone = scorer.alone(f"scoring {subject.base.name}")
    if subject.adapter is None:
        return _Scores(alone, None, ())
    whole = scorer.beside(subject.adapter, "scoring with the adapter")
    return _Scores(alone, whole, tuple(_by_rank(scorer, subject.adapter, ranks, whole)))


def _result(subject: _Subject, content: Data, scorer: _Scorer, scores: _Scores, picture: Path | None) -> EvalResult:
    return EvalResult(
        model=subject.base.name,
        adapter=None if subject.found is None else subject.found.reference,
        data=content.file,
        samples=len(scorer.samples),
        truncated=sum(sample.truncated for sample in scorer.samples),
        score=scores.whole or scores.alone,
        without_adapter=None if scores.whole is None else scores.alone,
        ranks=scores.by_rank,
        max_length=scorer.max_length,
        device=scorer.device,
        plot=picture,
        notes=subject.notes,
    )


def _by_rank(scorer: _Scorer, adapter: Adapter, ranks: Sequence[int], whole: Score) -> Iterator[RankScore]:
    """Yield the score at each of `ranks`; at the adapter's own rank it is `whole`."""
    for rank in ranks:
        if rank == adapter.rank:
            yield RankScore(rank, whole)
            continue
        with Draft(Path(tempfile.gettempdir())) as draft:
            cut = _cut(adapter, rank, draft)
            yield RankScore(rank, scorer.beside(cut, f"scoring at rank {rank}"))


def _cut(adapter: Adapter, rank: int, draft: Draft) -> Adapter:
    if kind_named(adapter.kind).nested:
        return truncate_leading(draft, adapter, rank, scaling_law(adapter.facts, adapter.name)).adapter
    (cut,) = truncate_by_svd([draft], adapter, [Cut(rank)])
    return cut.adapter


def _checked_ranks(asked: Sequence[int] | None, adapter: Adapter | None) -> tuple[int, ...]:
    """Return the ranks to measure, ascending and without duplicates, the adapter's own last; empty without ``--ranks``."""
    if asked is None:
        return ()
    if adapter is None:
        raise LoratoolError("--ranks cuts an adapter to ranks; give the --adapter")
    most = adapter.rank or 0
    unfit = next((rank for rank in asked if not 1 <= rank <= most), None)
    if unfit is not None or not asked:
        problem = "no rank is given" if unfit is None else f"rank {unfit} is not one of these"
        raise LoratoolError(f"{quoted(adapter.name)} can be cut to ranks 1 to {most}, and {problem}; correct --ranks")
    return tuple(sorted({*asked, most}))


def _checked_picture(plot: str | os.PathLike[str] | None, ranks: Sequence[int], *, force: bool) -> Path | None:
    if plot is None:
        return None
    if not ranks:
        raise LoratoolError("--plot draws the loss by rank; give the --ranks")
    picture = user_path(plot)
    refuse_picture(picture, force=force)
    return picture


def _draw(result: EvalResult, file: Path, *, force: bool) -> None:
    """Draw the loss against the rank as a curve, and the loss of the model alone as a dashed line."""
    ranks = [each.rank for each in result.ranks]
    ticks = ranks if len(ranks) <= MOST_TICKS else [2**power for power in range(ranks[-1].bit_length())]
    with drawn(file, force=force) as figure:
        axes = figure.add_subplot()
        if result.without_adapter is not None:
            axes.axhline(result.without_adapter.loss, color="grey", linestyle="--", label="the model alone")
        axes.plot(ranks, [each.score.loss for each in result.ranks], marker="o", label="with the adapter")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("rank")
        axes.set_ylabel("loss (nats per token)")
        # In names from outside, dollar signs do not mean mathematics.
        axes.set_title(printable(f"{result.model} on {result.data.name}"), parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()


def _figures(score: Score) -> dict[str, float | None]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "tokens_per_second": round(score.tokens_per_second, 1),
    }


def _right_base(found: ResolvedAdapter, base: ResolvedBase, catalogue: Registry) -> list[str]:
    """Return a note if the adapter belongs to another base by the catalogue. Nothing is written, so this is not an error."""
    wanted, actual = found.base_fingerprint, base.record.fingerprint if base.record else None
    if wanted is None or actual is None or catalogue.bases.same_family(wanted, actual):
        return []
    return [
        f"{quoted(found.adapter.name)} belongs to another base ({wanted[:12]}…) than {quoted(base.name)} ({actual[:12]}…)"
    ]
