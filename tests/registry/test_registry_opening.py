"""Opening a catalogue: new, old, newer, foreign, damaged, locked, read-only; and what is imported for it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from catalogued import SERVER, facts, without_privileges
from sqlalchemy import create_engine, event, inspect

from registry import (
    Location,
    Registry,
    RegistryBusyError,
    RegistryError,
    RegistryReadOnlyError,
    SchemaTooNewError,
    list_adapters,
)
from registry.database import write_transaction
from registry.places import DATABASE_NAME, home, registry_url
from registry.schema import MIGRATIONS, recorded_version, upgrade
from registry.tables import metadata
from registry.version import HEAD, VERSION_TABLE

REPOSITORY = Path(__file__).parents[2]

NEXT_REVISION = f"""
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{HEAD}"

def upgrade():
    with op.batch_alter_table("adapters") as table:
        table.add_column(sa.Column("licence", sa.String(96)))
"""


def one_sentence(error: RegistryError) -> str:
    """The error's text, checked to be one printable line that says what to do."""
    text = str(error)
    assert text.isprintable()
    assert ";" in text or ":" in text
    return text


def test_the_migrated_schema_is_the_one_of_the_tables(home: Path) -> None:
    Registry.open(home).close()
    engine = create_engine(f"sqlite:///{home / DATABASE_NAME}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, metadata) == []
        indexes = {index["name"] for table in metadata.tables for index in inspect(connection).get_indexes(table)}
        assert {index.name for table in metadata.tables.values() for index in table.indexes} <= indexes


def test_the_schema_version_in_the_code_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


@pytest.mark.parametrize("url", ["postgresql://", "mysql://", "mssql://", "oracle://"])
def test_the_migrations_can_be_written_in_other_databases_sql(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from alembic import command

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("sqlalchemy.url", url)
    command.upgrade(config, "head", sql=True)
    assert capsys.readouterr().out.count("CREATE TABLE") == len(metadata.tables) + 1


def test_the_migrations_go_back_to_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import command

    Registry.open(home).close()
    monkeypatch.setenv("LORATOOL_REGISTRY", f"sqlite:///{home / DATABASE_NAME}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    command.downgrade(config, "base")
    with closing(sqlite3.connect(home / DATABASE_NAME)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert tables == [(VERSION_TABLE,)]


def test_an_older_catalogue_is_upgraded_with_its_rows_and_then_too_new_for_the_old_code(
    home: Path, tmp_path: Path
) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add("pirate", facts(), tags=["speech"])
        newer = tmp_path / "migrations"
        shutil.copytree(MIGRATIONS, newer, ignore=shutil.ignore_patterns("__pycache__"))
        (newer / "versions" / "9999_licence.py").write_text(NEXT_REVISION)
        with write_transaction(registry.database.engine) as connection:
            upgrade(connection, "here", migrations=newer, head="9999")
        with registry.database.engine.connect() as connection:
            assert recorded_version(connection) == "9999"
            assert "licence" in {column["name"] for column in inspect(connection).get_columns("adapters")}
        assert registry.adapters.find("pirate").tags == ("speech",)
    for read_only in (True, False):
        with pytest.raises(SchemaTooNewError) as raised:
            Registry.open(home, read_only=read_only)
        assert "9999" in one_sentence(raised.value)
    with pytest.raises(SchemaTooNewError):
        list_adapters(home)


def test_a_catalogue_of_the_first_schema_keeps_its_rows_and_learns_of_files_on_the_hub(home: Path) -> None:
    from alembic import command

    database = home / DATABASE_NAME
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{database}")
    home.mkdir(exist_ok=True)
    command.upgrade(config, "0001")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "INSERT INTO bases (name, source, created_at) VALUES ('llama', 'org/llama', '2026-01-01 00:00:00')"
        )
        connection.execute(
            "INSERT INTO adapters (name, version, kind, sha256, size_bytes, base_id, created_at) "
            "VALUES ('pirate', 1, 'lora', 'ab', 1, 1, '2026-01-01 00:00:00')"
        )
        connection.execute(
            "INSERT INTO locations (adapter_id, kind, repo, revision, created_at) "
            "VALUES (1, 'hub', 'me/pirate', 'abc', '2026-01-01 00:00:00')"
        )
    files = {"model.safetensors": {"size": 8, "sha256": "00"}}
    with Registry.open(home) as registry:
        assert registry.bases.find("llama").files is None
        assert registry.bases.update("llama", files=files).files == files
        (pirate,) = registry.adapters.find_by_repo("me/pirate")
        assert (pirate.base, pirate.locations) == ("llama", (Location(kind="hub", repo="me/pirate", revision="abc"),))


def test_an_upgrade_that_fails_leaves_the_catalogue_as_it_was(home: Path, tmp_path: Path) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add("pirate", facts())
        newer = tmp_path / "migrations"
        shutil.copytree(MIGRATIONS, newer, ignore=shutil.ignore_patterns("__pycache__"))
        (newer / "versions" / "9999_licence.py").write_text(NEXT_REVISION + "    raise OSError('power cut')\n")
        with (
            pytest.raises(OSError, match="power cut"),
            write_transaction(registry.database.engine) as connection,
        ):
            upgrade(connection, "here", migrations=newer, head="9999")
    with Registry.open(home) as registry:
        assert registry.adapters.find("pirate").version == 1
        with registry.database.engine.connect() as connection:
            assert "licence" not in {column["name"] for column in inspect(connection).get_columns("adapters")}


def test_reading_where_nothing_was_made_finds_nothing_and_makes_nothing(home: Path) -> None:
    assert list_adapters(home) == ()
    with Registry.open(home, read_only=True) as registry:
        assert registry.adapters.list() == ()
        assert registry.counts().versions == 0
        with pytest.raises(RegistryReadOnlyError):
            registry.adapters.add("pirate", facts())
    assert not home.exists()


def test_a_home_with_strange_characters_works(tmp_path: Path) -> None:
    home = tmp_path / "a b%20c?d#e'ü"
    with Registry.open(home) as registry:
        registry.adapters.add("pirate", facts())
    assert [adapter.name for adapter in list_adapters(home)] == ["pirate"]
    with Registry.open(home, read_only=True) as registry:
        assert registry.counts().adapters == 1


def test_a_file_that_is_no_database_is_refused_and_left_alone(home: Path) -> None:
    home.mkdir()
    file = home / DATABASE_NAME
    file.write_bytes(b"this is a text and nothing else\n" * 100)
    for read_only in (True, False):
        with pytest.raises(RegistryError) as raised:
            Registry.open(home, read_only=read_only)
        assert "not a database" in one_sentence(raised.value)
    with pytest.raises(RegistryError, match="not a database"):
        list_adapters(home)
    assert file.read_bytes() == b"this is a text and nothing else\n" * 100


@pytest.mark.parametrize("read_only", [True, False])
def test_a_folder_in_the_place_of_the_database_is_refused(read_only: bool, home: Path) -> None:
    (home / DATABASE_NAME).mkdir(parents=True)
    with pytest.raises(RegistryError, match="is a folder") as raised:
        Registry.open(home, read_only=read_only)
    assert str(home / DATABASE_NAME) in one_sentence(raised.value)
    with pytest.raises(RegistryError, match="is a folder"):
        list_adapters(home)


@pytest.mark.usefixtures("catalogue")
def test_a_damaged_database_is_an_error_of_one_sentence(home: Path) -> None:
    with Registry.open(home) as registry, registry.writing():
        for number in range(200):
            registry.adapters.add("pirate", facts(str(number)))
    file = home / DATABASE_NAME
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(file.read_bytes())
    content[4096 * 3 :] = os.urandom(len(content) - 4096 * 3)
    file.write_bytes(content)
    with pytest.raises(RegistryError) as raised, Registry.open(home) as registry:
        registry.adapters.list()
    assert "damaged" in one_sentence(raised.value)


@pytest.mark.usefixtures("catalogue")
@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("target_modules", '["q_proj"', "JSON"),
        ("target_modules", b"\xff", "JSON"),
        ("created_at", "last week", "a time"),
        ("created_at", 5, "a time"),
    ],
)
def test_a_damaged_row_is_an_error_of_one_sentence_and_left_out_of_the_list(
    column: str, value: object, what: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add("pirate", facts())
        registry.adapters.add("parrot", facts())
    with closing(sqlite3.connect(home / DATABASE_NAME)) as connection, connection:
        connection.execute(f"UPDATE adapters SET {column} = ? WHERE name = 'pirate'", (value,))
    assert [adapter.name for adapter in list_adapters(home)] == ["parrot"]
    with Registry.open(home, read_only=True) as registry:
        assert [adapter.name for adapter in registry.adapters.list()] == ["parrot"]
    assert all("pirate@1" in note and "loratool doctor" in note for note in caplog.messages)
    assert len(caplog.messages) == 2
    with pytest.raises(RegistryError, match=what) as whole, Registry.open(home, read_only=True) as registry:
        registry.adapters.find("pirate")
    assert "damaged" in one_sentence(whole.value)
    assert "pirate@1" in str(whole.value)


def test_another_programs_database_is_refused_and_left_alone(home: Path) -> None:
    home.mkdir()
    with closing(sqlite3.connect(home / DATABASE_NAME)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(RegistryError) as raised:
        Registry.open(home)
    assert "bookmarks" in one_sentence(raised.value)
    with closing(sqlite3.connect(home / DATABASE_NAME)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]


def test_a_busy_database_is_an_error_after_the_timeout_and_can_still_be_read(home: Path) -> None:
    with Registry.open(home, busy_timeout=0.05) as registry:
        registry.adapters.add("pirate", facts())
        with closing(sqlite3.connect(home / DATABASE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(RegistryBusyError) as raised:
                registry.adapters.add("parrot", facts())
            one_sentence(raised.value)
            assert [adapter.name for adapter in registry.adapters.list()] == ["pirate"]
            assert [adapter.name for adapter in list_adapters(home)] == ["pirate"]
            other.execute("ROLLBACK")
        registry.adapters.add("parrot", facts())


def test_a_new_database_that_another_process_has_locked_is_an_error_after_the_timeout(home: Path) -> None:
    home.mkdir()
    with closing(sqlite3.connect(home / DATABASE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryBusyError):
            Registry.open(home, busy_timeout=0.05)


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_read_only_database_can_be_listed_and_says_so_when_written(open_home: Path, folder_too: bool) -> None:
    with Registry.open(open_home) as registry:
        registry.adapters.add("pirate", facts())
    (open_home / DATABASE_NAME).chmod(0o444)
    if folder_too:
        open_home.chmod(0o555)
    with without_privileges():
        assert [adapter.name for adapter in list_adapters(open_home)] == ["pirate"]
        with Registry.open(open_home, read_only=True) as registry:
            assert registry.adapters.find("pirate").version == 1
            with pytest.raises(RegistryReadOnlyError):
                registry.adapters.tag("pirate", "speech")
        with pytest.raises(RegistryReadOnlyError) as raised, Registry.open(open_home) as registry:
            registry.adapters.tag("pirate", "speech")
        assert "LORATOOL_HOME" in one_sentence(raised.value)


def test_a_database_that_may_not_be_read_is_an_error_of_one_sentence(open_home: Path) -> None:
    Registry.open(open_home).close()
    (open_home / DATABASE_NAME).chmod(0)
    with without_privileges(), pytest.raises(RegistryError) as raised:
        Registry.open(open_home, read_only=True)
    assert "cannot be opened" in one_sentence(raised.value)


def test_a_home_that_cannot_be_made_is_an_error_of_one_sentence(open_home: Path, tmp_path: Path) -> None:
    with without_privileges(), pytest.raises(RegistryReadOnlyError) as raised:
        Registry.open(open_home)
    assert "LORATOOL_HOME" in one_sentence(raised.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError) as raised_for_file:
        Registry.open(tmp_path / "file" / "home")
    assert "LORATOOL_HOME" in one_sentence(raised_for_file.value)


def test_a_full_disk_keeps_what_was_there_and_adds_nothing(home: Path) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add("pirate", facts())

        @event.listens_for(registry.database.engine, "connect")
        def no_more_pages(connection: sqlite3.Connection, record: object) -> None:
            connection.execute("PRAGMA max_page_count = 1")

        with pytest.raises(RegistryError) as raised:
            registry.adapters.add("parrot", facts(config={"text": "x" * 1_000_000}))
        assert "full" in one_sentence(raised.value)
    with Registry.open(home) as registry:
        assert [adapter.name for adapter in registry.adapters.list()] == ["pirate"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("registry.db", "not a database URL"),
        ("", "not a database URL"),
        ("nonsense://host/name", "cannot be used"),
        ("sqlite:////no/such/folder/registry.db", "cannot be opened"),
    ],
)
def test_a_url_that_leads_nowhere_is_an_error_of_one_sentence(home: Path, url: str, says: str) -> None:
    with pytest.raises(RegistryError) as raised:
        Registry.open(home, url)
    assert says in one_sentence(raised.value)


def test_a_missing_driver_is_named_and_the_password_is_not(home: Path) -> None:
    with pytest.raises(RegistryError) as raised:
        Registry.open(home, "mssql+pymssql://me:s3cret@server/name")
    assert "pymssql" in one_sentence(raised.value)
    assert "s3cret" not in str(raised.value)
    with pytest.raises(RegistryError) as raised:
        Registry.open(home, "me:s3cret@server")
    assert "s3cret" not in str(raised.value)


def test_another_url_holds_the_catalogue_and_the_home_still_holds_the_files(home: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with Registry.open(home, url) as registry:
        with registry.store.stage({"adapter_model.safetensors": b"weights"}) as staged:
            record, _ = registry.adapters.add("pirate", facts(), staged=staged)
        assert registry.adapters.files(record).is_relative_to(home)
    assert not (home / DATABASE_NAME).exists()
    assert [adapter.name for adapter in list_adapters(home, url)] == ["pirate"]


def test_a_catalogue_in_memory_works(home: Path) -> None:
    with Registry.open(home, "sqlite://") as registry:
        registry.adapters.add("pirate", facts())
        assert registry.adapters.find("pirate").version == 1
    with Registry.open(home, "sqlite://", read_only=True) as registry:
        assert registry.adapters.list() == ()


def test_the_home_is_the_one_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "one"))
    assert home() == tmp_path / "one"
    monkeypatch.setenv("LORATOOL_HOME", "~/two")
    assert home() == Path.home() / "two"
    monkeypatch.delenv("LORATOOL_HOME")
    assert home().is_absolute()
    assert registry_url() is None
    monkeypatch.setenv("LORATOOL_REGISTRY", "sqlite://")
    assert registry_url() == "sqlite://"


def test_a_home_that_nobody_has_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORATOOL_HOME", "~nosuchuser/loratool")
    with pytest.raises(RegistryError, match="no such home folder") as raised:
        home()
    assert "LORATOOL_HOME" in one_sentence(raised.value)
    monkeypatch.setenv("LORATOOL_HOME", "relative")
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with pytest.raises(RegistryError, match="was deleted") as raised:
        home()
    assert "LORATOOL_HOME" in one_sentence(raised.value)
    monkeypatch.chdir(tmp_path)


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> object:
        raise KeyError(number)

    for name in ("LORATOOL_HOME", "HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(RegistryError, match="HOME is not set") as raised:
        home()
    assert "LORATOOL_HOME" in one_sentence(raised.value)


def imported_by(code: str, home: Path) -> set[str]:
    """The top-level packages, and the modules of SQLAlchemy, that `code` imports in a fresh Python."""
    script = f"import sys\nfrom pathlib import Path\nhome = Path(sys.argv[1])\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(home)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.skipif(SERVER is not None, reason="it is about the SQLite file")
def test_the_list_of_an_up_to_date_catalogue_imports_no_sqlalchemy(catalogue: Registry, home: Path) -> None:
    catalogue.adapters.add("pirate", facts())
    modules = imported_by("import registry; assert len(registry.list_adapters(home)) == 1", home)
    assert not modules & {"sqlalchemy", "alembic", "torch", "loratool", "platformdirs"}


def test_opening_an_up_to_date_catalogue_imports_neither_alembic_nor_the_orm(catalogue: Registry, home: Path) -> None:
    code = "import registry\nwith registry.Registry.open(home) as r: r.counts(), r.adapters.list(), r.doctor.examine()"
    assert not imported_by(code, home) & {"alembic", "sqlalchemy.orm", "torch", "loratool"}


@pytest.mark.parametrize("place", ["", "below", "far/below"])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_in_the_place_of_the_home_is_an_error_also_for_who_only_reads(
    place: str, read_only: bool, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    home = tmp_path / "file" / place
    with pytest.raises(RegistryError, match="LORATOOL_HOME") as raised:
        Registry.open(home, read_only=read_only)
    assert one_sentence(raised.value)
    with pytest.raises(RegistryError, match="LORATOOL_HOME"):
        list_adapters(home)
