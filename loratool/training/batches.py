"""The batches of a training run: samples in rows, rows in batches, batches as tensors.

An epoch is planned before it begins, as a pure function of the samples, a seed and the epoch's number. A run resumed from a
checkpoint therefore draws the same batches.

A row holds one sample, or several packed side by side, so that little work is wasted on padding. Packed samples do not
attend to one another: the positions of each start at 0 again, and in a batch without an attention mask, transformers makes
its causal mask block-diagonal at these boundaries (``find_packed_sequence_indices`` in its ``masking_utils``). It does so
only without a cache, so call a model with ``use_cache=False``, which is not its default. Some models do not run that code,
or have no positions; `packs_cleanly` tests a model.
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
"""Samples that are packed into rows together: enough to fill 98% of a row, and few enough that rows differ by epoch."""

GROUPED_BATCHES: Final = 50
"""The most batches whose samples are sorted by length together, as in transformers' ``LengthGroupedSampler``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: one sample, or several packed side by side."""

    samples: tuple[TokenizedSample, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in the row, without padding."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def scored_tokens(self) -> int:
        """Number of tokens that count towards the loss."""
        return sum(sample.scored_tokens for sample in self.samples)


def split_validation(samples: Sequence[TokenizedSample], count: int,
                     seed: int) -> tuple[list[TokenizedSample], list[TokenizedSample]]:  # fmt: skip
    """Split samples into those to train on and `count` random ones to validate with. Both keep their order.

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
    """Return the batches of one epoch: every sample exactly once, in an order that depends on `seed` and `epoch`.

    Args:
        batch_size: rows in a batch. One batch may have fewer.
        row_length: the most tokens in a row that samples are packed into. None gives each sample its own row and puts
            samples of similar length into a batch.

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
    """Yield batches of samples that are sorted by length within groups. There are four groups or more, so epochs differ."""
    group = batch_size * max(1, min(GROUPED_BATCHES, len(samples) // (4 * batch_size)))
    for first in range(0, len(samples), group):
        rows = [Row((sample,)) for sample in _longest_first(samples[first : first + group])]
        for start in range(0, len(rows), batch_size):
            yield tuple(rows[start : start + batch_size])


def _packed(samples: Sequence[TokenizedSample], row_length: int) -> Iterator[Row]:
    """Yield rows packed by best fit, longest first: each sample goes into the fullest row that has room for it."""
    for first in range(0, len(samples), PACKED_TOGETHER):
        rows: list[list[TokenizedSample]] = []
        rooms: list[tuple[int, int]] = []  # the room left in a row and the row's number, least room first
        for sample in _longest_first(samples[first : first + PACKED_TOGETHER]):
            length = len(sample.input_ids)
            if length > row_length:
                raise ValueError(f"the sample in line {sample.line} has {length} tokens, but a row holds {row_length}")
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
    """Return `items` in random order. Only ``random()`` is used, since Python guarantees its sequence across versions."""
    draw = random.Random(seed).random
    return [item for _, _, item in sorted((draw(), place, item) for place, item in enumerate(items))]


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Return the arguments for a causal language model of transformers, each (rows, longest row) int64 on the CPU.

    - ``input_ids``: the tokens, then 0 as padding.
    - ``labels``: the tokens that count, `IGNORED` elsewhere. The first token of a sample never counts, because the sample
      before it would predict it; `Row.scored_tokens` tokens count in total.
    - ``attention_mask``, if no row holds more than one sample: 1 for tokens, 0 for padding.
    - ``position_ids``, otherwise: they start at 0 with each sample and with the padding.

    Call the model with ``use_cache=False``: with a cache, packed samples attend to one another.
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
    """Return whether two samples packed side by side have the same logits in `model` as each has alone.

    This depends on the architecture and the attention implementation, so it is tested on a few tokens. Every module keeps
    its mode, and no random number is drawn.
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
    """Return the logits of packed samples, (1, tokens, vocabulary) in the model's dtype."""
    import torch

    device = next(model.parameters()).device
    row = Row(tuple(TokenizedSample(1, sample, sample) for sample in samples))
    input_ids = torch.tensor([_filled(samples, row.tokens, 0)], device=device)
    position_ids = torch.tensor([_positions(row, row.tokens)], device=device)
    logits: torch.Tensor = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits
