"""Downloads of a repository's files into huggingface_hub's cache, checked byte by byte.

Each file is compared with the hash that the Hub lists: the sha256 of a large file, the git blob id of a small one.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from loratool.checkpoint.threads import in_threads
from loratool.errors import HubError, NotFoundError, quoted
from loratool.hub.errors import hub_errors
from loratool.hub.logs import Retries, counted_retries, keep_logs_clean
from loratool.hub.repository import HubFile, Snapshot
from loratool.hub.retry import is_unreachable, with_retries

DOWNLOADS_AT_ONCE: Final = 4
READ_BYTES: Final = 1 << 20


class _StoppedError(Exception):
    """The download is cancelled, because another one failed or the user interrupted."""


class Watcher(Protocol):
    """A display of progress: `begin` takes the total bytes, `advance` the bytes just received, `retrying` the retries so far."""

    def begin(self, label: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def retrying(self, tries: int) -> None: ...


def fetch(snapshot: Snapshot, paths: Collection[str], command: str, watcher: Watcher | None = None, *,
          recheck: bool = True) -> Path:  # fmt: skip
    """Download the missing ones of these files of a snapshot, check all, and return the snapshot's folder in the cache.

    `command` is the user's command, for error messages. Without `recheck`, files already in the cache are not checked again.

    Raises:
        NotFoundError: a file does not exist.
        HubError: a file cannot be downloaded, or differs from what the Hub lists.
    """
    wanted = [snapshot.files.get(path, HubFile(path)) for path in paths]
    keep_logs_clean()
    if watcher is not None:
        watcher.begin("downloading", sum(file.size or 0 for file in wanted))
    stopped = threading.Event()

    def advance(count: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        if watcher is not None:
            watcher.advance(count)

    def retrying(tries: int) -> None:
        if watcher is not None and not stopped.is_set():
            watcher.retrying(tries)

    def one(file: HubFile) -> Path:
        return _fetch_one(snapshot, file, command, advance, retries, recheck)

    try:
        with counted_retries(retrying) as retries:
            found = in_threads(one, wanted, DOWNLOADS_AT_ONCE, leave=True)
    except BaseException:
        stopped.set()  # the other downloads end at their next chunk
        raise
    return found[0].parents[wanted[0].path.count("/")]


def is_cached(snapshot: Snapshot, paths: Iterable[str]) -> bool:
    """Whether all these files of a snapshot are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(snapshot.repo, path, revision=snapshot.commit), str) for path in paths)


def _fetch_one(snapshot: Snapshot, file: HubFile, command: str, advance: Callable[[int], None],
               retries: Retries, recheck: bool) -> Path:  # fmt: skip
    label = f"{quoted(file.path)} of {quoted(snapshot.repo)}"
    if snapshot.folder is not None:
        if not (snapshot.folder / file.path).is_file():
            raise NotFoundError(f"{label} is not in the cache; run '{command}' once while online")
        wrong = _why_wrong(snapshot.folder / file.path, file) if recheck else None
        if wrong is not None:
            raise HubError(f"{label} is damaged in the cache ({wrong}); run '{command}' while online")
        return snapshot.folder / file.path
    taken_as_it_is = not recheck and is_cached(snapshot, [file.path])
    path = _download(snapshot, file, command, advance, retries)
    if taken_as_it_is:
        return path
    wrong = _why_wrong(path, file)
    if wrong is not None:
        # Damaged in transit, or since then in the cache: download it again.
        path = _download(snapshot, file, command, advance, retries, force=True)
        wrong = _why_wrong(path, file)
    if wrong is not None:
        _forget(path)
        raise HubError(
            f"{label} differs from what the Hub lists, in two downloads ({wrong}); it was not kept: run '{command}' again "
            "later, and tell the repository's owner if that does not help"
        )
    return path


def _download(snapshot: Snapshot, file: HubFile, command: str, advance: Callable[[int], None], retries: Retries, *,
              force: bool = False) -> Path:  # fmt: skip
    """Download one file through huggingface_hub, which resumes after a broken connection.

    Raises:
        HubError, NotFoundError: the download failed. The message counts the tries.
    """
    from huggingface_hub import hf_hub_download

    before, ours = retries.of_this_thread(), 0

    def may_retry(error: Exception) -> bool:
        nonlocal ours
        if is_unreachable(error) and retries.of_this_thread() - before > ours:
            return False  # huggingface_hub itself has retried
        ours += 1
        retries.count()
        return True

    watching: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        watching["tqdm_class"] = _bar(advance)
    with hub_errors(command, snapshot.repo, snapshot.commit):
        try:
            return Path(
                with_retries(
                    lambda: hf_hub_download(
                        snapshot.repo, file.path, revision=snapshot.commit, force_download=force, **watching
                    ),
                    may_retry=may_retry,
                )
            )
        except Exception as error:
            tries = retries.of_this_thread() - before
            if not (tries and is_unreachable(error)):
                raise
            raise HubError(
                f"the download of {quoted(file.path)} of {quoted(snapshot.repo)} broke off {tries + 1} times; check the "
                f"network, and run '{command}' again: it resumes where it stopped"
            ) from error


def _bar(advance: Callable[[int], None]) -> type:
    """Return a class with the interface of tqdm, for huggingface_hub. It draws nothing and calls `advance` with each count."""

    class Bar:
        n = 0
        total: int | None = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def ignored(self, *args: Any, **kwargs: Any) -> None:
            pass

        close = refresh = set_description = set_description_str = ignored
        set_postfix_str = update_transfer = set_transfer_postfix_str = ignored

    return Bar


def _why_wrong(path: Path, file: HubFile) -> str | None:
    """Return how a file differs from what the Hub lists; None if it does not, or the Hub lists no hash."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if file.size is not None and size != file.size:
            return f"it has {size:,} bytes instead of {file.size:,}"
        if file.sha256 is not None:
            expected, found = file.sha256, hashlib.file_digest(stream, "sha256").hexdigest()
        elif file.blob_id is not None:
            expected, found = file.blob_id, _git_blob_id(stream, size)
        else:
            return None
    kind = "sha256" if file.sha256 is not None else "git id"
    return None if found == expected else f"its {kind} is {found[:12]}… instead of {expected[:12]}…"


def _git_blob_id(stream: BinaryIO, size: int) -> str:
    """Return the git blob id of a file's content: SHA-1 over ``blob <size>\\0`` and the content."""
    hasher = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while chunk := stream.read(READ_BYTES):
        hasher.update(chunk)
    return hasher.hexdigest()


def _forget(path: Path) -> None:
    """Remove a wrong file from the cache, so that no program loads it: the link and its target."""
    real = Path(os.path.realpath(path))
    path.unlink(missing_ok=True)
    real.unlink(missing_ok=True)
