"""Translation of huggingface_hub's errors into errors that say what to do next and never contain a token."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from loratool.errors import HubError, HubUnreachableError, LoratoolError, NotFoundError, quoted

TOKEN: Final = re.compile(r"hf_[A-Za-z0-9_]{6,}")
SIGNED: Final = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
"""A URL with a query, which may be a signature that grants access."""

LOG_IN: Final = "log in with 'hf auth login', or set HF_TOKEN"
MOST_CAUSES: Final = 8


@contextmanager
def hub_errors(command: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub in the block into a LoratoolError; other errors pass through.

    `command` is the user's command (``loratool push``), `repository` the one it concerns. Both are for the messages.

    Raises:
        NotFoundError: there is no such repository, revision or file, or this user may not see it.
        HubError: access is gated or forbidden, the Hub fails or cannot be reached, or the disk is full.
    """
    try:
        yield
    except LoratoolError:
        raise
    except Exception as error:
        explained = _explained(error, command, repository, revision)
        if explained is None:
            raise
        raise explained from None


def refuse_offline(command: str) -> None:
    """Refuse `command`, which needs the network, if HF_HUB_OFFLINE is set.

    Raises:
        HubError: HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _offline(command)


def refuse_anonymous(command: str) -> None:
    """Refuse `command`, which needs a token, if there is none.

    Raises:
        HubError: there is no token.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise _anonymous(command)


def without_secrets(text: str) -> str:
    """Return `text` without tokens and without the queries of URLs, which may be signatures."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "hf_…")
    return SIGNED.sub(r"\1", TOKEN.sub("hf_…", text))


def _explained(error: Exception, command: str, repository: str, revision: str | None) -> LoratoolError | None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    causes = list(_causes(error))
    if any(isinstance(each, OfflineModeIsEnabled) for each in causes):
        return _offline(command, repository)
    answered = next((each for each in causes if isinstance(each, HfHubHTTPError)), None)
    if answered is not None:
        return _refused(answered, repository, revision)
    full = next((each for each in causes if isinstance(each, OSError) and each.errno in _NO_ROOM), None)
    if full is not None:
        where = f" for {quoted(full.filename)}" if full.filename else ""
        return HubError(f"no space is left on the disk{where}; free some, and run {command} again")
    if isinstance(error, LocalTokenNotFoundError):
        return _anonymous(command)
    if isinstance(error, HFValidationError):
        return NotFoundError(f"{quoted(repository)} is not a Hub id: {_first_line(error)}; write owner/name")
    if _from_xet(error):
        return HubError(
            f"{quoted(repository)}: Xet failed ({_first_line(error)}); run {command} again, with HF_HUB_DISABLE_XET=1 if "
            "your Hub does not support Xet"
        )
    transport = HfHubHTTPError.__bases__  # huggingface_hub's HTTP library depends on its version
    broken = next((each for each in causes if isinstance(each, transport) and not isinstance(each, OSError)), None)
    if broken is not None or isinstance(error, ConnectionError):
        return _unreachable(broken or error, command)
    if isinstance(error, OSError) and error.filename is not None:
        return None  # an error of the disk, which the command line explains
    if type(error).__module__.startswith(("huggingface_hub", "hf_xet")) or isinstance(error, (ValueError, OSError)):
        return HubError(f"{quoted(repository)}: {_first_line(error)}; run {command} again")
    return None


def _refused(error: Any, repository: str, revision: str | None) -> LoratoolError:
    """Return the error for a response of the Hub, with the next step. `error` is an HfHubHTTPError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, status = quoted(repository), error.response.status_code
    said = _said(error)
    if isinstance(error, GatedRepoError):
        url = f"{constants.ENDPOINT}/{repository}"
        return HubError(f"{name} is gated: {said}; ask for access at {url}, then {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(
            f"{name} has no revision {quoted(revision or 'main')} ({said}); check its branches and tags"
        )
    if isinstance(error, EntryNotFoundError):
        return NotFoundError(
            f"a file is not in {name} ({said}); check the path, or run the command again if it was there before"
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotFoundError(
            f"there is no repository {name} at {constants.ENDPOINT}, or it is private and you may not see it ({said}); "
            f"check the name, or {LOG_IN}"
        )
    return HubError(f"{name}: the Hub answered {status} ({said}); {_next_step(status)}")


def _next_step(status: int) -> str:
    if status == 401:
        return f"your token is not valid here: {LOG_IN}"
    if status == 403:
        return f"your token may not do this: {LOG_IN} with one that may, or propose the change with --create-pr"
    if status == 412:
        return "there is a new commit in the meantime: run the command again"
    if status == 429:
        return "too many requests: wait some minutes and run the command again"
    if status >= 500:
        return "the fault is the Hub's: run the command again later"
    return "follow that message, and run the command again"


def _offline(command: str, repository: str | None = None) -> HubUnreachableError:
    subject = (
        f"{command} needs the network"
        if repository is None
        else f"{command} needs the network for {quoted(repository)}"
    )
    return HubUnreachableError(f"{subject}, and HF_HUB_OFFLINE forbids it; unset HF_HUB_OFFLINE and run it again")


def _anonymous(command: str) -> HubError:
    return HubError(f"{command} needs a token; {LOG_IN}")


def _unreachable(error: BaseException, command: str) -> HubUnreachableError:
    from huggingface_hub import constants

    what = f"the Hub at {constants.ENDPOINT} cannot be reached, or the connection broke off"
    return HubUnreachableError(
        f"{what} ({_first_line(error)}); check the network and HF_ENDPOINT, and run {command} again"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, outermost first, at most MOST_CAUSES since they may form a loop."""
    current: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _from_xet(error: BaseException) -> bool:
    """Whether the error passed through huggingface_hub's Xet code, which has no error class of its own."""
    trace = error.__traceback__
    while trace is not None:
        if "xet" in trace.tb_frame.f_code.co_name:
            return True
        trace = trace.tb_next
    return False


def _said(error: Any) -> str:
    """The Hub's message, or the first line of huggingface_hub's if it sent none."""
    words = " ".join(str(error.server_message or "").split())
    return without_secrets(words).rstrip(".") if words else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return without_secrets(lines[0] if lines else type(error).__name__).rstrip(".:")


_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT}
