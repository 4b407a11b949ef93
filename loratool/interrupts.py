"""The signals that end a command (Ctrl-C, SIGTERM, SIGHUP), raised as one exception where that is safe.

Python may run a signal's handler between any two steps of the main thread. An exception raised there can be lost, in a
``__del__`` or in a callback of a C library. Or it can do damage: half an import, an open transaction of the database, a lock
that was just taken. So the handler looks at the running frames. If one of them must not be interrupted, it looks again some
milliseconds later. If its exception was lost, it is raised again.

`Deferral` is for work that ends in its own way, such as workers that stop or a training step that is finished. `whole` is for
short functions that create or remove something and must run to their end. What is cleaned up on the way out is noted on the
exception (`note`), for the command line to print.

Only the command line calls `install`. In a program that uses loratool as a library, Ctrl-C works as before, except that it
waits for the end of a `Deferral`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from types import CodeType, FrameType, TracebackType
from typing import Any, Final, Self, TypeVar

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a command."""

SECONDS_BETWEEN_LOOKS: Final = 0.002
"""First pause before looking at the frames again; each further one is twice as long, to `LONGEST_SECONDS_BETWEEN_LOOKS`."""

LONGEST_SECONDS_BETWEEN_LOOKS: Final = 0.05
SECONDS_TO_UNWIND: Final = 0.2
"""Time that a raised exception has to reach the command line before it counts as lost."""

IMPORTING: Final = "<frozen importlib._bootstrap>"
"""File name of the frames in which Python imports modules."""

CONTEXTS: Final = ExitStack.close.__code__.co_filename
"""File name of the frames in which `contextmanager` enters and leaves contexts."""

TORN: Final = frozenset({"__enter__", "__exit__", "__del__"})
"""Functions that acquire or release something, which an exception in the middle would leave half done."""

WHOLE_FILES: Final = ("/sqlalchemy/", "/registry/database.py")
"""Parts of the paths of files in which no function is interrupted: they begin, commit and roll back transactions."""

PAUSE: Final = ("/registry/waiting.py", "pause")
"""The file and name of the one function below those in which nothing has begun: the catalogue waits for another writer."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end. Its notes (`note`) say what was cleaned up, or how to continue."""

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        super().__init__(message)
        self.number = signal.Signals(number)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def status(self) -> int:
        """Exit status of a command that this signal ended, by the convention of shells."""
        return 128 + self.number


def note(error: BaseException, text: str) -> None:
    """Add to an interrupt a note on what was cleaned up. Other errors are left as they are."""
    if isinstance(error, KeyboardInterrupt):
        error.add_note(text)


