"""Adapters in the catalogue: names and versions, tags, and where their files lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Executable, Row, Select, delete, func, insert, select, text, update

from registry import trash_rows
from registry.bases import find_base_id
from registry.database import Database, inserted_id
from registry.entering import relink
from registry.errors import (
    AlreadyExistsError,
    DamagedValueError,
    InUseError,
    NotFoundError,
    RegistryDamagedError,
    RegistryError,
)
from registry.labels import Labels, named_keys
from registry.listing import STATEMENTS, Rows, SortKey, decoded, select_adapters
from registry.names import Reference, check_name, nearest_names, not_found_message, parse_reference, printable
from registry.records import AdapterFacts, AdapterRecord, AdapterSummary, Location
from registry.store import Staged, Store
from registry.tables import adapters, bases, lineage, locations, path_text, tags

_columns = (
    *(column for column in adapters.c if column is not adapters.c.base_id),
    bases.c.name.label("base"),
)
_adapters = select(*_columns).select_from(adapters.outerjoin(bases, adapters.c.base_id == bases.c.id))
_listing: tuple[Executable, ...] = (
    text(STATEMENTS[0]).columns(target_modules=adapters.c.target_modules.type, created_at=adapters.c.created_at.type),
    *map(text, STATEMENTS[1:]),
)
_NUMBERS = ("sha256", "kind", "rank", "ranks", "alpha", "scaling", "target_modules")


class Adapters:
    """The adapters of one catalogue, and their files in its store."""

    def __init__(self, database: Database, store: Store, labels: Labels | None = None) -> None:
        self._database = database
        self._store = store
        self._labels = labels or Labels(database, store)

    def add(
        self,
        name: str,
        facts: AdapterFacts,
        *,
        base: str | None = None,
        tags: Iterable[str] = (),
        locations: Iterable[Location] = (),
        staged: Staged | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Catalogue an adapter; return its record, and whether it is new.

        A version with the same weights and the same numbers (kind, rank, alpha, scaling, targets) is not catalogued again. It
        is returned, with the tags and locations added. Any other adapter becomes the next version of `name`, from 1.

        `base` names a catalogued base; by default it is one with `facts.base_fingerprint`, if there is one. `staged` files
        (`store.stage`) are published in the same transaction, so that they and the row appear together.

        Raises:
            InvalidNameError: `name` or a tag is not a valid name.
            NotFoundError: there is no base `base`.
            RegistryError: `base` is another model than the one with `facts.base_fingerprint`.
        """
        check_name(name)
        wanted_tags = _checked_tags(tags)
        values = _values(facts)
        with self._database.writing() as connection:
            base_id, values["base_fingerprint"] = find_base_id(connection, base, facts.base_fingerprint)
            known = _same_version(connection, name, values)
            if known is None:
                adapter_id = _insert(connection, name, base_id, values)
            else:
                adapter_id = known
                if base_id is not None:
                    link = {"base_id": base_id, "base_fingerprint": values["base_fingerprint"]}
                    connection.execute(update(adapters).where(adapters.c.id == adapter_id).values(link))
            _add_tags(connection, adapter_id, wanted_tags)
            for location in locations:
                _add_location(connection, adapter_id, location)
            if staged is not None:
                self._keep_files(connection, adapter_id, staged)
            files = {} if staged is None else {staged.key: staged.sha256}
            self._labels.touch(connection, [adapter_id], files)
            return _by_id(connection, adapter_id), known is None

    def find(self, reference: str) -> AdapterRecord:
        """Return the adapter `name@version`, or the newest version of `name`.

        Raises:
            InvalidNameError: `reference` is not a valid name.
            NotFoundError: there is none; the message has the nearest names or the existing versions.
        """
        wanted = parse_reference(reference)
        with self._database.reading() as connection:
            query = _adapters.where(adapters.c.name == wanted.name).order_by(adapters.c.version.desc()).limit(1)
            if wanted.version is not None:
                query = query.where(adapters.c.version == wanted.version)
            found = _records(connection, query)
            if not found:
                raise _not_found(connection, wanted)
            return found[0]

    def get(self, adapter_id: int) -> AdapterRecord | None:
        """Return the adapter with this row id, or None."""
        with self._database.reading() as connection:
            return next(iter(_records(connection, _adapters.where(adapters.c.id == adapter_id))), None)

    def find_by_sha256(self, sha256: str) -> tuple[AdapterRecord, ...]:
        """Return all versions under any name with these weights, newest first."""
        with self._database.reading() as connection:
            query = _adapters.where(adapters.c.sha256 == sha256).order_by(adapters.c.id.desc())
            return _records(connection, query)

    def find_by_repo(self, repo: str, path_in_repo: str | None = None) -> tuple[AdapterRecord, ...]:
        """Return all versions under any name that are at this path of the Hub repository `repo`, newest first.

        The case of letters in `repo` is ignored.
        """
        place = locations.c.path_in_repo.is_(None) if path_in_repo is None else locations.c.path_in_repo == path_in_repo
        there = select(locations.c.adapter_id).where(
            locations.c.kind == "hub", func.lower(locations.c.repo) == repo.lower(), place
        )
        with self._database.reading() as connection:
            query = _adapters.where(adapters.c.id.in_(there)).order_by(adapters.c.id.desc())
            return _records(connection, query)

    def versions(self, name: str) -> tuple[AdapterRecord, ...]:
        """Return all versions of one name, oldest first; none if the name is unknown."""
        with self._database.reading() as connection:
            query = _adapters.where(adapters.c.name == name).order_by(adapters.c.version)
            return _records(connection, query)

    def list(
        self,
        *,
        base: str | None = None,
        kind: str | None = None,
        tag: str | None = None,
        sort: SortKey = "name",
    ) -> tuple[AdapterSummary, ...]:
        """Return the adapters that pass every given filter; `registry.list_adapters` does the same without SQLAlchemy.

        `base` selects the adapters of that base and of its variants. They are sorted by name (then version), or with the
        largest rank, alpha or size, or the newest, first. Unknown values come last.

        Raises:
            NotFoundError: there is no base `base`.
            RegistryError: `sort` is unknown.
        """
        with self._database.reading() as connection:
            return select_adapters(_tables(connection), base=base, kind=kind, tag=tag, sort=sort)

    def tag(self, reference: str, *names: str) -> AdapterRecord:
        """Add tags to one version; tags that it has already stay. Raises InvalidNameError, NotFoundError."""
        wanted = _checked_tags(names)
        with self._database.writing() as connection:
            record = self.find(reference)
            _add_tags(connection, record.id, wanted)
            self._labels.touch(connection, [record.id])
            return _by_id(connection, record.id)

    def untag(self, reference: str, *names: str) -> AdapterRecord:
        """Remove tags from one version. Raises NotFoundError, also for a tag that it does not have."""
        with self._database.writing() as connection:
            record = self.find(reference)
            for name in names:
                if name not in record.tags:
                    has = "its tags are " + ", ".join(record.tags) if record.tags else "it has no tags"
                    raise NotFoundError(f"{record.reference} has no tag '{printable(name)}'; {has}")
            connection.execute(delete(tags).where(tags.c.adapter_id == record.id, tags.c.tag.in_(names)))
            self._labels.touch(connection, [record.id])
            return _by_id(connection, record.id)

    def add_location(self, reference: str, location: Location) -> AdapterRecord:
        """Record another place of one version's files. Raises NotFoundError."""
        with self._database.writing() as connection:
            record = self.find(reference)
            _add_location(connection, record.id, location)
            self._labels.touch(connection, [record.id])
            return _by_id(connection, record.id)

    def update(
        self,
        reference: str,
        *,
        recipe: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        base: str | None = None,
    ) -> AdapterRecord:
        """Replace the recipe, the metrics or the base of one version, if given.

        Raises:
            NotFoundError: there is no such version or base.
            RegistryError: `base` is another model than the one whose fingerprint the version records.
        """
        changes: dict[str, Any] = {"recipe": _plain(recipe), "metrics": _plain(metrics)}
        changes = {key: value for key, value in changes.items() if value is not None}
        with self._database.writing() as connection:
            record = self.find(reference)
            if base is not None:
                changes["base_id"], changes["base_fingerprint"] = find_base_id(
                    connection, base, record.base_fingerprint
                )
            if changes:
                connection.execute(update(adapters).where(adapters.c.id == record.id).values(changes))
                self._labels.touch(connection, [record.id])
            return _by_id(connection, record.id)

    def rename(self, name: str, new_name: str) -> tuple[AdapterRecord, ...]:
        """Rename all versions of `name`. Raises InvalidNameError, NotFoundError, AlreadyExistsError."""
        check_name(new_name)
        with self._database.writing() as connection:
            record = self.find(name)
            if self.versions(new_name):
                raise AlreadyExistsError(f"an adapter '{new_name}' is already in the catalogue; choose another name")
            connection.execute(update(adapters).where(adapters.c.name == record.name).values(name=new_name))
            renamed = self.versions(new_name)
            ids = [each.id for each in renamed]
            children = connection.execute(select(lineage.c.child_id).where(lineage.c.parent_id.in_(ids))).scalars()
            self._labels.touch(connection, {*ids, *children})
            return renamed

    def remove(self, reference: str, *, all_versions: bool = False, now: bool = False) -> tuple[AdapterRecord, ...]:
        """Move one version, or all of them, to the trash; return what was removed.

        With `now`, files in the store that nothing else refers to are freed at once, also those of adapters in the trash.
        Adapters made from it keep its label in their lineage. Files outside the store are never touched.

        Raises:
            NotFoundError: there is no such adapter.
            InUseError: `reference` has no version, there are several, and `all_versions` is off.
        """
        wanted = parse_reference(reference)
        with self._database.writing() as connection:
            query = select(adapters.c.id).where(adapters.c.name == wanted.name)
            if wanted.version is not None:
                query = query.where(adapters.c.version == wanted.version)
            if (
                now
                and connection.execute(query).first() is None
                and trash_rows.kept(connection, wanted.name, wanted.version)
            ):
                return self._remove_from_trash(connection, wanted, all_versions=all_versions)
            newest = self.find(reference)
            doomed = (newest,) if wanted.version is not None else self.versions(newest.name)
            if len(doomed) > 1 and not all_versions:
                raise _several(newest.name, len(doomed), newest.reference)
            ids = [record.id for record in doomed]
            if now:
                self._labels.withdraw(connection, ids)
            else:
                self._labels.touch(connection, ids)
                trash_rows.keep(connection, ids)
            connection.execute(delete(adapters).where(adapters.c.id.in_(ids)))
            keys = {place.store_key for record in doomed for place in record.locations if place.store_key is not None}
            if keys and now:
                self._database.after_commit(lambda: self._free(keys))
            return doomed

    def _remove_from_trash(
        self, connection: Connection, wanted: Reference, *, all_versions: bool
    ) -> tuple[AdapterRecord, ...]:
        doomed = tuple(trash_rows.kept(connection, wanted.name, wanted.version))
        if len(doomed) > 1 and wanted.version is None and not all_versions:
            raise _several(wanted.name, len(doomed), doomed[-1].reference)
        trash_rows.forget(connection, [each.id for each in doomed])
        keys = {each.store_key for each in doomed if each.store_key is not None}
        self._labels.touch_keys(connection, keys)
        self._database.after_commit(lambda: self._free(keys))
        return tuple(each.record() for each in doomed)

    def files(self, record: AdapterRecord) -> Path:
        """Return the folder or file that holds the adapter: its entry in the store, else the path it was added from.

        Raises:
            NotFoundError: the files are not on this disk; the message says where to get them.
        """
        for location in record.locations:
            if location.store_key is not None and (folder := self._store.path(location.store_key)).is_dir():
                return folder
        for location in record.locations:
            if location.path is not None and location.path.exists():
                return location.path
        hub = [_address(location) for location in record.locations if location.repo]
        if hub:
            raise NotFoundError(
                f"the files of {record.reference} are only on the Hub; get them with 'loratool pull {hub[0]}'"
            )
        raise NotFoundError(
            f"the files of {record.reference} are gone from the store and from where they were added; "
            "add them again with 'loratool add', or see 'loratool doctor'"
        )

    def store_keys(self) -> set[str]:
        """Return the keys of all store entries that a row of the catalogue or of its trash refers to."""
        with self._database.reading() as connection:
            return named_keys(connection)

    def _keep_files(self, connection: Connection, adapter_id: int, staged: Staged) -> None:
        """Publish the staged files, unless the store already has the adapter's complete files."""
        at_store = (
            locations.c.adapter_id == adapter_id,
            locations.c.kind == "store",
            locations.c.store_key != staged.key,
        )
        others = connection.execute(select(locations.c.store_key).where(*at_store)).scalars()
        if any(key is not None and self._store.path(key).is_dir() for key in others):
            return
        self._store.publish(staged)
        connection.execute(delete(locations).where(*at_store))
        _add_location(connection, adapter_id, Location(kind="store", store_key=staged.key))

    def _free(self, keys: set[str]) -> None:
        with self._database.writing() as connection:
            self._store.collect(named_keys(connection), among=keys)


