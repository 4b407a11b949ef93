"""A model repository at one commit, with the Hub's list of its files, or offline, the files in huggingface_hub's cache.

All requests name that commit, so changes to the repository in the meantime have no effect.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.errors import HubError, NotFoundError, quoted
from loratool.hub.address import HubAddress, leaves_its_folder
from loratool.hub.client import client
from loratool.hub.errors import LOG_IN, hub_errors
from loratool.hub.retry import is_unreachable, with_retries

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
TIMEOUT: Final = 60.0
"""Seconds that the Hub may take to list a repository. huggingface_hub has no timeout of its own."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """The Hub's facts about a file: its size in bytes, and the sha256 of a large file or the git blob id of a small one."""

    path: str
    size: int | None = None
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether the size and a hash are known, so that a download can be checked."""
        return self.size is not None and (self.sha256 is not None or self.blob_id is not None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        repo: ``owner/name``, as requested.
        commit: 40 hexadecimal digits.
        files: the files of the commit, by path, or those in the cache if the Hub was not asked.
        base_models: the bases that its card names.
        folder: its folder in the cache if the Hub was not asked, else None.
    """

    repo: str
    commit: str
    files: Mapping[str, HubFile]
    base_models: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def is_from_cache(self) -> bool:
        return self.folder is not None

    def names_in(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in a folder (``""`` is the top)."""
        return [name for name in self.names_below(folder) if "/" not in name]

    def names_below(self, folder: str) -> list[str]:
        """Return the sorted paths of all files below a folder (``""`` is the top), relative to it."""
        prefix = f"{folder}/" if folder else ""
        return sorted(path.removeprefix(prefix) for path in self.files if path.startswith(prefix))


def look(address: HubAddress, command: str, *, fresh: bool = False) -> Snapshot:
    """Ask the Hub for a repository at the current commit of its revision.

    Offline, or if the Hub cannot be reached, the cache's copy is returned, unless `fresh`. `command` is the user's command,
    for error messages.

    Raises:
        NotFoundError: there is no such repository or revision, this user may not see it, or the cache lacks it.
        HubError: the Hub cannot be reached, keeps failing, or sends an invalid response.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not fresh:
        return look_in_cache(address, command)
    with hub_errors(command, address.repo, address.revision), sensible_answers(address.repo):
        try:
            info = with_retries(
                lambda: client().model_info(
                    address.repo, revision=address.revision, files_metadata=True, timeout=TIMEOUT
                )
            )
        except Exception as error:
            if not fresh and is_unreachable(error):
                cached = _in_cache(address)
                if cached is not None:
                    return cached
            raise
        return _snapshot(address.repo, address.revision, info)


def cache_folder(repo: str) -> Path:
    """Return the folder of a repository in huggingface_hub's cache, which may not exist."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


@contextmanager
def sensible_answers(subject: str) -> Iterator[None]:
    """Turn responses that huggingface_hub cannot parse into a HubError.

    Raises:
        HubError: a response is invalid, or the user's token is.
    """
    try:
        yield
    except UnicodeEncodeError:
        raise HubError(f"the token in HF_TOKEN or from 'hf auth login' holds an invalid character; {LOG_IN}") from None
    except (TypeError, KeyError, AttributeError, RecursionError, OverflowError, json.JSONDecodeError) as error:
        raise HubError(
            f"the Hub's response for {quoted(subject)} is invalid ({type(error).__name__}); is there a Hub at HF_ENDPOINT?"
        ) from error


def look_in_cache(address: HubAddress, command: str) -> Snapshot:
    """Return the repository as it is in the cache, without network.

    Raises:
        NotFoundError: the cache lacks it.
    """
    found = _in_cache(address)
    if found is None:
        raise NotFoundError(
            f"{quoted(address)} is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub; "
            f"run '{command}' once while online"
        )
    return found


def _in_cache(address: HubAddress) -> Snapshot | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(address.repo, revision=address.revision, allow_patterns=[], local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    if COMMIT.fullmatch(folder.name) is None:
        return None
    files = {path: _cached_file(folder, path) for path in _files_below(folder)}
    return Snapshot(address.repo, folder.name, files, folder=folder)


def remember(snapshot: Snapshot, revision: str | None) -> None:
    """Record the commit of a branch or tag in the cache, as huggingface_hub does, so that it is found offline.

    The cache's layout is documented: ``refs/<revision>`` holds the commit. Failures to write it are ignored.
    """
    from huggingface_hub import constants

    name = revision or constants.DEFAULT_REVISION
    if snapshot.is_from_cache or name == snapshot.commit:
        return
    ref = cache_folder(snapshot.repo) / "refs" / name
    draft = ref.with_name(f".{ref.name}.{os.getpid()}")
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(snapshot.commit)
        draft.replace(ref)


def _snapshot(repo: str, revision: str | None, info: ModelInfo) -> Snapshot:
    """Return the snapshot in the Hub's response, and check every part of it."""
    if not isinstance(info.sha, str) or COMMIT.fullmatch(info.sha) is None:
        raise HubError(f"the Hub names no commit of {quoted(repo)}; is there a Hub at HF_ENDPOINT?")
    if revision is not None and COMMIT.fullmatch(revision) and info.sha != revision:
        raise HubError(f"the Hub returned a different commit of {quoted(repo)} than the requested {revision[:12]}…")
    files = {}
    for sibling in info.siblings or ():
        path = sibling.rfilename
        if not isinstance(path, str) or leaves_its_folder(path):
            raise HubError(
                f"{quoted(repo)} lists a file {quoted(path)}, which would be outside its folder; do not use this repository"
            )
        files[path] = _listed_file(path, sibling)
    return Snapshot(repo, info.sha, files, _base_models(info))


def _listed_file(path: str, sibling: RepoSibling) -> HubFile:
    large = sibling.lfs
    size = large.size if large is not None else sibling.size
    return HubFile(
        path,
        size if type(size) is int and size >= 0 else None,
        _matching(SHA256, large.sha256 if large is not None else None),
        # For a large file, it is the id of the pointer file.
        None if large is not None else _matching(COMMIT, sibling.blob_id),
    )


def _cached_file(folder: Path, path: str) -> HubFile:
    """A file in the cache. It links to a blob named by its sha256 or git blob id."""
    try:
        blob = (folder / path).readlink().name
    except OSError:
        blob = ""
    return HubFile(path, None, _matching(SHA256, blob), _matching(COMMIT, blob))


def _files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _matching(pattern: re.Pattern[str], text: object) -> str | None:
    return text if isinstance(text, str) and pattern.fullmatch(text) else None


def _base_models(info: ModelInfo) -> tuple[str, ...]:
    recorded = getattr(info.card_data, "base_model", None)
    named = recorded if isinstance(recorded, list) else [recorded]
    return tuple(name for name in named if isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable())