def whole(function: Function) -> Function:
    """Mark a short function in which no interrupt is raised: it is raised when the function has returned."""
    code: CodeType = function.__code__
    _whole[id(code)] = code
    return function


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that `error` is, or was caused by; None if there is none."""
    return next((each for each in _origins(error) if isinstance(each, KeyboardInterrupt)), None)


def notes(error: BaseException) -> list[str]:
    """Return the notes on an error and on the errors that caused it, each once."""
    found = [text for each in _origins(error) for text in getattr(each, "__notes__", ())]
    return list(dict.fromkeys(found))


def _origins(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and the errors that caused it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or current.__context__


class Deferral:
    """Block in which a signal is not raised. `notice` is called at once, in the main thread, and the block ends in its own way.

    The signal is raised at the end of the block, unless an error is raised already. With ``raises=False`` it is not raised,
    and the caller checks `number`. A second signal is raised at once with `patient`, and ignored without it.

    Outside the main thread, where no signal is raised, this does nothing. In a program that has not called `install`, it
    defers Ctrl-C if that has a handler, and with `patient` also SIGTERM and SIGHUP if they would end the process.
    """

    def __init__(
        self, notice: Callable[[], None] = lambda: None, *, patient: bool = False, raises: bool = True
    ) -> None:
        self.number: signal.Signals | None = None
        self._notice, self._patient, self._raises = notice, patient, raises
        self._before: dict[signal.Signals, Any] = {}
        self._active = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._active = True
            _deferrals.append(self)
            if not _state.installed:
                self._before = {number: signal.signal(number, _received) for number in ENDING if self._takes(number)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        _deferrals.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number is not None and self._raises and (error is None or isinstance(error, Interrupted)):
            self._hand_on(self.number)

    def ask(self, number: signal.Signals) -> bool:
        """Note a signal; return False if it is the second and must be raised."""
        if self.number is not None:
            return not self._patient
        self.number = number
        with suppress(Exception):  # printing may fail: the signal may have interrupted another print
            self._notice()
        return True

    @property
    def stops_workers(self) -> bool:
        """Whether the work inside must stop now."""
        return self.number is not None and not self._patient

    def _takes(self, number: signal.Signals) -> bool:
        handler = signal.getsignal(number)
        if number == signal.SIGINT:
            return callable(handler)
        return self._patient and handler is signal.SIG_DFL

    def _hand_on(self, number: signal.Signals) -> None:
        """Pass the signal to the enclosing deferral, or else to the handler outside; raise it if there is neither."""
        if _deferrals:
            if not _deferrals[-1].ask(number):
                raise _raised(number)
            return
        handler = self._before.get(number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)
        raise _raised(number)


def check() -> None:
    """Raise `Interrupted` if the running work was asked to stop. Call it, in any thread, in loops over much data."""
    if _deferrals and _deferrals[-1].stops_workers:
        raise Interrupted(_deferrals[-1].number or signal.SIGINT)


class _State:
    """State of the signal that ends this process."""

    installed = False
    number: signal.Signals | None = None
    """The signal that was received, and that was or will be raised."""
    pause = SECONDS_BETWEEN_LOOKS


_state: Final = _State()
_deferrals: Final[list[Deferral]] = []
_whole: Final[dict[int, CodeType]] = {}


def install() -> None:
    """Raise `Interrupted` in the main thread for each ending signal that is not ignored and has no other handler."""
    if _state.installed:
        return
    ours = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in ours.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _received)
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.signal(signal.SIGALRM, _look_again)
    _state.installed = True
    lost, uncaught = sys.unraisablehook, sys.excepthook  # a lost interrupt is raised again, so do not print it
    sys.unraisablehook = lambda what: None if isinstance(what.exc_value, Interrupted) else lost(what)
    sys.excepthook = lambda kind, error, trace: None if isinstance(error, Interrupted) else uncaught(kind, error, trace)


def received() -> Interrupted | None:
    """Return the interrupt for a signal whose exception was not raised yet, or was lost; None if no signal came."""
    return None if _state.number is None else Interrupted(_state.number)


def finish() -> None:
    """Ignore signals from here on: the command has ended, and another one would only cut its last output."""
    if _state.installed:
        for number in ENDING:
            if signal.getsignal(number) is _received:
                signal.signal(number, _ignore)
        if signal.getsignal(signal.SIGALRM) is _look_again:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, _ignore)


def _received(number: int, frame: FrameType | None) -> None:
    which = signal.Signals(number)
    if which == signal.SIGHUP:
        _leave_dead_terminal()
    if _state.number is not None:
        return
    if not _state.installed:
        if _deferrals and _deferrals[-1].ask(which):
            return
        raise Interrupted(which)
    _state.number = which
    _raise_where_it_does_no_harm(which, frame)


def _leave_dead_terminal() -> None:
    """Redirect streams of a closed terminal to ``/dev/null``, since printing to it would be an error."""
    for fd in (0, 1, 2):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_RDWR), fd)


def _look_again(number: int, frame: FrameType | None) -> None:
    if _state.number is not None:
        _raise_where_it_does_no_harm(_state.number, frame)


def _raise_where_it_does_no_harm(number: signal.Signals, frame: FrameType | None) -> None:
    handled = sys.exc_info()[1]
    if handled is not None and behind(handled) is not None:
        _look_in(SECONDS_TO_UNWIND)  # an interrupt is being raised already
        return
    if _deferrals and _deferrals[-1].ask(number):
        _state.number = None  # the deferral raises it at its end
        return
    if _would_tear(frame):
        _look_in(_state.pause)
        _state.pause = min(2 * _state.pause, LONGEST_SECONDS_BETWEEN_LOOKS)
        return
    raise _raised(number)


def _raised(number: signal.Signals) -> Interrupted:
    """Return the exception to raise now. If it is lost, it is raised again, until the command has ended."""
    if _state.installed:
        _state.number, _state.pause = number, SECONDS_BETWEEN_LOOKS
        _look_in(SECONDS_TO_UNWIND)
    return Interrupted(number)


def _look_in(seconds: float) -> None:
    if signal.getsignal(signal.SIGALRM) is _look_again:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _would_tear(frame: FrameType | None) -> bool:
    """Return whether an exception in this frame would be lost, or would interrupt a caller that must not be."""
    if frame is None:
        return False
    if frame.f_code.co_name in TORN or frame.f_code.co_filename == CONTEXTS:
        return True
    pauses = frame.f_code.co_filename.endswith(PAUSE[0]) and frame.f_code.co_name == PAUSE[1]
    running: FrameType | None = frame
    while running is not None:
        code = running.f_code
        if id(code) in _whole or code.co_filename == IMPORTING or code.co_name == "__del__":
            return True
        if not pauses and any(part in code.co_filename for part in WHOLE_FILES):
            return True
        running = running.f_back
    return False


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
