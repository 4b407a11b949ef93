"""The kinds of samples, and the check that an object in a file or a row of a table is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.errors import DataError, quoted

ASSISTANT: Final = "assistant"
KINDS: Final = (frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"}))
"""The keys of each kind of sample. A sample has the keys of exactly one kind."""

KEYS: Final = ("text", "prompt", "completion", "messages")
WANTED: Final = "either 'text', or 'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True, slots=True)
class Document:
    """A text of any length that is cut into windows."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A text in which every token counts, from line `line` of the file."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion. Only the completion counts."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. Only the assistant's turns count."""

    line: int
    messages: tuple[Mapping[str, Any], ...]


Sample = Text | Completion | Chat


@dataclass(frozen=True, slots=True)
class Place:
    """The position of one sample: line, row or entry `number` of `source`, counted from 1."""

    source: Path
    unit: str
    number: int

    def wrong(self, problem: str) -> DataError:
        """Return an error whose message is this place followed by `problem`, such as ``is empty; remove it``."""
        return DataError(f"{self.unit} {self.number} of {quoted(self.source)} {problem}")


@dataclass(frozen=True, slots=True)
class Data:
    """The samples of one source, in its order.

    Attributes:
        file: the file, or the id of a data set on the Hub.
        unit: what a sample's number counts: ``line``, ``row`` or ``entry``.
    """

    file: Path
    samples: tuple[Document | Sample, ...]
    unit: str = "line"

    def place(self, number: int) -> Place:
        """Return the place of sample `number`."""
        return Place(self.file, self.unit, number)


def read_rows(source: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Data:
    """Read the rows of a table as samples. A cell that is None counts as absent.

    Raises:
        DataError: the table lacks the columns of a sample, has no rows, or has an invalid row; the message names it.
    """
    check_columns(source, columns)
    samples = tuple(
        sample_of({key: value for key, value in row.items() if value is not None}, Place(source, "row", number))
        for number, row in enumerate(rows, 1)
    )
    if not samples:
        raise DataError(f"{quoted(source)} has no rows; give it at least one sample")
    return Data(source, samples, "row")


def check_columns(source: Path, columns: Sequence[str], advice: str = "rename its columns") -> None:
    """Raise DataError unless the columns include those of a sample, each of them once."""
    if not any(keys <= set(columns) for keys in KINDS):
        found = ", ".join(quoted(column, 40) for column in columns[:8]) + (", …" if len(columns) > 8 else "")
        raise DataError(f"{quoted(source)} has the columns {found or '(none)'} but must have {WANTED}; {advice}")
    twice = next((column for column in KEYS if list(columns).count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{quoted(source)} has two columns {quoted(twice)}; remove or rename one")


def sample_of(entry: Mapping[str, Any], place: Place) -> Sample:
    """Parse an object or a row as a sample.

    Raises:
        DataError: it is not a valid sample.
    """
    return _Entry(entry, place).sample()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One object or row. Each method raises DataError if a value is invalid."""

    content: Mapping[str, Any]
    place: Place

    def sample(self) -> Sample:
        number = self.place.number
        match [keys for keys in KINDS if keys <= self.content.keys()]:
            case [keys] if "text" in keys:
                return Text(number, self._filled("text", self.content["text"]))
            case [keys] if "messages" in keys:
                return Chat(number, self._messages(self.content["messages"]))
            case [_]:
                completion = self._filled("completion", self.content["completion"])
                return Completion(number, self._string("prompt", self.content["prompt"]), completion)
        found = " and ".join(quoted(key) for key in KEYS if key in self.content)
        raise self.place.wrong(f"has {found or 'none of the known keys'} but must have {WANTED}")

    def _messages(self, messages: object) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise self.place.wrong("has 'messages' that are not a list of objects with 'role' and 'content'; fix them")
        # In a table every message has the keys of all messages, so absent ones are None.
        turns = tuple({key: value for key, value in turn.items() if value is not None} for turn in messages)
        for number, message in enumerate(turns, 1):
            self._filled(f"role of message {number}", message.get("role"))
            check = self._filled if message["role"] == ASSISTANT else self._string
            check(f"content of message {number}", message.get("content"))
        if not any(message["role"] == ASSISTANT for message in turns):
            raise self.place.wrong("has no message with the role 'assistant', so there is nothing to score; add one")
        return turns

    def _filled(self, what: str, value: object) -> str:
        text = self._string(what, value)
        if not text.strip():
            raise self.place.wrong(f"has an empty {quoted(what)}; fill it in, or remove the {self.place.unit}")
        return text

    def _string(self, what: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.place.wrong(f"has a {quoted(what)} that is not a string; write it as text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.place.wrong(f"has half of a surrogate pair in its {quoted(what)}; fix the character") from None
        return value
