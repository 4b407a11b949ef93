"""`loratool.push`: upload an adapter or a merged model to the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loratool.errors import HubError, LoratoolError, NotFoundError, quoted
from loratool.formats.alpha import Alpha
from loratool.hub.address import is_repository, repository_id
from loratool.hub.client import ask_once
from loratool.hub.errors import refuse_anonymous, refuse_offline
from loratool.hub.push import (
    COMMAND,
    MAIN,
    Remote,
    Sent,
    check_card,
    find_proposal,
    look,
    refuse_token,
    send,
    user_name,
)
from loratool.hub.retry import is_unreachable
from loratool.library.places.user_path import exists, user_path
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import RANK_SIGN, resolve_adapter
from loratool.library.uploads.adapter_upload import prepare_adapter
from loratool.library.uploads.model_upload import open_model, prepare_model
from loratool.library.uploads.upload import Upload, Wishes, refuse_mixed
from registry import AdapterRecord, Location, RegistryError

if TYPE_CHECKING:
    from registry import Registry

Confirm = Callable[[str], bool]
"""Callback that asks the user a question and returns whether the answer is yes."""


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of a push. `state` compares it with the file on the Hub: ``new``, ``changed`` or ``same``."""

    path: str
    size_bytes: int
    state: str


@dataclass(frozen=True, slots=True)
class PushResult:
    """The result of a push, or with `dry_run` the expected result.

    Attributes:
        source: the adapter's reference, or the folder of the merged model.
        merged: whether a merged model was pushed.
        repository: its id on the Hub.
        url: of the repository.
        revision: the branch.
        commit: the current commit of the branch or the pull request; None in a dry run.
        pull_request: URL of the pull request, with `create_pr`.
        created: whether the repository was created.
        private: whether the repository is private.
        files: every file of the push.
        card: the text of its README.
        notes: notes for the user.
        sent: whether there is a new commit.
        dry_run: whether nothing was sent.
    """

    source: str
    merged: bool
    repository: str
    url: str
    revision: str
    commit: str | None
    pull_request: str | None
    created: bool
    private: bool
    files: tuple[PushedFile, ...]
    card: str
    notes: tuple[str, ...]
    sent: bool
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "source": self.source,
            "merged": self.merged,
            "repository": self.repository,
            "url": self.url,
            "revision": self.revision,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "created": self.created,
            "private": self.private,
            "files": [{"path": f.path, "size_bytes": f.size_bytes, "state": f.state} for f in self.files],
            "card": self.card,
            "notes": list(self.notes),
            "sent": self.sent,
            "dry_run": self.dry_run,
        }


def push(adapter: str | os.PathLike[str] | None = None, repository: str | None = None, *, merged: bool = False,
         files: Sequence[str | os.PathLike[str]] = (), all_files: bool = False,
         private: bool = False, create_pr: bool = False, revision: str | None = None, message: str | None = None,
         license: str | None = None, base_model: str | None = None, alpha: Alpha | None = None,  # noqa: A002
         dry_run: bool = False, confirm: Confirm | None = None, progress: Progress | None = None,
         registry: str | None = None) -> PushResult:  # fmt: skip
    """Upload an adapter to the Hugging Face Hub in PEFT's layout, with a card, in one commit.

    Files that the repository already has are not sent again, and if nothing differs there is no commit. A README that a
    person wrote is kept; only loratool's own part of it is updated.

    Args:
        adapter: a catalogued name or a path; by default the newest adapter of the catalogue. With `merged` the folder, or the
            catalogued name, of a model that loratool merged or quantized.
        repository: ``owner/name``, or ``name`` for the user's own; by default the adapter's name.
        merged: push a merged model instead of an adapter.
        files: with `merged`, files to send that were added to the folder after the merge: paths, or names in the folder.
        all_files: with `merged`, send all added files.
        private: make the repository private if it is created.
        create_pr: propose the files in a pull request.
        revision: the branch; it is created if it is missing.
        message: of the commit.
        license: the Hub's name of the license (``apache-2.0``); by default the card's license stays.
        base_model: the Hub id of the base, if the catalogue does not know it; ``none`` if it is not on the Hub.
        alpha: alpha of a bare file that does not state it: a number, or ``rank`` for each module's rank.
        dry_run: send nothing.
        confirm: called before a public repository is created; by default nobody is asked.
        progress: receives the progress of checking a merged model.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is committed.
    """
    from huggingface_hub import constants

    if message is not None and not message.strip():
        raise LoratoolError("the commit message is empty; give a text to --message, or leave it out")
    if merged and alpha is not None:
        raise LoratoolError("--alpha is for an adapter, and --merged pushes a model; leave one of them out")
    if not merged and (files or all_files):
        raise LoratoolError("--file and --all-files are for the folder of a merged model; give --merged as well")
    if not dry_run:
        refuse_offline(COMMAND)
        refuse_anonymous(COMMAND)
    unasked = _why_unasked() if dry_run else None
    online = unasked is None
    with open_registry(registry, read_only=True) as catalogue, TemporaryDirectory(prefix="loratool-") as scratch:
        remote, upload = _prepare(
            adapter, repository, revision, catalogue, Path(scratch), merged=merged, alpha=alpha,
            files=files, all_files=all_files, wishes=Wishes(license, base_model, online), watcher=progress or Silent(),
        )  # fmt: skip
        _refuse_impossible(remote, private=private, create_pr=create_pr)
        refuse_mixed(remote, upload.contents, merged=merged)
        if online:
            check_card(upload.card)
        refuse_token(upload.contents)
        pushed = tuple(PushedFile(each.path, each.size, remote.state_of(each)) for each in upload.contents)
        differs = remote.head is None or any(each.state != "same" for each in pushed)
        sent = None
        if differs and not dry_run:
            sent = _send(upload, remote, message, private=private, create_pr=create_pr, confirm=confirm)
    notes = [*upload.notes, *([] if online else [f"the Hub was not asked which files it has: {unasked}"])]
    is_proposal = sent is not None and sent.pull_request is not None  # not in the repository until it is accepted
    if upload.record is not None and not dry_run and not is_proposal:
        notes += _record(upload.record, remote.repository, sent.commit if sent else remote.head, registry)
    return PushResult(
        source=upload.source,
        merged=merged,
        repository=remote.repository,
        url=f"{constants.ENDPOINT}/{remote.repository}",
        revision=remote.revision,
        commit=sent.commit if sent else None if dry_run else remote.head,
        pull_request=sent.pull_request if sent else None,
        created=not remote.exists and sent is not None,
        private=remote.private if remote.exists else private,
        files=pushed,
        card=upload.card,
        notes=tuple(notes),
        sent=sent is not None and sent.is_new,
        dry_run=dry_run,
    )