def _tables(connection: Connection) -> Sequence[Rows]:
    """Return the rows of each of the listing's statements."""
    try:
        return [connection.execute(statement).all() for statement in _listing]
    except DamagedValueError:
        if connection.dialect.name != "sqlite":
            raise
        found = [connection.execute(text(statement)).all() for statement in STATEMENTS]
        return [decoded(found[0]), *found[1:]]


def _several(name: str, versions: int, reference: str) -> InUseError:
    return InUseError(
        f"'{name}' has {versions} versions; name one of them, as in '{reference}', or remove them all with --all"
    )


def _address(location: Location) -> str:
    """Return a place on the Hub as an argument of ``loratool pull``, at its commit, since a branch may have moved."""
    inside = f"/{location.path_in_repo}" if location.path_in_repo else ""
    return f"{location.repo}{inside}" + (f"@{location.revision}" if location.revision else "")


def _values(facts: AdapterFacts) -> dict[str, Any]:
    if facts.alpha is not None and not math.isfinite(facts.alpha):
        raise RegistryError(f"the adapter's alpha is {facts.alpha}; give a finite one with --alpha")
    try:
        return {name: _plain(getattr(facts, name)) for name in AdapterFacts.__dataclass_fields__}
    except RecursionError:
        raise RegistryError(
            "the adapter's configuration or recipe is nested too deep to be catalogued; make it smaller, or leave it out"
        ) from None


