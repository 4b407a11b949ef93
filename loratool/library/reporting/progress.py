"""Progress reports of long work."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receiver of progress reports. `advance` may be called from any thread."""

    def begin(self, label: str, total: int) -> None:
        """Begin a step of `total` bytes or other units. It ends when the next step begins."""

    def advance(self, count: int) -> None:
        """Report that `count` more units are done."""

    def retrying(self, tries: int) -> None:
        """Report that a connection broke and the request is repeated, for the `tries`-th time."""


class Silent:
    """Receiver that ignores all reports."""

    def begin(self, label: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def retrying(self, tries: int) -> None:
        pass
