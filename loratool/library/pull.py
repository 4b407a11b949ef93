"""`loratool.pull`: download an adapter from the Hugging Face Hub into the catalogue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratool.errors import LoratoolError, NotFoundError, quoted, to_paste
from loratool.formats.alpha import Alpha
from loratool.formats.identify import refuse_alpha
from loratool.hub.address import HubAddress
from loratool.hub.pull import pull_adapter
from loratool.hub.repository import Snapshot, look
from loratool.library.places.user_path import exists, user_path
from loratool.library.recording.base_of_adapter import name_base_of
from loratool.library.recording.new_adapter import HubPlace, enter
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.adapter_json import adapter_json
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.adapter_name import name_from, name_on_hub
from loratool.library.resolving.resolve import adapter_of_entry, has_alpha, is_here, pulled_from
from registry import AdapterRecord, Location, Registry, check_name


@dataclass(frozen=True, slots=True)
class PullResult:
    """The result of a pull.

    Attributes:
        record: the adapter's entry in the catalogue.
        repo: the repository.
        revision: the commit.
        path_in_repo: the folder or file inside the repository; None for its top.
        new: whether the entry is new.
        downloaded: whether files came from the Hub or its cache; False if the catalogue had them.
        notes: notes on how it was read and tied to its base.
    """

    record: AdapterRecord
    repo: str
    revision: str
    path_in_repo: str | None
    new: bool
    downloaded: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            **adapter_json(self.record),
            "repo": self.repo,
            "revision": self.revision,
            "path_in_repo": self.path_in_repo,
            "new": self.new,
            "downloaded": self.downloaded,
            "notes": list(self.notes),
        }


def pull(repo: str, *, name: str | None = None, path: str | None = None, base: str | os.PathLike[str] | None = None,
         any_base: bool = False, alpha: Alpha | None = None, update: bool = False, registry: str | None = None,
         progress: Progress | None = None) -> PullResult:  # fmt: skip
    """Download an adapter from the Hugging Face Hub, check it, and catalogue it.

    Pulling a catalogued adapter again does nothing and uses no network. With `update`, the branch is read again, and a new
    commit becomes the next version of the name.

    Args:
        repo: ``owner/name``, ``owner/name@revision``, or either with a path inside: ``owner/name/folder@revision``.
        name: name in the catalogue; by default the last part of the path inside that is not generic, or the repository's name.
        path: the folder or file inside the repository.
        base: the base that it belongs to: a catalogued name, a folder or a Hub id. A base that is not catalogued yet is
            catalogued under its folder's name. By default the base whose fingerprint it records, else the one catalogued from
            the Hub id that its configuration or its card names.
        any_base: tie it to `base` even if it records, or is tied to, another one.
        alpha: alpha of a bare file that does not state it: a number, or ``rank`` for each module's rank.
        update: follow the branch.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        LoratoolError, registry.RegistryError: there is no such repository, revision or adapter; loratool cannot identify it;
            it differs from the Hub's record; or another adapter has the name.
    """
    address = HubAddress.parse(repo, path)
    if name is not None:
        check_name(name)
    command = f"loratool pull {address}"
    with open_registry(registry) as catalogue:
        kept = None if update else _kept(address, catalogue, name, alpha)
        if kept is not None:
            return _again(kept, address, catalogue, base, progress, any_base=any_base)
        snapshot = _look(address, repo, command, fresh=update)
        pinned = address.at(snapshot.commit)
        kept = _kept(pinned, catalogue, name, alpha)
        if kept is not None:
            return _again(kept, pinned, catalogue, base, progress, any_base=any_base)
        chosen = name or _name(address, catalogue)
        pulled = pull_adapter(address, command, alpha=alpha, snapshot=snapshot, watcher=progress)
        refuse_alpha(pulled.adapter, alpha)
        if name is None:
            _refuse_taken(chosen, address, pulled.adapter.sha256, catalogue)
        place = HubPlace(
            Location(kind="hub", repo=address.repo, revision=snapshot.commit, path_in_repo=address.path),
            pulled.base_model,
        )
        adapter = replace(pulled.adapter, name=chosen)
        owner, base_notes = (
            (None, ()) if base is None else name_base_of(base, adapter, catalogue, progress, any_base=any_base)
        )
        added = enter(adapter, catalogue, name=chosen, base=owner, any_base=any_base, place=place)
    notes = (*pulled.notes, *base_notes, *added.notes[len(pulled.adapter.notes) :])
    return PullResult(added.record, address.repo, snapshot.commit, address.path, added.new, True, notes)


def _look(address: HubAddress, given: str, command: str, *, fresh: bool) -> Snapshot:
    try:
        return look(address, command, fresh=fresh)
    except NotFoundError as error:
        if exists(user_path(given)):
            raise NotFoundError(
                f"{quoted(given)} is on this disk; catalogue it with {to_paste('loratool add PATH', given)}"
            ) from error
        raise


def _kept(address: HubAddress, catalogue: Registry, name: str | None, alpha: Alpha | None) -> AdapterRecord | None:
    """Return the newest catalogued version from an address with this name and alpha, if its files are on this disk."""
    for record in pulled_from(address, catalogue):
        if name in (None, record.name) and has_alpha(record, alpha):
            return record if is_here(record, catalogue) else None
    return None


def _again(record: AdapterRecord, address: HubAddress, catalogue: Registry, base: str | os.PathLike[str] | None,
           progress: Progress | None, *, any_base: bool) -> PullResult:  # fmt: skip
    """Return the result for an adapter that is already catalogued, and tie it to its base if that is possible now."""
    place = _place(record, address)
    notes: tuple[str, ...] = ()
    if base is not None or record.base is None:
        adapter = adapter_of_entry(record, catalogue)
        owner, notes = (
            (None, ()) if base is None else name_base_of(base, adapter, catalogue, progress, any_base=any_base)
        )
        there = HubPlace(place, record.base_model)
        added = enter(adapter, catalogue, name=record.name, base=owner, any_base=any_base, place=there)
        record, notes = added.record, (*notes, *added.notes)
    return PullResult(record, address.repo, str(place.revision), address.path, False, False, notes)


def _place(record: AdapterRecord, address: HubAddress) -> Location:
    """Return the place on the Hub of a catalogued adapter, at the requested commit or else the last one it was pulled at."""
    places = [place for place in record.locations if _is_at(place, address)]
    exact = [place for place in places if place.revision == address.revision]
    return (exact or places)[-1]


def _is_at(place: Location, address: HubAddress) -> bool:
    return place.repo is not None and (place.repo.lower(), place.path_in_repo) == (address.repo.lower(), address.path)


def _name(address: HubAddress, catalogue: Registry) -> str:
    """Return the name of the adapter that was pulled from there before, or else a name made from the address."""
    known = catalogue.adapters.find_by_repo(address.repo, address.path)
    return known[0].name if known else name_from(name_on_hub(address.repo, address.steps))


def _refuse_taken(name: str, address: HubAddress, sha256: str, catalogue: Registry) -> None:
    """Raise LoratoolError if an adapter from elsewhere has the name, since this one would become its next version."""
    versions: Sequence[AdapterRecord] = catalogue.adapters.versions(name)
    if not versions or any(
        each.sha256 == sha256 or any(_is_at(place, address) for place in each.locations) for each in versions
    ):
        return
    raise LoratoolError(
        f"{quoted(name)} is catalogued already and is not from {quoted(address)}; give it another name with --name, such "
        f"as '{address.repo.replace('/', '-')}', or --name {name} to make it the next version of that one"
    )
