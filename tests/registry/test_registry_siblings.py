"""Catalogues that share a store: one keeps the files of another, and an empty one keeps nobody's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from catalogued import facts

from registry import Registry, RegistryError
from registry.places import DATABASE_NAME
from registry.siblings import names_nothing

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Another catalogue than the one in the home."""
    return f"sqlite:///{tmp_path / 'elsewhere.db'}"


def add(home: Path, name: str, url: str | None = None) -> None:
    with Registry.open(home, url) as registry, registry.store.stage({**FILES, "name": name.encode()}) as staged:
        registry.adapters.add(name, facts(name), staged=staged)


def entries(home: Path) -> int:
    with Registry.open(home) as registry:
        return len(list(registry.store.entries()))


def leftover(home: Path, url: str) -> None:
    """What a process that was killed between files and row leaves."""
    with Registry.open(home, url) as registry:
        registry.store.put({"left": b"over"})


def test_an_empty_catalogue_in_the_home_keeps_no_files_of_another_one(home: Path, url: str) -> None:
    Registry.open(home).close()
    add(home, "pirate", url)
    leftover(home, url)
    with Registry.open(home, url) as registry:
        assert registry.store.other_catalogues() == []
        assert [finding.kind for finding in registry.doctor.examine()] == ["store-orphan"]
        assert registry.doctor.collect().entries == 1
        assert len(list(registry.store.entries())) == 1


def test_a_catalogue_with_adapters_in_the_home_keeps_its_files_from_another_one(home: Path, url: str) -> None:
    add(home, "parrot")
    add(home, "pirate", url)
    with Registry.open(home, url) as registry:
        assert registry.store.other_catalogues() == [str(home / DATABASE_NAME)]
        registry.doctor.collect()
    assert entries(home) == 2


def test_continuous_integration_says_where_it_has_no_database_server() -> None:
    repository = Path(__file__).parents[2]
    assert ".ci/postgresql" in (repository / ".ci" / "run").read_text()
    done = subprocess.run(
        [repository / ".ci" / "postgresql"], env=os.environ | {"PYTHON": "false"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "NOT run on PostgreSQL: its driver" in done.stdout


def test_what_cannot_be_read_may_name_anything(tmp_path: Path) -> None:
    assert names_nothing(tmp_path / "gone.db")
    (tmp_path / "new.db").touch()
    assert names_nothing(tmp_path / "new.db")
    (tmp_path / "text.db").write_bytes(b"no database at all\n" * 100)
    assert not names_nothing(tmp_path / "text.db")
    (tmp_path / "folder.db").mkdir()
    assert not names_nothing(tmp_path / "folder.db")


@pytest.mark.parametrize("what", ["pipe", "link", "folder", "endless", "binary"])
def test_a_list_of_catalogues_that_is_none_is_an_error_and_nothing_waits_for_it(
    home: Path, tmp_path: Path, what: str
) -> None:
    add(home, "pirate")
    place = home / "store" / "catalogues"
    match what:
        case "pipe":
            os.mkfifo(place)
        case "link":
            (tmp_path / "other").write_text("/elsewhere/registry.db\n")
            place.symlink_to(tmp_path / "other")
        case "folder":
            place.mkdir()
        case "endless":
            place.write_bytes(b"a\n" * (1 << 20))
        case "binary":
            place.write_bytes(b"\xff\n")
    with (
        Registry.open(home) as registry,
        pytest.raises(RegistryError, match="store/catalogues' is not the list") as raised,
    ):
        registry.doctor.examine()
    assert "delete it" in str(raised.value)


def test_a_pipe_in_the_place_of_another_catalogue_may_name_anything_and_nothing_waits_for_it(
    home: Path, tmp_path: Path
) -> None:
    add(home, "pirate")
    os.mkfifo(tmp_path / "other.db")
    (home / "store" / "catalogues").write_text(f"{tmp_path / 'other.db'}\n")
    with Registry.open(home) as registry:
        assert registry.store.other_catalogues() == [str(tmp_path / "other.db")]
