"""Where the catalogue lives: the home folder and the database's URL."""

from __future__ import annotations

import os
from pathlib import Path

from registry.errors import RegistryError
from registry.names import printable

DATABASE_NAME = "registry.db"
STORE_NAME = "store"


def is_gone(path: Path) -> bool:
    """Whether nothing is at `path`. Where that cannot be told, on a disk that fails or in a folder that is closed, it is not."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def home() -> Path:
    """The home folder: `LORATOOL_HOME`, else the platform's user data folder. Absolute; it may not exist yet.

    Raises RegistryError where it cannot be known: no such user's home, no HOME, no working folder.
    """
    named = os.environ.get("LORATOOL_HOME")
    if named:
        return _absolute(named)
    import platformdirs

    try:
        found = platformdirs.user_data_path("loratool", appauthor=False)
    except RuntimeError:
        found = Path("~")
    if not found.is_absolute():
        raise RegistryError(
            "there is no home folder to keep the catalogue in: HOME is not set, and this user has none; "
            "set LORATOOL_HOME to a folder"
        )
    return found


def _absolute(named: str) -> Path:
    """The folder that LORATOOL_HOME names."""
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        raise RegistryError(
            f"LORATOOL_HOME is '{printable(named)}', and there is no such home folder; set it to another folder"
        ) from None
    except FileNotFoundError:
        raise RegistryError(
            f"LORATOOL_HOME is '{printable(named)}', seen from a working folder that was deleted; "
            "change to another folder, or set it to a path that begins with '/'"
        ) from None


def registry_url() -> str | None:
    """The SQLAlchemy URL in `LORATOOL_REGISTRY`, or None: then it is the file `registry.db` in the home folder."""
    return os.environ.get("LORATOOL_REGISTRY") or None
