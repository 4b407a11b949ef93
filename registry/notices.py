"""What the catalogue says while it works, one line each: to Python's logging, which shows it on stderr."""

from __future__ import annotations


def say(text: str) -> None:
    """Say `text` by the logger `registry`; without a handler of the caller's own it appears on stderr."""
    import logging  # seldom needed, and a list of adapters does without the time that it takes

    logging.getLogger("registry").warning("note: %s", text)
