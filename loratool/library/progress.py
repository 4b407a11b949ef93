"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of long work; `advance` is called from any thread."""

    def begin(self, label: str, total: int) -> None:
        """A step of `total` bytes, or of what else the work counts, begins; it ends when the next begins."""

    def advance(self, count: int) -> None:
        """`count` more are done."""

    def retrying(self, tries: int) -> None:
        """A connection broke, and what was asked for is asked for again: `tries` times so far."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, label: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def retrying(self, tries: int) -> None:
        pass
