"""Reading of rows of which some hold values that no column type accepts, so that one bad row stops nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Column, ColumnElement, Connection, Select, Table, select, true

from registry import notices
from registry.errors import DamagedValueError, RegistryDamagedError
from registry.names import printable

T = TypeVar("T")


def sound_parts(ids: Sequence[int], read: Callable[[Sequence[int]], T]) -> tuple[list[T], list[int]]:
    """Read rows by their ids, all at once if that works, else in halves. Return what was read, and the ids that cannot be."""
    try:
        return [read(ids)], []
    except DamagedValueError:
        if len(ids) == 1:
            return [], list(ids)
    middle = len(ids) // 2
    first, bad = sound_parts(ids[:middle], read)
    second, also_bad = sound_parts(ids[middle:], read)
    return first + second, bad + also_bad


def rows_less(
    connection: Connection, query: Select[Any], optional: Column[Any], called: Callable[[Mapping[str, Any]], str]
) -> list[Mapping[str, Any]]:
    """Return the rows of a query on the table of `optional`. Where that column cannot be read it is None, and a note says so.

    `called` names a row in the note. Raises RegistryDamagedError, with the row's number, if another of its values is damaged.
    """
    try:
        return [dict(row) for row in connection.execute(query).mappings()]
    except DamagedValueError:
        key = optional.table.c.id
        ids = list(connection.execute(query.with_only_columns(key, maintain_column_froms=True)).scalars())
    others = [column for column in query.selected_columns if column is not optional]
    found: list[Mapping[str, Any]] = []
    for each in ids:
        one = query.where(key == each)
        try:
            found.append(dict(connection.execute(one).mappings().one()))
        except DamagedValueError as error:
            reason = error.reason
            try:
                rest = dict(
                    connection.execute(one.with_only_columns(*others, maintain_column_froms=True)).mappings().one()
                )
            except DamagedValueError as worse:
                raise RegistryDamagedError(
                    f"the registry is damaged: row {each} of {key.table.name} cannot be read ({worse.reason}); 'loratool doctor' "
                    "says what to do"
                ) from None
            found.append({**rest, optional.name: None})
            notices.say(
                f"left out the {optional.name} of {printable(called(rest), 400)}, whose row is damaged ({reason}); "
                "'loratool doctor' says what to do"
            )
    return found


def read_rows(
    connection: Connection,
    table: Table,
    condition: ColumnElement[bool] | None = None,
    *,
    columns: Collection[str] = (),
    order: Sequence[Any] = (),
) -> list[Mapping[str, Any]]:
    """Return the rows that a condition is true of, by default with all columns, by id.

    In the place of a value that cannot be read is the `DamagedValueError` that says so.
    """
    wanted = [table.c[name] for name in {"id": None, **dict.fromkeys(columns or table.c.keys())}]
    query = select(*wanted).where(true() if condition is None else condition).order_by(*order, table.c.id)
    try:
        return [dict(row) for row in connection.execute(query).mappings()]
    except DamagedValueError:
        ids = list(connection.execute(query.with_only_columns(table.c.id)).scalars())

    def read(some: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        found = connection.execute(select(*wanted).where(table.c.id.in_(some))).mappings()
        return {row["id"]: dict(row) for row in found}

    parts, bad = sound_parts(ids, read)
    known = {key: row for part in parts for key, row in part.items()}
    known |= {key: _value_by_value(connection, wanted, table.c.id == key) for key in bad}
    return [known[key] for key in ids]


def _value_by_value(
    connection: Connection, wanted: Sequence[Column[Any]], condition: ColumnElement[bool]
) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    for column in wanted:
        try:
            values[column.name] = connection.execute(select(column).where(condition)).scalar_one()
        except DamagedValueError as error:
            values[column.name] = error
    return values
