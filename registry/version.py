"""The schema that this code reads and writes."""

HEAD = "0004"
"""The newest revision in `registry/migrations/versions`, which matches the tables in `registry.tables`."""

VERSION_TABLE = "registry_version"
"""The name of Alembic's version table, unlike that of any other program that shares the database."""
