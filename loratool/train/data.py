"""A user's own text as a model reads it: a file of samples, and of each sample the tokens that count.

A JSONL file holds one object a line: ``text``, of which every token counts; ``prompt`` and ``completion``, or
``messages``, of which what the assistant says counts. A ``.txt`` file is one text, cut into windows. Other keys of a
line are left alone.

Every sample becomes one text with marked stretches of characters, and that text is tokenized as a whole: its tokens are
those that the text has anywhere else, and none of a seam between prompt and completion. A token counts if its last
character lies in a marked stretch, so one that spans the end of the prompt counts with the completion that it reaches into.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from loratool.errors import DataError, NotFoundError, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED: Final = -100
"""The label of a token that does not count, as torch's cross entropy and transformers have it."""

ASSISTANT: Final = "assistant"
KINDS: Final = (frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"}))
"""The keys of each kind of sample; a line has those of exactly one."""

ADVICE: Final = "write one JSON object a line, or name the file .txt where it is plain text"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """A text of any length, to be cut into windows."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A text whose every token counts, from line `line` of the file."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and its completion, which counts."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; what the assistant says in it counts."""

    line: int
    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Data:
    """The samples of one file, in its order."""

    file: Path
    samples: tuple[Document | Text | Completion | Chat, ...]


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A sample as token ids.

    Attributes:
        line: where it stands in its file; 1 for the windows of a text file.
        input_ids: its tokens.
        labels: of the same length; the token itself where it counts, else `IGNORED`.
    """

    line: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def scored_tokens(self) -> int:
        """How many tokens count: those that are labelled, less the first, which nothing foretells."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_data(file: Path) -> Data:
    """Read a ``.txt`` file, or else a JSONL file. Needs neither torch nor a tokenizer.

    Raises:
        NotFoundError: nothing is there.
        DataError: the file cannot be read or is empty, or one of its lines, which is named, is no sample.
    """
    try:
        if file.is_char_device() or file.is_block_device():
            raise DataError(f"{quoted(file)} is a device; give a JSONL or .txt file")
        with open(file, "rb") as stream:
            samples = _document(stream, file) if file.suffix.lower() == ".txt" else _lines(stream, file)
    except FileNotFoundError:
        raise NotFoundError(f"there is no data at {quoted(file)}; give a JSONL or .txt file") from None
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {quoted(file)}: {problem}; give a JSONL or .txt file") from None
    if not samples:
        raise DataError(f"{quoted(file)} is empty; give it at least one sample")
    return Data(file, samples)


def _document(stream: BinaryIO, file: Path) -> tuple[Document, ...]:
    text = _decoded(stream.read().removeprefix(_BYTE_ORDER_MARK), file)
    return (Document(text),) if text.strip() else ()


def _lines(stream: BinaryIO, file: Path) -> tuple[Text | Completion | Chat, ...]:
    return tuple(
        _Line(file, number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).sample()
        for number, line in enumerate(stream, 1)
    )


def tokenize_data(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, *,
                  plain: bool = False) -> list[TokenizedSample]:  # fmt: skip
    """Tokenize every sample; each has one token at least that counts.

    A text has the special tokens that the tokenizer puts around any text. ``messages`` stand in the tokenizer's chat
    template, and so do ``prompt`` and ``completion``, as one turn of the user and one of the assistant, unless the
    tokenizer has none or `plain` is set: then they follow one another as they are, and the tokenizer's end token follows
    the completion and counts. Of an assistant's turn that counts which the template lets it say: its content and the
    token that ends it, not the header before nor the blanks behind.

    A document is cut into windows of `max_length` tokens that do not overlap, each begun by the tokenizer's own first
    token if it has one.

    Args:
        max_length: the most tokens of a sample.
        plain: read ``prompt`` and ``completion`` without the chat template.

    Raises:
        DataError: a sample, whose line is named, is too long, leaves nothing to score or does not fit the template, or
            the tokenizer cannot say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not say where in a text its tokens stand; save the model with a "
            "tokenizer.json"
        )
    tokenized: list[TokenizedSample] = []
    for sample in data.samples:
        if isinstance(sample, Document):
            tokenized += _windows(sample, tokenizer, max_length)
            continue
        try:
            tokenized.append(_tokenized(sample, tokenizer, max_length, plain=plain))
        except _UnfitError as error:
            raise DataError(f"line {sample.line} of {quoted(data.file)} {error}") from None
    if not tokenized:
        raise DataError(
            f"{quoted(data.file)} has fewer than two tokens, so there is nothing to score; give a longer text"
        )
    return tokenized


class _UnfitError(Exception):
    """Why a sample cannot be used: the rest of a sentence that begins with its line."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a JSONL file; each method raises DataError for what is no sample."""

    file: Path
    number: int
    content: bytes

    def sample(self) -> Text | Completion | Chat:
        entry = self._object()
        match [keys for keys in KINDS if keys <= entry.keys()]:
            case [keys] if "text" in keys:
                return Text(self.number, self._filled("text", entry["text"]))
            case [keys] if "messages" in keys:
                return Chat(self.number, self._messages(entry["messages"]))
            case [_]:
                completion = self._filled("completion", entry["completion"])
                return Completion(self.number, self._string("prompt", entry["prompt"]), completion)
        found = [quoted(key) for key in ("text", "prompt", "completion", "messages") if key in entry]
        raise self._wrong(
            f"has {' and '.join(found) or 'none of the keys that are read'}, and must have either 'text', or 'prompt' and "
            "'completion', or 'messages'"
        )

    def _object(self) -> dict[str, Any]:
        if not self.content.strip():
            raise self._wrong("is empty; remove it")
        try:
            entry = json.loads(self.content.decode())
        except (ValueError, RecursionError) as error:
            found = (
                f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
            )
            raise self._wrong(f"is not JSON ({found}); {ADVICE}") from None
        if not isinstance(entry, dict):
            raise self._wrong(f"is JSON and no object; {ADVICE}")
        return entry

    def _messages(self, messages: object) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise self._wrong("has 'messages' that are no list of objects with 'role' and 'content'; mend them")
        for place, message in enumerate(messages, 1):
            self._filled(f"role of message {place}", message.get("role"))
            check = self._filled if message["role"] == ASSISTANT else self._string
            check(f"content of message {place}", message.get("content"))
        if not any(message["role"] == ASSISTANT for message in messages):
            raise self._wrong("has no message of the role 'assistant', so there is nothing to score; add one")
        return tuple(messages)

    def _filled(self, what: str, value: object) -> str:
        text = self._string(what, value)
        if not text.strip():
            raise self._wrong(f"has an empty {quoted(what)}; fill it in, or remove the line")
        return text

    def _string(self, what: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._wrong(f"has a {quoted(what)} that is no string; put it in quotation marks")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._wrong(f"has half of a surrogate pair in its {quoted(what)}; mend the character") from None
        return value

    def _wrong(self, problem: str) -> DataError:
        return DataError(f"line {self.number} of {quoted(self.file)} {problem}")


def _decoded(content: bytes, file: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"line {number} of {quoted(file)} is not UTF-8; convert the file") from None


@dataclass(frozen=True, slots=True)
class _Marked:
    """A text, the stretches of its characters that count, and whether the tokenizer's special tokens go around it."""

    text: str
    counted: Sequence[range]
    special_tokens: bool


def _tokenized(sample: Text | Completion | Chat, tokenizer: PreTrainedTokenizerBase, max_length: int, *,
               plain: bool) -> TokenizedSample:  # fmt: skip
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
    if len(input_ids) > max_length:
        raise _UnfitError(
            f"is {len(input_ids):,} tokens long and {max_length:,} are allowed; shorten it, or give a larger --max-length "
            "if the model's context has room"
        )
    tokenized = TokenizedSample(sample.line, input_ids, labels)
    if tokenized.scored_tokens == 0:
        raise _UnfitError("has fewer than two tokens, so there is nothing to score; remove it")
    return tokenized


def _mark(sample: Completion | Chat, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> _Marked:
    if isinstance(sample, Chat):
        if not tokenizer.chat_template:
            raise _UnfitError(
                "has 'messages', and the model has no chat template; give 'prompt' and 'completion' instead"
            )
        return _marked_chat(sample.messages, tokenizer)
    if tokenizer.chat_template and not plain:
        turns = ({"role": "user", "content": sample.prompt}, {"role": ASSISTANT, "content": sample.completion})
        return _marked_chat(turns, tokenizer)
    text = sample.prompt + sample.completion + (tokenizer.eos_token or "")
    return _Marked(text, [range(len(sample.prompt), len(text))], special_tokens=True)


def _marked_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> _Marked:
    """A conversation in the chat template. An assistant's turn is what the template adds after its generation prompt."""
    whole = _rendered(messages, tokenizer)
    counted = []
    for place, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            if place == 0:
                raise _UnfitError("begins with the assistant; put a message of the user before it")
            before = _rendered(messages[:place], tokenizer, add_generation_prompt=True)
            through = _rendered(messages[: place + 1], tokenizer)
            if not (whole.startswith(through) and through.startswith(before)):
                raise _UnfitError(
                    f"has in message {place + 1} an assistant's turn that the model's chat template writes otherwise in its "
                    "conversation than when it is generated; give each such turn a line of its own, or 'prompt' and "
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
    except Exception as error:  # a template comes with the model and raises what it likes
        problem = str(error).strip().split("\n")[0]
        raise _UnfitError(f"does not fit the model's chat template ({problem}); mend its messages") from None


def _windows(document: Document, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[TokenizedSample]:
    """Windows side by side; a last one of a single token is left out, since nothing in it foretells it."""
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
