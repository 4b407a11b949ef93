"""Base models in the catalogue: their names, their fingerprints, and which are one model in different storages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, or_, select, update

from registry import notices
from registry.damaged_rows import sound_parts
from registry.database import Database
from registry.errors import AlreadyExistsError, DamagedValueError, InUseError, NotFoundError, RegistryError
from registry.families import relatives
from registry.labels import Labels
from registry.names import check_name, nearest_names, not_found_message, printable
from registry.records import BaseRecord, ModelFacts
from registry.tables import adapters, bases

_root = bases.alias("root")
_columns = (
    *(column for column in bases.c if column is not bases.c.variant_of),
    _root.c.name.label("variant_of"),
)
_bases = select(*_columns).select_from(bases.outerjoin(_root, bases.c.variant_of == _root.c.id))


class Bases:
    """The bases of one catalogue."""

    def __init__(self, database: Database, labels: Labels) -> None:
        self._database = database
        self._labels = labels

    def add(
        self,
        name: str,
        source: str,
        *,
        path: Path | None = None,
        revision: str | None = None,
        fingerprint: str | None = None,
        variant_of: str | None = None,
        facts: ModelFacts | None = None,
        files: Mapping[str, Any] | None = None,
    ) -> BaseRecord:
        """Catalogue a base. If the name exists with the same content, only its facts are updated.

        `source` is the folder or Hub id as given, `path` the folder of its files, `fingerprint` BLAKE3 in hex, `files` the
        Hub's list of its weight files. `variant_of` names a catalogued base that is the same model in a different storage.
        Adapters that already record this fingerprint are linked to the base.

        Raises InvalidNameError, NotFoundError (`variant_of`), AlreadyExistsError.
        """
        check_name(name, "base")
        values: dict[str, Any] = {
            "source": source,
            "path": path,
            "revision": revision,
            "fingerprint": fingerprint,
            "files": files,
            **asdict(facts or ModelFacts()),
        }
        with self._database.writing() as connection:
            existing = _find(connection, name)
            if existing is not None:
                _check_same_content(existing, source, revision, fingerprint)
                known = {key: value for key, value in values.items() if value is not None}
                connection.execute(update(bases).where(bases.c.id == existing.id).values(known))
            else:
                connection.execute(insert(bases).values(name=name, created_at=datetime.now(UTC), **values))
            record = self.find(name)
            if variant_of is not None:
                _join_family(connection, record, self.find(variant_of))
            _link_adapters(connection, record)
            self._labels.touch_bases(connection)
            return self.find(name)

    def find(self, name: str) -> BaseRecord:
        """Return the base of that name.

        Raises NotFoundError, with the nearest names.
        """
        with self._database.reading() as connection:
            record = _find(connection, name)
            if record is None:
                raise _not_found(connection, name)
            return record

    def get(self, name: str) -> BaseRecord | None:
        """Return the base of that name, or None."""
        with self._database.reading() as connection:
            return _find(connection, name)

    def find_by_fingerprint(self, fingerprint: str) -> tuple[BaseRecord, ...]:
        """Return all bases with this content, those whose folder exists first. Copies of a model may be in several places."""
        with self._database.reading() as connection:
            found = _records(connection, _bases.where(bases.c.fingerprint == fingerprint).order_by(bases.c.id))
        return tuple(sorted(found, key=lambda base: not (base.path is not None and base.path.exists())))

    def list(self) -> tuple[BaseRecord, ...]:
        """Return all bases, sorted by name. Those with a damaged row are left out, with a note that names them."""
        with self._database.reading() as connection:
            try:
                found = _records(connection, _bases)
            except DamagedValueError:
                found = _sound_records(connection)
        return tuple(sorted(found, key=lambda base: (base.name.casefold(), base.name)))

    def family(self, fingerprint: str) -> frozenset[str]:
        """Return this fingerprint and those of the model's variants in the catalogue."""
        with self._database.reading() as connection:
            return _family(connection, fingerprint)

    def same_family(self, one: str, other: str) -> bool:
        """Whether two fingerprints belong to one model: they are equal, or declared variants of each other."""
        return other in self.family(one)

    def set_variant(self, name: str, variant_of: str) -> BaseRecord:
        """Declare a base to be the same model as another in a different storage. Their families are joined.

        Raises NotFoundError, and RegistryError if both are the same base.
        """
        with self._database.writing() as connection:
            _join_family(connection, self.find(name), self.find(variant_of))
            self._labels.touch_bases(connection)
            return self.find(name)

    def update(self, name: str, **changes: Any) -> BaseRecord:
        """Change columns of a base (`path`, `fingerprint`, ...), for example after a download from the Hub.

        Raises NotFoundError.
        """
        unknown = changes.keys() - (set(bases.c.keys()) - {"id", "name", "variant_of", "created_at"})
        if unknown:
            raise TypeError(f"a base has no such fact to change: {min(unknown)}")
        with self._database.writing() as connection:
            record = self.find(name)
            if changes:
                connection.execute(update(bases).where(bases.c.id == record.id).values(changes))
            record = self.find(name)
            _link_adapters(connection, record)
            self._labels.touch_bases(connection)
            return record

    def remove(self, name: str, *, force: bool = False) -> BaseRecord:
        """Remove a base from the catalogue. Its files stay, and its variants stay variants of each other.

        Its adapters move to another base with the same content, if there is one. Otherwise they keep only its fingerprint.

        Raises NotFoundError, and InUseError if adapters would keep only the fingerprint, unless `force`.
        """
        with self._database.writing() as connection:
            record = self.find(name)
            users = connection.execute(
                select(adapters.c.name).where(adapters.c.base_id == record.id).distinct().order_by(adapters.c.name)
            ).scalars()
            names = list(users)
            heir = self.find(record.same_as[0]) if record.same_as else None
            if names and heir is None and not force:
                shown = ", ".join(f"'{user}'" for user in names[:3]) + (" and others" if len(names) > 3 else "")
                raise InUseError(
                    f"the base '{name}' is the base of {shown}; remove those adapters first, or use --force to let "
                    "them keep only its fingerprint"
                )
            heir_id = None if heir is None else heir.id
            connection.execute(update(adapters).where(adapters.c.base_id == record.id).values(base_id=heir_id))
            _leave_family(connection, record)
            connection.execute(delete(bases).where(bases.c.id == record.id))
            self._labels.touch_bases(connection)
            return record


