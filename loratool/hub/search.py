"""Search for adapters on the Hub, by base or by a word in their names."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, get_args

from loratool.errors import HubError, quoted
from loratool.hub.address import is_safe
from loratool.hub.client import ask_once, client
from loratool.hub.errors import hub_errors, refuse_offline
from loratool.hub.repository import sensible_answers
from loratool.hub.retry import with_retries

COMMAND: Final = "loratool hub search"
ADAPTERS: Final = "peft"
"""The Hub's library tag of adapters, the filter for a search without a base."""

HubSort = Literal["downloads", "likes", "updated", "created"]
SORTS: Final[tuple[HubSort, ...]] = get_args(HubSort)
_SORT_KEYS: Final[dict[str, Any]] = {
    "downloads": "downloads",
    "likes": "likes",
    "updated": "last_modified",
    "created": "created_at",
}
_PROPERTIES: Final = ["downloads", "likes", "lastModified", "tags", "gated"]
_LICENSE: Final = "license:"


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter's repository in the Hub's list.

    Attributes:
        repo: ``owner/name``.
        downloads: the number of downloads in the last 30 days.
        likes: the number of likes.
        updated_at: the time of the last commit.
        license: the Hub's identifier of its license.
        gated: whether access has to be requested.
    """

    repo: str
    downloads: int | None
    likes: int | None
    updated_at: datetime | None
    license: str | None
    gated: bool

    def to_json(self) -> dict[str, Any]:
        """The entry with the keys of ``--json``."""
        return {
            "repo": self.repo,
            "downloads": self.downloads,
            "likes": self.likes,
            "updated_at": None if self.updated_at is None else self.updated_at.isoformat(),
            "license": self.license,
            "gated": self.gated,
        }


def search_adapters(text: str | None, base: str | None, limit: int, sort: HubSort) -> tuple[FoundAdapter, ...]:
    """Return up to `limit` adapters on the Hub, sorted by `sort`, highest first.

    Their names contain `text`, and their cards name the repository `base`, where these are given.

    Raises:
        HubError: the Hub cannot be reached, or sends an invalid response.
    """
    refuse_offline(COMMAND)
    wanted = f"base_model:adapter:{base}" if base is not None else ADAPTERS
    subject = base or text or ADAPTERS
    with hub_errors(COMMAND, subject), sensible_answers(subject):
        ask_once()
        listed = with_retries(
            lambda: list(
                client().list_models(
                    search=text,
                    filter=wanted,
                    sort=_SORT_KEYS[sort],
                    limit=limit,
                    expand=_PROPERTIES,  # type: ignore[arg-type]
                )
            )
        )
        return tuple(_found(info) for info in listed)


def _found(info: Any) -> FoundAdapter:
    """Return an entry of the Hub's list, a ModelInfo whose every field is checked."""
    if not isinstance(info.id, str) or not is_safe(info.id):
        raise HubError(
            f"the Hub lists a repository {quoted(info.id)}, which is not a valid name; is there a Hub at HF_ENDPOINT?"
        )
    tags = [tag for tag in info.tags or () if isinstance(tag, str)]
    licenses = [tag.removeprefix(_LICENSE) for tag in tags if tag.startswith(_LICENSE)]
    updated = info.last_modified
    return FoundAdapter(
        repo=info.id,
        downloads=info.downloads if type(info.downloads) is int else None,
        likes=info.likes if type(info.likes) is int else None,
        updated_at=updated if isinstance(updated, datetime) else None,
        license=licenses[0][:40] if licenses else None,
        gated=bool(info.gated),
    )
