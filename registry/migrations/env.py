"""Alembic's entry point: migrates the given connection, or the database at LORATOOL_REGISTRY or `sqlalchemy.url`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, create_engine

from registry.places import registry_url
from registry.tables import metadata
from registry.version import VERSION_TABLE


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        render_as_batch=True,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def print_sql(url: str) -> None:
    context.configure(
        url=url,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        literal_binds=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        migrate(given)
        return
    url = registry_url() or context.config.get_main_option("sqlalchemy.url")
    if url is None:
        raise SystemExit("name the database in LORATOOL_REGISTRY")
    if context.is_offline_mode():
        print_sql(url)
        return
    with create_engine(url).begin() as connection:
        migrate(connection)


main()
