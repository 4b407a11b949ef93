"""Search for a base's entry in the catalogue, by its name, its folder or file, or its Hub id."""

from __future__ import annotations

import os
from pathlib import Path

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import NotFoundError, quoted, to_paste
from loratool.hub.address import HubAddress
from loratool.library.places.home_folder import digest_cache
from loratool.library.places.user_path import HUB_ID, exists, is_plainly_a_path, user_path
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import base_at, no_such_base
from registry import BaseRecord, Registry, check_name, is_name


def base_entry(name: str | os.PathLike[str], catalogue: Registry, progress: Progress | None = None, *,
               by_content: bool = True) -> BaseRecord:  # fmt: skip
    """Return the catalogued base that `name` refers to, as `find_base` does.

    Raises:
        LoratoolError, registry.RegistryError: there is no such entry; the nearest names are listed.
    """
    found = find_base(name, catalogue, progress, by_content=by_content)
    if found is not None:
        return found
    text = os.fspath(name)
    is_place = is_plainly_a_path(text) or (text and exists(user_path(text))) or HUB_ID.fullmatch(text)
    if not is_place:
        raise no_such_base(check_name(text, "base"), catalogue)
    if HUB_ID.fullmatch(text) is None and not exists(user_path(text)):
        raise NotFoundError(f"there is no model at {quoted(text)}; 'loratool base list' shows the catalogued bases")
    raise NotFoundError(
        f"{quoted(text)} is not a catalogued base; catalogue it with {to_paste('loratool base add NAME PATH', text)}, or "
        "see 'loratool base list'"
    )


def find_base(name: str | os.PathLike[str], catalogue: Registry, progress: Progress | None = None, *,
              by_content: bool = True) -> BaseRecord | None:  # fmt: skip
    """Return the catalogued base that `name` refers to, in the order of `resolve.resolve_base`; None if there is none.

    A folder or file is recognized by its path, or with `by_content` by its fingerprint. The Hub is not asked.

    Raises:
        CheckpointError: the folder must be fingerprinted but holds no model.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not is_plainly_a_path(text) and is_name(text):
        record = catalogue.bases.get(text)
        if record is not None or not exists(path):
            return record
    if text and exists(path):
        return base_at(path, catalogue) or (_with_content_of(path, catalogue, progress) if by_content else None)
    if not is_plainly_a_path(text) and HUB_ID.fullmatch(text):
        return _from_hub(HubAddress.parse(text), catalogue)
    return None


def _with_content_of(path: Path, catalogue: Registry, progress: Progress | None) -> BaseRecord | None:
    checkpoint = Checkpoint.open(path)
    sizes = {base.size_bytes for base in catalogue.bases.list()}
    if checkpoint.nbytes not in sizes:
        return None  # without reading the weights
    watcher = progress or Silent()
    watcher.begin("fingerprinting", checkpoint.nbytes)
    digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    return next(iter(catalogue.bases.find_by_fingerprint(fingerprint(checkpoint.tensors, digests))), None)


def _from_hub(address: HubAddress, catalogue: Registry) -> BaseRecord | None:
    """Return the base from a repository, ignoring the case of letters, and at a revision if the address names one."""
    for base in catalogue.bases.list():
        if base.source.casefold() == address.repo.casefold() and address.revision in (None, base.revision):
            return base
    return None
