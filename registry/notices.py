"""Notes of the catalogue while it works, one line each, through Python's logging."""

from __future__ import annotations


def say(text: str) -> None:
    """Log `text` to the logger `registry`. Without a handler it appears on stderr."""
    import logging  # rarely needed, and its import would slow down `loratool list`

    logging.getLogger("registry").warning("note: %s", text)