def _plain(value: Any) -> Any:
    """Return `value` in a form that every database's JSON can hold: NaN and infinity become their names."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case str() | bytes():
            return value
        case set() | frozenset():
            return sorted(_plain(item) for item in value)
        case Sequence():
            return [_plain(item) for item in value]
        case _:
            return value


def _insert(connection: Connection, name: str, base_id: int | None, values: Mapping[str, Any]) -> int:
    """Insert the next version of `name`, and return its id. A version with the same numbers returns from the trash."""
    taken = set(connection.execute(select(adapters.c.version).where(adapters.c.name == name)).scalars())
    kept = [each for each in trash_rows.kept(connection, name) if each.version not in taken]
    removed = next((each for each in kept if _is_same(each.entry, values)), None)
    if removed is not None:
        trash_rows.forget(connection, [removed.id])
        version = removed.version
    else:
        version = max(*taken, 0, trash_rows.newest_version(connection, name)) + 1
    row = insert(adapters).values(name=name, version=version, base_id=base_id, created_at=datetime.now(UTC), **values)
    adapter_id = inserted_id(connection.execute(row))
    if removed is not None:
        relink(connection, adapter_id, removed.reference, removed.sha256)
    return adapter_id


def _is_same(facts: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether an adapter in the trash has these weights and numbers."""
    return all(facts.get(column) == values[column] for column in _NUMBERS)


