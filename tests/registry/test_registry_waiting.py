"""Writers that wait for one another: long enough, and saying for whom."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from catalogue_workers import hold_the_lock
from catalogued import SERVER, facts
from sqlalchemy import create_engine, text

from registry import Registry, RegistryBusyError, database
from registry.places import DATABASE_NAME
from registry.waiting import holder

SPAWN = multiprocessing.get_context("spawn")


def test_a_writer_waits_a_minute_for_another_one_and_says_so_after_some_seconds() -> None:
    assert database.BUSY_SECONDS == 60
    assert 1 <= database.SILENT_SECONDS <= 10


def test_a_writer_that_waits_says_for_which_process_and_goes_on_when_that_is_done(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SILENT_SECONDS", 0.05)
    ready, done = SPAWN.Event(), SPAWN.Event()
    with Registry.open(home) as registry:
        process = SPAWN.Process(target=hold_the_lock, args=(home, ready, done))
        process.start()
        assert ready.wait(60)

        class ReleasesTheLock(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                done.set()

        handler = ReleasesTheLock()
        logging.getLogger("registry").addHandler(handler)
        try:
            registry.adapters.add("pirate", facts())
        finally:
            logging.getLogger("registry").removeHandler(handler)
        process.join(60)
        assert registry.adapters.find("pirate").version == 1
    (said,) = caplog.messages
    assert f"waiting for process {process.pid} (" in said
    assert str(home / DATABASE_NAME) in said


def test_a_writer_that_waits_in_vain_says_which_process_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, done = SPAWN.Event(), SPAWN.Event()
    Registry.open(home).close()
    process = SPAWN.Process(target=hold_the_lock, args=(home, ready, done))
    process.start()
    assert ready.wait(60)
    monkeypatch.setattr(database, "SILENT_SECONDS", 0.05)
    for busy_timeout in (0.01, 0.05, 0.1, 0.2):  # shorter than it is silent, as long, as long again, longer
        with pytest.raises(RegistryBusyError) as raised, Registry.open(home, busy_timeout=busy_timeout) as registry:
            registry.adapters.add("pirate", facts())
        assert f"process {process.pid} (" in str(raised.value)
    done.set()
    process.join(60)


def test_nobody_is_named_where_nobody_writes(home: Path) -> None:
    Registry.open(home).close()
    assert holder(home / DATABASE_NAME) == "another process"
    assert holder(None) == "another process"


def test_who_writes_to_a_file_without_a_log_is_known(tmp_path: Path) -> None:
    file = tmp_path / "plain.db"
    ready, done = SPAWN.Event(), SPAWN.Event()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE numbers (value)")
    process = SPAWN.Process(target=hold_the_lock, args=(file, ready, done))
    process.start()
    assert ready.wait(60)
    found = holder(file)
    done.set()
    process.join(60)
    assert found.startswith(f"process {process.pid} (")


@pytest.mark.skipif(SERVER is None, reason="it is about a database server")
def test_a_writer_waits_for_another_one_on_a_server_too(
    catalogue: Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SERVER is not None
    monkeypatch.setattr(database, "SILENT_SECONDS", 0.05)
    engine = create_engine(SERVER)
    with engine.connect() as other:
        other.execute(text("SELECT * FROM registry_version FOR UPDATE"))
        monkeypatch.setattr(catalogue.database, "_busy_timeout", 0.1)
        with pytest.raises(RegistryBusyError, match="busy"):
            catalogue.adapters.add("pirate", facts())
        monkeypatch.setattr(catalogue.database, "_busy_timeout", 60.0)
        threading.Timer(0.3, other.rollback).start()
        catalogue.adapters.add("pirate", facts())
    engine.dispose()
    assert "waiting for another process" in caplog.messages[-1]


@pytest.mark.skipif(SERVER is None, reason="it is about a database server")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_waits_for_another_writer_to_a_server_ends_at_once(
    catalogue: Registry, home: Path, number: int, status: int
) -> None:
    assert SERVER is not None
    catalogue.bases.add("llama", "meta/llama")
    with catalogue.writing():
        waiting = subprocess.Popen(
            [sys.executable, "-m", "loratool", "--registry", SERVER, "base", "remove", "llama"],
            env={**os.environ, "LORATOOL_HOME": str(home)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        said = waiting.stderr.readline()
        waiting.send_signal(number)
        try:
            _, error = waiting.communicate(timeout=20)  # it would wait a minute
        finally:
            waiting.kill()
    assert "waiting for another process" in said
    assert waiting.returncode == status, error
    assert error.startswith("Interrupted") and len(error.splitlines()) == 1
    assert [base.name for base in catalogue.bases.list()] == ["llama"]
