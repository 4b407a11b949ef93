"""`loratool.push`: upload an adapter or a merged model to the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loratool.errors import HubError, NotFoundError, quoted
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
from loratool.interrupts import note
from loratool.library.places.user_path import exists, user_path
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import RANK_SIGN, ResolvedAdapter, resolve_adapter
from loratool.library.uploads.adapter_upload import prepare_adapter
from loratool.library.uploads.model_upload import MergedModel, open_model, prepare_model
from loratool.library.uploads.options import PushOptions
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
    options = PushOptions(merged, files, all_files, alpha, private, create_pr, revision, message, dry_run)
    options.check()
    if not dry_run:
        refuse_offline(COMMAND)
        refuse_anonymous(COMMAND)
    unasked = _why_unasked() if dry_run else None
    wishes = Wishes(license, base_model, online=unasked is None)
    with open_registry(registry, read_only=True) as catalogue, TemporaryDirectory(prefix="loratool-") as scratch:
        source = _source(adapter, repository, catalogue, options, progress or Silent())
        remote = _look(repository, source, options, online=wishes.online)
        upload = _prepare(source, remote, catalogue, options, wishes, Path(scratch))
        _check(upload, remote, options, online=wishes.online)
        if dry_run:
            notes = [] if unasked is None else [f"the Hub was not asked which files it has: {unasked}"]
            return _result(upload, remote, options, None, notes)
        sent, notes = _deliver(upload, remote, options, confirm, catalogue)
        return _result(upload, remote, options, sent, notes)


def _source(adapter: str | os.PathLike[str] | None, repository: str | None, catalogue: Registry, options: PushOptions,
            watcher: Progress) -> ResolvedAdapter | MergedModel:  # fmt: skip
    """Return the adapter, or the merged model, that is pushed."""
    if options.merged:
        return open_model(os.fspath(adapter or ""), catalogue, watcher)
    name = _newest(catalogue) if adapter is None else os.fspath(adapter)
    _refuse_repository(name, repository)
    return resolve_adapter(name, catalogue, options.alpha)


def _prepare(source: ResolvedAdapter | MergedModel, remote: Remote, catalogue: Registry, options: PushOptions,
             wishes: Wishes, scratch: Path) -> Upload:  # fmt: skip
    """Return the contents of the repository after the push."""
    if isinstance(source, MergedModel):
        return prepare_model(source, catalogue, remote, wishes, files=options.files, all_files=options.all_files)
    return prepare_adapter(source, catalogue, remote, wishes, scratch)


def _check(upload: Upload, remote: Remote, options: PushOptions, *, online: bool) -> None:
    """Raise HubError if the repository must not get these contents; nothing is sent yet."""
    options.check_for(remote)
    refuse_mixed(remote, upload.contents, merged=options.merged)
    if online:
        check_card(upload.card)
    refuse_token(upload.contents)


def _deliver(upload: Upload, remote: Remote, options: PushOptions, confirm: Confirm | None,
             catalogue: Registry) -> tuple[Sent | None, list[str]]:  # fmt: skip
    """Send what differs, and record the adapter's place on the Hub; return the commit if there is one, and notes."""
    sent: Sent | None = None
    try:
        if remote.head is None or any(remote.state_of(each) != "same" for each in upload.contents):
            sent = _send(upload, remote, options, confirm)
        if upload.record is None or (sent is not None and sent.pull_request is not None):
            return sent, []  # the files of a pull request are in the repository when it is accepted
        return sent, _record(upload.record, remote.repository, sent.commit if sent else remote.head, catalogue)
    except KeyboardInterrupt as stopped:
        if sent is not None and upload.record is not None:
            note(stopped, f"{remote.repository} has the files; run the command again to record that in the catalogue")
        elif sent is not None:
            note(stopped, f"{remote.repository} has the files")
        raise


def _result(upload: Upload, remote: Remote, options: PushOptions, sent: Sent | None, notes: list[str]) -> PushResult:
    from huggingface_hub import constants

    return PushResult(
        source=upload.source,
        merged=options.merged,
        repository=remote.repository,
        url=f"{constants.ENDPOINT}/{remote.repository}",
        revision=remote.revision,
        commit=sent.commit if sent else None if options.dry_run else remote.head,
        pull_request=sent.pull_request if sent else None,
        created=not remote.exists and sent is not None,
        private=remote.private if remote.exists else options.private,
        files=tuple(PushedFile(each.path, each.size, remote.state_of(each)) for each in upload.contents),
        card=upload.card,
        notes=(*upload.notes, *notes),
        sent=sent is not None and sent.is_new,
        dry_run=options.dry_run,
    )


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


def _look(given: str | None, source: ResolvedAdapter | MergedModel, options: PushOptions, *, online: bool) -> Remote:
    """Return the repository with its current files; without files unless `online`."""
    text = given or (source.path.resolve().name if isinstance(source, MergedModel) else source.label)
    if "/" not in text:
        if not online:
            raise HubError(f"{COMMAND} must ask the Hub for your user name, and cannot now; write owner/{text}")
        text = f"{user_name()}/{text}"
    repository = repository_id(text)
    return look(repository, options.revision) if online else Remote(repository, options.revision or MAIN)


def _send(upload: Upload, remote: Remote, options: PushOptions, confirm: Confirm | None) -> Sent:
    if options.create_pr:
        proposed = find_proposal(remote, upload.contents)
        if proposed is not None:
            return proposed
    question = f"Make the public repository {remote.repository}, where everybody sees it?"
    if not (remote.exists or options.private or confirm is None or confirm(question)):
        raise HubError("nothing was pushed; with --private only you see the repository")
    message = options.message or f"Push {_label(upload)}"
    return send(remote, upload.contents, message, private=options.private, create_pr=options.create_pr)


def _label(upload: Upload) -> str:
    """Return a name for the upload without local folders."""
    return upload.record.reference if upload.record else Path(upload.source).name


def _record(record: AdapterRecord, repository: str, commit: str | None, catalogue: Registry) -> list[str]:
    """Record the adapter's place on the Hub. Since it is pushed, a catalogue that cannot be written gives only a note."""
    if commit is None:
        return []
    try:
        with catalogue.for_writing() as writable:
            writable.adapters.add_location(record.reference, Location(kind="hub", repo=repository, revision=commit))
    except RegistryError as error:
        return [f"it is pushed, but the catalogue does not know of it: {error}"]
    return []
