"""Filters for huggingface_hub's log: no secrets, and no line for each retry.

Its warnings contain URLs of files, whose queries grant access to them.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from loratool.hub.errors import without_secrets

LIBRARY: Final = "huggingface_hub"
AGAIN: Final = re.compile(r"Trying to resume download|Retrying in|Waiting .* before retry")
"""Messages before a retry."""

BROKEN: Final = re.compile(r"Max retries exceeded|thrown while requesting")
"""Other messages about the same failures."""


class WithoutSecrets(logging.Filter):
    """A filter that removes tokens and the queries of URLs from every message."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


class Retries(logging.Filter):
    """A filter that drops messages about retries and counts them by thread; `tell` is called with the total."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._tell = tell
        self._by_thread: Counter[int] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if AGAIN.search(message):
            self.count()
            return False
        return BROKEN.search(message) is None

    def count(self) -> None:
        """Count one more retry in this thread."""
        self._by_thread[threading.get_ident()] += 1
        self._tell(self._by_thread.total())

    def of_this_thread(self) -> int:
        """Return the number of retries in this thread."""
        return self._by_thread[threading.get_ident()]


def keep_logs_clean() -> None:
    """Remove secrets from huggingface_hub's own log handlers. Further calls change nothing."""
    for handler in logging.getLogger(LIBRARY).handlers:
        if not any(isinstance(each, WithoutSecrets) for each in handler.filters):
            handler.addFilter(WithoutSecrets())


@contextmanager
def counted_retries(tell: Callable[[int], None]) -> Iterator[Retries]:
    """Count huggingface_hub's retries in the block instead of logging them."""
    handlers = list(logging.getLogger(LIBRARY).handlers)
    retries = Retries(tell)
    for handler in handlers:
        handler.addFilter(retries)
    try:
        yield retries
    finally:
        for handler in handlers:
            handler.removeFilter(retries)
