"""The catalogue's tables, and column types that give the same values from every database.

They are SQLAlchemy Core tables instead of mapped classes, since importing `sqlalchemy.orm` would take a quarter of a reading
command's time. Change a table only together with a new revision in `registry/migrations`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from registry.errors import DamagedValueError, RegistryError
from registry.names import LONGEST_NAME, printable


def path_text(path: Path) -> str:
    """Return the path as the database stores it: absolute, with links not followed.

    Raises RegistryError if it has bytes that are not UTF-8, which not every database can store.
    """
    text = os.path.abspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RegistryError(
            f"the path '{printable(text)}' holds bytes that are not UTF-8; rename that file or folder"
        ) from None
    return text


class UTCDateTime(TypeDecorator[datetime]):
    """A time: with a zone in Python, stored as UTC without a zone, which every database supports."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _checked(super().result_processor(dialect, coltype), "a time")


class JSONValue(TypeDecorator[Any]):
    """Any JSON value."""

    impl = JSON
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _checked(super().result_processor(dialect, coltype), "JSON")


class FilePath(TypeDecorator[Path]):
    """A path of the file system, stored as text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Path | None, dialect: Dialect) -> str | None:
        return None if value is None else path_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Path | None:
        return None if value is None else Path(value)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _checked(super().result_processor(dialect, coltype), "a path")


def _checked(read: Callable[[Any], Any] | None, what: str) -> Callable[[Any], Any] | None:
    """Wrap a column's reader so that a damaged value raises a DamagedValueError."""
    if read is None:
        return None

    def checked(value: Any) -> Any:
        try:
            return read(value)
        except (ValueError, TypeError, AttributeError):
            raise DamagedValueError(f"it holds '{printable(str(value), 40)}' where {what} belongs") from None

    return checked


_JSON = JSONValue(none_as_null=True)
_NAME = String(LONGEST_NAME)
_DIGEST = String(64)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

bases = Table(
    "bases",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", _NAME, nullable=False, unique=True),
    Column("source", Text, nullable=False),
    Column("revision", String(255)),
    Column("path", FilePath),
    Column("fingerprint", _DIGEST, index=True),
    Column("variant_of", Integer, ForeignKey("bases.id", ondelete="SET NULL"), index=True),
    Column("architecture", String(255)),
    Column("model_type", String(255)),
    Column("parameter_count", BigInteger),
    Column("size_bytes", BigInteger),
    Column("dtype", String(32)),
    Column("created_at", UTCDateTime, nullable=False),
    Column("files", _JSON),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", _NAME, nullable=False),
    Column("version", Integer, nullable=False),
    Column("kind", String(32), nullable=False, index=True),
    Column("sha256", _DIGEST, nullable=False, index=True),
    Column("rank", Integer),
    Column("ranks", _JSON),
    Column("alpha", Double),
    Column("scaling", _JSON),
    Column("target_modules", _JSON),
    Column("dtype", String(32)),
    Column("size_bytes", BigInteger, nullable=False),
    Column("parameter_count", BigInteger),
    Column("base_id", Integer, ForeignKey("bases.id", ondelete="SET NULL"), index=True),
    Column("base_fingerprint", _DIGEST, index=True),
    Column("base_model", Text),
    Column("recipe", _JSON),
    Column("metrics", _JSON),
    Column("config", _JSON),
    Column("created_at", UTCDateTime, nullable=False, index=True),
    Column("format", String(32)),
    Column("tensor_count", Integer),
    Column("family", String(255)),
    UniqueConstraint("name", "version"),
)

tags = Table(
    "tags",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True),
    Column("tag", _NAME, primary_key=True, index=True),
)

locations = Table(
    "locations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("store_key", _DIGEST, index=True),
    Column("path", FilePath),
    Column("repo", String(255)),
    Column("revision", String(255)),
    Column("created_at", UTCDateTime, nullable=False),
    Column("path_in_repo", Text),
)

removed_adapters = Table(
    "removed_adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", _NAME, nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("sha256", _DIGEST, nullable=False, index=True),
    Column("store_key", _DIGEST, index=True),
    Column("entry", _JSON, nullable=False),
    Column("removed_at", UTCDateTime, nullable=False),
)

lineage = Table(
    "lineage",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("child_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("parent_id", Integer, ForeignKey("adapters.id", ondelete="SET NULL"), index=True),
    Column("parent", Text, nullable=False),
    Column("parent_sha256", _DIGEST),
    Column("operation", String(32), nullable=False),
    Column("details", _JSON),
    Column("created_at", UTCDateTime, nullable=False),
)

merges = Table(
    "merges",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("base_id", Integer, ForeignKey("bases.id", ondelete="SET NULL"), index=True),
    Column("base_fingerprint", _DIGEST, nullable=False, index=True),
    Column("output", FilePath, nullable=False),
    Column("output_fingerprint", _DIGEST, index=True),
    Column("undo_file", FilePath),
    Column("in_place", Boolean, nullable=False),
    Column("options", _JSON),
    Column("state", String(16), nullable=False),
    Column("created_at", UTCDateTime, nullable=False),
)

merged_adapters = Table(
    "merged_adapters",
    metadata,
    Column("merge_id", Integer, ForeignKey("merges.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="SET NULL"), index=True),
    Column("adapter", Text, nullable=False),
    Column("sha256", _DIGEST, nullable=False, index=True),
    Column("weight", Double, nullable=False),
)
