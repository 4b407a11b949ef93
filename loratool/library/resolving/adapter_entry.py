"""Search for an adapter's entry in the catalogue, by its name, its files or its Hub id."""

from __future__ import annotations

from loratool.checkpoint.model import has_file
from loratool.errors import NotFoundError, quoted
from loratool.formats.adapter_files import sha256_at
from loratool.formats.adapter_names import choose_weights
from loratool.hub.address import HubAddress
from loratool.library.places.user_path import HUB_ID, exists, user_path
from loratool.library.resolving.resolve import entry_at, no_such_adapter, pulled_from
from registry import AdapterRecord, Registry, is_reference


def adapter_entry(adapter: str, catalogue: Registry) -> AdapterRecord:
    """Return the entry that a name, a path or a Hub id refers to.

    Raises:
        LoratoolError, registry.RegistryError: there is none; the message says how to create it, or lists similar names.
    """
    found = find_adapter_entry(adapter, catalogue)
    if found is not None:
        return found
    path = user_path(adapter)
    if HUB_ID.fullmatch(adapter) and not exists(path):
        raise NotFoundError(f"{quoted(adapter)} is not in the catalogue; get it with 'loratool pull {adapter}'")
    sha256 = weights_sha256(adapter)
    if sha256 is None:
        raise no_such_adapter(adapter, catalogue)
    known = catalogue.adapters.find_by_sha256(sha256)
    if not known:
        raise NotFoundError(f"{quoted(path)} is not in the catalogue; add it with 'loratool add'")
    raise NotFoundError(
        f"{quoted(path)} is not in the catalogue: it has the weights of {known[0].reference}, but a different configuration; "
        "add it with 'loratool add'"
    )


def find_adapter_entry(adapter: str, catalogue: Registry) -> AdapterRecord | None:
    """Return the entry that a name, a path or a Hub id refers to; None if the catalogue has none."""
    path = user_path(adapter)
    if is_reference(adapter) and catalogue.adapters.versions(adapter.partition("@")[0]):
        return catalogue.adapters.find(adapter)
    if HUB_ID.fullmatch(adapter) and not exists(path):
        return next(iter(pulled_from(HubAddress.parse(adapter), catalogue)), None)
    sha256 = weights_sha256(adapter)
    known = () if sha256 is None else catalogue.adapters.find_by_sha256(sha256)
    return entry_at(path, known) if known else None


def weights_sha256(adapter: str) -> str | None:
    """Return the fingerprint of the adapter at a path, even if it cannot be read as one; None if there is no such file."""
    path = user_path(adapter)
    if adapter and exists(path) and path.is_dir():
        chosen = choose_weights([entry.name for entry in path.iterdir() if entry.is_file()])
        path = path / chosen if chosen else path
    return sha256_at(path) if adapter and has_file(path) else None
