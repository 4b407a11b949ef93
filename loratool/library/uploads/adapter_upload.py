"""An adapter's files for the Hub: PEFT's layout, its tokenizer, loratool's facts, a card, and the picture of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.architecture import architecture_of, module_of
from loratool.checkpoint.dtypes import title as dtype_title
from loratool.checkpoint.json_text import parse_json, read_json_object
from loratool.checkpoint.model import Checkpoint
from loratool.errors import HubError, PlacementError, quoted
from loratool.formats.adapter import Adapter, sha256_of
from loratool.formats.adapter_folder import tokenizer_files
from loratool.formats.adapter_names import CONFIG_KEY, CONFIG_NAME, FACTS_KEY, FACTS_NAME, WEIGHTS_NAME
from loratool.formats.landing import land
from loratool.formats.lora import lora_settings
from loratool.formats.lora_config import LoraConfig, lora_config
from loratool.formats.read import read_adapter
from loratool.formats.tokenizer import CONFIG_NAME as TOKENIZER_CONFIG
from loratool.formats.write import write_peft
from loratool.hub.card import AdapterCard, task_of
from loratool.hub.push import Content, Remote
from loratool.hub.readme import README, is_template, renewed
from loratool.library.places.user_path import exists
from loratool.library.resolving.resolve import ResolvedAdapter
from loratool.library.uploads.upload import Upload, Wishes, hub_base, is_path, without_paths
from registry import AdapterRecord, BaseRecord, Registry

PICTURE: Final = "training.png"
"""Name of the picture in the repository."""

PICTURE_SUFFIX: Final = ".train.png"
"""Suffix of the picture that training draws: ``pirate.train.png`` beside ``pirate.safetensors``."""

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_MOST_PICTURE_BYTES: Final = 8 * 1024 * 1024


def prepare_adapter(
    found: ResolvedAdapter, catalogue: Registry, remote: Remote, wishes: Wishes, scratch: Path
) -> Upload:
    """Write the adapter into `scratch` in its form for the Hub, and make its card.

    Raises:
        LoratoolError: the Hub id of its base is unknown, it cannot be written, or the README on the Hub is broken.
    """
    record = found.record
    owner = catalogue.bases.get(record.base) if record and record.base else _owner(found, catalogue)
    adapter = found.adapter if found.adapter.layout is None else with_whole_names(found.adapter, owner)
    base, notes = hub_base(found.base_fingerprint, owner, adapter.base_model, remote, wishes, catalogue)
    lineage = _lineage(record, adapter, catalogue)
    facts = _facts(found, lineage)
    config = without_paths(dict(adapter.config)) | {"base_model_name_or_path": base}
    keeps = not _names_a_path(adapter)
    folder = scratch / "adapter"
    write_peft(replace(adapter, config=config, facts=facts), folder, keep_metadata=keeps)
    written = read_adapter(folder)
    if written.sha256 != adapter.sha256:
        why = "in PEFT's layout" if keeps else "without the local folders that its file's metadata names"
        notes.append(f"its weights are written again {why}, so their sha256 differs from that of {found.reference}")
    picture = _picture(found)
    card = _card(found, written, owner, base, remote.repository, lineage, wishes, picture is not None)
    local = _hand_written(adapter)
    text = renewed(remote.readme if remote.readme is not None else local, card.name, card.front_matter(), card.body())
    contents = [Content(name, folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME, FACTS_NAME)]
    contents.append(Content(README, text.encode()))
    contents += [Content(name, _without_paths(file)) for name, file in tokenizer_files(found.adapter).items()]
    if picture is not None:
        contents.append(Content(PICTURE, picture))
    same = record if record is not None and written.sha256 == record.sha256 else None
    return Upload(found.reference, same, tuple(sorted(contents, key=lambda each: each.path)), tuple(notes))


def with_whole_names(adapter: Adapter, owner: BaseRecord | None) -> Adapter:
    """Rename the modules of an adapter in another layout, whose names may have ``_`` for dots, to the names of its base.

    Raises:
        HubError: the base's files are not available, or a module does not land in it.
    """
    layout = "its" if adapter.layout is None else f"{adapter.layout.title}'s"
    problem = f"{quoted(adapter.name)} is in {layout} layout, whose names PEFT does not read"
    if owner is None or owner.path is None or not exists(owner.path):
        raise HubError(
            f"{problem}; catalogue its base from files that are here, and the adapter with 'loratool add ... --base NAME'"
        )
    shapes = {name: update.shape for name, update in adapter.changes.items()}
    try:
        base = Checkpoint.open(owner.path)
        places = land(shapes, architecture_of(base.config, base.tensors), str(adapter.file)).tensors
    except PlacementError as error:
        line = str(error).split("\n")[0]
        raise HubError(f"{problem}, and they do not land on {quoted(owner.name)}: {line}") from None
    parts = next((name for name, (place, *more) in places.items() if more or not place.view.is_whole), None)
    if parts is not None:
        raise HubError(
            f"{problem}, and {quoted(module_of(parts))} is a part of {quoted(places[parts][0].name)} in {quoted(owner.name)}"
        )
    landed = {name: place.name for name, (place,) in places.items()}
    names = {module_of(name): module_of(tensor) for name, tensor in landed.items()}
    settings = lora_settings(adapter)
    modules = {names[module]: (update.rank, settings.alpha_of(module)) for module, update in adapter.ranked.items()}
    config = lora_config(modules, {"target_modules": sorted(modules)})
    return replace(
        adapter,
        changes={landed[name]: update for name, update in adapter.changes.items()},
        config=config,
        settings=LoraConfig.parse(config, str(adapter.file)),
        layout=None,
    )


def _card(found: ResolvedAdapter, written: Adapter, owner: BaseRecord | None, base: str | None, repository: str,
          lineage: list[dict[str, Any]], wishes: Wishes, has_picture: bool) -> AdapterCard:  # fmt: skip
    from huggingface_hub import constants

    record, facts = found.record, written.facts
    return AdapterCard(
        name=repository.rpartition("/")[2],
        repository=repository,
        kind=written.kind,
        modules=len(written.modules),
        ranks=written.ranks,
        alpha=written.alpha,
        scalings=[update.scaling for _, update in sorted(written.ranked.items())],
        target_modules=written.target_modules,
        replaced=len(written.replacements),
        parameters=written.parameter_count,
        dtype=dtype_title(written.dtype),
        size_bytes=written.file.stat().st_size,
        sha256=written.sha256,
        base=base,
        base_url=f"{constants.ENDPOINT}/{base}" if base else None,
        base_fingerprint=found.base_fingerprint,
        task=task_of(written.config, owner.architecture if owner else None),
        recipe=_mapping(facts.get("recipe")),
        metrics=_mapping(facts.get("metrics")),
        lineage=[(str(each["operation"]), [str(parent["name"]) for parent in each["parents"]]) for each in lineage],
        tags=record.tags if record else (),
        license=wishes.license,
        picture=PICTURE if has_picture else None,
    )


def _owner(found: ResolvedAdapter, catalogue: Registry) -> BaseRecord | None:
    known = catalogue.bases.find_by_fingerprint(found.base_fingerprint) if found.base_fingerprint else ()
    return known[0] if known else None


def _facts(found: ResolvedAdapter, lineage: list[dict[str, Any]]) -> dict[str, Any]:
    """Return loratool's facts about the adapter, for those who pull it."""
    adapter, record = found.adapter, found.record
    known: dict[str, Any] = {"base_fingerprint": found.base_fingerprint}
    if record is not None:
        known |= {"recipe": record.recipe, "metrics": record.metrics}
    facts = dict(adapter.facts) | {"schema": 1, "kind": adapter.kind}
    facts |= {key: value for key, value in known.items() if value}
    if lineage and "lineage" not in facts:
        facts["lineage"] = lineage[0]
    cleaned: dict[str, Any] = without_paths(facts)
    return cleaned