def _prepare(adapter: str | os.PathLike[str] | None, repository: str | None, revision: str | None, catalogue: Registry,
             scratch: Path, *, merged: bool, alpha: Alpha | None, files: Sequence[str | os.PathLike[str]],
             all_files: bool, wishes: Wishes, watcher: Progress) -> tuple[Remote, Upload]:  # fmt: skip
    """Return the repository as it is now, and the upload."""
    if merged:
        model = open_model(os.fspath(adapter or ""), catalogue, watcher)
        remote = _look(repository, model.path.resolve().name, revision, online=wishes.online)
        return remote, prepare_model(model, catalogue, remote, wishes, files=files, all_files=all_files)
    name = _newest(catalogue) if adapter is None else os.fspath(adapter)
    _refuse_repository(name, repository)
    found = resolve_adapter(name, catalogue, alpha)
    remote = _look(repository, found.label, revision, online=wishes.online)
    return remote, prepare_adapter(found, catalogue, remote, wishes, scratch)


def _why_unasked() -> str | None:
    """Return why the Hub cannot be reached, which a dry run can do without; None if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids it"
    try:
        ask_once()
    except Exception as error:
        if not is_unreachable(error):
            raise
        return f"{constants.ENDPOINT} cannot be reached"
    return None


def _newest(catalogue: Registry) -> str:
    newest = catalogue.adapters.list(sort="created_at")[:1]
    if not newest:
        raise NotFoundError("the catalogue has no adapter to push; name one, or add one with 'loratool add'")
    return newest[0].reference


def _refuse_repository(adapter: str, repository: str | None) -> None:
    """Raise NotFoundError for an adapter at a rank, and if only a repository was named."""
    if RANK_SIGN in adapter and not exists(user_path(adapter)):
        raise NotFoundError(
            f"{quoted(adapter)} has no file of its own to push; make one with 'loratool truncate', or push the whole adapter"
        )
    if repository is None and is_repository(adapter) and not exists(user_path(adapter)):
        raise NotFoundError(
            f"there is no adapter {quoted(adapter)}; if that is the repository, name the adapter first: {COMMAND} ADAPTER "
            f"{adapter}"
        )


def _look(given: str | None, name: str, revision: str | None, *, online: bool) -> Remote:
    """Return the repository with its current files; without files unless `online`."""
    text = given or name
    if "/" not in text:
        if not online:
            raise HubError(f"{COMMAND} must ask the Hub for your user name, and cannot now; write owner/{text}")
        text = f"{user_name()}/{text}"
    repository = repository_id(text)
    return look(repository, revision) if online else Remote(repository, revision or MAIN)


def _refuse_impossible(remote: Remote, *, private: bool, create_pr: bool) -> None:
    """Raise HubError if the options do not fit the repository."""
    if create_pr and not remote.exists:
        raise HubError(
            f"there is no repository {quoted(remote.repository)} to propose anything to; leave --create-pr out"
        )
    if create_pr and remote.head is None:
        raise HubError(
            f"{quoted(remote.repository)} has no branch {quoted(remote.revision)} to propose anything to; leave --revision out"
        )
    if private and remote.exists and not remote.private:
        raise HubError(
            f"{quoted(remote.repository)} exists already and is public; leave --private out, make it private on the Hub, or "
            "choose another name"
        )


def _send(upload: Upload, remote: Remote, message: str | None, *, private: bool, create_pr: bool,
          confirm: Confirm | None) -> Sent:  # fmt: skip
    if create_pr:
        proposed = find_proposal(remote, upload.contents)
        if proposed is not None:
            return proposed
    question = f"Make the public repository {remote.repository}, where everybody sees it?"
    if not (remote.exists or private or confirm is None or confirm(question)):
        raise HubError("nothing was pushed; with --private only you see the repository")
    return send(remote, upload.contents, message or f"Push {_label(upload)}", private=private, create_pr=create_pr)


def _label(upload: Upload) -> str:
    """Return a name for the upload without local folders."""
    return upload.record.reference if upload.record else Path(upload.source).name


def _record(record: AdapterRecord, repository: str, commit: str | None, registry: str | None) -> list[str]:
    """Record the adapter's place on the Hub. Since it is pushed, a catalogue that cannot be written gives only a note."""
    if commit is None:
        return []
    try:
        with open_registry(registry) as catalogue:
            catalogue.adapters.add_location(record.reference, Location(kind="hub", repo=repository, revision=commit))
    except RegistryError as error:
        return [f"it is pushed, but the catalogue does not know of it: {error}"]
    return []
