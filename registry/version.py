"""The schema that this code reads and writes."""

HEAD = "0003"
"""The newest revision in `registry/migrations/versions`, which is what the tables in `registry.tables` need."""

VERSION_TABLE = "registry_version"
"""Alembic's version table, under a name that no other program sharing the database uses."""
