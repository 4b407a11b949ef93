"""`loratool.hub_search`: search for adapters on the Hugging Face Hub."""

from __future__ import annotations

from loratool.errors import LoratoolError, NotFoundError, quoted
from loratool.hub.address import HubAddress, is_hub_id
from loratool.hub.search import SORTS, FoundAdapter, HubSort, search_adapters
from loratool.library.places.user_path import exists, user_path
from loratool.library.recording.opening import open_registry
from loratool.library.resolving.base_entry import base_entry, find_base
from registry import is_name

MOST: int = 1000


def hub_search(text: str | None = None, *, base: str | None = None, limit: int = 20, sort: HubSort = "downloads",
               registry: str | None = None) -> tuple[FoundAdapter, ...]:  # fmt: skip
    """Search for adapters on the Hugging Face Hub, by their base, by a text in their names, or by both.

    Args:
        text: a part of the repository's name.
        base: a catalogued base that came from the Hub (its name or its folder), or a Hub id.
        limit: largest number of results, at most 1000.
        sort: ``downloads`` (of the last 30 days), ``likes``, ``updated`` or ``created``; the highest or newest first.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: neither is given, there is no such base, or the Hub cannot be reached.
    """
    if not text and base is None:
        raise LoratoolError("nothing is searched for; give a text, or --base BASE")
    if not 1 <= limit <= MOST:
        raise LoratoolError(f"--limit is {limit} and must be 1 to {MOST}")
    if sort not in SORTS:
        raise LoratoolError(f"adapters cannot be sorted by {quoted(sort)}; use one of {', '.join(SORTS)}")
    return search_adapters(text or None, None if base is None else _hub_id(base, registry), limit, sort)


def _hub_id(base: str, registry: str | None) -> str:
    """Return the Hub id of a base: `base` itself, or the one in its catalogue entry or its family's."""
    with open_registry(registry, read_only=True) as catalogue:
        is_hub_id_itself = not is_name(base) and not exists(user_path(base))
        record = find_base(base, catalogue) if is_hub_id_itself else base_entry(base, catalogue)
        if record is None:
            return HubAddress.parse(base).repo
        family = [record, *(each for each in catalogue.bases.list() if each.name == record.variant_of)]
    for each in family:
        if is_hub_id(each.source):
            return each.source
    raise NotFoundError(
        f"base {quoted(base)} is not from the Hub, so the Hub has no name for it; give its Hub id: --base owner/name"
    )
