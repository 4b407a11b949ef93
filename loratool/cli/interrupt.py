"""Ctrl-C that is not lost: a KeyboardInterrupt out of the middle of an import may be swallowed, or leave half a module."""

from __future__ import annotations

import atexit
import signal
from types import FrameType
from typing import Final

IMPORTING: Final = "<frozen importlib._bootstrap>"
"""The file of the frames in which Python imports."""

SECONDS_BETWEEN_LOOKS: Final = 0.002
"""So short that a run of a few milliseconds is not at its end when it is interrupted."""


def interrupt_between_imports() -> None:
    """Have Ctrl-C raise KeyboardInterrupt as ever, but during an import only when that has ended.

    Nothing is changed where Ctrl-C has another meaning already: where it is ignored, or somebody handles it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _look_again)
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # an alarm after Python's own end would be its death


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        signal.setitimer(signal.ITIMER_REAL, SECONDS_BETWEEN_LOOKS)
    else:
        raise KeyboardInterrupt


def _look_again(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does by now: a training that has begun meanwhile ends after its step."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way in `frame` or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
