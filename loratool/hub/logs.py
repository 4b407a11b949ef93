"""What huggingface_hub logs: without secrets, as its warnings name the addresses of files, whose queries open them; and without
a line for each time that it tries again."""

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
"""What it logs before it tries again."""

BROKEN: Final = re.compile(r"Max retries exceeded|thrown while requesting")
"""What else it logs of the same trouble."""


class WithoutSecrets(logging.Filter):
    """Takes tokens and the queries of addresses out of every message."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


class Retries(logging.Filter):
    """Drops what huggingface_hub logs of its tries, and counts those of each thread; `tell` is told how many in all."""

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
        """One more try of this thread."""
        self._by_thread[threading.get_ident()] += 1
        self._tell(self._by_thread.total())

    def of_this_thread(self) -> int:
        """How many times what this thread asked for was tried again."""
        return self._by_thread[threading.get_ident()]


def keep_logs_clean() -> None:
    """Have huggingface_hub's own log handler show no secrets. Twice is once."""
    for handler in logging.getLogger(LIBRARY).handlers:
        if not any(isinstance(each, WithoutSecrets) for each in handler.filters):
            handler.addFilter(WithoutSecrets())


@contextmanager
def counted_retries(tell: Callable[[int], None]) -> Iterator[Retries]:
    """Keep what huggingface_hub logs of its tries out of its log inside, and count them instead."""
    handlers = list(logging.getLogger(LIBRARY).handlers)
    retries = Retries(tell)
    for handler in handlers:
        handler.addFilter(retries)
    try:
        yield retries
    finally:
        for handler in handlers:
            handler.removeFilter(retries)
