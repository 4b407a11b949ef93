"""What can be made to go wrong on demand, each a number of times."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Befalls the next `times` requests of `method` whose path matches `pattern`."""

    method: str
    pattern: str
    times: int = 1

    def befalls(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it if so."""
        if self.times < 1 or method != self.method or re.search(self.pattern, path) is None:
            return False
        self.times -= 1
        return True


@dataclass
class Failure(Fault):
    """The request is answered with an error."""

    status: int = 500
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Cut(Fault):
    """The connection ends after `after` bytes of the body; with None before there is any answer."""

    after: int | None = None


@dataclass
class Corruption(Fault):
    """One bit of the body is wrong; its length and its headers are as they should be."""


@dataclass
class Event(Fault):
    """Something happens just before the request is answered: the repository changes, say."""

    happen: Callable[[], object] = lambda: None
