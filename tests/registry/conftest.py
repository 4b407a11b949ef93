"""Fixtures of the registry's tests: a home and an open catalogue."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import MetaData, create_engine

from registry import Registry

# What the tests share is imported by its plain name, by the processes that they start too.
sys.path.append(str(Path(__file__).parent))

from catalogued import SERVER


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a database server only those tests say something new that use the catalogue there."""
    if not SERVER:
        return
    here = Path(__file__).parent
    idle = {
        item
        for item in items
        if item.path.is_relative_to(here) and "catalogue" not in getattr(item, "fixturenames", ())
    }
    config.hook.pytest_deselected(items=list(idle))
    items[:] = [item for item in items if item not in idle]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder that does not exist yet."""
    return tmp_path / "home"


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty catalogue. Copy it."""
    folder = tmp_path_factory.mktemp("registry") / "home"
    Registry.open(folder).close()
    return folder


@pytest.fixture
def catalogue(home: Path, empty_home: Path) -> Iterator[Registry]:
    """An empty catalogue, open for writing; its store is in `home`."""
    shutil.copytree(empty_home, home)
    with Registry.open(home, SERVER) as registry:
        yield registry
    if SERVER:
        _drop_tables(SERVER)


def _drop_tables(url: str) -> None:
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    tables.drop_all(engine)
    engine.dispose()


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A home folder that an unprivileged user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder / "home"
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)
