"""Samples as tokens that a model can read: within its context and its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.errors import CheckpointError, LoratoolError, quoted
from loratool.running.data import Data, TokenizedSample, tokenize_data
from loratool.running.model import context_length, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEFAULT_MAX_LENGTH: Final = 2048
"""Default limit on the tokens of a sample. The memory for the logits grows with it."""


def checked_max_length(asked: int | None, config: PreTrainedConfig, most: int = DEFAULT_MAX_LENGTH) -> int:
    """Return the largest number of tokens of a sample: `asked`, or else the model's context, at most `most`.

    Raises:
        LoratoolError: `asked` is beyond the model's context, or leaves no token to predict.
    """
    context = context_length(config)
    if asked is None:
        return min(context or DEFAULT_MAX_LENGTH, most)
    if asked < 2:
        raise LoratoolError(f"{asked} tokens leave nothing to predict; give a --max-length of at least 2")
    if context is not None and asked > context:
        raise LoratoolError(
            f"the model reads {context:,} tokens at most; give a --max-length up to that, not {asked:,}"
        )
    return asked


def tokenized_for(data: Data, folder: Path, config: PreTrainedConfig, max_length: int, *,
                  plain: bool, truncate: bool = False) -> list[TokenizedSample]:  # fmt: skip
    """Return the samples as tokens of the model in `folder`.

    Raises:
        DataError: a sample cannot be used; the message names its line.
        CheckpointError: there is no tokenizer, or it belongs to another model.
    """
    samples = tokenize_data(data, load_tokenizer(folder), max_length, plain=plain, truncate=truncate)
    vocabulary = config.get_text_config().vocab_size
    largest = max(max(sample.input_ids) for sample in samples)
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {quoted(folder)} produces token {largest:,}, but the model has only {vocabulary:,}; give it the "
            "tokenizer that it was trained with"
        )
    return samples
