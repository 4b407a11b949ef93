"""The schema's version. Opening an up-to-date catalogue takes one query; Alembic is imported only for an upgrade."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select

from registry.errors import RegistryError, SchemaTooNewError
from registry.tables import metadata
from registry.version import HEAD, VERSION_TABLE

MIGRATIONS = Path(__file__).parent / "migrations"

version_table = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))


def recorded_version(connection: Connection) -> str | None:
    """Return the database's revision; None if it holds no catalogue, or no table of versions at all."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(select(version_table.c.version_num)).scalar()


def upgrade(connection: Connection, where: str, migrations: Path = MIGRATIONS, head: str = HEAD) -> None:
    """Upgrade the database of `connection` to `head`, within its open transaction. An up-to-date database is not changed.

    Raises SchemaTooNewError if `migrations` does not have the database's revision, and RegistryError if the database
    belongs to another program.
    """
    version = recorded_version(connection)
    if version == head:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if version is None:
        _refuse_foreign(connection, where)
    elif version not in known:
        raise SchemaTooNewError(
            f"the registry {where} was written by a newer loratool (its schema is {version}, this one knows {head}); "
            "upgrade loratool, or name another registry"
        )
    command.upgrade(config, head)


def _refuse_foreign(connection: Connection, where: str) -> None:
    present = set(inspect(connection).get_table_names())
    in_the_way = present if connection.dialect.name == "sqlite" else present & set(metadata.tables)
    if in_the_way:
        raise RegistryError(
            f"the database {where} belongs to another program (it has the table '{min(in_the_way)}'); "
            "name another file or database for the registry"
        )
