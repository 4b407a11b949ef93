"""The loss of a model on samples: cross entropy in nats, summed in fp64 over the tokens that count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import LoratoolError
from loratool.running.data import IGNORED, TokenizedSample

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

CHUNK: Final = 256
"""Tokens whose logits are converted to fp32 at once. With a vocabulary of 256,000 that takes 256 MiB."""


class NotFiniteError(LoratoolError):
    """A loss or its gradient is not finite."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts samples.

    Attributes:
        loss: mean cross entropy in nats over the tokens that count; each is predicted from all tokens before it.
        tokens: number of tokens that count.
        tokens_per_second: tokens the model read per second, including those that do not count but not padding.
    """

    loss: float
    tokens: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def score(model: Module, samples: Sequence[TokenizedSample], *, batch_size: int, device: str,
          progress: Callable[[int], None]) -> Score:  # fmt: skip
    """Score a causal language model on `samples`.

    Batches hold samples of similar length, the longest first, padded at the end. After each batch, `progress` is called
    with its number of samples.

    Raises:
        NotFiniteError: the loss is not finite.
        LoratoolError: the device has too little memory.
    """
    import torch

    longest_first = sorted(samples, key=lambda sample: -len(sample.input_ids))
    summed = 0.0
    began = time.perf_counter()
    for start in range(0, len(longest_first), batch_size):
        batch = longest_first[start : start + batch_size]
        try:
            summed += _summed_loss(model, batch, device)
        except torch.OutOfMemoryError:
            raise LoratoolError(
                f"{device} has too little memory for {len(batch)} x {len(batch[0].input_ids):,} tokens; give a smaller "
                "--batch-size or --max-length"
            ) from None
        progress(len(batch))
    seconds = time.perf_counter() - began
    tokens = sum(sample.scored_tokens for sample in samples)
    loss = summed / tokens
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss is {loss}: the model's numbers overflow or are not finite; check its weights, and the adapter's scaling "
            "if there is an adapter"
        )
    return Score(loss, tokens, sum(len(sample.input_ids) for sample in samples) / seconds)


def _summed_loss(model: Module, batch: Sequence[TokenizedSample], device: str) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    width = max(len(sample.input_ids) for sample in batch)
    input_ids = _padded([sample.input_ids for sample in batch], width, 0).to(device)
    attention_mask = _padded([[1] * len(sample.input_ids) for sample in batch], width, 0).to(device)
    labels = _padded([sample.labels for sample in batch], width + 1, IGNORED).to(device)[:, 1:]
    with torch.no_grad():  # parameters that FSDP gathers in inference mode cannot be trained afterwards
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        logits, wanted = logits.flatten(0, 1), labels.flatten()
        losses = [
            cross_entropy(logits[places].float(), wanted[places], reduction="none").double().sum()
            for places in torch.split((wanted != IGNORED).nonzero().squeeze(1), CHUNK)
        ]
        return float(torch.stack(losses).sum())


def summed_loss(model: Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the cross entropy in nats, summed over the tokens that count, as an fp32 scalar with a gradient.

    `batch` is what `loratool.training.batches.collate` returns. The output head computes logits only at positions that
    predict a token that counts.
    """
    import torch
    from torch.nn.functional import cross_entropy

    wanted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    places = (wanted != IGNORED).nonzero().squeeze(1)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with _head_sees(model, places):
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    if len(logits) != len(places):  # a model whose head could not be found
        logits = logits[places]
    return cross_entropy(logits.float(), wanted[places], reduction="sum")


@contextmanager
def _head_sees(model: Any, places: torch.Tensor) -> Iterator[None]:
    """Cut the inputs of the output head inside this context: from (rows, tokens, features) to (1, len(places), features).

    `places` index the flattened (rows x tokens).
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[places].unsqueeze(0), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _padded(rows: Sequence[Sequence[int]], width: int, filler: int) -> torch.Tensor:
    """Return the rows as one tensor, (len(rows), width) int64; short rows are filled at the end."""
    import torch

    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
