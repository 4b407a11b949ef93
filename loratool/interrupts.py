"""The signals that end a command (Ctrl-C, SIGTERM, SIGHUP), raised as one exception at a moment at which it does no harm.

Python runs a signal's handler between any two steps of the main thread. An exception that is raised there may be lost, in a
``__del__`` or a callback of a library in C, or may break what it meets: half an import, a transaction of the database, a lock
that was just taken. So the handler looks at the frames that are running. Where one of them must not be torn, it looks again a
few milliseconds later; and where its exception was lost, it is raised again.

`Deferral` is for work that ends in its own way: workers that are to stop, a training step that is to be finished. `whole` is
for short functions that make or remove something and must not be left in the middle. What is cleaned up on the way out is
noted on the exception (`note`), so that the command line can say it.

`install` is called by the command line alone. In a program that uses loratool as a library Ctrl-C stays what it was, and
inside a `Deferral` it waits for the end of that.
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
"""Between two looks at frames that must not be torn; doubled each time, to `LONGEST_SECONDS_BETWEEN_LOOKS`."""

LONGEST_SECONDS_BETWEEN_LOOKS: Final = 0.05
SECONDS_TO_UNWIND: Final = 0.2
"""How long an exception may be on its way before it is looked for."""

IMPORTING: Final = "<frozen importlib._bootstrap>"
"""The file of the frames in which Python imports."""

CONTEXTS: Final = ExitStack.close.__code__.co_filename
"""The file of the frames in which Python enters and leaves the contexts of functions with `contextmanager`."""

TORN: Final = frozenset({"__enter__", "__exit__", "__del__"})
"""Functions that take, give back or forget something: an exception in the middle of one leaves it neither way."""

WHOLE_FILES: Final = ("/sqlalchemy/", "/registry/database.py")
"""Parts of the names of files whose functions are all `whole`: they begin, commit and take back transactions."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end. Its notes (`note`) say what was cleaned up, or how to go on."""

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        super().__init__(message)
        self.number = signal.Signals(number)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def status(self) -> int:
        """The exit status of a command that this signal ended, as shells count it."""
        return 128 + self.number


def note(error: BaseException, text: str) -> None:
    """Keep on an interrupt what was cleaned up because of it; other errors say so themselves."""
    if isinstance(error, KeyboardInterrupt):
        error.add_note(text)


def whole(function: Function) -> Function:
    """Mark a short function in which no interrupt is raised: it comes when the function, or whoever called it, is at its end."""
    code: CodeType = function.__code__
    _whole[id(code)] = code
    return function


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that an error is, or came from; None where it has nothing to do with one."""
    return next((each for each in _origins(error) if isinstance(each, KeyboardInterrupt)), None)


def notes(error: BaseException) -> list[str]:
    """What was noted on an interrupt, or on another that it took the place of, each once."""
    found = [text for each in _origins(error) for text in getattr(each, "__notes__", ())]
    return list(dict.fromkeys(found))


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or current.__context__


class Deferral:
    """Inside, a signal is not raised: `notice` is called, at once and in the main thread, and the block ends in its own way.

    At the end of the block the signal is raised, unless an error is on its way, or `raises` is off and the caller looks at
    `number`. With `patient` a second signal is raised at once; without it, it is one too many and does nothing.

    Outside the main thread nothing is raised anyway, and this does nothing. In a program that has not called `install`, it
    is for Ctrl-C where that is handled, and with `patient` for SIGTERM and SIGHUP where they would kill.
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
        """Note a signal; False where it is the second, and is to be raised."""
        if self.number is not None:
            return not self._patient
        self.number = number
        with suppress(Exception):  # it may be in the middle of the very print that it wants to make
            self._notice()
        return True

    @property
    def stops_workers(self) -> bool:
        """Whether what runs inside is to stop now, wherever it is."""
        return self.number is not None and not self._patient

    def _takes(self, number: signal.Signals) -> bool:
        handler = signal.getsignal(number)
        if number == signal.SIGINT:
            return callable(handler)
        return self._patient and handler is signal.SIG_DFL

    def _hand_on(self, number: signal.Signals) -> None:
        """Tell the deferral around this one, or whoever handles the signal outside; raise it where there is none."""
        if _deferrals:
            if not _deferrals[-1].ask(number):
                raise _raised(number)
            return
        handler = self._before.get(number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)
        raise _raised(number)


def check() -> None:
    """Raise `Interrupted`, in any thread, if the work that is under way was asked to stop; for loops over megabytes."""
    if _deferrals and _deferrals[-1].stops_workers:
        raise Interrupted(_deferrals[-1].number or signal.SIGINT)


class _State:
    """What this process knows of the signal that ends it."""

    installed = False
    number: signal.Signals | None = None
    """The signal that came and was, or is to be, raised."""
    pause = SECONDS_BETWEEN_LOOKS


_state: Final = _State()
_deferrals: Final[list[Deferral]] = []
_whole: Final[dict[int, CodeType]] = {}


def install() -> None:
    """Raise `Interrupted` in the main thread for each of the signals that is not ignored, or handled by somebody else."""
    if _state.installed:
        return
    ours = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in ours.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _received)
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.signal(signal.SIGALRM, _look_again)
    _state.installed = True
    lost, uncaught = sys.unraisablehook, sys.excepthook  # an interrupt that C code printed or dropped is raised again
    sys.unraisablehook = lambda what: None if isinstance(what.exc_value, Interrupted) else lost(what)
    sys.excepthook = lambda kind, error, trace: None if isinstance(error, Interrupted) else uncaught(kind, error, trace)


def received() -> Interrupted | None:
    """A signal that came and whose exception nobody has raised or seen; None where none did."""
    return None if _state.number is None else Interrupted(_state.number)


def finish() -> None:
    """Raise nothing from here on: the command has ended, and another signal would only tear its last words."""
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
    """Send to nowhere what is printed from here on to a terminal that is gone; it would be an error."""
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
        _look_in(SECONDS_TO_UNWIND)  # it is on its way out
        return
    if _deferrals and _deferrals[-1].ask(number):
        _state.number = None  # it raises it at its end
        return
    if _would_tear(frame):
        _look_in(_state.pause)
        _state.pause = min(2 * _state.pause, LONGEST_SECONDS_BETWEEN_LOOKS)
        return
    raise _raised(number)


def _raised(number: signal.Signals) -> Interrupted:
    """The exception to raise now; it is looked for until the command has ended."""
    if _state.installed:
        _state.number, _state.pause = number, SECONDS_BETWEEN_LOOKS
        _look_in(SECONDS_TO_UNWIND)
    return Interrupted(number)


def _look_in(seconds: float) -> None:
    if signal.getsignal(signal.SIGALRM) is _look_again:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _would_tear(frame: FrameType | None) -> bool:
    """Whether an exception in this frame would break it or be lost: in it, or in one that waits for it."""
    if frame is None:
        return False
    if frame.f_code.co_name in TORN or frame.f_code.co_filename == CONTEXTS:
        return True
    running: FrameType | None = frame
    while running is not None:
        code = running.f_code
        if id(code) in _whole or code.co_filename == IMPORTING or code.co_name == "__del__":
            return True
        if any(part in code.co_filename for part in WHOLE_FILES):
            return True
        running = running.f_back
    return False


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
