"""Base models in the catalogue: names, fingerprints, and which of them are the same model stored otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, or_, select, update

from registry.database import Database
from registry.errors import AlreadyExistsError, InUseError, NotFoundError, RegistryError
from registry.families import relatives
from registry.labels import Labels
from registry.names import check_name, nearest_names, not_found_message, printable
from registry.records import BaseRecord
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
        architecture: str | None = None,
        model_type: str | None = None,
        parameter_count: int | None = None,
        size_bytes: int | None = None,
        dtype: str | None = None,
        files: Mapping[str, Any] | None = None,
    ) -> BaseRecord:
        """Catalogues a base. The same name with the same content again only updates where it lies.

        `source` is the folder or Hub id as it was given, `path` the folder where its files are, `fingerprint` BLAKE3 in
        hex, `files` what the Hub says of its weight files. `variant_of` names a catalogued base that is the same model
        stored otherwise. Adapters that recorded this fingerprint before are linked to the base.

        Raises InvalidNameError, NotFoundError (`variant_of`), AlreadyExistsError.
        """
        check_name(name, "base")
        values: dict[str, Any] = {
            "source": source,
            "path": path,
            "revision": revision,
            "fingerprint": fingerprint,
            "architecture": architecture,
            "model_type": model_type,
            "parameter_count": parameter_count,
            "size_bytes": size_bytes,
            "dtype": dtype,
            "files": files,
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
        """Raises NotFoundError, with the nearest names."""
        with self._database.reading() as connection:
            record = _find(connection, name)
            if record is None:
                raise _not_found(connection, name)
            return record

    def get(self, name: str) -> BaseRecord | None:
        """The base of that name, or None."""
        with self._database.reading() as connection:
            return _find(connection, name)

    def find_by_fingerprint(self, fingerprint: str) -> tuple[BaseRecord, ...]:
        """All bases with this content (a model may lie at two places), those whose folder exists first."""
        with self._database.reading() as connection:
            found = _records(connection, _bases.where(bases.c.fingerprint == fingerprint).order_by(bases.c.id))
        return tuple(sorted(found, key=lambda base: not (base.path is not None and base.path.exists())))

    def list(self) -> tuple[BaseRecord, ...]:
        """All bases, by name."""
        with self._database.reading() as connection:
            found = _records(connection, _bases)
        return tuple(sorted(found, key=lambda base: (base.name.casefold(), base.name)))

    def family(self, fingerprint: str) -> frozenset[str]:
        """The fingerprints of this model and of its variants, as far as the catalogue knows them; itself always."""
        with self._database.reading() as connection:
            return _family(connection, fingerprint)

    def same_family(self, one: str, other: str) -> bool:
        """Whether two fingerprints are of one model: equal, or declared variants of each other."""
        return other in self.family(one)

    def set_variant(self, name: str, variant_of: str) -> BaseRecord:
        """Declares a catalogued base to be the same model as another, stored otherwise. Joins their families.

        Raises NotFoundError, RegistryError (of itself).
        """
        with self._database.writing() as connection:
            _join_family(connection, self.find(name), self.find(variant_of))
            self._labels.touch_bases(connection)
            return self.find(name)

    def update(self, name: str, **changes: Any) -> BaseRecord:
        """Changes columns of a base (`path`, `fingerprint`, ...): what a Hub base learns when it is downloaded.

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
        """Forgets a base; its files stay. Its variants stay variants of each other.

        Its adapters go to another base with the same content, if there is one. Raises NotFoundError, and where there is
        none InUseError while adapters belong to it, unless `force`: they then keep only its fingerprint.
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
    """The id and fingerprint of the base that an adapter names, or whose fingerprint it records.

    Raises NotFoundError, and RegistryError where the base of that name is another model than the fingerprint's.
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
    """Makes `record`, and all that were its variants, variants of the root of `other`."""
    if record.id == other.id:
        raise RegistryError(f"the base '{record.name}' cannot be a variant of itself; name another base")
    old, new = _root_id(connection, record.id), _root_id(connection, other.id)
    if old == new:
        return
    connection.execute(update(bases).where(or_(bases.c.id == old, bases.c.variant_of == old)).values(variant_of=new))


def _leave_family(connection: Connection, record: BaseRecord) -> None:
    """Before a root goes, its first variant takes its place."""
    variants = select(bases.c.id).where(bases.c.variant_of == record.id).order_by(bases.c.id)
    heir = connection.execute(variants.limit(1)).scalar()
    if heir is not None:
        connection.execute(update(bases).where(bases.c.variant_of == record.id).values(variant_of=heir))
        connection.execute(update(bases).where(bases.c.id == heir).values(variant_of=None))


def _link_adapters(connection: Connection, record: BaseRecord) -> None:
    """Adapters that recorded this base's fingerprint before it had a name now belong to it, and the other way round."""
    if record.fingerprint is None:
        return
    orphans = (adapters.c.base_id.is_(None), adapters.c.base_fingerprint == record.fingerprint)
    connection.execute(update(adapters).where(*orphans).values(base_id=record.id))
    unknown = (adapters.c.base_id == record.id, adapters.c.base_fingerprint.is_(None))
    connection.execute(update(adapters).where(*unknown).values(base_fingerprint=record.fingerprint))
