"""What a training step reads: samples in rows, rows in batches, batches as tensors.

An epoch is planned before it begins, as a pure function of the samples, a seed and the number of the epoch, so that a run
that goes on from a checkpoint draws the batches that it would have drawn.

A row is one sample, or several packed side by side, which fills a row of a fixed length and wastes no work on padding.
Packed samples do not see one another: the positions of each begin at 0 again, and where a batch has no attention mask,
transformers takes that for a boundary in its block-diagonal causal mask (``find_packed_sequence_indices`` in its
``masking_utils``). It does so only without a cache: a model must be called with ``use_cache=False``, which is not its default.
Nor does every model go through that code or have positions at all; `packs_cleanly` tries it.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeVar

from loratool.running.data import IGNORED, TokenizedSample

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

T = TypeVar("T")

PACKED_TOGETHER: Final = 1024
"""Samples among which the fillings of a row are sought: many enough to fill 98% of it, few enough to differ by epoch."""

GROUPED_BATCHES: Final = 50
"""Batches at most whose samples are sorted by length together, as transformers' ``LengthGroupedSampler`` has it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: one sample, or several side by side."""

    samples: tuple[TokenizedSample, ...]

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def scored_tokens(self) -> int:
        """How many of them count in the loss."""
        return sum(sample.scored_tokens for sample in self.samples)


def split_validation(samples: Sequence[TokenizedSample], count: int,
                     seed: int) -> tuple[list[TokenizedSample], list[TokenizedSample]]:  # fmt: skip
    """The samples to train on, and `count` drawn at random to validate with; both in their order.

    Raises:
        ValueError: `count` is negative, or leaves no sample to train on.
    """
    if not 0 <= count < len(samples):
        raise ValueError(f"cannot keep {count} of {len(samples)} samples for validation")
    held = set(_shuffled(range(len(samples)), f"validation {seed}")[:count])
    train = [sample for place, sample in enumerate(samples) if place not in held]
    return train, [sample for place, sample in enumerate(samples) if place in held]


def plan_epoch(samples: Sequence[TokenizedSample], *, batch_size: int, row_length: int | None, seed: int,
               epoch: int) -> list[tuple[Row, ...]]:  # fmt: skip
    """The batches of one epoch: every sample exactly once, in an order that `seed` and `epoch` decide.

    Args:
        batch_size: rows of a batch; the last drawn may have fewer.
        row_length: pack samples into rows of at most so many tokens. None gives each sample a row of its own, among
            others of about its length.

    Raises:
        ValueError: a sample is longer than `row_length`, or `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows")
    drawn = _shuffled(samples, f"samples {seed} {epoch}")
    if row_length is None:
        batches = list(_of_like_length(drawn, batch_size))
    else:
        rows = _shuffled(list(_packed(drawn, row_length)), f"rows {seed} {epoch}")
        batches = [tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return _shuffled(batches, f"batches {seed} {epoch}")


def _of_like_length(samples: Sequence[TokenizedSample], batch_size: int) -> Iterator[tuple[Row, ...]]:
    """Batches of samples that are sorted by length within groups; four groups at least, so that epochs differ."""
    group = batch_size * max(1, min(GROUPED_BATCHES, len(samples) // (4 * batch_size)))
    for first in range(0, len(samples), group):
        rows = [Row((sample,)) for sample in _longest_first(samples[first : first + group])]
        for start in range(0, len(rows), batch_size):
            yield tuple(rows[start : start + batch_size])


def _packed(samples: Sequence[TokenizedSample], row_length: int) -> Iterator[Row]:
    """Best fit, longest first: each sample goes into the fullest row that has room for it."""
    for first in range(0, len(samples), PACKED_TOGETHER):
        rows: list[list[TokenizedSample]] = []
        rooms: list[tuple[int, int]] = []  # the room left in a row and the row's number, least room first
        for sample in _longest_first(samples[first : first + PACKED_TOGETHER]):
            length = len(sample.input_ids)
            if length > row_length:
                raise ValueError(f"the sample of line {sample.line} has {length} tokens, a row {row_length}")
            place = bisect_left(rooms, (length, -1))
            if place < len(rooms):
                room, row = rooms.pop(place)
                rows[row].append(sample)
            else:
                room, row = row_length, len(rows)
                rows.append([sample])
            insort(rooms, (room - length, row))
        yield from (Row(tuple(row)) for row in rows)


def _longest_first(samples: Sequence[TokenizedSample]) -> list[TokenizedSample]:
    return sorted(samples, key=lambda sample: -len(sample.input_ids))


def _shuffled(items: Sequence[T], seed: str) -> list[T]:
    """`items` by random keys: of Python's generators, ``random()`` alone is promised to stay the same."""
    draw = random.Random(seed).random
    return [item for _, _, item in sorted((draw(), place, item) for place, item in enumerate(items))]


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The arguments of a causal language model of transformers, each (rows, longest row) int64 on the CPU.

    ``input_ids``: 0 where a row has ended. ``labels``: the tokens that count, else `IGNORED`; a sample's first token never
    counts, so that none is foretold by the sample before it, and as many count as `Row.scored_tokens` says.

    They are to be given together with ``use_cache=False``: with a cache, packed samples see one another.

    Where no row holds more than one sample, ``attention_mask``: 1 for tokens, 0 where a row has ended. Else
    ``position_ids`` and no mask: they begin at 0 with each sample, and where the row has ended.
    """
    import torch

    width = max(row.tokens for row in rows)
    batch = {
        "input_ids": [_filled([sample.input_ids for sample in row.samples], width, 0) for row in rows],
        "labels": [_filled([(IGNORED, *sample.labels[1:]) for sample in row.samples], width, IGNORED) for row in rows],
    }
    if all(len(row.samples) == 1 for row in rows):
        batch["attention_mask"] = [_filled([(1,) * row.tokens], width, 0) for row in rows]
    else:
        batch["position_ids"] = [_positions(row, width) for row in rows]
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}


def _filled(samples: Sequence[Sequence[int]], width: int, filler: int) -> list[int]:
    row = list(chain.from_iterable(samples))
    return row + [filler] * (width - len(row))


def _positions(row: Row, width: int) -> list[int]:
    lengths = [*(len(sample.input_ids) for sample in row.samples), width - row.tokens]
    return list(chain.from_iterable(range(length) for length in lengths))


def packs_cleanly(model: Module) -> bool:
    """Whether each of two samples packed side by side has the logits in `model` that it has alone.

    It is tried on a few tokens, since it depends on the architecture and on the attention that is used. Every module
    stays in its mode, and no random number is drawn.
    """
    import torch

    first, second = (5, 3, 8, 4, 7), (4, 9, 2, 6, 5, 3, 7)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            packed = _logits(model, first, second)
            alone = torch.cat([_logits(model, first), _logits(model, second)], dim=1)
    except TypeError:  # a model without positions
        return False
    finally:
        for module, training in modes:
            module.training = training
    tolerance = 1e-3 if packed.dtype == torch.float32 else 3e-2
    packed, alone = packed.double(), alone.double()
    return float((packed - alone).norm()) <= tolerance * float((alone - alone.mean()).norm())


def _logits(model: Module, *samples: tuple[int, ...]) -> torch.Tensor:
    """(1, tokens, vocabulary) in the model's type."""
    import torch

    device = next(model.parameters()).device
    row = Row(tuple(TokenizedSample(1, sample, sample) for sample in samples))
    input_ids = torch.tensor([_filled(samples, row.tokens, 0)], device=device)
    position_ids = torch.tensor([_positions(row, row.tokens)], device=device)
    logits: torch.Tensor = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits
