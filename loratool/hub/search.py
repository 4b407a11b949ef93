"""What the Hub knows of adapters: those of a base, those whose names hold a word."""

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
"""The library that the Hub files adapters under; what is asked for where no base says that it is adapters."""

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
    """A repository that the Hub lists: how often it was downloaded in the last 30 days, its likes, its last commit."""

    repo: str
    downloads: int | None
    likes: int | None
    updated_at: datetime | None
    license: str | None
    gated: bool

    def to_json(self) -> dict[str, Any]:
        """The entry in the words of ``--json``."""
        return {
            "repo": self.repo,
            "downloads": self.downloads,
            "likes": self.likes,
            "updated_at": None if self.updated_at is None else self.updated_at.isoformat(),
            "license": self.license,
            "gated": self.gated,
        }


def search_adapters(text: str | None, base: str | None, limit: int, sort: HubSort) -> tuple[FoundAdapter, ...]:
    """Adapters on the Hub whose names hold `text` and whose cards name the repository `base`, the best first.

    Raises:
        HubError: the Hub cannot be asked, or gives no sensible answer.
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
    """An entry of the Hub's list, a ModelInfo; nothing in it is taken at its word."""
    if not isinstance(info.id, str) or not is_safe(info.id):
        raise HubError(
            f"the Hub lists a repository {quoted(info.id)}, which is no name; is there a Hub at HF_ENDPOINT?"
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
