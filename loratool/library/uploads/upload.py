"""Uploads of adapters and models to the Hub: the user's wishes, the contents, and the base's Hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.model import INDEX_SUFFIX
from loratool.checkpoint.model import WEIGHTS_NAME as MODEL_WEIGHTS
from loratool.errors import HubError, quoted, to_paste
from loratool.formats.adapter_names import CONFIG_NAME
from loratool.hub.address import is_hub_id, is_repository, repository_id
from loratool.hub.push import Content, Remote, find_model
from loratool.hub.readme import README, front_matter
from registry import AdapterRecord, BaseRecord, Registry

NO_BASE: Final = "none"
"""Value of ``--base-model`` for a base that is not on the Hub."""

_PATH: Final = re.compile(r"(?:~?/|\.{1,2}/|[A-Za-z]:[\\/]|file:).*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Wishes:
    """The user's wishes for the card, and whether the Hub may be asked (`online`)."""

    license: str | None = None
    base_model: str | None = None
    online: bool = True


@dataclass(frozen=True, slots=True)
class Upload:
    """Contents of a repository after a push.

    Attributes:
        source: the adapter's reference, or the model's folder.
        record: the adapter's entry in the catalogue, if the pushed weights are those of the entry.
        contents: all files, including the card.
        notes: notes for the user.
    """

    source: str
    record: AdapterRecord | None
    contents: Sequence[Content]
    notes: Sequence[str]

    @property
    def card(self) -> str:
        """The text of the README."""
        found = next(each.source for each in self.contents if each.path == README)
        return found.decode() if isinstance(found, bytes) else found.read_text(encoding="utf-8")


def hub_base(fingerprint: str | None, owner: BaseRecord | None, recorded: str | None, remote: Remote, wishes: Wishes,
             catalogue: Registry) -> tuple[str | None, list[str]]:  # fmt: skip
    """Return the Hub id of a base, and notes; None if the user says that it is not on the Hub.

    The first of these decides: the user's choice, the catalogued source of the base or of its family, the name in the
    adapter's configuration if the Hub has such a model, the card that is on the Hub now.

    Args:
        fingerprint: of the base, if known.
        owner: its entry in the catalogue.
        recorded: its name in the adapter's configuration, which may be a folder.
        remote: the repository as it is now.
        wishes: the user's choices.
        catalogue: the catalogue.

    Raises:
        HubError: none of these gives it.
    """
    if wishes.base_model == NO_BASE:
        return None, ["its base is not on the Hub, as you say; users of the adapter need to get it elsewhere"]
    if wishes.base_model is not None:
        given = repository_id(wishes.base_model)
        there = find_model(given) if wishes.online else given
        return there or given, [] if there else [_unknown(given)]
    family = catalogue.bases.family(fingerprint) if fingerprint else frozenset()
    relatives = [
        base for base in catalogue.bases.list() if base.fingerprint in family or (owner and base.id == owner.id)
    ]
    relatives.sort(key=lambda base: (owner is None or base.id != owner.id, base.variant_of is not None, base.id))
    catalogued = next((base.source for base in relatives if is_repository(base.source)), None)
    if catalogued is not None:
        there = find_model(catalogued) if wishes.online else catalogued
        return there or catalogued, [] if there else [_unknown(catalogued)]
    if recorded and is_hub_id(recorded):  # a Hub id, not a local folder that looks like one
        there = find_model(recorded) if wishes.online else recorded
        if there is not None:
            return there, []
    on_card = front_matter(remote.readme).get("base_model")
    if isinstance(on_card, str) and is_repository(on_card):
        return on_card, []
    raise HubError(_advice(owner, recorded))


def refuse_mixed(remote: Remote, contents: Sequence[Content], *, merged: bool) -> None:
    """Raise HubError if a file that stays in the repository would be loaded instead of the pushed files, or on top of them.

    transformers prefers ``model.safetensors`` to an index of shards, and loads an adapter on top of any model beside it.
    """
    pushed = {each.path for each in contents}
    if merged:
        wrong = next(
            (name for name in (CONFIG_NAME, MODEL_WEIGHTS) if name in remote.files and name not in pushed), None
        )
        why = (
            "transformers would put that adapter on top" if wrong == CONFIG_NAME else "it would be loaded in its place"
        )
    else:
        weights = [MODEL_WEIGHTS, f"model{INDEX_SUFFIX}"] if "config.json" in remote.files else []
        wrong = next((name for name in weights if name in remote.files), None)
        why = "it is a whole model, which would load with the adapter on top"
    if wrong is not None:
        raise HubError(
            f"{quoted(remote.repository)} holds {quoted(wrong)} besides what is pushed: {why}; delete that file on the Hub, or "
            "push to another repository"
        )


def without_paths(value: Any) -> Any:
    """Return JSON in which every path is reduced to its last name, so that local folders are not published."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if _PATH.fullmatch(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    own = str(Path.home())
    return value.replace(own, "~") if len(own) > 1 else value


def is_path(text: str) -> bool:
    """Return whether a text can only be a path."""
    return _PATH.fullmatch(text) is not None


def _unknown(base: str) -> str:
    return f"the Hub has no model {quoted(base)}, or it is private; the card and the configuration name it all the same"


def _advice(owner: BaseRecord | None, recorded: str | None) -> str:
    what = (
        f"the Hub id of its base is not known (recorded as {quoted(recorded)})"
        if recorded
        else "the Hub id of its base is not known"
    )
    if owner is None:
        return f"{what}; give it with --base-model owner/name, or --base-model none if it is not on the Hub"
    command = f"loratool base add {owner.name} PATH --hub-id owner/name"
    way = f"'{command}'" if owner.path is None else to_paste(command, owner.path)
    return (
        f"{what}: {quoted(owner.name)} is catalogued from {quoted(owner.source)}; record it with {way}, "
        f"give it with --base-model owner/name, or give --base-model none"
    )
