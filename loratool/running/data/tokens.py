"""Samples as tokens, with labels on the tokens that count towards the loss.

Every sample becomes one text with marked ranges of characters. The text is tokenized as a whole, so its tokens do not
depend on where the prompt ends. A token counts if its last character is in a marked range; one that spans the end of the
prompt therefore counts as part of the completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import DataError, quoted
from loratool.running.data.samples import ASSISTANT, Chat, Completion, Data, Document, Sample, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED: Final = -100
"""The label of a token that does not count, the same as in torch's cross entropy and transformers."""


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A sample as token ids.

    Attributes:
        line: its line in the file; 1 for the windows of a text file.
        input_ids: its tokens.
        labels: for each token, the token itself if it counts, else `IGNORED`.
        truncated: whether its end was cut off because it was too long.
    """

    line: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool = False

    @property
    def scored_tokens(self) -> int:
        """Number of tokens that count: the labelled ones except the first, which nothing predicts."""
        return sum(label != IGNORED for label in self.labels[1:])


def tokenize_data(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, *,
                  plain: bool = False, truncate: bool = False) -> list[TokenizedSample]:  # fmt: skip
    """Tokenize every sample. Each result has at least one token that counts.

    - A text gets the tokenizer's usual special tokens.
    - ``messages`` are rendered by the tokenizer's chat template.
    - ``prompt`` and ``completion`` are rendered by it as one turn of the user and one of the assistant. With `plain`, or
      if there is no template, they are joined as they are and followed by the tokenizer's end token, which counts.
    - A document is cut into windows of `max_length` tokens that do not overlap. Each begins with the tokenizer's first
      special token, if it has one.

    In an assistant's turn, the content and the token that ends it count. The header before them and the whitespace after
    them do not.

    Args:
        max_length: the most tokens in a sample.
        plain: join ``prompt`` and ``completion`` without the chat template.
        truncate: cut the end off a sample that is too long, and mark it as truncated, instead of refusing it. A sample
            that would keep no token that counts is refused anyway.

    Raises:
        DataError: a sample is too long, has nothing to score, or does not fit the template; the message names its line.
            Or the tokenizer does not report the positions of its tokens.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not report the positions of its tokens in a text; save the model "
            "with a tokenizer.json"
        )
    tokenized: list[TokenizedSample] = []
    for sample in data.samples:
        if isinstance(sample, Document):
            tokenized += _windows(sample, tokenizer, max_length)
            continue
        try:
            tokenized.append(_tokenized(sample, tokenizer, max_length, plain=plain, truncate=truncate))
        except _UnfitError as error:
            raise data.place(sample.line).wrong(str(error)) from None
    if not tokenized:
        raise DataError(
            f"{quoted(data.file)} has fewer than two tokens, so there is nothing to score; give a longer text"
        )
    return tokenized


class _UnfitError(Exception):
    """The reason why a sample cannot be used, as the rest of a sentence that begins with its line."""


@dataclass(frozen=True, slots=True)
class _Marked:
    """A text, the ranges of its characters that count, and whether the tokenizer adds its special tokens."""

    text: str
    counted: Sequence[range]
    special_tokens: bool


def _tokenized(sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int, *,
               plain: bool, truncate: bool) -> TokenizedSample:  # fmt: skip
    if isinstance(sample, Text):
        input_ids = _ids(sample.text, tokenizer)
        labels = input_ids
    else:
        marked = _mark(sample, tokenizer, plain=plain)
        encoded = tokenizer(marked.text, add_special_tokens=marked.special_tokens, return_offsets_mapping=True)
        input_ids = tuple(encoded["input_ids"])
        ends = [end for _, end in encoded["offset_mapping"]]
        labels = tuple(
            token if any(end - 1 in stretch for stretch in marked.counted) else IGNORED
            for token, end in zip(input_ids, ends, strict=True)
        )
    tokenized = TokenizedSample(sample.line, input_ids, labels)
    if tokenized.scored_tokens == 0:
        raise _UnfitError("has fewer than two tokens, so there is nothing to score; remove it")
    return tokenized if len(input_ids) <= max_length else _shortened(tokenized, max_length, truncate=truncate)


def _shortened(sample: TokenizedSample, max_length: int, *, truncate: bool) -> TokenizedSample:
    length = f"is {len(sample.input_ids):,} tokens long and {max_length:,} are allowed"
    if not truncate:
        raise _UnfitError(
            f"{length}; shorten it, give a larger --max-length if the model's context has room, or --truncate"
        )
    cut = TokenizedSample(sample.line, sample.input_ids[:max_length], sample.labels[:max_length], truncated=True)
    if cut.scored_tokens == 0:
        raise _UnfitError(f"{length}, and none of those counts; shorten what stands before them, or remove it")
    return cut


def _mark(sample: Completion | Chat, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> _Marked:
    if isinstance(sample, Chat):
        if not tokenizer.chat_template:
            raise _UnfitError(
                "has 'messages', but the model has no chat template; give 'prompt' and 'completion' instead"
            )
        return _marked_chat(sample.messages, tokenizer)
    if tokenizer.chat_template and not plain:
        turns = ({"role": "user", "content": sample.prompt}, {"role": ASSISTANT, "content": sample.completion})
        return _marked_chat(turns, tokenizer)
    text = sample.prompt + sample.completion + (tokenizer.eos_token or "")
    return _Marked(text, [range(len(sample.prompt), len(text))], special_tokens=True)


def _marked_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> _Marked:
    """Render a conversation and mark the assistant's turns: what the template adds after its generation prompt."""
    whole = _rendered(messages, tokenizer)
    counted = []
    for place, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            if place == 0:
                raise _UnfitError("begins with the assistant; put a message from the user before it")
            before = _rendered(messages[:place], tokenizer, add_generation_prompt=True)
            through = _rendered(messages[: place + 1], tokenizer)
            if not (whole.startswith(through) and through.startswith(before)):
                raise _UnfitError(
                    f"has in message {place + 1} an assistant's turn that the model's chat template renders differently within "
                    "its conversation than when it is generated; give each such turn a line of its own, or 'prompt' and "
                    "'completion' with --plain"
                )
            counted.append(range(len(before), len(through.rstrip())))
    return _Marked(whole, counted, special_tokens=False)


def _rendered(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *,
              add_generation_prompt: bool = False) -> str:  # fmt: skip
    try:
        conversation = [dict(message) for message in messages]
        return str(
            tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, tokenize=False)
        )
    except Exception as error:  # a template comes with the model and can raise anything
        problem = str(error).strip().split("\n")[0]
        raise _UnfitError(f"does not fit the model's chat template ({problem}); fix its messages") from None


def _windows(document: Document, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[TokenizedSample]:
    """Yield adjacent windows. A last window of a single token is skipped, since nothing in it predicts that token."""
    first = _ids("", tokenizer)[:1]
    first = first if first == (tokenizer.bos_token_id,) else ()
    tokens = tuple(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    room = max_length - len(first)
    for start in range(0, len(tokens), room):
        window = first + tokens[start : start + room]
        if len(window) > 1:
            yield TokenizedSample(1, window, window)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text)["input_ids"])
