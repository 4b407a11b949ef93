"""The catalogue of adapters: `loratool.add`, `list`, `show`, `tag`, `remove` and `export`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry import (
    AdapterFacts,
    AdapterRecord,
    AdapterSummary,
    BaseRecord,
    LineageRecord,
    MergeRecord,
    SortKey,
    check_name,
    home,
    is_name,
    is_reference,
    registry_url,
)
from registry import (
    list_adapters as list_catalogued,
)

if TYPE_CHECKING:
    from loratool.formats.adapter import Adapter
    from registry import Registry  # brings SQLAlchemy, which a list does without
    from registry.store import Staged

DTYPE_NAMES: Final = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


@dataclass(frozen=True, slots=True)
class AddResult:
    """An adapter's entry in the catalogue, whether it is `new`, and notes on how it was read and tied to its base."""

    record: AdapterRecord
    new: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShowResult:
    """Everything known of one adapter: its entry, its base, its family, the merges it went into, and where it lies."""

    record: AdapterRecord
    base: BaseRecord | None
    versions: tuple[AdapterRecord, ...]
    ancestors: tuple[LineageRecord, ...]
    descendants: tuple[LineageRecord, ...]
    merges: tuple[MergeRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """The result in the words of ``--json``."""
        return {
            **adapter_json(self.record),
            "parent": next((edge.parent for edge in self.ancestors if edge.child_id == self.record.id), None),
            "versions": [record.version for record in self.versions],
            "ancestors": [_edge_json(edge) for edge in self.ancestors],
            "descendants": [_edge_json(edge) for edge in self.descendants],
            "merges": [
                {"output": str(m.output), "base": m.base, "state": m.state, "created_at": m.created_at.isoformat()}
                for m in self.merges
            ],
        }


def add(path: str | os.PathLike[str], *, name: str | None = None, base: str | None = None, alpha: float | None = None,
        tags: Sequence[str] = (), registry: str | None = None) -> AddResult:  # fmt: skip
    """Catalogue the adapter at `path`: its files are copied into the content store, under their sha256.

    Args:
        path: a PEFT folder or a single safetensors file.
        name: letters, digits, ``.``, ``_`` and ``-``; by default the folder's or file's name. The same name with other
            content becomes its next version.
        base: the catalogued base that it belongs to. By default the one whose fingerprint it records, else the one that
            was catalogued from the Hub id that it records.
        alpha: for a bare file that does not say its own.
        tags: words to find it by.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: it cannot be read, does not fit `base`, or the name is taken wrongly.
    """
    from loratool.errors import NotFoundError, quoted
    from loratool.formats.finite import refuse_not_finite
    from loratool.formats.read import read_adapter
    from loratool.library.resolve import exists, open_registry, user_path

    source = user_path(path)
    if not os.fspath(path) or not exists(source):
        raise NotFoundError(f"there is no adapter at {quoted(path)}; give a PEFT folder or a safetensors file")
    adapter = read_adapter(source, alpha)
    refuse_not_finite(adapter)
    chosen = name_from(adapter.name, source) if name is None else name
    with open_registry(registry) as catalogue:
        return enter(adapter, catalogue, name=chosen, base=base, tags=tags)


def enter(adapter: Adapter, catalogue: Registry, *, name: str, base: str | None = None,
          tags: Sequence[str] = ()) -> AddResult:  # fmt: skip
    """Put an adapter that was read, or was just written, into the catalogue and its files into the content store.

    Raises:
        LoratoolError, registry.RegistryError: it does not fit `base`, or the name is taken wrongly.
    """
    with staged_entry(adapter, catalogue, base=base) as entry:
        return entry.add(name, tags)


@contextmanager
def staged_entry(adapter: Adapter, catalogue: Registry, *, base: str | None = None) -> Iterator[StagedEntry]:
    """Copy the files of an adapter to where one step more takes them into the store; gone if that is not made.

    Raises:
        LoratoolError, registry.RegistryError: it does not fit `base`, or the store cannot be written.
    """
    owner, notes = _owner(adapter, base, catalogue)
    files: dict[str, Path | bytes] = {
        "adapter_model.safetensors": adapter.file,
        "adapter_config.json": _json_bytes(adapter.config),
    }
    if adapter.facts:
        files["loratool.json"] = _json_bytes(adapter.facts)
    facts = _facts(adapter, owner)
    with catalogue.store.stage(files, {"adapter_model.safetensors": adapter.sha256}) as staged:
        yield StagedEntry(catalogue, facts, owner, staged, adapter.notes, tuple(notes))


@dataclass(frozen=True, slots=True)
class StagedEntry:
    """An adapter whose files are in the store's staging: all that takes time is done, and `add` is a matter of rows."""

    catalogue: Registry
    facts: AdapterFacts
    owner: BaseRecord | None
    staged: Staged
    notes: tuple[str, ...]
    base_notes: tuple[str, ...]

    def add(self, name: str, tags: Sequence[str] = ()) -> AddResult:
        """Enter it under `name`.

        Raises:
            registry.RegistryError: the name is taken wrongly, or the catalogue cannot be written.
        """
        owner = self.owner.name if self.owner else None
        record, new = self.catalogue.adapters.add(name, self.facts, base=owner, tags=tags, staged=self.staged)
        # One that was tied before stays so, whatever this file and this call say.
        tied_before = self.owner is None and record.base is not None
        return AddResult(record, new, self.notes if tied_before else (*self.notes, *self.base_notes))


def list_adapters(*, base: str | None = None, kind: str | None = None, tag: str | None = None, sort: SortKey = "name",
                  registry: str | None = None) -> tuple[AdapterSummary, ...]:  # fmt: skip
    """The catalogued adapters that pass every filter.

    Args:
        base: only those of this catalogued base and of its variants.
        kind: only those of this kind: ``lora``, ``dylora`` or ``adalora``.
        tag: only those with this tag.
        sort: by ``name`` (then version), ``kind`` or ``base``; by ``rank``, ``alpha`` or ``size_bytes``, largest first;
            or by ``created_at``, newest first.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: the catalogue cannot be read, or `base` is not in it.
    """
    return list_catalogued(home(), registry or registry_url(), base=base, kind=kind, tag=tag, sort=sort)


def show(adapter: str | os.PathLike[str], *, registry: str | None = None) -> ShowResult:
    """Everything the catalogue knows of one adapter.

    Args:
        adapter: ``name``, ``name@version``, or the path of a file or folder whose content is catalogued.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such adapter; the nearest names are listed.
    """
    from loratool.library.resolve import open_registry

    with open_registry(registry, read_only=True) as catalogue:
        record = _entry(os.fspath(adapter), catalogue)
        return ShowResult(
            record=record,
            base=catalogue.bases.get(record.base) if record.base else None,
            versions=catalogue.adapters.versions(record.name),
            ancestors=catalogue.lineage.ancestors(record),
            descendants=catalogue.lineage.descendants(record),
            merges=catalogue.merges.of_adapter(record.sha256),
        )


def tag(adapter: str, tags: Sequence[str], *, remove: bool = False, registry: str | None = None) -> AdapterRecord:
    """Put tags on an adapter, or take them off; its entry afterwards.

    Args:
        adapter: ``name`` (its newest version) or ``name@version``.
        tags: names; those that it has already stay.
        remove: take them off instead.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: there is no such adapter, a tag is not a name, or it has no such tag to take off.
    """
    from loratool.library.resolve import open_registry

    with open_registry(registry) as catalogue:
        change = catalogue.adapters.untag if remove else catalogue.adapters.tag
        return change(adapter, *tags)


def remove(adapter: str, *, all_versions: bool = False, registry: str | None = None) -> tuple[AdapterRecord, ...]:
    """Forget an adapter and free its files in the content store; files elsewhere stay. Returns what was removed.

    Args:
        adapter: ``name@version``, or ``name`` where it has one version only.
        all_versions: remove every version of ``name``.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: there is no such adapter, or it has several versions and none was chosen.
    """
    from loratool.library.resolve import open_registry

    with open_registry(registry) as catalogue:
        return catalogue.adapters.remove(adapter, all_versions=all_versions)


def export(adapter: str | os.PathLike[str], out: str | os.PathLike[str], *, alpha: float | None = None,
           force: bool = False, registry: str | None = None) -> Path:  # fmt: skip
    """Write an adapter as a PEFT directory or as a single file; the path of what was written.

    Args:
        adapter: a catalogued name or a path.
        out: a folder, or a file where it ends in ``.safetensors`` or ``.st``.
        alpha: for a bare adapter file that does not say its own.
        force: replace an output that loratool wrote before.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such adapter, or `out` exists.
    """
    from dataclasses import replace

    from loratool.errors import OutputError
    from loratool.formats.read import SINGLE_FILE_SUFFIXES
    from loratool.formats.write import write_peft, write_single_file
    from loratool.library.resolve import open_registry, resolve_adapter, user_path

    if not os.fspath(out):
        raise OutputError("the output's path is empty; give --out a folder or file")
    target = user_path(out)
    with open_registry(registry, read_only=True) as catalogue:
        found = resolve_adapter(adapter, catalogue, alpha)
        facts = dict(found.adapter.facts) | {"schema": 1, "kind": found.adapter.kind}
        if found.base_fingerprint:
            facts["base_fingerprint"] = found.base_fingerprint
        write = write_single_file if target.suffix in SINGLE_FILE_SUFFIXES else write_peft
        write(replace(found.adapter, facts=facts), target, force=force)
    return target


def adapter_json(record: AdapterSummary) -> dict[str, Any]:
    """An adapter's entry in the words of ``--json``: the catalogue's columns."""
    value = {key: item for key, item in asdict(record).items() if key not in {"id", "locations"}}
    value["created_at"] = record.created_at.isoformat()
    value["tags"] = list(record.tags)
    return value


def _entry(adapter: str, catalogue: Registry) -> AdapterRecord:
    """The entry that a name or a path means; a path by the sha256 of its weights."""
    from loratool.checkpoint.model import has_file
    from loratool.errors import NotFoundError, quoted
    from loratool.formats.adapter import sha256_of
    from loratool.formats.read import WEIGHTS_NAME
    from loratool.library.resolve import exists, user_path

    path = user_path(adapter)
    file = path / WEIGHTS_NAME if exists(path) and path.is_dir() else path
    if not adapter or not has_file(file) or (is_reference(adapter) and catalogue.adapters.versions(adapter)):
        return catalogue.adapters.find(adapter)
    for record in catalogue.adapters.find_by_sha256(sha256_of(file)):
        return record
    raise NotFoundError(f"{quoted(path)} is not in the catalogue; put it there with 'loratool add'")


def _edge_json(edge: LineageRecord) -> dict[str, Any]:
    return {"child": edge.child, "parent": edge.parent, "operation": edge.operation, "details": edge.details}


def _facts(adapter: Adapter, owner: BaseRecord | None) -> AdapterFacts:
    scalings = {module: update.scaling for module, update in sorted(adapter.updates.items())}
    same = len(set(scalings.values())) == 1
    return AdapterFacts(
        kind=adapter.kind,
        sha256=adapter.sha256,
        size_bytes=adapter.file.stat().st_size,
        rank=adapter.rank,
        ranks=adapter.ranks,
        alpha=adapter.alpha,
        scaling=next(iter(scalings.values())) if same else scalings,
        target_modules=list(adapter.target_modules),
        dtype=DTYPE_NAMES.get(adapter.dtype, adapter.dtype),
        parameter_count=adapter.parameter_count,
        base_fingerprint=owner.fingerprint if owner else adapter.base_fingerprint,
        base_model=adapter.base_model,
        recipe=adapter.facts.get("recipe"),
        metrics=adapter.facts.get("metrics"),
        config=dict(adapter.config),
    )


def _owner(adapter: Adapter, base: str | None, catalogue: Registry) -> tuple[BaseRecord | None, list[str]]:
    """The catalogued base that the adapter belongs to, checked by names and shapes, and notes on how it was found."""
    from loratool.errors import LoratoolError, WrongBaseError, quoted

    recorded = adapter.base_fingerprint
    if base is not None:
        record = catalogue.bases.find(check_name(base, "base"))
        if recorded and record.fingerprint and not catalogue.bases.same_family(recorded, record.fingerprint):
            raise WrongBaseError(
                f"{quoted(adapter.name)} records another base ({recorded[:12]}…) than {quoted(base)}; leave --base out"
            )
        _refuse_unfit(adapter, record)
        return record, []
    if recorded:
        known = catalogue.bases.find_by_fingerprint(recorded)
        return (known[0], []) if known else (None, ["its base is not catalogued yet; add it with 'loratool base add'"])
    named = [record for record in catalogue.bases.list() if adapter.base_model and adapter.base_model == record.source]
    for record in named[:1]:
        try:
            _refuse_unfit(adapter, record)
        except LoratoolError:
            break
        return record, [f"it names {quoted(record.source)} as its base, which is catalogued as {quoted(record.name)}"]
    hint = f" (its configuration names {quoted(adapter.base_model)})" if adapter.base_model else ""
    return None, [f"it is tied to no base yet{hint}; add it again with --base NAME to tie it to one"]


def _refuse_unfit(adapter: Adapter, record: BaseRecord) -> None:
    """Raise LoratoolError if the adapter does not land on the base; one whose files are away is taken at its word."""
    from loratool.checkpoint.model import Checkpoint
    from loratool.library.resolve import exists
    from loratool.merging.plan import WeightedAdapter, plan_merge

    if record.path is not None and exists(record.path):
        plan_merge([WeightedAdapter(adapter)], Checkpoint.open(record.path))


def name_from(stem: str, source: Path) -> str:
    """A name for the catalogue made from a file's or folder's name."""
    from loratool.errors import AdapterError, quoted

    if stem == "adapter_model":
        stem = source.resolve().parent.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:96]
    if not is_name(name):
        raise AdapterError(f"no name can be made from {quoted(stem)}; give one with --name")
    return name


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()
