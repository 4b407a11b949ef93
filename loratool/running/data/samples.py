"""What a sample is, and whether an object of a file, or a row of a table, is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.errors import DataError, quoted

ASSISTANT: Final = "assistant"
KINDS: Final = (frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"}))
"""The keys of each kind of sample; one has those of exactly one."""

KEYS: Final = ("text", "prompt", "completion", "messages")
WANTED: Final = "either 'text', or 'prompt' and 'completion', or 'messages'"


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


Sample = Text | Completion | Chat


@dataclass(frozen=True, slots=True)
class Place:
    """Where one sample stands: line, row or entry `number` of `source`, from 1."""

    source: Path
    unit: str
    number: int

    def wrong(self, problem: str) -> DataError:
        """The error that says what is wrong with it, in the rest of a sentence that begins with the place."""
        return DataError(f"{self.unit} {self.number} of {quoted(self.source)} {problem}")


@dataclass(frozen=True, slots=True)
class Data:
    """The samples of one source, in its order.

    Attributes:
        file: the file, or the id of a data set of the Hub.
        unit: what the numbers of the samples count: ``line``, ``row`` or ``entry``.
    """

    file: Path
    samples: tuple[Document | Sample, ...]
    unit: str = "line"

    def place(self, number: int) -> Place:
        """The place of a sample that says its number."""
        return Place(self.file, self.unit, number)


def read_rows(source: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Data:
    """The samples of a table; a cell that is None is not there.

    Raises:
        DataError: the table lacks the columns of a sample or has no row, or one of its rows, which is named, is no sample.
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
    """Raise DataError unless a table with these columns can hold a sample, each column once."""
    if not any(keys <= set(columns) for keys in KINDS):
        found = ", ".join(quoted(column, 40) for column in columns[:8]) + (", …" if len(columns) > 8 else "")
        raise DataError(f"{quoted(source)} has the columns {found or '(none)'}, and must have {WANTED}; {advice}")
    twice = next((column for column in KEYS if list(columns).count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{quoted(source)} has two columns {quoted(twice)}; remove or rename one")


def sample_of(entry: Mapping[str, Any], place: Place) -> Sample:
    """The sample that an object or a row is.

    Raises:
        DataError: it is none.
    """
    return _Entry(entry, place).sample()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One object or row; each method raises DataError for what is no sample."""

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
        raise self.place.wrong(f"has {found or 'none of the keys that are read'}, and must have {WANTED}")

    def _messages(self, messages: object) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise self.place.wrong("has 'messages' that are no list of objects with 'role' and 'content'; mend them")
        # A table gives every message the keys of all.
        turns = tuple({key: value for key, value in turn.items() if value is not None} for turn in messages)
        for number, message in enumerate(turns, 1):
            self._filled(f"role of message {number}", message.get("role"))
            check = self._filled if message["role"] == ASSISTANT else self._string
            check(f"content of message {number}", message.get("content"))
        if not any(message["role"] == ASSISTANT for message in turns):
            raise self.place.wrong("has no message of the role 'assistant', so there is nothing to score; add one")
        return turns

    def _filled(self, what: str, value: object) -> str:
        text = self._string(what, value)
        if not text.strip():
            raise self.place.wrong(f"has an empty {quoted(what)}; fill it in, or remove the {self.place.unit}")
        return text

    def _string(self, what: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.place.wrong(f"has a {quoted(what)} that is no string; write it as text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.place.wrong(f"has half of a surrogate pair in its {quoted(what)}; mend the character") from None
        return value
