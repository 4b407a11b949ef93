"""Files into a repository on the Hub: compared with what is there, and sent in one commit where anything differs."""

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

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

COMMAND: Final = "loratool push"
MAIN: Final = "main"
MOST_PROPOSALS: Final = 10
"""How many open pull requests are looked at for one that proposes the same."""

State = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class Content:
    """A file as it is to be in the repository: its `path` there, and where its bytes are."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """What the Hub knows a large file by."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        with open(self.source, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """What the Hub, which is git, knows a small file by."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that is there: its size, its git id, and of a large one the sha256."""

    size: int | None
    blob_id: str | None
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Whether it is the same."""
        if self.size != content.size:
            return False
        return content.sha256 == self.sha256 if self.sha256 else content.blob_id == self.blob_id


@dataclass(frozen=True, slots=True)
class Remote:
    """What is in a repository now.

    Attributes:
        repository, revision: where to push to: the name that it has now, and a branch.
        exists: whether there is such a repository.
        private: whether it is private, where it exists.
        head: the commit that the branch is at; None where there is no such branch yet.
        files: of that commit; of the main branch where the branch is still to be made, since it begins there.
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
        """What a push would do to a file."""
        there = self.files.get(content.path)
        return "new" if there is None else "same" if there.holds(content) else "changed"


@dataclass(frozen=True, slots=True)
class Sent:
    """A commit, the pull request that proposes it, and whether it is new or was there already."""

    commit: str
    pull_request: str | None
    is_new: bool = True


def look(repository: str, revision: str | None = None) -> Remote:
    """What is in `repository` now, at a branch; nothing where there is no such repository that this user may see.

    Raises:
        NotFoundError, HubError: the Hub does not say, or its README cannot be read.
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
    """The id that a model has on the Hub now; None where there is none that this user may see.

    Raises:
        HubError: the Hub does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(COMMAND, repository):
        try:
            return client().model_info(repository, timeout=TIMEOUT).id
        except RepositoryNotFoundError:
            return None


def is_public(repository: str) -> bool:
    """Whether everybody may see a repository.

    Raises:
        HubError: the Hub does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(COMMAND, repository):
        try:
            return client().model_info(repository, timeout=TIMEOUT).private is False
        except RepositoryNotFoundError:
            return False


def user_name() -> str:
    """Who the token belongs to.

    Raises:
        HubError: there is no token, or the Hub does not take it.
    """
    from huggingface_hub import constants

    with hub_errors(COMMAND, constants.ENDPOINT):
        return str(client().whoami()["name"])


def check_card(readme: str) -> None:
    """Have huggingface_hub and the Hub check the front matter of a README.

    Raises:
        HubError: they do not accept it.
    """
    from huggingface_hub import ModelCard

    with hub_errors(COMMAND, README):
        try:
            ModelCard(readme).validate()
        except (ValueError, TypeError) as error:  # TypeError of keys that are no words
            if isinstance(error, OSError):
                raise
            said = " ".join(str(error).split())
            raise HubError(
                f"the Hub does not accept the front matter of {README}: {said}; mend --license, or the file on the Hub"
            ) from None


def refuse_token(contents: Sequence[Content]) -> None:
    """Raise HubError if a text among the files holds the user's token."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for content in contents:
        if not token or content.path.endswith(".safetensors"):
            continue
        data = content.source if isinstance(content.source, bytes) else content.source.read_bytes()
        if token in data:
            raise HubError(f"{quoted(content.path)} would show your token to everybody; take it out of there")


def send(
    remote: Remote, contents: Sequence[Content], message: str, *, private: bool = False, create_pr: bool = False
) -> Sent:
    """Make the repository or the branch where it is missing, and commit the files that differ, all at once.

    What was uploaded before an interruption is not uploaded again.

    Raises:
        NotFoundError, HubError: the Hub refuses, fails, or cannot be reached; what was there stays as it was.
    """
    from huggingface_hub import CommitOperationAdd

    api = client()
    with hub_errors(COMMAND, remote.repository, remote.revision):
        if not remote.exists:
            api.create_repo(remote.repository, private=private)
        if remote.head is None and remote.revision != MAIN:
            api.create_branch(remote.repository, branch=remote.revision)
        differing = [each for each in contents if remote.state_of(each) != "same"]
        if not differing:  # of a new branch, which begins with all that there is
            info = api.model_info(remote.repository, revision=remote.revision, timeout=TIMEOUT)
            return Sent(info.sha or remote.revision, None, is_new=False)
        done = api.create_commit(
            remote.repository,
            [CommitOperationAdd(each.path, each.source) for each in differing],
            commit_message=message,
            revision=remote.revision,
            create_pr=create_pr,
            # A commit that came in between would be overwritten.
            parent_commit=None if create_pr else remote.head,
        )
    return Sent(done.oid, done.pr_url)


def find_proposal(remote: Remote, contents: Sequence[Content]) -> Sent | None:
    """An open pull request that holds all of these files as they are; None where there is none.

    Raises:
        NotFoundError, HubError: the Hub does not say.
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
        raise HubError(f"{README} of {quoted(repository)} is no UTF-8 text; mend it on the Hub") from None