def _same_version(connection: Connection, name: str, values: Mapping[str, Any]) -> int | None:
    """Return the id of the newest version of `name` with these weights and numbers, or None."""
    rows = connection.execute(
        select(adapters.c.id, *(adapters.c[column] for column in _NUMBERS))
        .where(adapters.c.name == name, adapters.c.sha256 == values["sha256"])
        .order_by(adapters.c.version.desc())
    )
    for row in rows:
        if all(row._mapping[column] == values[column] for column in _NUMBERS):
            return int(row.id)
    return None


def _checked_tags(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(check_name(name, "tag") for name in names))


def _add_tags(connection: Connection, adapter_id: int, names: Iterable[str]) -> None:
    present = set(connection.execute(select(tags.c.tag).where(tags.c.adapter_id == adapter_id)).scalars())
    missing = [{"adapter_id": adapter_id, "tag": name} for name in names if name not in present]
    if missing:
        connection.execute(insert(tags), missing)


def _add_location(connection: Connection, adapter_id: int, location: Location) -> None:
    if location.path is not None:
        location = Location(kind="path", path=Path(path_text(location.path)))
    if location in _locations(connection, adapter_id):
        return
    connection.execute(
        insert(locations).values(
            adapter_id=adapter_id,
            kind=location.kind,
            store_key=location.store_key,
            path=location.path,
            repo=location.repo,
            revision=location.revision,
            path_in_repo=location.path_in_repo,
            created_at=datetime.now(UTC),
        )
    )