def find_base_id(connection: Connection, name: str | None, fingerprint: str | None) -> tuple[int | None, str | None]:
    """Return the id and fingerprint of the base with this name, or without a name, of one with this fingerprint.

    Raises NotFoundError, and RegistryError if the named base is a different model than the fingerprint's.
    """
    if name is None:
        if fingerprint is None:
            return None, None
        by_content = select(bases.c.id).where(bases.c.fingerprint == fingerprint).order_by(bases.c.id).limit(1)
        return connection.execute(by_content).scalar(), fingerprint
    record = _find(connection, name)
    if record is None:
        raise _not_found(connection, name)
    if fingerprint is None or record.fingerprint is None:
        return record.id, fingerprint or record.fingerprint
    if fingerprint not in _family(connection, record.fingerprint):
        raise RegistryError(
            f"the adapter records the base fingerprint {printable(fingerprint, 13)} but the base '{name}' has "
            f"{printable(record.fingerprint, 13)}; leave --base away, or declare the other base "
            f"with --variant-of {name}"
        )
    return record.id, fingerprint


def _family(connection: Connection, fingerprint: str) -> frozenset[str]:
    rows = connection.execute(select(bases.c.id, bases.c.variant_of, bases.c.fingerprint))
    return relatives([(row.id, row.variant_of, row.fingerprint) for row in rows], fingerprint=fingerprint).fingerprints