def _lineage(record: AdapterRecord | None, adapter: Adapter, catalogue: Registry) -> list[dict[str, Any]]:
    """Return the operation that made the adapter, with its parents, from its own facts or else from the catalogue."""
    own = adapter.facts.get("lineage")
    if isinstance(own, Mapping) and isinstance(own.get("parents"), list):
        parents = [parent for parent in own["parents"] if isinstance(parent, Mapping) and "name" in parent]
        return [{**own, "operation": own.get("operation", ""), "parents": without_paths(parents)}]
    edges = [edge for edge in catalogue.lineage.ancestors(record) if edge.child_id == record.id] if record else []
    if not edges:
        return []
    parents = [{"name": edge.parent, "sha256": edge.parent_sha256} for edge in edges]
    return [
        {"operation": edges[0].operation, "parents": without_paths(parents), **without_paths(edges[0].details or {})}
    ]


def _names_a_path(adapter: Adapter) -> bool:
    """Return whether the metadata of the weights' file names a local path."""
    from loratool.formats.adapter_files import open_adapter

    metadata = open_adapter(adapter.file).metadata
    for key in (CONFIG_KEY, FACTS_KEY):
        try:
            value = parse_json(metadata.get(key, "{}").encode())
        except ValueError:
            return True
        if without_paths(value) != value:
            return True
    return any(is_path(value) for value in metadata.values())


def _without_paths(file: Path) -> Path | bytes:
    """Return a tokenizer's file, or if it is a configuration that names a local path, its JSON without that."""
    if file.name != TOKENIZER_CONFIG:
        return file
    config = read_json_object(file)
    cleaned = without_paths(config)
    return file if cleaned == config else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _picture(found: ResolvedAdapter) -> Path | None:
    """Return the picture that training drew beside the adapter's file, at any known location of it."""
    record, file = found.record, found.adapter.file
    places = [file.parent if file.name == WEIGHTS_NAME else file]
    if record is not None:
        places += [place.path for place in record.locations if place.path is not None]
        places += [place for place in [Path(f"{record.name}.safetensors"), Path(record.name)] if _is_of(place, record)]
    for place in places:
        stem = place.name if place.is_dir() else place.stem
        picture = place.absolute().with_name(stem + PICTURE_SUFFIX)
        if picture.is_file() and not picture.is_symlink() and picture.stat().st_size <= _MOST_PICTURE_BYTES:
            with open(picture, "rb") as stream:
                if stream.read(len(_PNG)) == _PNG:
                    return picture
    return None


def _is_of(place: Path, record: AdapterRecord) -> bool:
    """Return whether the file or folder `place` holds this adapter's weights."""
    file = place / WEIGHTS_NAME if place.is_dir() else place
    return file.is_file() and file.stat().st_size == record.size_bytes and sha256_of(file) == record.sha256


def _hand_written(adapter: Adapter) -> str | None:
    """Return the README in the adapter's own folder, if a person wrote it."""
    file = adapter.file.parent / README
    if adapter.file.name != WEIGHTS_NAME or file.is_symlink() or not file.is_file():
        return None
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return None if is_template(text) else text


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
