"""What adapters and models have in common on their way to the Hub: what was asked for, and their base's Hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.model import INDEX_SUFFIX
from loratool.checkpoint.model import WEIGHTS_NAME as MODEL_WEIGHTS
from loratool.errors import HubError, quoted
from loratool.formats.adapter_names import CONFIG_NAME
from loratool.hub.address import is_hub_id, is_repository, repository_id
from loratool.hub.push import Content, Remote, find_model
from loratool.hub.readme import README, front_matter
from registry import AdapterRecord, BaseRecord, Registry

NO_BASE: Final = "none"
"""Given as ``--base-model``: the base is on no Hub."""

_PATH: Final = re.compile(r"(?:~?/|\.{1,2}/|[A-Za-z]:[\\/]|file:).*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user says of the card, and whether the Hub may be asked (`online`)."""

    license: str | None = None
    base_model: str | None = None
    online: bool = True


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be in the repository.

    Attributes:
        source: the adapter's reference, or the model's folder.
        record: the adapter's entry in the catalogue, where the weights that are pushed are those of the entry.
        contents: all the files, the card among them.
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
    """The Hub id of a base, and notes; None where the user says that it is on no Hub.

    It is what the user gives; else what the catalogue has the base, or the model that it stores otherwise, from; else what
    the adapter's configuration records, where the Hub knows it; else what the card on the Hub says already.

    Args:
        fingerprint: of the base, where it is known.
        owner: its entry in the catalogue.
        recorded: what the adapter's configuration calls it, which may be a folder.
        remote: what is on the Hub now.

    Raises:
        HubError: nothing says it.
    """
    if wishes.base_model == NO_BASE:
        return None, ["its base is on no Hub, as you say; whoever loads the adapter has to know it"]
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
    if recorded and is_hub_id(recorded):  # and no folder here of the same look
        there = find_model(recorded) if wishes.online else recorded
        if there is not None:
            return there, []
    on_card = front_matter(remote.readme).get("base_model")
    if isinstance(on_card, str) and is_repository(on_card):
        return on_card, []
    raise HubError(_advice(owner, recorded))


def refuse_mixed(remote: Remote, contents: Sequence[Content], *, merged: bool) -> None:
    """Raise HubError where what stays in the repository would be loaded in place of what is pushed, or on top of it.

    transformers takes ``model.safetensors`` before an index of shards, and an adapter with whatever lies beside it.
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
    """JSON in which every path is only its last name: the folders of this machine are nobody's business."""
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
    """Whether a text is plainly a path."""
    return _PATH.fullmatch(text) is not None


def _unknown(base: str) -> str:
    return f"the Hub has no model {quoted(base)}, or it is private; the card and the configuration name it all the same"


def _advice(owner: BaseRecord | None, recorded: str | None) -> str:
    what = (
        f"which Hub model its base is, is not known (recorded as {quoted(recorded)})"
        if recorded
        else ("which Hub model its base is, is not known")
    )
    if owner is None:
        return f"{what}; give it with --base-model owner/name, or --base-model none where it is on no Hub"
    where = owner.path or "FOLDER"
    return (
        f"{what}: {quoted(owner.name)} is catalogued from {quoted(owner.source)}; record it with 'loratool base add "
        f"{owner.name} {where} --hub-id owner/name', give it with --base-model owner/name, or say --base-model none"
    )