def _find(connection: Connection, name: str) -> BaseRecord | None:
    found = _records(connection, _bases.where(bases.c.name == name))
    return found[0] if found else None


def _sound_records(connection: Connection) -> list[BaseRecord]:
    """Return the bases whose rows can be read, with a note that names the others."""
    names = {row.id: row.name for row in connection.execute(select(bases.c.id, bases.c.name))}
    parts, damaged = sound_parts(sorted(names), lambda some: _records(connection, _bases.where(bases.c.id.in_(some))))
    left = printable(", ".join(sorted(names[key] for key in damaged)), 400)
    notices.say(f"left out base {left}, whose row in the registry is damaged; 'loratool doctor' says what to do")
    return [base for part in parts for base in part]


def _records(connection: Connection, query: Select[Any]) -> list[BaseRecord]:
    rows = connection.execute(query).all()
    wanted = {row.fingerprint for row in rows if row.fingerprint is not None}
    named = select(bases.c.fingerprint, bases.c.name).where(bases.c.fingerprint.is_not(None)).order_by(bases.c.id)
    called: dict[str, list[str]] = {}
    for fingerprint, name in connection.execute(named):
        if fingerprint in wanted:
            called.setdefault(fingerprint, []).append(name)
    return [
        BaseRecord(**row._mapping, same_as=tuple(name for name in called.get(row.fingerprint, ()) if name != row.name))
        for row in rows
    ]


def _not_found(connection: Connection, name: str) -> NotFoundError:
    nearest = nearest_names(name, connection.execute(select(bases.c.name)).scalars())
    return NotFoundError(not_found_message("base", name, nearest, "loratool base list"), nearest)


def _check_same_content(existing: BaseRecord, source: str, revision: str | None, fingerprint: str | None) -> None:
    if existing.fingerprint is not None and fingerprint is not None:
        same = existing.fingerprint == fingerprint
    else:
        same = existing.source == source and (revision is None or existing.revision in (None, revision))
    if not same:
        raise AlreadyExistsError(
            f"the base '{existing.name}' is already in the catalogue with other content "
            f"(from '{printable(existing.source)}'); choose another name, or remove it first with "
            f"'loratool base remove {existing.name}'"
        )


def _root_id(connection: Connection, base_id: int) -> int:
    root = select(func.coalesce(bases.c.variant_of, bases.c.id)).where(bases.c.id == base_id)
    return int(connection.execute(root).scalar_one())


def _join_family(connection: Connection, record: BaseRecord, other: BaseRecord) -> None:
    """Make `record` and its variants variants of the root of `other`."""
    if record.id == other.id:
        raise RegistryError(f"the base '{record.name}' cannot be a variant of itself; name another base")
    old, new = _root_id(connection, record.id), _root_id(connection, other.id)
    if old == new:
        return
    connection.execute(update(bases).where(or_(bases.c.id == old, bases.c.variant_of == old)).values(variant_of=new))


def _leave_family(connection: Connection, record: BaseRecord) -> None:
    """Let the first variant of `record` replace it as the root of their family."""
    variants = select(bases.c.id).where(bases.c.variant_of == record.id).order_by(bases.c.id)
    heir = connection.execute(variants.limit(1)).scalar()
    if heir is not None:
        connection.execute(update(bases).where(bases.c.variant_of == record.id).values(variant_of=heir))
        connection.execute(update(bases).where(bases.c.id == heir).values(variant_of=None))


def _link_adapters(connection: Connection, record: BaseRecord) -> None:
    """Link adapters that record this base's fingerprint to it, and record the fingerprint in its adapters that lack it."""
    if record.fingerprint is None:
        return
    orphans = (adapters.c.base_id.is_(None), adapters.c.base_fingerprint == record.fingerprint)
    connection.execute(update(adapters).where(*orphans).values(base_id=record.id))
    unknown = (adapters.c.base_id == record.id, adapters.c.base_fingerprint.is_(None))
    connection.execute(update(adapters).where(*unknown).values(base_fingerprint=record.fingerprint))