def _locations(connection: Connection, adapter_id: int) -> tuple[Location, ...]:
    columns = [locations.c[name] for name in Location.__dataclass_fields__]
    rows = connection.execute(select(*columns).where(locations.c.adapter_id == adapter_id).order_by(locations.c.id))
    return tuple(Location(**row._mapping) for row in rows)


def _by_id(connection: Connection, adapter_id: int) -> AdapterRecord:
    (record,) = _records(connection, _adapters.where(adapters.c.id == adapter_id))
    return record


def _records(connection: Connection, query: Select[Any]) -> tuple[AdapterRecord, ...]:
    """Return the records of a query's rows.

    Raises RegistryError, which names them, if one of the rows is damaged.
    """
    try:
        return tuple(_record(connection, row) for row in connection.execute(query).all())
    except (DamagedValueError, OverflowError) as error:
        found = connection.execute(
            query.with_only_columns(adapters.c.name, adapters.c.version, maintain_column_froms=True)
        )
        names = " or ".join(f"{row.name}@{row.version}" for row in found)
        reason = error.reason if isinstance(error, DamagedValueError) else "it holds a number without bound"
        raise RegistryDamagedError(
            f"the registry is damaged: the row of {names} cannot be read ({reason}); 'loratool doctor' says what to do"
        ) from None


def _record(connection: Connection, row: Row[Any]) -> AdapterRecord:
    names = connection.execute(select(tags.c.tag).where(tags.c.adapter_id == row.id).order_by(tags.c.tag)).scalars()
    facts = dict(row._mapping)
    if isinstance(facts["scaling"], int):  # SQLite's JSON columns drop the fraction of 2.0
        facts["scaling"] = float(facts["scaling"])
    return AdapterRecord(**facts, tags=tuple(names), locations=_locations(connection, row.id))


def _not_found(connection: Connection, wanted: Reference) -> NotFoundError:
    of_name = select(adapters.c.version).where(adapters.c.name == wanted.name).order_by(adapters.c.version)
    present = connection.execute(of_name).scalars().all()
    if present:
        nearest = tuple(f"{wanted.name}@{version}" for version in reversed(present[-3:]))
        return NotFoundError(not_found_message("adapter", str(wanted), nearest, "loratool list"), nearest)
    if removed := trash_rows.kept(connection, wanted.name, wanted.version):
        return NotFoundError(
            f"no adapter '{printable(str(wanted))}' is in the catalogue: it is in the trash; 'loratool restore "
            f"{removed[-1].reference}' puts it back"
        )
    nearest = nearest_names(wanted.name, connection.execute(select(adapters.c.name).distinct()).scalars())
    return NotFoundError(not_found_message("adapter", str(wanted), nearest, "loratool list"), nearest)
