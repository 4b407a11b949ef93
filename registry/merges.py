"""The history of merges: the adapters, their weights, the base, and the output of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import Connection, Select, insert, or_, select, update

from registry.bases import find_base_id
from registry.damaged_rows import rows_less
from registry.database import Database, inserted_id
from registry.errors import NotFoundError, RegistryError
from registry.names import is_reference, parse_reference, printable
from registry.places import is_gone
from registry.records import AdapterRecord, MergedAdapter, MergeRecord, MergeState
from registry.tables import adapters, bases, merged_adapters, merges

_columns = (*(column for column in merges.c if column is not merges.c.base_id), bases.c.name.label("base"))
_merges = select(*_columns).select_from(merges.outerjoin(bases, merges.c.base_id == bases.c.id))


class Merges:
    """The merges of one catalogue."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        output: Path,
        *,
        base_fingerprint: str,
        merged: Sequence[MergedAdapter],
        output_fingerprint: str | None = None,
        undo_file: Path | None = None,
        in_place: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> MergeRecord:
        """Record a merge. Unless it was in place, earlier merges with the same output become `replaced`.

        Its base is the catalogued one with `base_fingerprint`, if there is one.
        """
        with self._database.writing() as connection:
            base_id, _ = find_base_id(connection, None, base_fingerprint)
            if not in_place:
                earlier = (merges.c.output.in_([output]), merges.c.state.in_(["merged", "gone"]))
                connection.execute(update(merges).where(*earlier).values(state="replaced"))
            row = insert(merges).values(
                base_id=base_id,
                base_fingerprint=base_fingerprint,
                output=output,
                output_fingerprint=output_fingerprint,
                undo_file=undo_file,
                in_place=in_place,
                options=None if options is None else dict(options),
                state="merged",
                created_at=datetime.now(UTC),
            )
            merge_id = inserted_id(connection.execute(row))
            for position, adapter in enumerate(merged):
                _add_adapter(connection, merge_id, position, adapter)
            return _all(connection, _merges.where(merges.c.id == merge_id))[0]

    def list(self, *, state: MergeState | None = None) -> tuple[MergeRecord, ...]:
        """Return all merges, or those in one state, newest first."""
        with self._database.reading() as connection:
            return _all(connection, _merges if state is None else _merges.where(merges.c.state == state))

    def of_output(self, output: Path) -> tuple[MergeRecord, ...]:
        """Return the merges that wrote to this folder, newest first. There are several if they were in place."""
        with self._database.reading() as connection:
            return _all(connection, _merges.where(merges.c.output.in_([output])))

    def of_adapter(self, adapter: AdapterRecord) -> tuple[MergeRecord, ...]:
        """Return the merges of this adapter, newest first.

        Merges of uncatalogued adapters with equal weights are left out, since their configuration may have differed.
        """
        ids = select(merged_adapters.c.merge_id).where(merged_adapters.c.adapter_id == adapter.id)
        with self._database.reading() as connection:
            return _all(connection, _merges.where(merges.c.id.in_(ids)))

    def of_base(self, fingerprint: str) -> tuple[MergeRecord, ...]:
        """Return the merges whose base or output has this fingerprint, newest first."""
        with self._database.reading() as connection:
            either = or_(merges.c.base_fingerprint == fingerprint, merges.c.output_fingerprint == fingerprint)
            return _all(connection, _merges.where(either))

    def note_gone(self) -> int:
        """Set the state of merges whose output is gone to `gone`, and forget undo files that are gone.

        If an output is back, its merge becomes `merged` again. Return the number of merges changed.
        """
        with self._database.writing() as connection:
            noted = 0
            for merge in self.list():
                changed: dict[str, Any] = {}
                if merge.state == "gone" and merge.output.is_dir():
                    changed = {"state": "merged"}
                elif merge.state == "merged" and is_gone(merge.output):
                    changed = {"state": "gone"}
                elif merge.state == "merged" and merge.undo_file is not None and is_gone(merge.undo_file):
                    changed = {"undo_file": None}
                if changed:
                    connection.execute(update(merges).where(merges.c.id == merge.id).values(changed))
                    noted += 1
            return noted

    def set_state(self, merge_id: int, state: MergeState) -> MergeRecord:
        """Set the state of a merge: its adapters were taken out again (`unmerged`), or its output is `replaced` or `gone`.

        Raises NotFoundError for an unknown merge, RegistryError for an unknown state.
        """
        if state not in get_args(MergeState):
            raise RegistryError(f"a merge is not '{printable(state)}'; it is one of {', '.join(get_args(MergeState))}")
        with self._database.writing() as connection:
            connection.execute(update(merges).where(merges.c.id == merge_id).values(state=state))
            found = _all(connection, _merges.where(merges.c.id == merge_id))
            if not found:
                raise NotFoundError(
                    f"the catalogue has no merge {merge_id}; see 'loratool show' of its adapter for those there are"
                )
            return found[0]


def _add_adapter(connection: Connection, merge_id: int, position: int, adapter: MergedAdapter) -> None:
    adapter_id = None
    if is_reference(adapter.adapter):
        wanted = parse_reference(adapter.adapter)
        named = (adapters.c.name == wanted.name, adapters.c.version == wanted.version)
        adapter_id = connection.execute(select(adapters.c.id).where(*named)).scalar()
    connection.execute(
        insert(merged_adapters).values(
            merge_id=merge_id,
            position=position,
            adapter_id=adapter_id,
            adapter=adapter.adapter,
            sha256=adapter.sha256,
            weight=adapter.weight,
        )
    )


def _all(connection: Connection, query: Select[Any]) -> tuple[MergeRecord, ...]:
    rows = rows_less(connection, query.order_by(merges.c.id.desc()), merges.c.options, _called)
    members: dict[int, list[MergedAdapter]] = {row["id"]: [] for row in rows}
    found = connection.execute(
        select(merged_adapters, adapters.c.name, adapters.c.version)
        .select_from(merged_adapters.outerjoin(adapters, merged_adapters.c.adapter_id == adapters.c.id))
        .where(merged_adapters.c.merge_id.in_(query.with_only_columns(merges.c.id)))
        .order_by(merged_adapters.c.position)
    )
    for row in found:
        label = row.adapter if row.name is None else f"{row.name}@{row.version}"
        members[row.merge_id].append(MergedAdapter(adapter=label, sha256=row.sha256, weight=row.weight))
    return tuple(MergeRecord(**row, adapters=tuple(members[row["id"]])) for row in rows)


def _called(row: Mapping[str, Any]) -> str:
    return f"the merge into '{row['output']}'"
