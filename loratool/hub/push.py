"""Pushes of files to a repository on the Hub: they are compared with its files, and those that differ go in one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from loratool.errors import HubError, quoted
from loratool.hub.client import client
from loratool.hub.errors import hub_errors
from loratool.hub.readme import README
from loratool.hub.repository import TIMEOUT
from loratool.interrupts import note

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

COMMAND: Final = "loratool push"
MAIN: Final = "main"
MOST_PROPOSALS: Final = 10
"""The number of open pull requests in which to look for the same proposal."""

State = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class Content:
    """A file to push: its `path` in the repository, and a local file or the bytes themselves."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """The size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The sha256, by which the Hub identifies large files."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        with open(self.source, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """The git blob id, by which the Hub identifies small files."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in the repository: its size, its git blob id, and its sha256 if it is large."""

    size: int | None
    blob_id: str | None
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Whether it equals `content`."""
        if self.size != content.size:
            return False
        return content.sha256 == self.sha256 if self.sha256 else content.blob_id == self.blob_id


@dataclass(frozen=True, slots=True)
class Remote:
    """The state of a repository on the Hub.

    Attributes:
        repository, revision: the repository's current id, and the branch to push to.
        exists: whether the repository exists.
        private: whether it exists and is private.
        head: the commit of the branch; None if the branch does not exist yet.
        files: the files of that commit, or of the main branch if a new branch will start from it.
        readme: the text of its README.
    """

    repository: str
    revision: str = MAIN
    exists: bool = False
    private: bool = False
    head: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    readme: str | None = None

    def state_of(self, content: Content) -> State:
        """Return whether a push would add or change a file, or leave it the same."""
        there = self.files.get(content.path)
        return "new" if there is None else "same" if there.holds(content) else "changed"


@dataclass(frozen=True, slots=True)
class Sent:
    """A commit, the URL of the pull request that proposes it if any, and whether this push made it."""

    commit: str
    pull_request: str | None
    is_new: bool = True


def look(repository: str, revision: str | None = None) -> Remote:
    """Return the state of `repository` at a branch; it is empty if this user can see no such repository.

    Raises:
        NotFoundError, HubError: the request failed, or the README cannot be read.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    branch = revision or MAIN
    api = client()
    with hub_errors(COMMAND, repository, branch):
        try:
            info = api.model_info(repository, revision=branch, files_metadata=True, timeout=TIMEOUT)
            head = info.sha
        except RevisionNotFoundError:
            if branch.startswith("refs/") or branch == MAIN:
                raise
            info, head = api.model_info(repository, files_metadata=True, timeout=TIMEOUT), None
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Remote(repository, branch)
        files = _files(info)
        readme = _read_readme(repository, info.sha) if README in files else None
    return Remote(info.id, branch, True, bool(info.private), head, files, readme)


def find_model(repository: str) -> str | None:
    """Return a model's current id on the Hub; None if this user can see no such model.

    Raises:
        HubError: the request failed.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(COMMAND, repository):
        try:
            return client().model_info(repository, timeout=TIMEOUT).id
        except RepositoryNotFoundError:
            return None


def is_public(repository: str) -> bool:
    """Whether a repository is public.

    Raises:
        HubError: the request failed.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(COMMAND, repository):
        try:
            return client().model_info(repository, timeout=TIMEOUT).private is False
        except RepositoryNotFoundError:
            return False


def user_name() -> str:
    """Return the name of the user that the token belongs to.

    Raises:
        HubError: there is no token, or the Hub does not accept it.
    """
    from huggingface_hub import constants

    with hub_errors(COMMAND, constants.ENDPOINT):
        return str(client().whoami()["name"])


def check_card(readme: str) -> None:
    """Check the front matter of a README with huggingface_hub and the Hub.

    Raises:
        HubError: it is not accepted.
    """
    from huggingface_hub import ModelCard

    with hub_errors(COMMAND, README):
        try:
            ModelCard(readme).validate()
        except (ValueError, TypeError) as error:  # a TypeError comes from keys that are not strings
            if isinstance(error, OSError):
                raise
            said = " ".join(str(error).split())
            raise HubError(
                f"the Hub does not accept the front matter of {README}: {said}; correct --license, or the file on the Hub"
            ) from None


def refuse_token(contents: Sequence[Content]) -> None:
    """Raise HubError if a text file holds the user's token."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for content in contents:
        if not token or content.path.endswith(".safetensors"):
            continue
        data = content.source if isinstance(content.source, bytes) else content.source.read_bytes()
        if token in data:
            raise HubError(f"{quoted(content.path)} holds your token and would publish it; remove it from there")


def send(
    remote: Remote, contents: Sequence[Content], message: str, *, private: bool = False, create_pr: bool = False
) -> Sent:
    """Create the repository or branch if it is missing, and commit the files that differ in one commit.

    After an interruption, files that were already uploaded are not uploaded again.

    Raises:
        NotFoundError, HubError: the Hub refuses, fails, or cannot be reached. The repository's files are unchanged.
    """
    from huggingface_hub import CommitOperationAdd

    api = client()
    with hub_errors(COMMAND, remote.repository, remote.revision):
        if not remote.exists:
            api.create_repo(remote.repository, private=private)
        if remote.head is None and remote.revision != MAIN:
            api.create_branch(remote.repository, branch=remote.revision)
        differing = [each for each in contents if remote.state_of(each) != "same"]
        if not differing:  # for example a new branch, which starts with the files of the main branch
            info = api.model_info(remote.repository, revision=remote.revision, timeout=TIMEOUT)
            return Sent(info.sha or remote.revision, None, is_new=False)
        try:
            done = api.create_commit(
                remote.repository,
                [CommitOperationAdd(each.path, each.source) for each in differing],
                commit_message=message,
                revision=remote.revision,
                create_pr=create_pr,
                # Without it, a commit made in the meantime would be overwritten.
                parent_commit=None if create_pr else remote.head,
            )
        except KeyboardInterrupt as stopped:
            note(
                stopped,
                f"{remote.repository} has all of the files or none; run the command again, which sends nothing twice",
            )
            raise
    return Sent(done.oid, done.pr_url)


def find_proposal(remote: Remote, contents: Sequence[Content]) -> Sent | None:
    """Return an open pull request that already holds exactly these files; None if there is none.

    Raises:
        NotFoundError, HubError: the request failed.
    """
    api = client()
    with hub_errors(COMMAND, remote.repository):
        opened = api.get_repo_discussions(remote.repository, discussion_type="pull_request", discussion_status="open")
        for proposal, _ in zip(opened, range(MOST_PROPOSALS), strict=False):
            ref = f"refs/pr/{proposal.num}"
            info = api.model_info(remote.repository, revision=ref, files_metadata=True, timeout=TIMEOUT)
            files = _files(info)
            if all(each.path in files and files[each.path].holds(each) for each in contents):
                return Sent(info.sha or ref, proposal.url, is_new=False)
    return None


def _files(info: ModelInfo) -> dict[str, RemoteFile]:
    return {
        each.rfilename: RemoteFile(each.size, each.blob_id, each.lfs.sha256 if each.lfs else None)
        for each in info.siblings or ()
    }


def _read_readme(repository: str, commit: str | None) -> str:
    file = client().hf_hub_download(repository, README, revision=commit)
    try:
        return Path(file).read_bytes().decode()
    except UnicodeDecodeError:
        raise HubError(f"{README} of {quoted(repository)} is not UTF-8 text; correct it on the Hub") from None
