"""Asking the Hub again where huggingface_hub asks once only: when it is busy, fails for a moment, or hangs up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds between five attempts."""

LONGEST_WAIT: Final = 60.0
PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that may be another at the next attempt."""

HTTP_LIBRARIES: Final = frozenset({"httpx", "httpx2", "requests"})
HUNG_UP: Final = frozenset({"ReadError", "ReadTimeout", "RemoteProtocolError", "ChunkedEncodingError"})
"""What the HTTP libraries of huggingface_hub raise where somebody answered and hung up; where nobody answers at all, or the
address is none, asking again is of little use."""


def patiently(ask: Callable[[], T], *, again: Callable[[Exception], bool] = lambda error: True) -> T:
    """What `ask` returns, asked again while the error that it raises may pass; the last error is raised.

    `again` is asked before each further attempt, and counts it.
    """
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            asked_to_wait = _wait(error)
            if asked_to_wait is None or not again(error):
                raise
            time.sleep(min(max(wait, asked_to_wait), LONGEST_WAIT))
    return ask()


def is_unreachable(error: BaseException) -> bool:
    """Whether huggingface_hub's HTTP library, which is another in other versions, gave no answer at all."""
    from huggingface_hub.errors import HfHubHTTPError

    library = type(error).__module__.partition(".")[0]
    return library in HTTP_LIBRARIES and not isinstance(error, HfHubHTTPError)


def may_pass(error: Exception) -> bool:
    """Whether there is sense in asking again."""
    return _wait(error) is not None


def _wait(error: Exception) -> float | None:
    """How long to wait at least before the next attempt, in seconds; None where there is no sense in one."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        response: Any = error.response
        return _retry_after(response) if response.status_code in PASSING else None
    hung_up = type(error).__name__ in HUNG_UP or "Connection aborted" in str(error)
    return 0.0 if is_unreachable(error) and hung_up else None


def _retry_after(response: Any) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0
