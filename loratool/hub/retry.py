"""Requests to the Hub, repeated where huggingface_hub makes only one: the Hub is busy, fails for a moment, or hangs up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds between five attempts."""

LONGEST_WAIT: Final = 60.0
TRANSIENT_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that may change by the next attempt."""

HTTP_LIBRARIES: Final = frozenset({"httpx", "httpx2", "requests"})
HUNG_UP: Final = frozenset({"ReadError", "ReadTimeout", "RemoteProtocolError", "ChunkedEncodingError"})
"""Errors of huggingface_hub's HTTP libraries when a server answers and then hangs up.

Where no server answers, or the address is invalid, a retry is of little use.
"""


def with_retries(ask: Callable[[], T], *, may_retry: Callable[[Exception], bool] = lambda error: True) -> T:
    """Return the result of `ask`, and repeat it while its error is transient; raise the last error.

    `may_retry` is called with the error before each retry. It may count the retry, or return False to stop.
    """
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            asked_to_wait = _wait(error)
            if asked_to_wait is None or not may_retry(error):
                raise
            time.sleep(min(max(wait, asked_to_wait), LONGEST_WAIT))
    return ask()


def is_unreachable(error: BaseException) -> bool:
    """Whether huggingface_hub's HTTP library, which depends on its version, got no answer at all."""
    from huggingface_hub.errors import HfHubHTTPError

    library = type(error).__module__.partition(".")[0]
    return library in HTTP_LIBRARIES and not isinstance(error, HfHubHTTPError)


def is_transient(error: Exception) -> bool:
    """Whether a retry may succeed."""
    return _wait(error) is not None


def _wait(error: Exception) -> float | None:
    """The least seconds to wait before a retry; None if a retry cannot help."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        response: Any = error.response
        return _retry_after(response) if response.status_code in TRANSIENT_STATUSES else None
    hung_up = type(error).__name__ in HUNG_UP or "Connection aborted" in str(error)
    return 0.0 if is_unreachable(error) and hung_up else None


def _retry_after(response: Any) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0
